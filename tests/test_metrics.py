"""Metrics of a loss, token by token in Python; and of which values they are."""

import pytest
import torch
from cases import CONFIGS, LAYOUTS, make_batch, optional_arguments

from qae_kernels import policy_loss


def metrics_by_hand(out, batch, config, old, ref):
    """Token by token, in Python."""
    tokens = []
    for i in range(batch.tokens.numel()):
        if batch.mask.view(-1)[i]:
            logprob, entropy, advantage = (x.view(-1)[i].double().item() for x in
                                           (out.logprobs, out.entropy, batch.advantages))  # fmt: skip
            log_ratio = 0.0 if old is None else logprob - old.view(-1)[i].item()
            distance = 0.0 if ref is None else ref.view(-1)[i].item() - logprob
            tokens.append((entropy, advantage, log_ratio, distance))

    def mean(values):
        values = list(values)
        return sum(values) / max(len(values), 1)

    ratios = [torch.tensor(log_ratio).double().exp().item() for _, _, log_ratio, _ in tokens]
    kl = {"k1": lambda d: -d, "k2": lambda d: d * d / 2, "k3": lambda d: torch.tensor(d).double().exp().item() - 1 - d}
    return {
        "entropy": mean(e for e, _, _, _ in tokens),
        "entropy_positive": mean(e for e, a, _, _ in tokens if a > 0),
        "entropy_negative": mean(e for e, a, _, _ in tokens if a < 0),
        "entropy_zero": mean(e for e, a, _, _ in tokens if a == 0),
        "clip_fraction_low": mean(r < 1 - config.eps_low and t[1] < 0 for r, t in zip(ratios, tokens, strict=True)),
        "clip_fraction_high": mean(r > 1 + config.eps_high and t[1] > 0 for r, t in zip(ratios, tokens, strict=True)),
        "ratio_mean": mean(ratios),
        "ratio_max": max(ratios),
        "ratio_min": min(ratios),
        "tokens": len(tokens),
        "effective_tokens": sum(
            config.kl_coef != 0
            or config.entropy_coef != 0
            or (a != 0 and not (r < 1 - config.eps_low and a < 0) and not (r > 1 + config.eps_high and a > 0))
            for r, (_, a, _, _) in zip(ratios, tokens, strict=True)
        ),
        "approx_kl": mean(r - 1 - t[2] for r, t in zip(ratios, tokens, strict=True)),
        "active_fraction": mean(config.kl_coef != 0 or config.entropy_coef != 0 or a != 0 for _, a, _, _ in tokens),
        "kl": 0.0 if ref is None else mean(kl[config.kl_estimator](d) for _, _, _, d in tokens),
    }


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("name", "on_policy", "with_ref"), [
    ("dapo", False, False), ("dapo", True, False), ("dapo", False, True), ("entropy", False, False),
    ("k1", False, True), ("k2", False, True), ("k3", True, True),
])  # fmt: skip
def test_metrics(name, on_policy, with_ref, layout, backend, device):
    batch = make_batch(57, layout, device=device)
    advantages, keywords = optional_arguments(batch, on_policy=on_policy, ref=with_ref)
    out = policy_loss(batch.logits, batch.tokens, advantages, config=CONFIGS[name], backend=backend, **keywords)
    expected = metrics_by_hand(out, batch, CONFIGS[name], keywords["old_logprobs"], keywords.get("ref_logprobs"))
    assert set(out.metrics) == set(expected)
    for metric, value in expected.items():
        assert out.metrics[metric].item() == pytest.approx(value, rel=2e-6, abs=1e-7), metric
        assert out.metrics[metric].shape == () and out.metrics[metric].device == batch.logits.device


def test_metrics_are_of_the_values_that_were_passed(backend, device):
    """They are computed on access; by then the caller may have written other numbers into its buffers."""
    batch = make_batch(device=device)
    advantages, keywords = optional_arguments(batch, rollout=True, ref=True)

    def output(*, overwrite: bool):
        own = {name: x.clone() for name, x in keywords.items()}
        credit = advantages.clone()
        out = policy_loss(batch.logits, batch.tokens, credit, backend=backend, **own)
        if overwrite:
            for x in (credit, *own.values()):
                x.zero_()
        return {name: value.item() for name, value in out.metrics.items()}

    assert output(overwrite=True) == output(overwrite=False)


def test_tokens_without_rollout_weight_carry_no_credit(backend, device):
    batch = make_batch(device=device)
    weights = batch.rollout_weights.clone()
    weights[::2] = 0
    out = policy_loss(batch.logits, batch.tokens, batch.advantages, mask=batch.mask, rollout_weights=weights,
                      backend=backend)  # fmt: skip
    credit = (batch.advantages * weights != 0) & batch.mask
    assert 0 < credit.sum() < ((batch.advantages != 0) & batch.mask).sum()
    assert out.metrics["active_fraction"].item() == pytest.approx(credit.sum().item() / batch.mask.sum().item())


@pytest.mark.parametrize("entropy", ["active", "none"])
@pytest.mark.parametrize("name", ["dapo", "k3"])
def test_metrics_of_the_rows_that_were_read(name, entropy, backend, device):
    """As if the rows without credit were masked, except for counts of all tokens; no entropy that is not known."""
    config = CONFIGS[name]
    batch = make_batch(57, device=device)
    advantages, keywords = optional_arguments(batch, ref=True, rollout=True)
    mask = keywords.pop("mask")

    def metrics(mask, entropy):
        return policy_loss(batch.logits, batch.tokens, advantages, mask=mask, config=config, entropy=entropy,
                           backend=backend, **keywords).metrics  # fmt: skip

    whole = metrics(mask, "all")
    expected = metrics(mask & (batch.advantages != 0), "all") if config.skips_zero_credit else whole
    expected |= {key: whole[key] for key in ("active_fraction", "tokens")}
    got = metrics(mask, entropy)
    if entropy == "none":
        expected = {key: value for key, value in expected.items() if not key.startswith("entropy")}
    elif config.skips_zero_credit:
        del expected["entropy_zero"]  # nobody knows it
    assert set(got) == set(expected)
    for key, value in got.items():
        assert value.item() == pytest.approx(expected[key].item(), rel=2e-6, abs=1e-7), key
