"""Import and export of Hugging Face models, without the ``transformers`` library."""
