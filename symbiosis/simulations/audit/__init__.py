"""`symbiosis audit matrix`: every attack against every mode, on work that is made and recorded here."""
