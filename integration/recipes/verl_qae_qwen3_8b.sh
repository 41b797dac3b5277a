#!/usr/bin/env bash
# The run of the paper in verl: DAPO (arXiv 2503.14476) with QAE (arXiv 2509.22611) on Qwen3-8B-Base, one node of eight
# GPUs of 80 GB. Written for verl 0.9.1; docs/verl.md says more. More overrides go behind it, and win:
#
#     pip install "verl[vllm,fsdp]==0.9.1" qae-kernels
#     DATA=<folder with dapo-math-17k.parquet and aime-2024.parquet, as DAPO's scripts have them> \
#         bash integration/recipes/verl_qae_qwen3_8b.sh [more overrides]
#
# The lines under "QAE" are all that differs from a DAPO run. Not run by us: no such machine was at hand. A test composes
# verl's configuration of these very lines.
set -euo pipefail

data=${DATA:?the folder with dapo-math-17k.parquet and aime-2024.parquet}
prompt=2048       # tokens; DAPO's script
response=20480    # the paper: 16,384 and a cache of 4,096
cache=4096

arguments=(
    # QAE.
    algorithm.adv_estimator=qae           # for grpo; verl knows it once qae-kernels is installed
    +algorithm.quantile_k=0.4             # the paper's K; 0.6 where the entropy of a run without QAE is low. The + adds
                                          # a key that verl's configuration does not have
    "+algorithm.quantile_outcomes=[-1,1]" # the rewards of DAPO's verifier. The quantile is taken over these, and not
                                          # over what the overlong penalty leaves of them. The authors' code takes it
                                          # over the latter, and interpolates: for that, +algorithm.quantile_bit_for_bit=True
                                          # in place of this line

    # Data.
    "data.train_files=$data/dapo-math-17k.parquet"
    "data.val_files=$data/aime-2024.parquet"
    data.prompt_key=prompt
    data.truncation=left
    data.max_prompt_length=$prompt
    data.max_response_length=$response

    # Model and optimizer: 1e-6, constant. What the paper leaves open is from DAPO's published script.
    actor_rollout_ref.model.path=Qwen/Qwen3-8B-Base
    actor_rollout_ref.model.use_remove_padding=True
    actor_rollout_ref.model.enable_gradient_checkpointing=True
    actor_rollout_ref.actor.optim.lr=1e-6
    actor_rollout_ref.actor.optim.lr_warmup_steps=10
    actor_rollout_ref.actor.optim.weight_decay=0.1
    actor_rollout_ref.actor.optim.clip_grad=1.0

    # Batches: 512 prompts of 16 responses a rollout, 32 prompts a minibatch, so 16 updates per rollout.
    data.train_batch_size=512
    actor_rollout_ref.rollout.n=16        # the paper does not state it; DAPO's is 16
    actor_rollout_ref.actor.ppo_mini_batch_size=32

    # DAPO: clip-higher, mean over all tokens of a minibatch, no KL, no entropy term.
    actor_rollout_ref.actor.clip_ratio_low=0.2
    actor_rollout_ref.actor.clip_ratio_high=0.28
    actor_rollout_ref.actor.clip_ratio_c=10.0   # of verl's own loss, as DAPO's script; qae_dapo has no dual clip
    actor_rollout_ref.actor.loss_agg_mode=token-mean
    actor_rollout_ref.actor.use_kl_loss=False
    actor_rollout_ref.actor.entropy_coeff=0
    algorithm.use_kl_in_reward=False
    # DAPO: prompts whose responses are all right or all wrong are replaced. QAE's zeros do not count as such: the
    # metric is the verdict.
    algorithm.filter_groups.enable=True
    algorithm.filter_groups.metric=acc
    # DAPO: from 16,384 tokens on a response costs more and more, up to 1 at 20,480.
    reward.reward_manager.name=dapo
    +reward.reward_kwargs.max_resp_len=$response
    +reward.reward_kwargs.overlong_buffer_cfg.enable=True
    +reward.reward_kwargs.overlong_buffer_cfg.len=$cache
    +reward.reward_kwargs.overlong_buffer_cfg.penalty_factor=1.0
    +reward.reward_kwargs.overlong_buffer_cfg.log=False

    # Sampling, and the evaluation of the paper: 32 responses per problem at temperature 0.7.
    actor_rollout_ref.rollout.name=vllm
    actor_rollout_ref.rollout.tensor_model_parallel_size=1
    actor_rollout_ref.rollout.gpu_memory_utilization=0.7
    actor_rollout_ref.rollout.max_num_batched_tokens=$((prompt + response))
    actor_rollout_ref.rollout.temperature=1.0
    actor_rollout_ref.rollout.top_p=1.0
    actor_rollout_ref.rollout.val_kwargs.do_sample=True
    actor_rollout_ref.rollout.val_kwargs.n=32
    actor_rollout_ref.rollout.val_kwargs.temperature=0.7

    # Memory: two GPUs share a sequence, so that a GPU holds the logits of half of it; weights and AdamW leave the GPU
    # while vLLM has it.
    actor_rollout_ref.actor.use_dynamic_bsz=True
    actor_rollout_ref.actor.ppo_max_token_len_per_gpu=$(((prompt + response) / 2))
    actor_rollout_ref.actor.ulysses_sequence_parallel_size=2
    actor_rollout_ref.actor.fsdp_config.param_offload=True
    actor_rollout_ref.actor.fsdp_config.optimizer_offload=True

    # The run.
    trainer.nnodes="${NNODES:-1}"
    trainer.n_gpus_per_node=8
    trainer.total_training_steps=200      # the paper's length of training is not stated in steps of this kind
    trainer.val_before_train=False
    trainer.test_freq=10
    trainer.save_freq=10
    trainer.project_name=qae
    trainer.experiment_name=qwen3-8b-base-k0.4
    "trainer.logger=[console,tensorboard]"
)

exec python -m verl.trainer.main_ppo "${arguments[@]}" "$@"
