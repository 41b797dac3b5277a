"""A thin RLVR loop around the kernels: rollout -> verify -> advantages -> minibatches -> update -> log."""
