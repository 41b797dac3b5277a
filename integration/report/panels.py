"""What is drawn of a run, panel by panel, and what each panel says."""

from __future__ import annotations

from dataclasses import dataclass

from .runs import Curve, Group, eval_curve, most_samples, step_curve


@dataclass(frozen=True)
class Panel:
    """One small figure: a quantity of every group."""

    title: str
    key: str
    why: str
    """What it shows and what healthy looks like, in a sentence or two."""
    data_set: str | None = None
    """Of its evaluations; None: of the training steps."""
    bottom: float | None = 0.0
    top: float | None = None
    smooth: bool = True
    """Draws the running mean of the steps. False: what is set and not measured."""
    dashed: str | None = None
    """A second quantity of the training steps, as a dashed line without a band."""

    def curve(self, group: Group, along: str = "steps") -> Curve | None:
        if self.data_set is None:
            return step_curve(group, self.key, along, self.smooth)
        return eval_curve(group, self.data_set, self.key, along)


ENTROPY = (
    Panel("Entropy of the rollouts", "sampler_entropy",
          "Nats per token, all responses. A slow decline that levels off is healthy; near 0 the policy explores no "
          "more, a steady rise is noise taking over."),
    Panel("Entropy, positive advantage", "sampler_entropy_positive",
          "Of responses that are pushed up. The baseline decides who they are: with the quantile, the rare successes "
          "of hard problems."),
    Panel("Entropy, negative advantage", "sampler_entropy_negative",
          "Of responses that are pushed down. Far above the positive side, the push is against exploration."),
    Panel("Entropy, no advantage", "sampler_entropy_zero", "Of responses that teach nothing."),
    Panel("Entropy, hard problems", "sampler_entropy_hard", "Of groups whose success rate is at most 1 - K."),
    Panel("Entropy, easy problems", "sampler_entropy_easy", "Of groups whose success rate is above 1 - K."),
    Panel("Entropy of trained tokens", "entropy", "Of the tokens that entered the update, as the trainer computes it."),
)  # fmt: skip
CREDIT = (
    Panel("Reward", "reward",
          "Mean score of the rollouts. It rises faster than the evaluations where problems repeat or get easier under "
          "dynamic sampling."),
    Panel("Share without advantage", "zero_fraction",
          "Responses of advantage 0, which the update skips. About 0.8 with the quantile in the paper; near 1, nearly "
          "nothing is learnt from.", top=1.0),
    Panel("Share with positive advantage", "positive_fraction", "Responses that are pushed up."),
    Panel("Share with negative advantage", "negative_fraction",
          "Responses that are pushed down. A higher K makes them more."),
    Panel("K", "k", "Quantile level of the baseline, as its schedule or its controller set it.", bottom=None,
          smooth=False),
)  # fmt: skip
RESPONSES = (
    Panel("Response length", "response_length",
          "Tokens, mean over the rollouts. Slow growth is common with reasoning; a jump goes with loops or with gaming "
          "the verifier."),
    Panel("Truncated responses", "truncated_fraction",
          "Share that reached the length limit. Above a few percent the limit teaches more than the verifier does."),
)  # fmt: skip
UPDATE = (
    Panel("Gradient norm", "grad_norm",
          "Before clipping, mean over the step's updates. Spikes that come more often are the first sign of an "
          "unstable run."),
    Panel("Clipped below", "clip_fraction_low",
          "Share of trained tokens that have a negative advantage and are beyond the lower bound."),
    Panel("Clipped above", "clip_fraction_high",
          "Share of trained tokens that have a positive advantage and are beyond the upper bound. All at 0: one update "
          "per rollout, or steps too small to matter."),
    Panel("Largest ratio", "ratio_max", "Of new to old probability of a token.", bottom=None),
    Panel("KL from the old policy", "approx_kl",
          "Nats per token within a step (k3 estimate): how far the updates of one rollout go."),
    Panel("Learning rate", "learning_rate", "As scheduled.", smooth=False),
)  # fmt: skip
TIME = (
    Panel("Seconds of a step", "seconds_total",
          "The whole step without its evaluation. It grows with the responses; a sudden rise is another process on the "
          "machine, or an engine that runs out of memory."),
)  # fmt: skip


def accuracy_panels(groups: list[Group]) -> list[Panel]:
    """pass@1 and pass@n of every data set that some run was evaluated on."""
    panels = []
    for name in dict.fromkeys(name for group in groups for name in group.data_sets):
        evaluations = [e for group in groups for run in group.runs for e in run.evaluations(name).values()]
        counts = {most_samples(e) for e in evaluations}
        n = counts.pop() if len(counts) == 1 else "n"
        panels.append(Panel(f"{name}: pass@1", "pass@1", "Chance that a response is right, mean over problems.", name))
        if n != 1:
            why = (
                f"Chance that one of {n} responses is right. Falling while pass@1 rises: answers get sharper, and "
                "fewer problems are within reach."
            )
            panels.append(Panel(f"{name}: pass@{n}", "pass@n", why, name))
    return panels


def panel_of(key: str) -> Panel:
    return next(panel for panel in (*ENTROPY, *CREDIT, *RESPONSES, *UPDATE) if panel.key == key)


def accuracy_of(metric: str, groups: list[Group], data_set: str | None) -> Panel:
    panels = [panel for panel in accuracy_panels(groups) if panel.key == metric]
    found = [panel for panel in panels if data_set in (None, panel.data_set)]
    if not found:
        expected = ", ".join(panel.data_set for panel in panels) or "runs with evaluations"
        raise ValueError(f"no evaluation on {data_set!r} in these runs; expected {expected}")
    return found[0]
