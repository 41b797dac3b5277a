"""Every wrong input is refused before anything runs, with a message that says what was got and what was expected."""

import math
import os
import subprocess
import sys
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import pytest
import torch
from cases import make_batch

import qae_kernels
from qae_kernels import PRESETS, PolicyLossConfig, group_advantages, policy_loss, qae_dapo_loss, token_logprobs

NAN, INF = math.nan, math.inf


def on(device):
    """Keyword arguments that make a GPU check values too, as a CPU always does."""
    return {"validate": device == "cuda"}


REWARDS = [1.0, 0.0, 0.5, 0.0]
# name: (keyword arguments that replace the right ones, message)
GROUP_ERRORS = {
    "rewards list": ({"rewards": REWARDS}, "rewards must be a torch.Tensor; got list"),
    "rewards int": ({"rewards": torch.ones(4, dtype=torch.long)},
                    r"rewards must have a floating-point dtype; got torch.int64"),
    "rewards 2d": ({"rewards": torch.zeros(2, 2)}, r"rewards must have shape \[B\].*got \(2, 2\)"),
    "rewards nan": ({"rewards": torch.tensor([0, 1, NAN, NAN])}, r"rewards\[2\] is nan \(2 such"),
    "rewards beyond float32": ({"rewards": torch.tensor([0, 1, 0, 1e300], dtype=torch.float64)},
                               r"rewards\[3\] is inf"),
    "eps inf": ({"eps": INF}, "eps must be a finite number >= 0; got inf"),
    "rewards inf": ({"rewards": torch.tensor([0, -INF, 0, 0])}, r"rewards\[1\] is -inf"),
    "outcomes list": ({"outcomes": REWARDS}, "outcomes must be a torch.Tensor; got list"),
    "outcomes shape": ({"outcomes": torch.zeros(3)}, r"outcomes must have shape \(4,\); got \(3,\)"),
    "outcomes nan": ({"outcomes": torch.tensor([0, 1, 1, NAN])}, r"outcomes\[3\] is nan"),
    "outcomes device": ({"outcomes": torch.zeros(4, device="meta")}, "outcomes is on meta"),
    "groups does not divide": ({"groups": 3}, "group size 3 does not divide the number of rewards, 4"),
    "groups too large": ({"groups": 8}, "group size 8 does not divide"),
    "groups 0": ({"groups": 0}, "must be at least 1.*got 0"),
    "groups negative": ({"groups": -2}, "must be at least 1.*got -2"),
    "groups bool": ({"groups": True}, "groups must be an int .* or a tensor .*; got bool"),
    "groups float": ({"groups": 2.0}, "groups must be an int .*; got float"),
    "groups list": ({"groups": [0, 0, 1, 1]}, "groups must be an int .*; got list"),
    "ids float": ({"groups": torch.zeros(4)}, "groups must have an integer dtype, int32 or int64; got torch.float32"),
    "ids bool": ({"groups": torch.zeros(4, dtype=torch.bool)},
                 "groups must have an integer dtype, int32 or int64; got torch.bool"),
    "ids shape": ({"groups": torch.zeros(2, dtype=torch.long)}, r"groups must have shape \(4,\); got \(2,\)"),
    "ids device": ({"groups": torch.zeros(4, dtype=torch.long, device="meta")}, "groups is on meta"),
    **{f"k {k}": ({"k": k}, "k must be a number strictly between 0 and 1.*; got " + str(k).replace("-", "."))
       for k in (0, 1, 0.0, 1.0, -0.4, 1.5, NAN, INF, True, False, None)},
    "k str": ({"k": "0.4"}, "k must be a number strictly between 0 and 1.*; got '0.4'"),
    "k list": ({"k": [0.4, 0.4]}, r"k must be a number strictly between 0 and 1, or a tensor \[num_groups\]"),
    "k tensor length": ({"k": torch.full((3,), 0.4)}, r"k must have shape \(2,\); got \(3,\)"),
    "k tensor 0-dim": ({"k": torch.tensor(0.4)}, r"k must have shape \(2,\); got \(\)"),
    "k tensor range": ({"k": torch.tensor([0.4, 1.0])}, r"strictly between 0 and 1; k\[1\] is 1.0"),
    "k tensor nan": ({"k": torch.tensor([NAN, 0.4])}, r"strictly between 0 and 1; k\[0\] is nan"),
    "k tensor dtype": ({"k": torch.tensor([0.4, 0.4], dtype=torch.bfloat16)},
                       "k as a tensor must be float32 or float64"),
    "k tensor ids": ({"k": torch.full((3,), 0.4), "groups": torch.tensor([9, 9, 9, 1])}, r"k must have shape \(2,\)"),
    "k tensor device": ({"k": torch.full((2,), 0.4, device="meta")}, "k is on meta"),
    "eps negative": ({"eps": -1e-6}, "eps must be a finite number >= 0; got -1e-06"),
    "eps nan": ({"eps": NAN}, "eps must be a finite number >= 0; got nan"),
    "eps str": ({"eps": "0"}, "eps must be a finite number >= 0; got '0'"),
    "correction float": ({"correction": 1.0}, "correction must be an integer >= 0.*; got 1.0"),
    "correction negative": ({"correction": -1}, "correction must be an integer >= 0.*; got -1"),
    "baseline": ({"baseline": "mode"},
                 "baseline must be one of 'quantile', 'mean', 'leave_one_out', 'none', 'opo', .*; got 'mode'"),
    "lengths missing": ({"baseline": "opo"}, r"baseline='opo' needs lengths \[B\], .*; got None"),
    "lengths unread": ({"baseline": "mean", "lengths": torch.ones(4)},
                       "lengths are read by baseline='opo' only; got lengths with baseline='mean'"),
    **{f"lengths {name}": ({"baseline": "opo", "lengths": value}, message) for name, value, message in (
        ("list", [1, 2, 3, 4], "lengths must be a torch.Tensor; got list"),
        ("shape", torch.ones(2), r"lengths must have shape \(4,\); got \(2,\)"),
        ("bool", torch.ones(4, dtype=torch.bool), "lengths must have an integer dtype.*; got torch.bool"),
        ("device", torch.ones(4, device="meta"), "lengths is on meta"),
        ("nan", torch.tensor([1, 2, 3, NAN]), r"lengths\[3\] is nan"),
        ("negative", torch.tensor([1, 0, -2, 4]), r"lengths must be >= 0; lengths\[2\] is -2"),
    )},
    "interpolation": ({"interpolation": "lower"}, "interpolation must be one of 'inverted_cdf', 'linear'; got 'lower'"),
    "scale": ({"scale": True}, "scale must be one of 'std', 'batch', 'none'; got True"),
    "backend": ({"backend": "cuda"}, "backend must be one of 'auto', 'triton', 'torch'; got 'cuda'"),
}  # fmt: skip


