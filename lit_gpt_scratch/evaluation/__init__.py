"""Scoring a text with a model, and without one."""
