"""What watches a run: progress, throughput, samples, saving, and the last word."""
