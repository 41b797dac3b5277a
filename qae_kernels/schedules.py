"""Where K comes from if it is not one number: from the step, from the entropy of the policy, or from the prompt.

Fixed K is what arXiv 2509.22611 studies; schedules and K adapted to the state of the model are its open questions, and
no results of either are known. Its first-order theory says that the one-step change of a prompt's entropy rises
with the baseline, and its ablation that runs with a higher K have the higher entropy. All of this is plain Python and
costs nothing; every object gives its state as JSON and takes it back, to the bit.

    k = schedule(step)                                   # KSchedule
    k = controller.update(entropy)                       # EntropyTargetK
    k = difficulty.k_for(prompt_ids, device=device)      # DifficultyK: [num_groups]
    advantages = quantile_advantages(rewards, groups, k)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeGuard, get_args

import torch
from torch import Tensor

from .checks import one_of

Shape = Literal["linear", "cosine"]


@dataclass(frozen=True)
class KSchedule:
    """K by the step: `k_start` for `hold` steps, then over `ramp` steps to `k_end`, which is kept.

    k_start, k_end: strictly between 0 and 1, as every value between them is.
    hold: steps with k_start. ramp: steps from k_start to k_end, 0 for a jump: step `hold` is then the first with k_end.
    shape: of the ramp, "linear" or "cosine" (slow, fast, slow).

    `schedule(step)` is K at that step, an int from 0. The usual ones have names: `constant`, `linear`, `cosine`,
    `two_phase`. Raises ValueError where a number is out of its range.
    """

    k_start: float
    k_end: float
    hold: int = 0
    ramp: int = 0
    shape: Shape = "linear"

    def __post_init__(self) -> None:
        _level("k_start", self.k_start)
        _level("k_end", self.k_end)
        _count("hold", self.hold, 0)
        _count("ramp", self.ramp, 0)
        one_of("shape", self.shape, get_args(Shape))

    @classmethod
    def constant(cls, k: float) -> KSchedule:
        return cls(k, k)

    @classmethod
    def linear(cls, k_start: float, k_end: float, steps: int) -> KSchedule:
        """k_start at step 0, k_end from step `steps` on."""
        _count("steps", steps, 1)
        return cls(k_start, k_end, ramp=steps)

    @classmethod
    def cosine(cls, k_start: float, k_end: float, steps: int) -> KSchedule:
        """k_start at step 0, k_end from step `steps` on, along half a cosine."""
        _count("steps", steps, 1)
        return cls(k_start, k_end, ramp=steps, shape="cosine")

    @classmethod
    def two_phase(
        cls, k_start: float, k_end: float, until: int | float, *, total_steps: int | None = None, ramp: int = 0
    ) -> KSchedule:
        """k_start before step `until`, k_end from there (`ramp=0`) or from `ramp` steps later on.

        until: a step, as an int; or as a float between 0 and 1 the share of total_steps, to the nearest step.
        """
        if isinstance(until, float):
            _number("until, a share of total_steps,", until, 0, 1)
            if total_steps is None:
                raise ValueError(f"until={until!r} is a share: it needs total_steps")
            _count("total_steps", total_steps, 1)
            until = round(until * total_steps)
        elif total_steps is not None:
            raise ValueError(f"total_steps goes with a share of it, a float between 0 and 1; got until={until!r}")
        _count("until", until, 0)
        return cls(k_start, k_end, hold=until, ramp=ramp)

    def __call__(self, step: int) -> float:
        _count("step", step, 0)
        if step < self.hold:
            return float(self.k_start)
        if step >= self.hold + self.ramp:
            return float(self.k_end)
        share = (step - self.hold) / self.ramp
        if self.shape == "cosine":
            share = (1 - math.cos(math.pi * share)) / 2
        return _clip(self.k_start + share * (self.k_end - self.k_start), *sorted((self.k_start, self.k_end)))

    def state_dict(self) -> dict[str, Any]:
        """Its numbers, JSON: `KSchedule(**state)` is the schedule again."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """A schedule has no state. Raises ValueError if the state is that of another schedule, and names the values."""
        mine = self.state_dict()
        _keys("KSchedule", state, mine)
        different = [f"{name} is {state[name]!r}, here {mine[name]!r}" for name in mine if state[name] != mine[name]]
        if different:
            raise ValueError(f"the state is of another KSchedule: {'; '.join(different)}")


class EntropyTargetK:
    """K that holds the entropy of the policy near a target: it rises where the entropy is too low, and falls above.

    After each update, with e the smoothed entropy and e' the one before:

        k <- clip(k + clip(gain (target - e) - damping (e - e'), -max_step, max_step), k_min, k_max)

    target: entropy, in nats per token if that is what `update` gets. The mean over all tokens of a rollout is usual.
    k: where it starts. k_min, k_max: bounds, strictly between 0 and 1, that it never leaves.
    gain: change of K per update and nat that the entropy is away from the target.
    damping: change of K per nat that the entropy moved since the last update, against the movement. K sets the drift of
        the entropy rather than its level (arXiv 2509.22611, theory), and a controller that only adds up the error
        swings about its target then. 0: none.
    max_step: largest change of K in one update.
    smoothing: in [0, 1): e <- smoothing e + (1 - smoothing) entropy; the first entropy is taken as it is. 0: none.
    dead_band: K stays where it is while the entropy is this close to the target, in nats.

    The sum of the errors is K itself, which is bounded, so nothing winds up while it is at a bound. Give all ranks the
    same entropy, reduced over them, or their K will differ. The defaults are not tuned on any training run.

    Raises ValueError: a number out of its range; k outside [k_min, k_max].
    """

    def __init__(
        self,
        target: float,
        *,
        k: float = 0.4,
        k_min: float = 0.2,
        k_max: float = 0.8,
        gain: float = 0.02,
        damping: float = 0.5,
        max_step: float = 0.02,
        smoothing: float = 0.8,
        dead_band: float = 0.0,
    ):
        for name, value in (("k", k), ("k_min", k_min), ("k_max", k_max)):
            _level(name, value)
        if not k_min <= k <= k_max:
            raise ValueError(f"k must lie in [k_min, k_max]; got k={k!r}, k_min={k_min!r}, k_max={k_max!r}")
        _number("target", target, 0, math.inf)
        _number("gain", gain, 0, math.inf)
        _number("damping", damping, 0, math.inf, low_is_allowed=True)
        _number("max_step", max_step, 0, math.inf)
        _number("smoothing", smoothing, 0, 1, low_is_allowed=True)
        _number("dead_band", dead_band, 0, math.inf, low_is_allowed=True)
        self.target, self.k_min, self.k_max = float(target), float(k_min), float(k_max)
        self.gain, self.damping, self.max_step = float(gain), float(damping), float(max_step)
        self.smoothing, self.dead_band = float(smoothing), float(dead_band)
        self._k = float(k)
        self._entropy: float | None = None

    @property
    def k(self) -> float:
        """K for the next batch."""
        return self._k

    @property
    def entropy(self) -> float | None:
        """The smoothed entropy; None before the first update."""
        return self._entropy

    def update(self, entropy: float | Tensor) -> float:
        """Takes the entropy of the last batch, a number or a tensor of one element; returns K for the next.

        Reading a tensor on a GPU waits for it. Raises ValueError if it is NaN or infinite; nothing has changed then.
        """
        if isinstance(entropy, Tensor):
            if entropy.numel() != 1:
                raise ValueError(f"entropy must be one number; got a tensor of shape {tuple(entropy.shape)}")
            entropy = entropy.item()
        _number("entropy", entropy, -math.inf, math.inf)
        before = entropy if self._entropy is None else self._entropy
        smooth = self.smoothing * before + (1 - self.smoothing) * entropy
        error = self.target - smooth
        if abs(error) > self.dead_band:
            step = _clip(self.gain * error - self.damping * (smooth - before), -self.max_step, self.max_step)
            self._k = _clip(self._k + step, self.k_min, self.k_max)
        self._entropy = smooth
        return self._k

    def state_dict(self) -> dict[str, Any]:
        """K and the smoothed entropy, JSON. The settings are not in it: they are those of the constructor."""
        return {"k": self._k, "entropy": self._entropy}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError, and changes nothing, if the state is not one of this class or K is out of the bounds."""
        _keys("EntropyTargetK", state, self.state_dict())
        k, entropy = state["k"], state["entropy"]
        _level("k of the state", k)
        if not self.k_min <= k <= self.k_max:
            raise ValueError(f"k of the state must lie in [{self.k_min}, {self.k_max}]; got {k!r}")
        if entropy is not None:
            _number("entropy of the state", entropy, -math.inf, math.inf)
        self._k, self._entropy = float(k), None if entropy is None else float(entropy)


class DifficultyK:
    """K for each prompt, from how often it was solved before: a line from `k_hard` (never) to `k_easy` (always).

    The gate of a group with success rate p is hard iff p <= 1 - K (only successes get an advantage), else easy (only
    failures do). With one K for all, the luck of one group decides for a prompt whose success rate is near 1 - K. With
    k_hard < k_easy a prompt that used to be hard has a low K, and its gate stays hard unless the group does much better
    than the prompt used to; one that used to be easy stays easy likewise. With k_hard > k_easy the gate works against
    the history. No results of K by prompt have been published.

        weight    <- decay weight + 1
        successes <- decay successes + success rate of the group          when a prompt is seen
        K = (prior_weight k + (weight - successes) k_hard + successes k_easy) / (prior_weight + weight)

    k_hard, k_easy: K of a prompt that was never, or always, solved. k: of one never seen. Strictly between 0 and 1.
    prior_weight: how many groups k counts as; with 0 a prompt's first group decides alone.
    decay: in (0, 1]: how much a group still counts when the prompt is seen the next time; 1: all groups count alike.

    Keeps two numbers per prompt id. All ranks must give the same updates, or hold prompts of their own.

    Raises ValueError: a number out of its range.
    """

    def __init__(self, k_hard: float, k_easy: float, *, k: float = 0.4, prior_weight: float = 1.0, decay: float = 0.9):
        for name, value in (("k_hard", k_hard), ("k_easy", k_easy), ("k", k)):
            _level(name, value)
        _number("prior_weight", prior_weight, 0, math.inf, low_is_allowed=True)
        if decay != 1:
            _number("decay, if not 1,", decay, 0, 1)
        self.k_hard, self.k_easy, self.k = float(k_hard), float(k_easy), float(k)
        self.prior_weight, self.decay = float(prior_weight), float(decay)
        self._history: dict[str | int, tuple[float, float]] = {}  # (weight, successes)

    def k_for(self, prompt_ids: Sequence[str | int], device: torch.device | str | None = None) -> Tensor:
        """[num_groups] float32: K of each prompt, in the order of the ids.

        `group_advantages` wants it in the order of `.group_ids`: that of the batch for contiguous groups, ascending for
        groups given as ids. Ask before `update`, or the group decides on its own gate once more.
        """
        _ids(prompt_ids)
        ks = torch.tensor([self._k_of(prompt) for prompt in prompt_ids], dtype=torch.float32, device=device)
        return ks.clamp(torch.finfo(torch.float32).tiny, 1 - 2**-24)  # a K so near 0 or 1 that float32 makes it that

    def _k_of(self, prompt: str | int) -> float:
        weight, successes = self._history.get(prompt, (0.0, 0.0))
        if self.prior_weight + weight == 0:
            return self.k
        total = self.prior_weight * self.k + (weight - successes) * self.k_hard + successes * self.k_easy
        return total / (self.prior_weight + weight)

    def update(self, prompt_ids: Sequence[str | int], success_rates: Sequence[float] | Tensor) -> None:
        """Takes the success rate, in [0, 1], of one group of each prompt, such as `Advantages.success_rate`.

        Reading a tensor on a GPU waits for it. Raises ValueError, and changes nothing, if one is out of range, or if
        there are not as many rates as ids.
        """
        _ids(prompt_ids)
        rates = success_rates.tolist() if isinstance(success_rates, Tensor) else success_rates
        if not isinstance(rates, Sequence) or len(rates) != len(prompt_ids):
            got = len(rates) if isinstance(rates, Sequence) else repr(rates)
            raise ValueError(f"success_rates must be as many as the prompt ids, {len(prompt_ids)}; got {got}")
        for i, rate in enumerate(rates):
            _rate(f"success_rates[{i}]", rate)
        for prompt, rate in zip(prompt_ids, rates, strict=True):
            weight, successes = self._history.get(prompt, (0.0, 0.0))
            self._history[prompt] = (self.decay * weight + 1, self.decay * successes + rate)

    def state_dict(self) -> dict[str, Any]:
        """[id, weight, successes] of each prompt, JSON; not a dict by id, in which JSON would turn 7 into "7"."""
        return {"history": [[prompt, *counts] for prompt, counts in self._history.items()]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replaces the history. Raises ValueError, and changes nothing, if the state is not one of this class."""
        _keys("DifficultyK", state, self.state_dict())
        history = {}
        if not isinstance(state["history"], list | tuple):
            raise ValueError(f"history of the state must be a list; got {type(state['history']).__name__}")
        for entry in state["history"]:
            if not isinstance(entry, list | tuple) or len(entry) != 3:
                raise ValueError(f"history of the state must hold [id, weight, successes]; got {entry!r}")
            prompt, weight, successes = entry
            _ids([prompt])
            _number(f"weight of {prompt!r}", weight, 0, math.inf)
            _number(f"successes of {prompt!r}", successes, 0, weight, low_is_allowed=True, high_is_allowed=True)
            history[prompt] = (float(weight), float(successes))
        self._history = history


def _clip(x: float, low: float, high: float) -> float:
    return min(max(x, low), high)


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _number(
    name: str, value: object, low: float, high: float, low_is_allowed: bool = False, high_is_allowed: bool = False
) -> None:
    """A finite number between the two."""
    if not (
        _is_number(value)
        and (low < value or (low_is_allowed and value == low))
        and (value < high or (high_is_allowed and value == high))
    ):
        left, right = "[" if low_is_allowed else "(", "]" if high_is_allowed else ")"
        raise ValueError(f"{name} must be a finite number in {left}{low}, {high}{right}; got {value!r}")


def _level(name: str, value: object) -> None:
    if not (_is_number(value) and 0 < value < 1):
        raise ValueError(f"{name} must be a number strictly between 0 and 1; got {value!r}")


def _rate(name: str, value: object) -> None:
    _number(name, value, 0, 1, low_is_allowed=True, high_is_allowed=True)


def _count(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be an integer >= {least}; got {value!r}")


def _ids(prompt_ids: object) -> None:
    if not isinstance(prompt_ids, list | tuple | range):
        raise ValueError(f"prompt_ids must be a list of str or int; got {type(prompt_ids).__name__}")
    for i, prompt in enumerate(prompt_ids):
        if isinstance(prompt, bool) or not isinstance(prompt, str | int):
            raise ValueError(f"prompt_ids must be str or int; prompt_ids[{i}] is {prompt!r}")


def _keys(name: str, state: object, expected: dict[str, Any]) -> None:
    if not isinstance(state, dict) or set(state) != set(expected):
        got = sorted(map(str, state)) if isinstance(state, dict) else type(state).__name__
        raise ValueError(f"the state of a {name} has the keys {sorted(expected)}; got {got}")