def moved(value, device):
    return value.to(device) if isinstance(value, torch.Tensor) and value.device.type == "cpu" else value


@pytest.mark.parametrize(("wrong", "message"), GROUP_ERRORS.values(), ids=GROUP_ERRORS)
def test_group_advantages(wrong, message, device):
    right = {"rewards": torch.tensor(REWARDS), "groups": 2}
    group_advantages(**{name: moved(value, device) for name, value in right.items()}, backend="torch")
    with pytest.raises(ValueError, match=message):
        group_advantages(**{name: moved(value, device) for name, value in (right | wrong).items()}, **on(device))


def test_k_is_checked_by_every_entry(device):
    rewards = torch.tensor(REWARDS, device=device)
    batch = make_batch(5, device=device, lengths=(2, 2, 2, 2))
    for call in (
        lambda: qae_kernels.quantile_advantages(rewards, 2, 1.0),
        lambda: qae_dapo_loss(batch.logits, batch.tokens, rewards, 2, k=1.0, cu_seqlens=batch.cu_seqlens),
    ):
        with pytest.raises(ValueError, match="k must be a number strictly between 0 and 1"):
            call()


N, V = 16, 7  # of make_batch(7): packed
LOSS_ERRORS = {
    "logits list": ({"logits": [[0.0]]}, "logits must be a torch.Tensor; got list"),
    "logits int": ({"logits": torch.zeros(N, V, dtype=torch.int32)},
                   "logits must have a floating-point dtype; got torch.int32"),
    "logits 1d": ({"logits": torch.zeros(V)}, r"logits must have shape \[N, V\] or \[B, T, V\]; got \(7,\)"),
    "logits 4d": ({"logits": torch.zeros(1, 4, 4, V)}, r"logits must have shape .*; got \(1, 4, 4, 7\)"),
    "no vocabulary": ({"logits": torch.zeros(N, 0)}, r"vocabulary of at least 1; got shape \(16, 0\)"),
    "tokens shape": ({"tokens": torch.zeros(N - 1, dtype=torch.long)}, r"tokens must have shape \(16,\); got \(15,\)"),
    "tokens float": ({"tokens": torch.zeros(N)},
                     "tokens must have an integer dtype, int32 or int64; got torch.float32"),
    "tokens bool": ({"tokens": torch.zeros(N, dtype=torch.bool)},
                    "tokens must have an integer dtype, int32 or int64; got torch.bool"),
    "tokens int16": ({"tokens": torch.zeros(N, dtype=torch.int16)}, "int32 or int64; got torch.int16"),
    "tokens device": ({"tokens": torch.zeros(N, dtype=torch.long, device="meta")}, "tokens is on meta, the other"),
    "token too large": ({"tokens": torch.full((N,), V)}, r"tokens must lie in \[0, 7\).*; tokens\[0\] is 7"),
    "token negative": ({"tokens": torch.tensor([0] * 6 + [-100] + [0] * 9)}, r"tokens\[6\] is -100"),
    "mask list": ({"mask": [1] * N}, "mask must be a torch.Tensor; got list"),
    "mask shape": ({"mask": torch.ones(N, 1)}, r"mask must have shape \(16,\); got \(16, 1\)"),
    "mask device": ({"mask": torch.ones(N, device="meta")}, "mask is on meta"),
}  # fmt: skip
POLICY_LOSS_ERRORS = LOSS_ERRORS | {
    "advantages list": ({"advantages": [1.0]}, "advantages must be a torch.Tensor; got list"),
    "advantages none": ({"advantages": None}, "advantages must be a torch.Tensor; got NoneType"),
    "advantages int": ({"advantages": torch.ones(N, dtype=torch.long)}, "advantages must have a floating-point dtype"),
    "advantages shape": ({"advantages": torch.ones(N + 1)}, r"\[N\] = \(16,\) or \[B\] = \(5,\).*; got \(17,\)"),
    "advantages device": ({"advantages": torch.ones(N, device="meta")}, "advantages is on meta"),
    "per response, no cu_seqlens": ({"advantages": torch.ones(5), "cu_seqlens": None},
                                    r"one value per response needs \[B, T, V\] logits, or cu_seqlens; got \(5,\)"),
    "old shape": ({"old_logprobs": torch.zeros(N, 1)}, r"old_logprobs must have shape .*; got \(16, 1\)"),
    "old per response": ({"old_logprobs": torch.zeros(5)}, r"old_logprobs must have shape \(16,\); got \(5,\)"),
    "old int": ({"old_logprobs": torch.zeros(N, dtype=torch.long)}, "old_logprobs must have a floating-point dtype"),
    "old device": ({"old_logprobs": torch.zeros(N, device="meta")}, "old_logprobs is on meta"),
    "ref per response": ({"ref_logprobs": torch.zeros(5)}, r"ref_logprobs must have shape \(16,\); got \(5,\)"),
    "rollout shape": ({"rollout_weights": torch.zeros(4)}, r"rollout_weights must have shape .*; got \(4,\)"),
    "offsets float": ({"cu_seqlens": torch.tensor([0.0, 16.0])}, "cu_seqlens must have an integer dtype"),
    "offsets list": ({"cu_seqlens": [0, 16]}, "cu_seqlens must be a torch.Tensor; got list"),
    "offsets 2d": ({"cu_seqlens": torch.tensor([[0, 16]])}, r"cu_seqlens must have shape \[B \+ 1\]; got \(1, 2\)"),
    "offsets none": ({"cu_seqlens": torch.tensor([], dtype=torch.long)}, r"cu_seqlens must have shape \[B \+ 1\]"),
    "offsets end": ({"cu_seqlens": torch.tensor([0, 15])},
                    r"cu_seqlens must rise from 0 to the number of rows, 16; got \[0, 15\]"),
    "offsets start": ({"cu_seqlens": torch.tensor([1, 16])}, r"cu_seqlens must rise from 0 .*; got \[1, 16\]"),
    "offsets fall": ({"cu_seqlens": torch.tensor([0, 9, 8, 16])},
                     r"cu_seqlens must rise from 0 .*; got \[0, 9, 8, 16\]"),
    "offsets device": ({"cu_seqlens": torch.tensor([0, 16], device="meta")}, "cu_seqlens is on meta"),
    "kl without ref": ({"config": PolicyLossConfig(kl_coef=0.1)}, "kl_coef is 0.1: the KL penalty needs ref_logprobs"),
    "sequences unknown": ({"config": PRESETS["grpo"], "cu_seqlens": None},
                          r"aggregation 'seq-mean-token-mean' needs to know the responses"),
    "normalizer negative": ({"normalizer": -1}, "normalizer must be a count of tokens or sequences, >= 0; got -1"),
    "normalizer nan": ({"normalizer": torch.tensor(NAN)}, "normalizer must be a count .*; got nan"),
    "normalizer bool": ({"normalizer": True}, "normalizer must be a count .*; got True"),
    "normalizer shape": ({"normalizer": torch.ones(2)},
                         r"normalizer must be a number or a tensor of one element; got shape \(2,\)"),
    "config": ({"config": "dapo"}, r"config must be a PolicyLossConfig, such as PRESETS\['dapo'\]; got 'dapo'"),
    "entropy": ({"entropy": "zero"}, "entropy must be one of 'all', 'active', 'none'; got 'zero'"),
    "entropy bonus without entropy": ({"entropy": "none", "config": PolicyLossConfig(entropy_coef=0.1)},
                                      "entropy_coef is 0.1: that needs the entropy; entropy='none' computes none"),
    "backend": ({"backend": "cpu"}, "backend must be one of 'auto', 'triton', 'torch'; got 'cpu'"),
    "triton float64": ({"backend": "triton", "logits": torch.zeros(N, V, dtype=torch.float64)},
                       "for float64 pass backend='torch'"),
}  # fmt: skip


