"""Acceptance of a machine: measurements and checks that run in separate processes within a time budget."""
