"""Strings to token ids and back; imports no torch."""
