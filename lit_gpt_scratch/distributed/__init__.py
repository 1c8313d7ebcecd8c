"""Distributed strategies (FSDP2 and tensor parallelism), and hardware-dependent defaults and checks."""
