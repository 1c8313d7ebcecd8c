"""Estimates and measurements of FLOPs, memory and peak throughput."""
