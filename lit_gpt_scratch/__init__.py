"""A PyTorch Lightning template for building a large language model from scratch."""

__version__ = "0.2.0"
