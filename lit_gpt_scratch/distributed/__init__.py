"""Strategies (FSDP2, tensor parallelism) and defaults and checks that depend on the hardware."""
