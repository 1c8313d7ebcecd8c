"""Strategies (FSDP2, tensor parallelism), collectives, and defaults and checks that depend on the hardware."""
