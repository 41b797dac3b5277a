"""TRL's GRPO with quantile advantages and our head: `QAEConfig` and `QAETrainer` in place of its config and trainer.

What differs from TRL 1.16, and nothing else does: the advantages, replaced where TRL has just formed its own; the loss,
which `linear_policy_loss` forms inside the model's forward, where DDP, FSDP and ZeRO expect the use of its weights; and
the responses that enter the model: of a micro-batch only those with credit, if nothing else is wanted of the others.
Generation, rewards, the passes for old and reference log-probabilities, optimizer and checkpoints are TRL's.
"""

from __future__ import annotations

import functools
import inspect
import json
import os
import types
import warnings
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from accelerate.utils import is_peft_model
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial
from transformers import PreTrainedModel
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import maybe_gather_lm_head_ctx, nanmax, nanmin

from ..checks import one_of
from ..config import PolicyLossConfig
from ..diagnostics import WHAT, WHERE, Diagnostics
from ..ops import BASELINES, group_advantages, linear_policy_loss
from ..outputs import Advantages, PolicyLossOutput
from ..schedules import EntropyTargetK, KSchedule
from .transformers import check_body_and_head, output_head

OFFERED = tuple(name for name in BASELINES if name != "opo")  # which wants lengths and no std
SCHEDULES = {"linear": KSchedule.linear, "cosine": KSchedule.cosine}
SCALES = {"group": "std", "batch": "batch", "none": "none"}  # of TRL's scale_rewards
AGGREGATIONS = {
    "grpo": "seq-mean-token-mean", "sapo": "seq-mean-token-mean", "luspo": "seq-mean-token-sum",
    "dr_grpo": "seq-mean-token-sum-norm", "bnpo": "token-mean", "dapo": "token-mean", "cispo": "token-mean",
    "vespo": "token-mean",
}  # fmt: skip
GLOBAL_TOKENS = ("dapo", "cispo", "vespo")  # divided by the tokens of all ranks and micro-batches
CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
PER_TOKEN = {  # of TRL's inputs, and what `linear_policy_loss` calls them
    "completion_ids": "tokens", "advantages": "advantages", "old_per_token_logps": "old_logprobs",
    "ref_per_token_logps": "ref_logprobs", "sampling_per_token_logps": "rollout_logprobs",
    "importance_sampling_ratio": "rollout_weights",
}  # fmt: skip
NOT_LOGGED = ("entropy", "kl", "tokens", "active_fraction", "responses", "groups")  # TRL's, or of some responses only
STATE_FILE = "quantile_k.json"


