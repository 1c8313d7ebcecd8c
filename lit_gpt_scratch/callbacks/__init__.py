"""Trainer callbacks: checkpoints, progress, throughput, introspection, samples, diagnostics and summaries."""
