"""Rules that diagnose problems in a run from its metrics, and suggest the likely cause and a flag to try."""