@pytest.mark.parametrize(("wrong", "message"), POLICY_LOSS_ERRORS.values(), ids=POLICY_LOSS_ERRORS)
def test_policy_loss(wrong, message, device):
    """Refused, and with inplace=True nothing was overwritten by then."""
    batch = make_batch(V, device=device)
    right = {"logits": batch.logits.requires_grad_(), "tokens": batch.tokens, "advantages": batch.advantages,
             "cu_seqlens": batch.cu_seqlens, "old_logprobs": batch.old_logprobs}  # fmt: skip
    policy_loss(**right, backend="torch")
    before = batch.logits.detach().clone()
    arguments = {name: moved(value, device) for name, value in (right | wrong).items()}
    with pytest.raises(ValueError, match=message):
        policy_loss(**arguments, inplace=True, **on(device))
    assert (batch.logits == before).all()


@pytest.mark.parametrize(("wrong", "message"), LOSS_ERRORS.values(), ids=LOSS_ERRORS)
def test_token_logprobs(wrong, message, device):
    batch = make_batch(V, device=device)
    arguments = {"logits": batch.logits, "tokens": batch.tokens, "mask": batch.mask}
    token_logprobs(**arguments, backend="torch")
    if message.startswith((r"tokens\[6\]", r"tokens must lie")):
        arguments["mask"] = torch.ones_like(batch.mask)
    with pytest.raises(ValueError, match=message):
        token_logprobs(**{name: moved(value, device) for name, value in (arguments | wrong).items()}, **on(device))


