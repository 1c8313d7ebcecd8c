"""Hyperparameter sweeps: run ``fit`` many times, and compare and report the results."""
