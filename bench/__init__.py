"""Micro-benchmarks: ours against peers, after both have been checked against the reference."""
