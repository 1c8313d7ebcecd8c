"""FLOPs, memory and peak throughput."""
