"""Losses and metrics on tensors, independent of models and training loops."""
