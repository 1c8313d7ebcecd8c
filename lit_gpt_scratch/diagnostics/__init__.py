"""What was measured of a run, and what it means: symptom, likely cause, and the flag to try."""
