#!/usr/bin/env bash
# Qwen3-0.6B-Base on one GPU of 24 GB: QAE with K = 0.4 on DAPO-Math-17k, responses of up to 4,096 tokens.
#
#     pip install "qae-kernels[train,vllm]"        and, if it can be had, [flash-attn]
#     bash integration/recipes/qwen3_0.6b_24gb.sh [more flags]
#
# Memory, computed, not measured. GB = 10^9 bytes.
#
#   Parameters: 28 layers of q 1024 x 2048, k and v 1024 x 1024 each, o 2048 x 1024, MLP 3 x 1024 x 3072 = 15.73 M
#     each, 440.4 M; embeddings 151,936 x 1024 = 155.6 M, tied to the head; 596.0 M in all.
#   All the time: weights 4 B + AdamW 8 B per parameter, float32:                  12 x 0.596            =  7.2 GB
#   While training
#     gradients, float32:                                                           4 x 0.596            =  2.4
#     bfloat16 of embeddings (0.31) and of two layers (2 x 0.03), kept gathered:                            0.4
#     gradient of the embeddings in bfloat16 (0.31), on its way to float32 (0.62):                          0.9
#     inputs of the layers, checkpointed, 16,384 tokens:          16,384 x 1024 x 2 B x 28               =  0.9
#     one layer run again, about 55,000 bfloat16 values a token:  16,384 x 55,000 x 2 B                  =  1.8
#     logits of a chunk (1.9) and gradient of the head, float32 and bfloat16 (0.62 + 0.31):                 2.8
#     vLLM asleep: context and graphs, a guess                                                              1.5
#                                                                      7.2 + 10.7                        = 17.9 GB
#   While sampling: 7.2 + 0.5 x 24 of vLLM                                                               = 19.2 GB
#     of vLLM's 12.0: weights 1.2, working memory about 1.5, KV cache 9.3. A token's is
#     28 layers x 2 x 8 heads x 128 x 2 B = 114,688 B: 81,000 tokens, 20 responses of full length at once and more of
#     usual length; the others wait.
set -euo pipefail

arguments=(
    --name qwen3-0.6b
    --init Qwen/Qwen3-0.6B-Base

    # Training problems, and three examinations. 4,096 tokens are short for them: expect truncated responses.
    --data.train dapo-math-17k
    --data.evals aime-2024 aime-2025 amc-2023
    --data.chat-template              # as the published runs on base models put their prompts
    --max-new-tokens 4096
    --overlong-buffer 1024            # the last quarter before the limit costs more and more

    --baseline quantile
    --k 0.4
    --dynamic-sampling                # problems that are all right or all wrong are drawn anew
    --steps 200
    --prompts-per-step 64
    --group-size 16                   # 1,024 responses a step
    --minibatches 4                   # 16 prompts each: 4 updates per rollout
    --learning-rate 1e-6
    --warmup-steps 10

    --rollout.engine vllm             # beside the trainer, on the same GPU, in turn with it
    --rollout.gpu-memory 0.5
    --old-logprobs recompute          # vLLM's own differ from the trainer's, and it tells no entropy

    --dtype bfloat16                  # of the forward; weights and AdamW stay float32
    --activation-checkpointing        # a layer's input is kept, the rest computed again
    --max-tokens 16384                # per forward and backward: at least a prompt and 4,096

    --eval-every 20
    --eval-samples 8
    --eval-temperature 0.7
    --save-every 20                   # a checkpoint is 12 B x 0.596 G = 7.2 GB
)

exec python -m integration.train "${arguments[@]}" "$@"
