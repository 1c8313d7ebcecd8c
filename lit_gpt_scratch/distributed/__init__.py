"""What a Trainer flag needs behind it: what this machine can do, and what suits it."""
