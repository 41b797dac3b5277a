"""Every knob of a run in one documented dataclass; the command line is made from it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from qae_kernels import PRESETS as LOSSES
from qae_kernels import EntropyTargetK, KSchedule, PolicyLossConfig

Baseline = Literal["quantile", "mean", "leave_one_out", "none", "opo", "passk", "median", "pos_mask", "neg_mask"]


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a Qwen3 made from scratch (read only when `init` names no checkpoint)."""

    hidden_size: int = 128
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    intermediate_size: int = 384


@dataclass(frozen=True)
class TaskConfig:
    """reasoning-gym's `chain_sum`: sums and differences of a few numbers, e.g. `7-0+4 =`."""

    min_terms: int = 2
    max_terms: int = 6
    """More terms are harder: the range spreads the success rates."""
    min_digits: int = 1
    max_digits: int = 1
    held_out: int = 256
    """Problems kept for evaluation; no expression among them is ever trained on."""


@dataclass(frozen=True)
class WarmStartConfig:
    """Supervised training on right answers, so that RL starts with some successes and some entropy: worked and direct
    ones of "arithmetic", those that reasoning-gym tells of "gym:<task>"."""

    steps: int = 250
    batch_size: int = 128
    learning_rate: float = 2e-3
    warmup_steps: int = 50
    direct_share: float = 0.3
    """Share of examples that give the answer without the steps: they keep the policy undecided between the two."""


@dataclass(frozen=True)
class DataConfig:
    """What is trained on and what is evaluated."""

    train: str = "arithmetic"
    """"arithmetic" (the toy task of `task`), "gym:<task>" or "gym:<task>+<task>" of reasoning-gym, a preset
    ("dapo-math-17k"), a .jsonl or .parquet file, "<preset>=<file>", or the name of a data set on the Hugging Face hub,
    "<name>:<split>" for another split. See docs/data.md."""
    evals: tuple[str, ...] = ("held-out",)
    """Evaluated every `eval_every` steps: "held-out" (problems of the training data that are never trained on), presets
    ("aime-2024", "aime-2025", "amc-2023"), "gym:<task>", files, hub names."""
    split: str = "train"
    """Of a data set on the hub that is no preset."""
    prompt_column: str = "prompt"
    """Text or chat messages; "a.b" is column b within column a. Presets know theirs."""
    answer_column: str = "answer"
    verifier: str = "auto"
    """"math" (math-verify), "exact", "gym" (reasoning-gym's own), "<module>:<function>" of yours; "auto": what suits
    the data set."""
    chat_template: bool = False
    """Prompts go through the tokenizer's chat template; else they are taken as they are."""
    instruction: str = ""
    """Put after each problem, e.g. "Put the final answer within \\boxed{}.". Empty: that of the preset, if any."""
    held_out: int = 256
    """Problems kept for the evaluation "held-out", and those of an evaluation "gym:<task>"."""
    gym_options: str = "{}"
    """Options of the reasoning-gym task, as JSON; of several tasks, {"<task>": {...}, ...}."""
    curriculum_level: int | None = None
    """Level of every attribute of the task's reasoning-gym curriculum. None: the task's own defaults."""


@dataclass(frozen=True)
class VerifyConfig:
    """The processes that compare answers."""

    workers: int = 1
    timeout: float = 5.0
    """Seconds for one answer; then its process is killed and the answer scores 0."""


