"""From rewards to loss in one call: the two steps it stands for, and the paper's formula by autograd."""

import pytest
import torch
from cases import LAYOUTS, assert_same, make_batch, run
from tolerances import assert_bitwise, assert_gradient, assert_statistics

from qae_kernels import PRESETS, PolicyLossConfig, qae_dapo_loss, quantile_advantages

DAPO = PRESETS["dapo"]


def dapo_by_hand(logits, tokens, advantages, mask, old_logprobs, temperature, eps_low, eps_high):
    """The DAPO loss as its paper writes it, by autograd, sharing no code with the package."""
    logprobs = torch.log_softmax(logits.double() / temperature, -1).gather(-1, tokens[..., None])[..., 0]
    ratio = (logprobs - (logprobs.detach() if old_logprobs is None else old_logprobs.double())).exp()
    surrogate = torch.minimum(ratio * advantages, ratio.clip(1 - eps_low, 1 + eps_high) * advantages)
    return -(surrogate * mask).sum() / mask.sum()


@pytest.mark.parametrize("on_policy", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_qae_dapo_loss(layout, on_policy, backend, device):
    batch = make_batch(57, layout, device=device, lengths=(3, 4, 2, 4, 1, 3, 2, 4))
    rewards = torch.tensor([1.0, 0, 0, 0, 1, 1, 1, 0], device=device)  # hard, then easy
    old = None if on_policy else batch.old_logprobs
    arguments = {"mask": batch.mask, "cu_seqlens": batch.cu_seqlens, "old_logprobs": old, "backend": backend}
    logits = batch.logits.clone().requires_grad_()
    out = qae_dapo_loss(logits, batch.tokens, rewards, 4, eps_low=0.1, eps_high=0.3, temperature=0.9, **arguments)
    out.loss.backward()

    advantages = quantile_advantages(rewards, 4, backend=backend).advantages
    config = PolicyLossConfig(eps_low=0.1, eps_high=0.3, temperature=0.9)
    assert_same(replace_loss(out, logits), run(batch, advantages, config, **arguments))

    exact = batch.logits.double().requires_grad_()
    # success rate 1/4: baseline 0, std 1/2; 3/4: baseline 1, std 1/2 (divided by G - 1)
    by_hand = torch.tensor([2.0, 0, 0, 0, 0, 0, 0, -2], dtype=torch.float64, device=device) / (1 + 2e-6)
    loss = dapo_by_hand(exact, batch.tokens, batch.spread(by_hand), batch.mask, old, 0.9, 0.1, 0.3)
    loss.backward()
    assert_statistics(out.loss.detach(), loss.detach(), torch.float32, "loss")
    assert_gradient(logits.grad, exact.grad, torch.float32)


def replace_loss(out, logits):
    """A PolicyLossOutput in the shape of what `run` returns."""
    return type("Result", (), {"loss": out.loss.detach(), "logprobs": out.logprobs, "entropy": out.entropy,
                               "dlogits": logits.grad})  # fmt: skip


def test_qae_dapo_loss_passes_everything_on(backend, device):
    """k, outcomes, ragged groups, normalizer and inplace reach the two steps."""
    batch = make_batch(57, "padded", device=device, lengths=(3, 4, 2, 4))
    rewards, outcomes = torch.tensor([[1.0, -0.5, 0.9, -1.0], [1, 0, 1, 0]], device=device)
    groups = torch.tensor([5, 2, 2, 5], device=device)
    logits = batch.logits.clone().requires_grad_()
    out = qae_dapo_loss(logits, batch.tokens, rewards, groups, k=0.6, outcomes=outcomes, mask=batch.mask,
                        normalizer=40, inplace=True, backend=backend)  # fmt: skip
    out.loss.backward()
    advantages = quantile_advantages(rewards, groups, 0.6, outcomes=outcomes, backend=backend).advantages
    expected = run(batch, advantages, DAPO, mask=batch.mask, normalizer=40, backend=backend)
    assert_same(replace_loss(out, logits), expected)
    assert_bitwise(logits.detach(), expected.dlogits, "logits, overwritten")
    assert (advantages != quantile_advantages(rewards, groups, 0.4, backend=backend).advantages).any()
