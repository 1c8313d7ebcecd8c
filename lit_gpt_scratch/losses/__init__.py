"""Tensors to losses and metrics; knows nothing of models or training loops."""
