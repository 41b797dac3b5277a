"""Micro-benchmarks: ours against peers, after both have been checked against the reference."""

import os

# As in the training loop, threads of OpenMP that wait for one another do not spin, which CPU time would count as work.
# Read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