@dataclass(frozen=True)
class RolloutConfig:
    """Where responses come from."""

    engine: Literal["sampler", "transformers", "vllm", "vllm_server"] = "sampler"
    """See integration/engines."""
    server: str = "http://localhost:8000"
    """Address of the vLLM server ("vllm_server")."""
    timeout: float = 600.0
    """Seconds without an answer after which the engine counts as stuck ("vllm", "vllm_server")."""
    gpu_memory: float = 0.5
    """Share of the GPU's memory that a colocated vLLM may take."""
    top_p: float = 1.0


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (peft) instead of all weights. rank 0: all weights are trained."""

    rank: int = 0
    alpha: float = 32.0
    dropout: float = 0.0
    targets: str = "all-linear"


@dataclass(frozen=True)
class TrainConfig:
    """One run. `python -m integration.train --help` shows the same."""

    preset: Literal["tiny"] = "tiny"
    """Named set of defaults that the other flags change."""
    name: str = "tiny"
    """Results go to `<runs>/<name>/`. The same command continues a run that was stopped there."""
    runs: Path = Path("runs")
    overwrite: bool = False
    """An earlier run of this name with other settings is deleted; without this flag it is an error. One with the same
    settings goes on in any case."""
    init: str | None = None
    """Model to start from: a folder, or a name on the Hugging Face hub. None: a new one and a supervised warm start on
    the training data, which must then be "arithmetic" or "gym:<task>"."""
    seed: int = 0
    device: str = "auto"
    """"auto": the GPU if there is one."""
    backend: Literal["auto", "triton", "torch"] = "auto"
    """Kernels of the policy update: "auto" takes Triton on a GPU and PyTorch on a CPU."""

    baseline: Baseline = "quantile"
    """"quantile" is QAE (arXiv 2509.22611), "mean" is GRPO and DAPO; for the others see `qae_kernels.group_advantages`.
    Divided by the std of the group, "opo" as well."""
    k: float = 0.4
    """Quantile level of the baseline, strictly between 0 and 1; read by "quantile", "pos_mask", "neg_mask"."""
    k_end: float | None = None
    """K at the last step; see `k_schedule`. None: K stays what it is."""
    k_schedule: Literal["linear", "cosine", "two_phase"] = "linear"
    """From k to k_end: along a line, half a cosine, or at once in the middle of the run."""
    entropy_target: float | None = None
    """Nats per token that the entropy of the rollouts shall keep: moves K from k on (`qae_kernels.EntropyTargetK`)."""

    steps: int = 150
    """Rollouts."""
    prompts_per_step: int = 32
    group_size: int = 16
    """Responses per prompt, G."""
    minibatches: int = 4
    """Shares of a rollout's prompts, with an optimizer update each."""
    epochs: int = 1
    """Times each rollout is gone through: epochs * minibatches updates, `old_logprobs` stay what they were."""
    max_tokens: int = 4096
    """Most tokens, prompts and responses, per forward and backward; changes the memory needed and not the result."""
    old_logprobs: Literal["sampler", "recompute"] = "sampler"
    """Log-probabilities that ratios start from: "sampler", its own; "recompute", those of the training path, once per
    rollout and only for the responses with credit (for all where the engine tells no entropy)."""
    rollout_correction: Literal["none", "tis", "icepop"] = "none"
    """Weights for the mismatch of sampler and trainer, with recomputed logprobs (`qae_kernels.rollout_correction`):
    truncated importance sampling, or tokens beyond the bounds left out."""
    max_new_tokens: int = 48
    temperature: float = 1.0

    dynamic_sampling: bool = False
    """DAPO's: groups whose outcomes are all equal are drawn anew (arXiv 2503.14476, section 3.2)."""
    max_rounds: int = 10
    """Most rounds of drawing per step; the step then goes on with what it has."""
    overlong_buffer: int = 0
    """DAPO's soft punishment: the last tokens before `max_new_tokens` in which the penalty grows from 0 to
    `overlong_penalty`. 0: none."""
    overlong_penalty: float = 1.0
    mask_truncated: bool = False
    """Responses that reach `max_new_tokens` count in the group's statistics and are not trained on."""

    learning_rate: float = 1e-4
    lr_schedule: Literal["constant", "cosine"] = "constant"
    """After the warm-up; "cosine" ends at 0 with the last step."""
    warmup_steps: int = 5
    weight_decay: float = 0.0
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the forward and backward; weights and optimizer states are kept in float32."""
    activation_checkpointing: bool = False
    max_grad_norm: float = 1.0
    loss: str = "dapo"
    """Named policy loss of `qae_kernels.PRESETS`: dapo, grpo, dr_grpo, gspo, cispo, sapo, clip_cov, kl_cov, ..."""
    eps_low: float | None = None
    eps_high: float | None = None
    """Clip bounds. None: those of the loss."""

    eval_every: int = 25
    eval_samples: int = 4
    """Responses per held-out problem."""
    eval_temperature: float | None = None
    """None: that of training."""
    save_every: int = 25
    """Steps between checkpoints; a run that is killed goes on from the last."""
    keep: int = 2
    """Checkpoints kept, the newest ones, beside the best."""
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Where metrics go beside metrics.jsonl."""

    data: DataConfig = field(default_factory=DataConfig)
    verify: VerifyConfig = field(default_factory=VerifyConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    warm_start: WarmStartConfig = field(default_factory=WarmStartConfig)

    def __post_init__(self):
        if not 0 < self.k < 1:
            raise ValueError(f"k must be strictly between 0 and 1; got {self.k}")
        counts = (
            "prompts_per_step",
            "group_size",
            "minibatches",
            "epochs",
            "max_tokens",
            "max_new_tokens",
            "max_rounds",
        )
        for name in (*counts, "eval_every", "eval_samples", "save_every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        if self.prompts_per_step % self.minibatches:
            raise ValueError(
                f"minibatches ({self.minibatches}) must divide prompts_per_step ({self.prompts_per_step}): "
                "a minibatch holds whole groups"
            )
        if self.group_size == 1:
            raise ValueError("group_size must be at least 2; got 1: a response alone has an advantage of 0")
        if self.steps < 0:
            raise ValueError(f"steps must not be negative; got {self.steps}")
        if self.temperature <= 0:
            raise ValueError(f"temperature must be positive; got {self.temperature}")
        if self.k_end is not None and self.entropy_target is not None:
            raise ValueError("k_end and entropy_target are two ways to set K; expected one of them")
        if self.seed < 0:
            raise ValueError(f"seed must not be negative; got {self.seed}")
        if self.max_tokens <= self.max_new_tokens:
            raise ValueError(
                f"max_tokens ({self.max_tokens}) must hold a prompt and a response of max_new_tokens "
                f"({self.max_new_tokens})"
            )
        if not 0 <= self.overlong_buffer <= self.max_new_tokens or self.overlong_penalty < 0:
            raise ValueError(
                f"overlong_buffer must be in [0, max_new_tokens = {self.max_new_tokens}] and overlong_penalty not "
                f"negative; got {self.overlong_buffer} and {self.overlong_penalty}"
            )
        if not 0 < self.rollout.top_p <= 1:
            raise ValueError(f"rollout.top_p must be in (0, 1]; got {self.rollout.top_p}")
        if self.eval_temperature is not None and self.eval_temperature < 0:
            raise ValueError(f"eval_temperature must not be negative; got {self.eval_temperature}")
        if self.init is None and self.data.train != "arithmetic" and not self.data.train.startswith("gym:"):
            raise ValueError(f"a model to start from is needed for {self.data.train!r}; got no init")
        if self.rollout_correction != "none" and self.old_logprobs != "recompute":
            raise ValueError(
                f"rollout_correction {self.rollout_correction!r} compares the sampler's log-probabilities with the "
                f"trainer's: expected old_logprobs 'recompute'; got {self.old_logprobs!r}"
            )
        if self.loss not in LOSSES:
            raise ValueError(f"loss must be one of {', '.join(LOSSES)}; got {self.loss!r}")
        if self.rollout.engine.startswith("vllm") and self.old_logprobs == "sampler":
            wants = "entropy_target" if self.entropy_target is not None else f"loss {self.loss!r}"
            if self.entropy_target is not None or LOSSES[self.loss].top_entropy < 1:
                raise ValueError(
                    f"{wants} needs entropies, which vLLM does not tell: expected old_logprobs 'recompute'"
                )
        for name in ("eps_low", "eps_high"):
            if getattr(self, name) is not None and name not in self.loss_config.numbers:
                raise ValueError(f"loss {self.loss!r} has no clip bounds; got {name} {getattr(self, name)}")
        self.k_source()

    @property
    def folder(self) -> Path:
        return self.runs / self.name

    @property
    def loss_config(self) -> PolicyLossConfig:
        bounds = {"eps_low": self.eps_low, "eps_high": self.eps_high}
        given = {name: x for name, x in bounds.items() if x is not None}
        return replace(LOSSES[self.loss], temperature=self.temperature, **given)

    def k_source(self) -> KSchedule | EntropyTargetK:
        """What K comes from, at its beginning."""
        if self.entropy_target is not None:
            return EntropyTargetK(self.entropy_target, k=self.k, k_min=min(0.2, self.k), k_max=max(0.8, self.k))
        if self.k_end is None:
            return KSchedule.constant(self.k)
        if self.k_schedule == "two_phase":
            return KSchedule.two_phase(self.k, self.k_end, 0.5, total_steps=max(1, self.steps))
        return getattr(KSchedule, self.k_schedule)(self.k, self.k_end, max(1, self.steps - 1))


PRESETS: dict[str, TrainConfig] = {
    # A Qwen3 of 0.4 M parameters, from scratch, on two CPU cores in a few minutes.
    "tiny": TrainConfig(),
}
