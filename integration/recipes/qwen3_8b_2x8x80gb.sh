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

arguments=(
    --name qwen3-8b-2-nodes
    --init Qwen/Qwen3-8B-Base

    # Data: of the paper.
    --data.train dapo-math-17k
    --data.evals aime-2024 aime-2025 amc-2023
    --data.chat-template              # DAPO's scripts put prompts through the template of the model

    # Estimator and loss: of the paper; the clip bounds and the rest are DAPO's.
    --baseline quantile
    --k 0.4
    --loss dapo                       # mean over all tokens of a minibatch, no KL
    --eps-low 0.2
    --eps-high 0.28
    --dynamic-sampling                # problems that are all right or all wrong are drawn anew
    --max-rounds 10                   # as DAPO's script
    --max-new-tokens 20480
    --overlong-buffer 4096            # from 16,384 tokens on a response costs more and more, up to 1 at 20,480
    --overlong-penalty 1.0

    # Batches: 512 prompts a rollout, 32 prompts a minibatch, so 16 updates per rollout.
    --prompts-per-step 512
    --minibatches 16
    --group-size 16                   # the paper does not state it; DAPO's is 16
    --steps 200                       # the paper's length of training is not stated in steps of this kind

    # Optimizer: 1e-6, constant. What the paper leaves open is from DAPO's published script.
    --learning-rate 1e-6
    --lr-schedule constant
    --warmup-steps 10                 # DAPO's script
    --weight-decay 0.1                # DAPO's script; here of matrices only
    --max-grad-norm 1.0               # DAPO's script

    --rollout.engine vllm             # one engine on each GPU, in turn with the trainer
    --rollout.gpu-memory 0.7
    --old-logprobs recompute          # vLLM's own differ from the trainer's, and it tells no entropy

    --dtype bfloat16                  # of the forward; weights and AdamW stay float32
    --activation-checkpointing        # a layer's input is kept, the rest computed again
    --max-tokens 32768                # per GPU, forward and backward: at least a prompt and 20,480

    # Evaluation: 32 responses per problem at temperature 0.7, as the paper.
    --eval-every 10
    --eval-samples 32
    --eval-temperature 0.7
    --save-every 10                   # a checkpoint is 12 B x 8.19 G = 98 GB
    --trackers tensorboard
)

exec torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint "${HEAD:?the first node}:29500" \
    --rdzv-id qwen3-8b -m integration.train "${arguments[@]}" "$@"
