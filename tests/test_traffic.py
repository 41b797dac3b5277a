"""Global memory that the kernels ask for and launches, counted in the interpreter: no read and no launch too many."""

import json
import os

import pytest
import torch
import triton
import triton.language as tl

from bench import peers, traffic
from bench.traffic import count_as_on_gpu, count_launches
from qae_kernels import token_logprobs

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="bytes need Triton's interpreter")
ROWS, VOCAB = 5, 20_000  # what is read once per row does not show


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Not here: its fills would be counted."""


@triton.jit
def copy_kernel(x_ptr, y_ptr, counter_ptr, N, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs, mask=offs < N), mask=offs < N)
    tl.atomic_add(counter_ptr, 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_masked_elements_are_not_counted(dtype):
    x, y, counter = torch.randn(1000).to(dtype), torch.zeros(1000, dtype=dtype), torch.zeros(1, dtype=torch.int32)
    with count_launches() as counts:
        copy_kernel[(8,)](x, y, counter, 1000, BLOCK=128)
    assert x.equal(y) and counter == 8
    moved = 1000 * dtype.itemsize + 8 * 4  # the counter is read and written
    assert counts.bytes == {"triton_read": moved, "triton_written": moved}
    assert counts.triton == {"copy_kernel": 1} and not counts.aten


INDEX, VALUES = torch.tensor([0, 5, 9]), torch.ones(3)
OPERATORS = {  # of x [1000] f32: bytes read, bytes written, launches
    "new": (lambda x: x.exp(), 4000, 4000, 1),
    "in place": (lambda x: x.exp_(), 4000, 4000, 1),
    "out": (lambda x: torch.cumsum(x, 0, out=torch.empty(1000)), 4000, 4000, 1),
    "expanded": (lambda x: x[:, None].expand(1000, 7).sum(1), 4000, 4000, 1),
    "views": (lambda x: x.view(10, 100).T[:5].detach(), 0, 0, 0),
    "allocation": (lambda x: x.new_empty(50), 0, 0, 0),
    "zeros": (lambda x: torch.zeros_like(x), 0, 4000, 1),
    "copy": (lambda x: torch.empty(1000).copy_(x), 4000, 4000, 1),
    "gather": (lambda x: x.gather(0, INDEX), 24 + 12, 12, 1),
    "scatter": (lambda x: x.scatter_(0, INDEX, VALUES), 24 + 12, 12, 1),
    "backward of gather": (
        lambda x: torch.autograd.grad(x.requires_grad_().gather(0, INDEX), x, VALUES),
        (24 + 12) + (24 + 12),
        12 + (4000 + 12),
        3,
    ),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_operands_of_aten(name):
    call, read, written, launches = OPERATORS[name]
    x = torch.rand(1000)
    with count_launches() as counts:
        call(x)
    assert (counts.bytes["aten_read"], counts.bytes["aten_written"]) == (read, written)
    assert counts.aten.total() == launches and not counts.triton


def bytes_per_logit(name: str, idle: int) -> float:
    inputs = traffic.problem(ROWS, VOCAB, idle)
    counts = traffic.count_update(name, inputs)
    return counts.bytes.total() / inputs.logits.numel()


@pytest.mark.parametrize("name", traffic.UPDATES)
def test_dense(name):
    """bf16: read for the statistics, read for the gradient, written."""
    assert 6 <= bytes_per_logit(name, idle=0) <= 6.05


@pytest.mark.parametrize("name", traffic.UPDATES)
def test_without_credit(name):
    """80% of the rows: read once for their entropy, or not at all; written."""
    unread = "active" in name or "none" in name
    assert 2.8 <= bytes_per_logit(name, idle=4) <= (2.85 if unread else 4.45)


def test_launches_of_public_calls():
    inputs = traffic.problem(ROWS, VOCAB)
    calls = traffic.count_calls(inputs)
    assert {name: counts.triton for name, counts in calls.items()} == {
        "policy_loss, forward": {"policy_loss_kernel": 1},
        "policy_loss, metrics": {},
        "policy_loss, backward": {"scale_kernel": 1},
        "token_logprobs, forward": {"token_logprobs_kernel": 1},
        "token_logprobs, backward": {"token_logprobs_backward_kernel": 1},
    }
    assert calls["policy_loss, backward"].bytes.total() <= 8 * ROWS  # the factor is 1
    assert not calls["policy_loss, backward"].aten
    for counts in traffic.count_advantages(64).values():
        assert counts.triton in ({"group_advantages_kernel": 1}, {})
    assert traffic.count_advantages(64)["quantile_advantages"].triton == {"group_advantages_kernel": 1}


def test_another_factor_scales_every_logit():
    inputs = traffic.problem(ROWS, VOCAB)
    output = traffic.our_loss(inputs)
    with count_as_on_gpu() as counts:
        torch.autograd.grad(output.loss * 2, inputs.logits)
    assert 4 <= counts.bytes.total() / inputs.logits.numel() <= 4.05


def test_what_a_custom_operator_does_is_counted():
    inputs = traffic.problem(ROWS, VOCAB)
    with torch.no_grad(), count_as_on_gpu() as counts:
        token_logprobs(inputs.logits, inputs.tokens)
    assert counts.triton == {"token_logprobs_kernel": 1}
    assert not any("token_logprobs" in name for name in counts.aten)


@pytest.mark.slow
def test_command(monkeypatch, tmp_path, capsys):
    def absent():
        raise ImportError("no such package")

    some = {"eager PyTorch": peers.LOGITS_PEERS["eager PyTorch"], "absent": peers.Peer(absent, load=absent)}
    monkeypatch.setattr(peers, "LOGITS_PEERS", some)
    path = tmp_path / "traffic.json"
    monkeypatch.setattr("sys.argv", ["traffic", "--n", "5", "--vocab", "300", "--json", str(path)])
    traffic.main()
    printed, report = capsys.readouterr().out, json.loads(path.read_text())
    assert "absent: missing (ImportError: no such package)" in printed
    assert report["missing"]["absent"] and report["torch"] == torch.__version__
    dense = {row["name"]: row["total"] for row in report["rows"] if " 0% of the rows" in row["table"]}
    assert dense["policy_loss"] < 7 < 40 < dense["eager PyTorch"]
    monkeypatch.setattr("sys.argv", ["traffic", "--n", "7"])
    with pytest.raises(SystemExit):
        traffic.main()
    assert "--n must be a multiple of 5" in capsys.readouterr().err
