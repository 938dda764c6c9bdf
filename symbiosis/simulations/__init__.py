"""Many tenants on one machine: corpora, the built-in base, local bases and the Flower simulation."""
