"""Split execution for private fine-tuning and generation of language models."""

__version__ = "0.1.0"
