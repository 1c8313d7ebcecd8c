"""FLOPs, memory, peak throughput and step timing."""
