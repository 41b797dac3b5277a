"""A thin RLVR loop around the kernels: rollout -> verify -> advantages -> minibatches -> update -> log."""

import os

# On a busy CPU the threads of OpenMP otherwise spin for one another: steps took ten times as long and more. Read when
# torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