def test_inplace_needs_a_contiguous_vocabulary(backend, device):
    logits = torch.randn(7, 16, device=device).t()
    before = logits.clone()
    arguments = {
        "tokens": torch.zeros(16, dtype=torch.long, device=device),
        "advantages": torch.ones(16, device=device),
    }
    with pytest.raises(ValueError, match=r"needs logits with stride 1 in the vocabulary; got strides \(1, 16\)"):
        policy_loss(logits.requires_grad_(), **arguments, inplace=True, backend=backend)
    assert (logits == before).all()


def test_inplace_with_one_token_and_any_stride(backend, device):
    logits = torch.zeros(16, 1, device=device).requires_grad_()
    view = torch.as_strided(logits * 1, (16, 1), (1, 7))
    out = policy_loss(view, torch.zeros(16, dtype=torch.long, device=device), torch.ones(16, device=device),
                      inplace=True, backend=backend)  # fmt: skip
    out.loss.backward()
    assert out.loss == -1


@pytest.mark.parametrize("name", ["advantages", "rollout_weights"])
def test_values_that_may_be_of_tokens_or_of_responses(name, device):
    """As many tokens as responses, one of them empty: N values could mean either. With a token in each both agree."""
    batch = make_batch(V, device=device, lengths=(2, 0, 1))
    values = {"advantages": batch.advantages, "rollout_weights": None, name: torch.ones(3, device=device)}
    arguments = {"cu_seqlens": batch.cu_seqlens, "validate": True}
    if name == "rollout_weights":
        values["advantages"] = torch.ones(3, device=device)
    with pytest.raises(ValueError, match=r"has shape \(3,\), and cu_seqlens describes 3 responses of 3 tokens"):
        policy_loss(batch.logits, batch.tokens, **values, **arguments)
    arguments["cu_seqlens"] = torch.arange(4, device=device)
    policy_loss(batch.logits, batch.tokens, **values, **arguments)


def test_inplace_needs_rows_of_their_own(backend, device):
    logits = torch.randn(1, 16, device=device).expand(7, 16)
    arguments = {"tokens": torch.zeros(7, dtype=torch.long, device=device), "advantages": torch.ones(7, device=device)}
    with pytest.raises(ValueError, match=r"needs rows that do not share memory; got strides \(0, 1\)"):
        policy_loss(logits.requires_grad_(), **arguments, inplace=True, backend=backend)


