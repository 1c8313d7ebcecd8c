"""Hyperparameter sweeps: run ``fit`` many times, then compare and report the results."""
