#!/usr/bin/env bash
# Qwen3-8B-Base on eight GPUs of 80 GB: the hyper-parameters of QAE (arXiv 2509.22611), which are those of DAPO
# (arXiv 2503.14476) but for the baseline.
#
#     pip install "qae-kernels[train,vllm,flash-attn]"
#     bash integration/recipes/qwen3_8b_8x80gb.sh [more flags]
#
# Memory of a GPU, computed, not measured. GB = 10^9 bytes.
#
#   Parameters: 36 layers of q and o 4096 x 4096 each, k and v 4096 x 1024 each, MLP 3 x 4096 x 12,288 = 192.9 M each,
#     6,946 M; embeddings and head 2 x 151,936 x 4096 = 1,245 M; 8.19 G in all.
#   All the time: an eighth of weights 4 B + AdamW 8 B per parameter, float32:     12 x 8.19 / 8         = 12.3 GB
#   While training
#     an eighth of the gradients, float32:                                           4 x 8.19 / 8         =  4.1
#     bfloat16 of embeddings and head (2.5) and of two layers (2 x 0.39), kept gathered:                     3.3
#     gradients of embeddings and head in bfloat16 (2.5), on their way to float32 (5.0):                     7.5
#     inputs of the layers, checkpointed, 32,768 tokens:          32,768 x 4096 x 2 B x 36               =  9.7
#     one layer run again, about 150,000 bfloat16 values a token: 32,768 x 150,000 x 2 B                 =  9.8
#     logits of a chunk (1.9) and gradient of the head, float32 and bfloat16 (2.5 + 1.2):                    5.6
#     the rollout, 8,192 responses of up to 20,480 tokens: ids 8 B, mask 1 B, three statistics of 4 B:       3.5
#     vLLM asleep: context and graphs, a guess                                                               2.0
#                                                                     12.3 + 45.5                        = 57.8 GB
#   While sampling: 12.3 + 0.7 x 80 of vLLM                                                              = 68.3 GB
#     of vLLM's 56.0: weights 16.4, working memory about 3, KV cache 36.6. A token's is
#     36 layers x 2 x 8 heads x 128 x 2 B = 147,456 B: 248,000 tokens, 12 responses of full length at once and about 50
#     of 5,000 tokens; the others of a rank's 1,024 wait.
#   Of the host: every rank reads the model in float32, 8 x 32.8 = 262 GB at the start.
set -euo pipefail

arguments=(
    --name qwen3-8b
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

# shellcheck disable=SC2086  # TORCHRUN is several words: where the ranks are, if not on this machine
exec torchrun ${TORCHRUN:---standalone --nproc-per-node 8} -m integration.train "${arguments[@]}" "$@"
