#!/usr/bin/env bash
# Qwen3-8B-Base on two nodes of eight GPUs of 80 GB: qwen3_8b_8x80gb.sh, with the model over 16 GPUs and twice the
# engines. Start it on both nodes, within some minutes; the ranks find each other at the first node:
#
#     HEAD=<name or address of the first node> bash integration/recipes/qwen3_8b_2x8x80gb.sh [more flags]
#
# The folder of the results (--runs) must be one that both nodes share: each rank writes its part of a checkpoint.
#
# Memory of a GPU, computed, not measured: that of qwen3_8b_8x80gb.sh, with a sixteenth of what is sharded.
#   All the time:   12 x 8.19 / 16 = 6.1 GB, for 12.3        while training: gradients 4 x 8.19 / 16 = 2.0, for 4.1
#   While training: 57.8 - 6.2 - 2.1 = 49.5 GB               while sampling: 6.1 + 56.0 = 62.1 GB
#
# Traffic of a GPU, computed, not measured, for each micro-batch: the weights in bfloat16 arrive twice (forward and
# backward), the gradients leave in float32: (2 x 2 B + 4 B) x 8.19 G x 15/16 = 61 GB; at 50 GB/s (400 Gb/s a GPU)
# 1.2 s. The computing beside it: 8 x 8.19 G x 32,768 tokens = 2.1e15 operations (a forward, a forward again, a
# backward), at 400 T/s 5.4 s. A much smaller --max-tokens makes the network the bottleneck.
set -euo pipefail

export TORCHRUN="--nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-id qwen3-8b
    --rdzv-endpoint ${HEAD:?the first node}:29500"
exec bash "$(dirname "$0")/qwen3_8b_8x80gb.sh" --name qwen3-8b-2-nodes "$@"
