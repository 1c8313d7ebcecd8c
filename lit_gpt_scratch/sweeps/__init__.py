"""Hyperparameter sweeps: trials, storage, statistics and report of many runs of ``fit``."""
