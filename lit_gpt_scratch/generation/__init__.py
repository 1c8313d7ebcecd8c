"""Logits to the next token, and the loop that writes text."""
