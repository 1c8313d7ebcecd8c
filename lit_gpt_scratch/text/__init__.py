"""Document reading, cleaning, tokenization and chat templates; these modules do not import PyTorch."""
