"""Import and export Hugging Face models without the ``transformers`` library."""
