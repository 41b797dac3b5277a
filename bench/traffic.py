"""Bytes of global memory that kernels ask for, and launches, ours and our peers': counted, without a GPU.

    python -m bench.traffic
    python -m bench.traffic --n 20 --vocab 20000 --json traffic.json

Kernels run in Triton's interpreter; every element of a load or store whose mask is true counts, whether or not a cache
would have it. Of PyTorch's own operators each operand counts once: less than what they move, for those that go over
their input twice. A launch is a Triton kernel, or an aten operator that is neither a view nor an allocation; some of
these, such as a sort, are several kernels on a GPU. Generated code (torch.compile) cannot be counted.
"""

from __future__ import annotations

import argparse
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any
from unittest.mock import patch

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

import numpy as np
import torch
import triton
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder
from triton.runtime.jit import JITFunction

import qae_kernels as qae
from qae_kernels.fused.policy_loss import policy_loss_rows
from qae_kernels.rows import Rows

from . import peers

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
LAUNCH_NOTHING = ("empty", "new_empty", "_unsafe_view", "_reshape_alias", "set_", "resize_")
ONLY_WRITE = ("zeros", "zero_", "ones", "full", "fill", "new_zeros", "new_ones", "new_full", "arange")
READ_AS_MUCH_AS_THEY_RETURN = ("gather", "index", "index_select", "embedding")
# scatter_add among them: what gather's backward calls, while it is watched, in place of scatter_add_
WRITE_THEIR_LAST_OPERAND = ("scatter_", "scatter_add", "scatter_add_", "index_put_", "index_add_")


# ---- Counting


class Counts(TorchDispatchMode):
    """Launches by name, and bytes: "triton_read", "triton_written", "aten_read", "aten_written"."""

    def __init__(self):
        super().__init__()
        self.triton: Counter[str] = Counter()
        self.aten: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self._in_kernel = False  # the interpreter is PyTorch and NumPy itself

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if operator.name() in OPDEFS:  # a custom operator: what counts is what it does
            with self:
                return OPDEFS[operator.name()]._init_fn(*args, **kwargs)
        result = operator(*args, **kwargs)
        name = operator.overloadpacket.__name__
        given = [x for x in tree_leaves((args, {**kwargs, "out": None})) if isinstance(x, Tensor)]
        returned = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        nothing = operator.is_view or name.startswith(LAUNCH_NOTHING) or not (given or returned)
        if not self._in_kernel and not nothing:
            self.aten[name] += 1
            self._count_operands(name, given, returned)
        return result

    def _count_operands(self, name: str, given: list[Tensor], returned: list[Tensor]) -> None:
        read, written = sum(map(size_bytes, given)), sum(map(size_bytes, returned))
        if name.startswith(ONLY_WRITE):
            read = 0
        elif name == "copy_":
            read -= size_bytes(given[0])
        elif name in READ_AS_MUCH_AS_THEY_RETURN:
            read += written - size_bytes(given[0])
        elif name in WRITE_THEIR_LAST_OPERAND:
            read -= size_bytes(given[0])
            written = size_bytes(given[-1])
        self.bytes["aten_read"] += read
        self.bytes["aten_written"] += written


def size_bytes(x: Tensor) -> int:
    """Of the distinct elements: an expanded dimension is read once."""
    return x.element_size() * int(np.prod([n for n, step in zip(x.shape, x.stride(), strict=True) if step]))


@contextmanager
def count_launches() -> Iterator[Counts]:
    """Counts what is launched within, on a GPU or in the interpreter; bytes of kernels in the interpreter only."""
    counts = Counts()

    def interpreted(launch):
        def call(executor, *args, **kwargs):
            counts.triton[executor.fn.__name__] += 1
            counts._in_kernel = True
            try:
                return launch(executor, *args, **kwargs)
            finally:
                counts._in_kernel = False

        return call

    def compiled(launch):
        def run(kernel, *args, warmup, **kwargs):
            counts.triton[kernel.fn.__name__] += not warmup
            return launch(kernel, *args, warmup=warmup, **kwargs)

        return run

    def counted(access, pointers_at: int, mask_at: int | None, *directions: str):
        def call(builder, *args, **kwargs):
            pointers = args[pointers_at]
            mask = True if mask_at is None else args[mask_at].data
            elements = int(np.broadcast_to(mask, pointers.data.shape).sum())
            for direction in directions:
                counts.bytes[f"triton_{direction}"] += elements * pointers.get_element_ty().primitive_bitwidth // 8
            return access(builder, *args, **kwargs)

        return call

    with ExitStack() as stack:
        for owner, name, wrap, *how in (
            (GridExecutor, "__call__", interpreted),
            (JITFunction, "run", compiled),
            (InterpreterBuilder, "create_masked_load", counted, 0, 1, "read"),
            (InterpreterBuilder, "create_masked_store", counted, 0, 2, "written"),
            (InterpreterBuilder, "create_atomic_rmw", counted, 1, 3, "read", "written"),
            (InterpreterBuilder, "create_atomic_cas", counted, 0, None, "read", "written"),
        ):
            stack.enter_context(patch.object(owner, name, wrap(getattr(owner, name), *how)))
        yield stack.enter_context(counts)