@dataclass
class QAEConfig(GRPOConfig):
    """`GRPOConfig` and how the advantages are formed; the help of each field says what it is.

    Raises ValueError for a number out of its range, and for a setting of TRL that `QAETrainer` does not carry out, with
    the reason.
    """

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [*GRPOConfig._VALID_DICT_FIELDS, "quantile_k_entropy_kwargs"]

    baseline: str = field(
        default="quantile",
        metadata={"help": "Baseline of the advantages, as in `qae_kernels.group_advantages`; 'mean' is stock GRPO."},
    )
    quantile_k: float = field(
        default=0.4, metadata={"help": "Quantile level K, strictly between 0 and 1; where it starts if it moves."}
    )
    quantile_k_schedule: str = field(
        default="constant",
        metadata={"help": "'constant', or 'linear' or 'cosine': from quantile_k to quantile_k_end over the training."},
    )
    quantile_k_end: float | None = field(default=None, metadata={"help": "K at the end of the schedule."})
    quantile_k_entropy_target: float | None = field(
        default=None,
        metadata={"help": "Entropy in nats per token that `qae_kernels.EntropyTargetK` holds by moving K. None: off."},
    )
    quantile_k_entropy_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Other arguments of EntropyTargetK: gain, k_min, k_max, ..."}
    )
    outcome_reward: str | None = field(
        default=None,
        metadata={
            "help": "Name of the reward function whose values are the outcomes that the quantile is taken over. None: "
            "the sum of the rewards."
        },
    )
    advantage_eps: float = field(
        default=1e-4, metadata={"help": "Added to the standard deviation that divides the advantages; TRL's is 1e-4."}
    )
    entropy_of: str = field(
        default="active",
        metadata={
            "help": "Whose entropy is logged. 'active': of the responses with credit; the others do not enter the "
            "model. 'all': of all, and all enter it."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        one_of("baseline", self.baseline, OFFERED)
        one_of("entropy_of", self.entropy_of, ("active", "all"))
        one_of("loss_type", self.loss_type, tuple(AGGREGATIONS))
        one_of("scale_rewards", self.scale_rewards, tuple(SCALES))
        one_of("quantile_k_schedule", self.quantile_k_schedule, ("constant", *SCHEDULES))
        _level("quantile_k", self.quantile_k)
        if (self.quantile_k_end is None) != (self.quantile_k_schedule == "constant"):
            raise ValueError(
                "quantile_k_end goes with a quantile_k_schedule of 'linear' or 'cosine', and only with it; got "
                f"quantile_k_end={self.quantile_k_end}, quantile_k_schedule={self.quantile_k_schedule!r}"
            )
        if self.quantile_k_end is not None:
            _level("quantile_k_end", self.quantile_k_end)
        if self.quantile_k_entropy_target is not None:
            if self.quantile_k_schedule != "constant":
                raise ValueError(
                    "K follows a schedule or an entropy target, not both; got "
                    f"quantile_k_schedule={self.quantile_k_schedule!r}, "
                    f"quantile_k_entropy_target={self.quantile_k_entropy_target}"
                )
            entropy_controller(self)
        for unsupported, reason in _unsupported(self):
            if unsupported:
                raise ValueError(f"QAETrainer does not support {reason}")
        policy_loss_config(self)


def _level(name: str, k: object) -> None:
    if isinstance(k, bool) or not isinstance(k, int | float) or not 0 < k < 1:
        raise ValueError(f"{name} must be strictly between 0 and 1; got {k!r}")


def _unsupported(args: QAEConfig) -> list[tuple[bool, str]]:
    """What `QAETrainer` would otherwise do differently from what the setting says, with the reasons."""
    bonus = args.entropy_coef != 0
    return [
        (args.use_liger_kernel, "use_liger_kernel: it replaces parts of the model whose head is replaced here"),
        (args.torch_compile, "torch_compile: the number of responses that enter the model changes from call to call"),
        (
            args.multi_objective_aggregation != "sum_then_normalize",
            f"multi_objective_aggregation={args.multi_objective_aggregation!r}: it subtracts each reward's own mean, "
            "which leaves no place for another baseline; expected 'sum_then_normalize'",
        ),
        (
            args.use_adaptive_entropy,
            "use_adaptive_entropy: the controller is part of the loss that is replaced here; quantile_k_entropy_target "
            "holds the entropy by K",
        ),
        (
            bonus and AGGREGATIONS[args.loss_type] == "seq-mean-token-mean",
            f"entropy_coef={args.entropy_coef} with loss_type={args.loss_type!r}: TRL's bonus is a mean over tokens, "
            "the loss weighs tokens by the length of their response; expected entropy_coef=0 or another loss_type",
        ),
        (
            bonus and args.top_entropy_quantile < 1,
            f"entropy_coef={args.entropy_coef} with top_entropy_quantile={args.top_entropy_quantile}: the bonus here "
            "is on every token",
        ),
        (
            args.top_entropy_quantile < 1 and args.world_size > 1,
            f"top_entropy_quantile={args.top_entropy_quantile} with {args.world_size} processes: TRL selects among the "
            "tokens of all processes, the loss here among those of its own",
        ),
        (
            args.loss_type == "cispo" and not (args.epsilon_high or 0) >= 1,
            f"loss_type='cispo' with epsilon_high={args.epsilon_high}: it is the bound of the ratio itself, and must "
            "be at least 1 (ScaleRL takes 5.0)",
        ),
    ]


def policy_loss_config(args: GRPOConfig) -> PolicyLossConfig:
    """The loss that TRL's settings describe. Raises ValueError where ours does not go that far."""
    eps_low, eps_high = args.epsilon, args.epsilon if args.epsilon_high is None else args.epsilon_high
    objective, dual_clip, hyper = "clip", None, {}
    if args.loss_type not in CLIPPED:
        objective = args.loss_type
    elif args.delta is not None:  # below 1 + eps_high TRL's two bounds change roles
        dual_clip, eps_high = max(args.delta, 1 + eps_high), min(args.delta - 1, eps_high)
    if objective == "cispo":
        eps_low, eps_high = 1.0, eps_high - 1
    elif objective == "sapo":
        hyper = {"tau_positive": args.sapo_temperature_pos, "tau_negative": args.sapo_temperature_neg}
    elif objective == "vespo":
        hyper = {
            "k_positive": args.vespo_k_pos, "lambda_positive": max(args.vespo_lambda_pos, 1e-4),
            "k_negative": args.vespo_k_neg, "lambda_negative": max(args.vespo_lambda_neg, 1e-4),
        }  # fmt: skip
    return PolicyLossConfig(
        objective=objective, ratio=args.importance_sampling_level, aggregation=AGGREGATIONS[args.loss_type],
        eps_low=eps_low, eps_high=eps_high, dual_clip=dual_clip, kl_coef=args.beta,
        kl_estimator="k3_is" if args.use_bias_correction_kl else "k3", entropy_coef=args.entropy_coef,
        temperature=args.temperature, hyper=hyper, top_entropy=args.top_entropy_quantile,
        loss_scale_factor=args.max_completion_length if args.loss_type == "dr_grpo" else None,
        off_policy_threshold=args.off_policy_mask_threshold,
    )  # fmt: skip


def entropy_controller(args: QAEConfig) -> EntropyTargetK:
    settings = {"k": args.quantile_k} | dict(args.quantile_k_entropy_kwargs or {})
    allowed = tuple(name for name in inspect.signature(EntropyTargetK).parameters if name != "target")
    for name in settings:
        one_of("a key of quantile_k_entropy_kwargs", name, allowed)
    return EntropyTargetK(args.quantile_k_entropy_target, **settings)


def add_policy_loss(model: PreTrainedModel, cast_lm_head_to_fp32: bool = False) -> None:
    """`model(..., policy_loss=f)` then returns `f(hidden, **head)`: hidden [B, T, D] is what the head would be given,
    head the arguments of `linear_policy_loss` from `output_head`. A call without policy_loss is as before."""
    plain = model.forward

    @functools.wraps(type(model).forward)  # `generate` checks its arguments against the signature
    def forward(self, *args, policy_loss=None, labels=None, **kwargs):
        if policy_loss is None:
            return plain(*args, labels=labels, **kwargs)
        hidden = self.base_model(*args, use_cache=False, **kwargs).last_hidden_state
        head = {name: _whole(x) if isinstance(x, DTensor) else x for name, x in output_head(self).items()}
        precision = nullcontext()
        if cast_lm_head_to_fp32:
            hidden, precision = hidden.float(), torch.autocast(hidden.device.type, enabled=False)
        with precision, maybe_gather_lm_head_ctx(head["weight"], head["bias"]):
            return policy_loss(hidden, **head)

    model.forward = types.MethodType(forward, model)


def _whole(x: DTensor) -> Tensor:
    """Of a weight that FSDP2 shards on its own; its gradient is the mean over the ranks, as FSDP has it."""
    return x.full_tensor(grad_placements=[Partial("avg")] * x.device_mesh.ndim)


def _is_whole(model: PreTrainedModel, device: torch.device) -> bool:
    """On the device, and not sharded by tensor parallelism or ZeRO-3. What FSDP will shard waits on the CPU."""
    return all(
        x.device.type == device.type and not isinstance(x, DTensor) and not hasattr(x, "ds_id")
        for x in model.parameters()
    )


def _without_empty_means(total: Diagnostics) -> dict[str, float | list[float]]:
    """Its metrics, but none of tokens where none was read, and no entropy of a kind of token that there was none of."""
    counts = dict(zip(WHERE, total.sums[:, WHAT.index("entropies")].tolist(), strict=True))
    if total.sums[WHERE.index("read"), WHAT.index("tokens")] == 0:
        total = replace(total, has=total.has - {"loss"})
    return {name: x for name, x in total.as_dict().items() if counts.get(name.removeprefix("entropy_"), 1) > 0}


class QAETrainer(GRPOTrainer):
    """`GRPOTrainer` with the advantages of `QAEConfig`, and with a head that does nothing for responses without credit.

    Metrics have TRL's names, and ours begin with "qae/": see `docs/trl.md`. Besides what GRPOTrainer and QAEConfig
    raise: ValueError for args of another class, a model with images or a load-balancing loss, a head that is not one
    linear layer, a family that does more to its logits than is known here, and an outcome_reward that is none of the
    reward functions or has another weight than 1.
    """

    def __init__(self, model, reward_funcs=None, args: QAEConfig | None = None, *others, **keywords):
        if not isinstance(args, QAEConfig):
            raise ValueError(f"args must be a QAEConfig; got {type(args).__name__}")
        super().__init__(model, reward_funcs, args, *others, **keywords)
        if self._is_vlm:
            raise ValueError("QAETrainer does not support images: only tokens are given to the model in the loss")
        if self.aux_loss_enabled:
            raise ValueError(
                "QAETrainer does not support the load-balancing loss of experts, which is over all tokens; expected "
                f"router_aux_loss_coef=0, got {self.router_aux_loss_coef}"
            )
        self._outcome = self._find_outcome(args.outcome_reward)
        self._config = policy_loss_config(args)
        self._drops = args.entropy_of == "active" and self._config.skips_zero_credit and self._config.scope != "batch"
        self._controller = None if args.quantile_k_entropy_target is None else entropy_controller(args)
        self._rewards_per_func: Tensor | None = None
        self._totals: dict[str, Diagnostics] = {}  # by mode, since the last log
        self._step_total: Diagnostics | None = None  # of the optimizer step, for the controller
        causal = self.model.get_base_model() if is_peft_model(self.model) else self.model
        output_head(causal)
        if _is_whole(causal, self.accelerator.device):
            with self.accelerator.autocast():
                check_body_and_head(causal)
        add_policy_loss(causal, args.cast_lm_head_to_fp32)

    def _find_outcome(self, name: str | None) -> int | None:
        """Place of the reward function of that name."""
        if name is None:
            if len(self.reward_func_names) > 1 and self.args.baseline == "quantile":
                warnings.warn(
                    f"the quantile is that of the sum of {len(self.reward_func_names)} rewards; expected "
                    f"outcome_reward, the name of the one that says right or wrong: {self.reward_func_names}",
                    stacklevel=3,
                )
            return None
        if self.reward_func_names.count(name) != 1:
            raise ValueError(f"outcome_reward must be one of the rewards {self.reward_func_names}; got {name!r}")
        index = self.reward_func_names.index(name)
        if self.reward_weights[index] != 1:
            raise ValueError(
                "outcome_reward must have the weight 1, for the baseline is one of the outcomes and is subtracted from "
                f"the rewards; got {self.reward_weights[index].item()}: scale the other reward_weights instead"
            )
        return index

    @property
    def quantile_k(self) -> float:
        """K of the next rollout."""
        if self._controller is not None:
            return self._controller.k
        if self.args.quantile_k_schedule == "constant":
            return self.args.quantile_k
        schedule = SCHEDULES[self.args.quantile_k_schedule]
        steps = max(self.state.max_steps, 1)
        return schedule(self.args.quantile_k, self.args.quantile_k_end, steps)(self.state.global_step)

    # ---- advantages

    def _calculate_rewards(self, *args, **kwargs) -> Tensor:
        self._rewards_per_func = super()._calculate_rewards(*args, **kwargs)
        return self._rewards_per_func

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """TRL shuffles the rows of what this returns, and cuts them into micro-batches."""
        output = super()._generate_and_score_completions(inputs)
        mode = self._mode
        everyone, hard, result = self._all_advantages(mode)
        first = self.accelerator.process_index * len(inputs)
        output["advantages"] = everyone[first : first + len(inputs)]
        output["hard"] = hard[first : first + len(inputs)]

        logged = self._logs["advantages"]
        for _ in range(min(len(everyone), len(logged))):
            logged.pop()
        logged.extend(everyone.tolist())
        self._metrics[mode]["qae/k"].append(self.quantile_k)
        self._add_to_total(mode, result.diagnostics())
        return output

    def _all_advantages(self, mode: str) -> tuple[Tensor, Tensor, Advantages]:
        """Advantages and hardness of the group [B], of all ranks' responses in TRL's order. A response that no reward
        function scored, or outcome_reward did not, has advantage 0 and counts in no group. With an outcome_reward, a
        group that is all right or all wrong has 0."""
        rewards = self._rewards_per_func
        scored = ~rewards.isnan().all(1)
        outcomes = None
        if self._outcome is not None:
            outcomes = rewards[:, self._outcome]
            scored &= ~outcomes.isnan()
            outcomes = outcomes[scored]
        size = self.num_generations if mode == "train" else self.num_generations_eval
        groups = torch.arange(len(rewards), device=rewards.device) // size
        summed = (rewards * self.reward_weights.to(rewards.device)).nansum(1)
        result = group_advantages(
            summed[scored], groups[scored], baseline=self.args.baseline, k=self.quantile_k, outcomes=outcomes,
            scale=SCALES[self.scale_rewards], eps=self.args.advantage_eps,
        )  # fmt: skip
        advantages, hard = torch.zeros_like(summed), torch.zeros_like(scored)
        values = result.advantages
        if outcomes is not None:  # what other rewards add is no lesson where all are right, or all wrong
            values = values.masked_fill(result.equal_outcomes, 0.0)
        advantages[scored], hard[scored] = values, result.hard
        return advantages, hard, result

    # ---- loss

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    def _compute_loss(self, model, inputs: dict[str, Any]) -> Tensor:
        mask = inputs["completion_mask"]
        if "tool_mask" in inputs:
            mask = mask * inputs["tool_mask"]
        rows = self._rows_for_the_model(inputs["advantages"], mask)
        used = mask[rows].any(0).nonzero()
        width = int(used[-1]) + 1 if len(used) else 1  # TRL pads to the longest response of the whole rollout

        def kept(name: str) -> Tensor:
            x = inputs[name][rows]
            return x if x.dim() == 1 else x[:, :width]

        given = {ours: kept(name) for name, ours in PER_TOKEN.items() if inputs.get(name) is not None}
        if "rollout_weights" in given and self.vllm_importance_sampling_mode.startswith("sequence"):
            given["rollout_weights"] = given["rollout_weights"].squeeze(1)
        normalizer, config = self._normalizer_and_config(inputs, mask)
        given |= {"mask": mask[rows, :width], "normalizer": normalizer, "config": config}
        output = None

        def policy_loss(hidden: Tensor, **head) -> Tensor:
            nonlocal output
            hidden = hidden[:, -width - 1 : -1]  # a token is sampled from the position before it
            output = linear_policy_loss(hidden, **given, **head, entropy="active" if self._drops else "all")
            return output.loss

        parts = {name: [inputs[f"prompt_{name}"][rows], kept(f"completion_{name}")] for name in ("ids", "mask")}
        with self.accelerator.autocast():
            loss = model(
                input_ids=torch.cat(parts["ids"], 1), attention_mask=torch.cat(parts["mask"], 1),
                policy_loss=policy_loss,
            )  # fmt: skip
        self._log_loss(output, inputs, mask, rows)
        return loss

    def _rows_for_the_model(self, advantages: Tensor, mask: Tensor) -> Tensor | slice:
        """The responses with credit; one if there is none: every rank must run its forward and its backward."""
        if not self._drops:
            return slice(None)
        per_token = advantages[:, None] if advantages.dim() == 1 else advantages
        rows = ((per_token != 0) & (mask != 0)).any(1).nonzero().squeeze(1)
        return rows if len(rows) else rows.new_zeros(1)

    def _normalizer_and_config(self, inputs: dict[str, Any], mask: Tensor) -> tuple[int | Tensor, PolicyLossConfig]:
        """What TRL divides the loss of this micro-batch by, counting the responses that do not enter the model."""
        train = self._mode == "train"
        accumulated = self.current_gradient_accumulation_steps if train else 1
        tokens = mask.sum().clamp(min=1)
        if self.loss_type in GLOBAL_TOKENS:  # num_items_in_batch is of the whole generation
            share = accumulated / self.args.steps_per_generation if train else 1
            normalizer = inputs["num_items_in_batch"].clamp(min=1) / self.accelerator.num_processes * share
        else:
            normalizer = (tokens if self.loss_type == "bnpo" else len(mask)) * accumulated
        config = self._config
        if config.entropy_coef != 0:  # TRL's bonus is a mean over these tokens, ours is weighted as the loss of a token
            weight = normalizer * (config.loss_scale_factor or 1) / (tokens * accumulated)
            config = replace(config, entropy_coef=config.entropy_coef * float(weight))
        return normalizer, config

    # ---- metrics

    def _log_loss(self, output: PolicyLossOutput, inputs: dict[str, Any], mask: Tensor, rows: Tensor | slice) -> None:
        mode = self._mode
        diagnostics = output.diagnostics(hard=inputs["hard"][rows]).all_reduce()
        self._add_to_total(mode, diagnostics)
        values, metrics = diagnostics.as_dict(), self._metrics[mode]
        was_read = not self._drops or values["active_fraction"] > 0
        metrics["entropy"].append(values["entropy"] if was_read else float("nan"))  # TRL leaves NaN out of its means
        if self.beta != 0:
            metrics["kl"].append(values["kl"])
        self._log_clipping(output.logprobs, inputs, mask, rows)
        if mode == "train" and self._controller is not None:
            self._step_total = diagnostics if self._step_total is None else self._step_total + diagnostics
            if self.accelerator.sync_gradients:
                self._update_controller()

    def _update_controller(self) -> None:
        """At the end of an optimizer step, with the mean over all its tokens; the same on every rank."""
        values, self._step_total = self._step_total.as_dict(), None
        if not self._drops or values["active_fraction"] > 0:
            self._controller.update(values["entropy"])

    def _log_clipping(self, logprobs: Tensor, inputs: dict[str, Any], mask: Tensor, rows: Tensor | slice) -> None:
        """TRL's shares of clipped tokens (responses, at the sequence level), of all that are in the micro-batch. What
        was not read counts as not clipped."""
        if self.loss_type not in (*CLIPPED, "cispo"):
            return
        log_ratio = torch.zeros(mask.shape, device=mask.device)
        if inputs.get("old_per_token_logps") is not None:
            width = logprobs.shape[1]
            known = (logprobs - inputs["old_per_token_logps"][rows, :width]) * mask[rows, :width]
            if inputs.get("importance_sampling_ratio") is not None:  # a token of weight 0 may not have been read
                weights = inputs["importance_sampling_ratio"][rows, :width]
                known = known.masked_fill((weights == 0) & (logprobs == 0), 0)
            log_ratio[rows, :width] = known
        counted = mask.float()
        if self.importance_sampling_level == "sequence":
            log_ratio = log_ratio.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
            counted = torch.ones_like(log_ratio)
        ratio, advantages = log_ratio.exp(), inputs["advantages"]
        advantages = advantages[:, None] if advantages.dim() == 1 else advantages
        metrics = self._metrics[self._mode]
        if self.loss_type == "cispo":
            bounds = (0.0, self.epsilon_high)
        else:
            bounds = (1 - self.epsilon_low, 1 + self.epsilon_high)
            ratio = ratio if self.args.delta is None else ratio.clamp(max=self.args.delta)
        clipped = (
            torch.stack([(ratio < bounds[0]) & (advantages < 0), (ratio > bounds[1]) & (advantages > 0)]) * counted
        )
        sums = torch.stack([*clipped.sum((1, 2)), counted.sum()])
        low, high, count = self.accelerator.reduce(sums, reduction="sum").tolist()
        low, high = low / max(count, 1), high / max(count, 1)
        if self.loss_type == "cispo":
            metrics["cispo_clip_ratio"].append(high)
            return
        of_responses = self.accelerator.gather((clipped.sum(2) / counted.sum(1)).T)  # NaN: no token
        values = {
            "low_mean": low, "high_mean": high, "region_mean": low + high,
            "low_min": nanmin(of_responses[:, 0]).item(), "high_max": nanmax(of_responses[:, 1]).item(),
        }  # fmt: skip
        for name, value in values.items():
            metrics[f"clip_ratio/{name}"].append(value)

    def _add_to_total(self, mode: str, diagnostics: Diagnostics) -> None:
        """diagnostics: of all ranks."""
        self._totals[mode] = self._totals[mode] + diagnostics if mode in self._totals else diagnostics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode = self._mode
        if mode in self._totals:
            total = _without_empty_means(self._totals.pop(mode))
            for name, value in total.items():
                if name not in NOT_LOGGED and not isinstance(value, list):
                    self._metrics[mode][f"qae/{name}"].append(value)
        super().log(logs, start_time)

    # ---- checkpoints

    def _save_checkpoint(self, model, trial) -> None:
        super()._save_checkpoint(model, trial)
        if self._controller is not None and self.args.should_save:
            folder = os.path.join(
                self._get_output_dir(trial=trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            )
            with open(os.path.join(folder, STATE_FILE), "w") as file:
                json.dump(self._controller.state_dict(), file)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if self._controller is not None and checkpoint is not None:
            path = os.path.join(checkpoint, STATE_FILE)
            if not os.path.exists(path):
                warnings.warn(
                    f"{checkpoint} has no {STATE_FILE}: it is of a run without quantile_k_entropy_target. K begins at "
                    f"{self.quantile_k}",
                    stacklevel=2,
                )
                return
            with open(path) as file:
                self._controller.load_state_dict(json.load(file))
