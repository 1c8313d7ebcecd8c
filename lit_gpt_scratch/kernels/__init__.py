"""Operators that are faster than plain PyTorch on some hardware, each tested against the PyTorch version."""
