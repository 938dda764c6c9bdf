"""The tenant: remote weights in Hugging Face models, session, egress gate and the Flower ClientApp."""