def test_offsets_do_not_go_with_padded_tensors(device):
    batch = make_batch(V, "padded", device=device)
    offsets = torch.tensor([0, batch.tokens.numel()], device=device)
    with pytest.raises(ValueError, match="cu_seqlens goes with packed tensors"):
        policy_loss(batch.logits, batch.tokens, batch.advantages, cu_seqlens=offsets)
    with pytest.raises(ValueError, match=r"must have shape \[B, T\] = \(3, 6\) or \[B\] = \(3,\); got \(6,\)"):
        policy_loss(batch.logits, batch.tokens, batch.advantages[0])
    tokens = batch.tokens.clone()
    tokens[1, 2] = 9
    with pytest.raises(ValueError, match=r"tokens\[1, 2\] is 9"):
        policy_loss(batch.logits, tokens, batch.advantages, **on(device))


@pytest.mark.parametrize("temperature", [0, 0.0, -1.0, NAN, INF, True, "1", None])
def test_temperature(temperature, device):
    batch = make_batch(V, device=device)
    with pytest.raises(ValueError, match="temperature must be > 0; got"):
        token_logprobs(batch.logits, batch.tokens, temperature=temperature)
    with pytest.raises(ValueError, match="temperature must be > 0; got"):
        qae_dapo_loss(batch.logits, batch.tokens, batch.per_response[:5], 5, cu_seqlens=batch.cu_seqlens,
                      temperature=temperature)  # fmt: skip


CONFIG_ERRORS = [
    ("objective", ["ppo", None], "objective must be one of 'clip', 'cispo', .*; got"),
    ("ratio", ["tokens", 1], "ratio must be one of 'token'.*; got"),
    ("aggregation", ["mean", None], "aggregation must be one of 'token-mean', .*; got"),
    ("kl_estimator", ["k4"], "kl_estimator must be one of 'k1', 'k2', 'k3', 'k3_is'; got 'k4'"),
    ("eps_low", [-0.1, 1.1, NAN, "0.2", None, True], r"eps_low must be in \[0, 1\]; got"),
    ("eps_high", [-0.1, NAN, INF, None], "eps_high must be >= 0; got"),
    ("dual_clip", [1, 1.0, 0.5, -3, NAN, INF, True], "dual_clip must be > 1, or None; got"),
    ("kl_coef", [-1, NAN, None], "kl_coef must be >= 0; got"),
    ("entropy_coef", [NAN, INF, None, False], "entropy_coef must be a finite number; got"),
    ("temperature", [0, -1, NAN, INF], "temperature must be > 0; got"),
    ("loss_scale_factor", [0, -1.0, NAN, "8"], "loss_scale_factor must be > 0, or None; got"),
]


@pytest.mark.parametrize(("field", "values", "message"), CONFIG_ERRORS, ids=[field for field, _, _ in CONFIG_ERRORS])
def test_config(field, values, message):
    for value in values:
        with pytest.raises(ValueError, match=message):
            PolicyLossConfig(**{field: value})
        with pytest.raises(ValueError, match=message):
            replace(PRESETS["dapo"], **{field: value})
    with pytest.raises(FrozenInstanceError):
        setattr(PRESETS["dapo"], field, getattr(PRESETS["grpo"], field))


def test_config_accepts_its_bounds():
    config = PolicyLossConfig(eps_low=0, eps_high=0, kl_coef=0, entropy_coef=-1, dual_clip=1.01)
    assert config.eps_low == 0 and PolicyLossConfig(eps_low=1).eps_low == 1


@pytest.mark.slow
def test_triton_needs_a_gpu_or_the_interpreter():
    """On a CPU without TRITON_INTERPRET: a clear error for "triton", and PyTorch for "auto"."""
    code = """
import torch, qae_kernels as q
rewards, logits, tokens = torch.tensor([1., 0.]), torch.zeros(2, 3), torch.tensor([0, 1])
for call in (lambda backend: q.quantile_advantages(rewards, 2, backend=backend),
             lambda backend: q.policy_loss(logits, tokens, rewards, backend=backend),
             lambda backend: q.token_logprobs(logits, tokens, backend=backend)):
    call("auto"), call("torch")
    try:
        call("triton")
    except ValueError as error:
        assert "needs a GPU tensor, or TRITON_INTERPRET=1 in the environment; got cpu" in str(error), error
    else:
        raise AssertionError("not refused")
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = Path(qae_kernels.__file__).parents[1]
    subprocess.run([sys.executable, "-c", code], cwd=root, env=environment, check=True)