@contextmanager
def count_as_on_gpu() -> Iterator[Counts]:
    """Leaves out the checks of values that our operations make on CPU tensors only."""
    with patch("qae_kernels.checks.reads_values", lambda device, validate: validate), count_launches() as counts:
        yield counts


# ---- What is counted

RESPONSES, GROUP_SIZE = 5, 16
NOT_COUNTED = {"torch.compile": "generated code cannot be counted"}


def problem(rows: int, vocab: int, idle: int = 0, dtype: torch.dtype = torch.bfloat16) -> peers.Problem:
    """`idle` of the 5 responses have advantage 0. No token is clipped: its row would carry no credit either."""
    draw = torch.Generator().manual_seed(0)
    shape = (RESPONSES, rows // RESPONSES)
    logits = torch.randn(*shape, vocab, generator=draw).to(dtype).requires_grad_()
    tokens = torch.randint(vocab, shape, generator=draw)
    advantages = torch.randn(RESPONSES, generator=draw)
    advantages[:idle] = 0
    logprobs = logits.detach().float().log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    return peers.Problem(logits, tokens, advantages, logprobs - 0.05)


def our_loss(problem: peers.Problem, **options: Any) -> qae.PolicyLossOutput:
    return qae.policy_loss(
        problem.logits, problem.tokens, problem.advantages, old_logprobs=problem.old_logprobs, **options
    )


def our_update(problem: peers.Problem, **options: Any) -> tuple[Tensor, ...]:
    return torch.autograd.grad(our_loss(problem, **options).loss, problem.logits)


def our_logprobs_update(problem: peers.Problem) -> tuple[Tensor, ...]:
    logprobs, _ = qae.token_logprobs(problem.logits, problem.tokens)
    return torch.autograd.grad(peers.objective(logprobs, problem), problem.logits)


UPDATES = {
    "policy_loss": our_update,
    "policy_loss, inplace": partial(our_update, inplace=True),
    "policy_loss, entropy=active": partial(our_update, entropy="active"),
    "policy_loss, entropy=none": partial(our_update, entropy="none"),
    "token_logprobs": our_logprobs_update,
}


def count_update(name: str, problem: peers.Problem) -> Counts:
    """Forward and gradient of the logits, by one of us or of our peers."""
    if name in UPDATES:
        update = UPDATES[name]
    else:
        peer = peers.LOGITS_PEERS[name]
        update, problem = peer.update, peer.prepare(problem)
    with count_as_on_gpu() as counts:
        update(problem)
    return counts


def count_advantages(responses: int) -> dict[str, Counts]:
    rewards = torch.randint(2, (responses,), generator=torch.Generator().manual_seed(0)).float()
    ids = torch.arange(responses) // GROUP_SIZE
    counts = {}
    for name, call in {
        "quantile_advantages": lambda: qae.quantile_advantages(rewards, GROUP_SIZE),
        "quantile_advantages, groups by ids": lambda: qae.quantile_advantages(rewards, ids),
        "GRPO's, vectorised PyTorch": lambda: peers.vectorised_advantages(rewards, GROUP_SIZE),
    }.items():
        with count_as_on_gpu() as counts[name]:
            call()
    return counts


def count_calls(problem: peers.Problem) -> dict[str, Counts]:
    """Our public calls, one by one."""
    counts, logits = {}, problem.logits

    def counted(name: str, call: Callable[[], Any]) -> Any:
        with count_as_on_gpu() as counts[name]:
            return call()

    output = counted("policy_loss, forward", lambda: our_loss(problem))
    counted("policy_loss, metrics", lambda: output.metrics)
    one = torch.ones(())
    counted("policy_loss, backward", lambda: torch.autograd.grad(output.loss, logits, one))
    logprobs, entropy = counted("token_logprobs, forward", lambda: qae.token_logprobs(logits, problem.tokens))
    gradients = torch.ones_like(logprobs), torch.zeros_like(entropy)
    counted("token_logprobs, backward", lambda: torch.autograd.grad((logprobs, entropy), logits, gradients))
    return counts


def count_linear_rows(problem: peers.Problem, entropy: str) -> Counts:
    """The row kernel of `linear_policy_loss` on one chunk, dense: float32 logits, gradient in the problem's dtype."""
    logits = problem.logits.detach().float()
    dlogits = torch.empty_like(logits, dtype=problem.logits.dtype)
    weights = torch.full(problem.tokens.shape, 1 / problem.tokens.numel())
    advantages = problem.advantages[:, None].expand(problem.tokens.shape)
    with count_as_on_gpu() as counts:
        rows = Rows(problem.tokens, weights, advantages, problem.old_logprobs)
        policy_loss_rows(logits, dlogits, rows, qae.PRESETS["dapo"], entropy)
    return counts


# ---- The command

COLUMNS = "{:<38}{:>9}{:>9}{:>12}{:>9}{:>9}{:>10}{:>7}"
BYTES = ("triton_read", "triton_written", "aten_read", "aten_written")


def row(table: str, name: str, counts: Counts, units: int) -> dict[str, Any]:
    """Bytes per unit (logit or response)."""
    moved = {what: counts.bytes[what] / units for what in BYTES}
    launches = {"triton_launches": counts.triton, "aten_launches": counts.aten}
    return {"table": table, "name": name, **moved, "total": sum(moved.values()), **launches}


def print_rows(rows: list[dict[str, Any]]) -> None:
    for table, group in groupby(rows, key=lambda row: row["table"]):
        print(f"\n{table}")
        print(COLUMNS.format("", "kernels:", "", "aten:", "", "", "launches:", ""))
        print(COLUMNS.format("", *("read", "written") * 2, "total", "Triton", "aten"))
        for r in group:
            numbers = (f"{r[name]:.2f}" for name in (*BYTES, "total"))
            launches = (r[name].total() for name in ("triton_launches", "aten_launches"))
            print(COLUMNS.format(r["name"], *numbers, *launches))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.traffic", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--n", type=int, default=100, help=f"rows of logits, a multiple of {RESPONSES}")
    parser.add_argument("--vocab", type=int, default=5000)
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bf16")
    parser.add_argument("--json", metavar="PATH", help="also write everything there")
    options = parser.parse_args()
    if options.n < 1 or options.n % RESPONSES:
        parser.error(f"--n must be a multiple of {RESPONSES}, the number of responses; got {options.n}")
    report = {"torch": torch.__version__, "triton": triton.__version__, **peers.versions()}
    print(", ".join(f"{name} {version}" for name, version in report.items()))

    size = f"N = {options.n}, V = {options.vocab}, {options.dtype}"
    rows, missing = [], NOT_COUNTED | peers.missing()
    for idle in (0, 4):
        table = f"update, bytes per logit, {size}, {idle / RESPONSES:.0%} of the rows without credit"
        for name in (*UPDATES, *(name for name in peers.LOGITS_PEERS if name not in missing)):
            inputs = problem(options.n, options.vocab, idle, DTYPES[options.dtype])
            try:
                rows.append(row(table, name, count_update(name, inputs), inputs.logits.numel()))
            except Exception as error:
                if name in UPDATES:
                    raise
                missing[name] = f"{type(error).__name__}: {error}"
    inputs = problem(options.n, options.vocab, 0, DTYPES[options.dtype])
    table = f"row kernel of linear_policy_loss, bytes per logit, {size}: float32 logits, gradient in {options.dtype}"
    rows += [
        row(table, f"entropy={entropy}", count_linear_rows(inputs, entropy), inputs.logits.numel())
        for entropy in ("all", "none")
    ]
    responses = 32 * GROUP_SIZE
    table = f"advantages, bytes per response, {responses} responses in groups of {GROUP_SIZE}"
    rows += [row(table, name, counts, responses) for name, counts in count_advantages(responses).items()]
    inputs = problem(options.n, options.vocab, 0, DTYPES[options.dtype])
    table = f"public calls, bytes per logit, {size}"
    rows += [row(table, name, counts, inputs.logits.numel()) for name, counts in count_calls(inputs).items()]

    print_rows(rows)
    print(*(f"{name}: missing ({reason})" for name, reason in missing.items()), sep="\n")
    if options.json:
        text = json.dumps({**report, "rows": rows, "missing": missing}, indent=1)
        Path(options.json).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
