"""Rules that diagnose a run from its metrics: symptom, likely cause, and the flag to try."""
