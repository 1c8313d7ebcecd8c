"""Trainer callbacks: checkpoints, progress, throughput, introspection, samples, diagnostics, summary."""
