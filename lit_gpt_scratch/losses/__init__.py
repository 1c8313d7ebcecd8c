"""Losses and metrics of tensors; independent of models and training loops."""
