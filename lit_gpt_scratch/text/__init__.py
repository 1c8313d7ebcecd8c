"""Documents, cleaning, tokenizers and the chat template; imports no torch."""
