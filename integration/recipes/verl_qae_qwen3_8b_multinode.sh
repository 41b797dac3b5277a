#!/usr/bin/env bash
# verl_qae_qwen3_8b.sh on several nodes of eight GPUs each, through Ray. Install the same on every node: each process that
# Ray starts imports verl, and verl finds QAE among the installed packages by itself. Start it on all nodes, the others
# within ten minutes of the first:
#
#     HEAD=<name or address of the first node> NNODES=2 NODE_RANK=<0 on the first, 1, 2, ... on the others> DATA=<folder> \
#         bash integration/recipes/verl_qae_qwen3_8b_multinode.sh [more overrides]
#
# DATA and the checkpoints (trainer.default_local_dir) must be in a folder that all nodes share. The other nodes leave
# when the first one's Ray stops. Nothing of the recipe depends on the number of nodes but the time it takes.
set -euo pipefail

: "${HEAD:?the first node}" "${NODE_RANK:?0 on the first node, 1, 2, ... on the others}"
export NNODES=${NNODES:-2} RAY_ADDRESS="$HEAD:6379"

if [[ $NODE_RANK != 0 ]]; then
    exec ray start --address "$RAY_ADDRESS" --block
fi

ray start --head --port 6379
trap 'ray stop' EXIT
# verl refuses to start while GPUs are missing.
alive='import ray; ray.init(logging_level="ERROR"); print(sum(node["Alive"] for node in ray.nodes()))'
waited=0
until (($(python -c "$alive") >= NNODES)); do
    ((waited < 600)) || { echo "fewer than $NNODES nodes after ten minutes" >&2; exit 1; }
    sleep 10
    waited=$((waited + 10))
done

bash "$(dirname "$0")/verl_qae_qwen3_8b.sh" "$@"
