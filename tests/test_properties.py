"""What every batch keeps, whatever its shape, strides, dtypes and options: Hypothesis draws them, alike in every run.

A failing example prints the `Case` (or the groups) it was made of, which is all that is needed to make it again.
"""
# ruff: noqa: RUF009  `of` makes a field

from dataclasses import dataclass, field, fields, replace
from fractions import Fraction
from functools import partial
from random import Random

import pytest
import torch
from cases import AGGREGATIONS, CONFIGS, Batch, Result, assert_same, make_batch, optional_arguments
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from test_policy_loss import assert_right
from tolerances import arithmetic_dtype, assert_bitwise, assert_gradient, assert_statistics

from qae_kernels import group_advantages, policy_loss, qae_dapo_loss, token_logprobs
from qae_kernels.reference.token_stats import token_logprobs as reference_token_logprobs

pytestmark = pytest.mark.slow
# A fixture lives through all examples of its test: poisoned memory, the name of a backend and a device keep no state.
DRAWN = settings(deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
SMALL = 1 / 64  # of advantages and coefficients: the tolerances suppose that little comes into a row, here one of few
FILL = 3.0  # of the memory between rows
PATH = {torch.float64: "auto"}  # not the backend under test
pad = torch.nn.functional.pad
# How logits lie in memory: (logits -> memory, memory -> logits).
VIEWS = {
    "contiguous": (lambda x: x, lambda x: x),
    "longer": (lambda x: pad(x, (0, 0, 0, 1), value=FILL), lambda x: x[..., :-1, :]),
    "second": (lambda x: pad(x[..., None, :], (0, 0, 1, 0), value=FILL).flatten(-3, -2), lambda x: x[..., 1::2, :]),
    "wider": (lambda x: pad(x, (3, 2), value=FILL), lambda x: x[..., 3:-2]),
    "transposed": (lambda x: x.transpose(0, 1), lambda x: x.transpose(0, 1)),
}
# Which logits of every other row are -inf: j the ids, t the sampled one.
BANS = {
    "nothing": lambda j, t, vocab: j < 0,
    "head": lambda j, t, vocab: (j < 0.75 * vocab) & (j != t),
    "all others": lambda j, t, vocab: j != t,
    "sampled": lambda j, t, vocab: (j == t) & (vocab > 1),
}


def of(*values):
    """A field of a Case: its values, the likelier the oftener, by default the first."""
    return field(default=values[0], metadata={"values": values})


@dataclass(frozen=True)
class Case:
    """A call of `policy_loss`."""

    layout: str = of("flat", "padded", "packed")  # flat: packed, and nobody says where responses begin
    lengths: tuple = of((7,), (3, 4, 4), (4, 3, 1), (2, 0, 4), (3, 3), (5, 2), (1, 1, 1), (1,), (0, 0), ())
    vocab: int = of(3, 1, 2, 16, 255, 256, 257, 511, 512, 513, 1023, 1024, 1025, 4097)  # around the kernels' blocks
    dtype: torch.dtype = of(torch.float32, torch.bfloat16, torch.float16, torch.float64)
    banned: str = of(*BANS)
    offset: float = of(0.0, 0.0, 0.0, -150.0, 30000.0)
    view: str = of(*VIEWS)
    masked: float | None = of(0.0, 0.4, 0.4, 1.0, None)  # share of masked rows; None: no mask is given
    unmasked: bool | int | float = of(True, 3, 0.5)  # what the mask holds elsewhere
    zeros: float = of(0.0, 0.5, 0.5, 1.0)  # share of advantages that are 0
    per_response: bool = of(False, True)
    old: bool = of(True, True, False)
    ref: bool = of(False, True)
    rollout: bool = of(False, True)
    strided: bool = of(False, True)  # tokens, mask and values lie in memory with gaps
    integers: torch.dtype = of(torch.int64, torch.int32)
    config: str = of(*(name for name, config in CONFIGS.items() if config.scope == "token"))  # rows on their own
    aggregation: str = of(*AGGREGATIONS)
    temperature: float = of(1.0, 0.7, 1.3)
    scale_factor: float | None = of(7.0, None)
    normalizer: float | torch.Tensor | None = of(6.0, None, torch.tensor(6.0, requires_grad=True))
    inplace: bool = of(False, True)
    upstream: float = of(1.0, -1.0, 0.5, 0.0, 1 / 7)
    seed: int = of(*range(100))

    def build(self, device: str) -> Batch:
        """Masked rows hold garbage."""
        padded = self.layout == "padded"
        lengths = (max(self.lengths, default=0),) * len(self.lengths) if padded else self.lengths
        shape = (len(lengths), max(lengths, default=0)) if padded else (sum(lengths),)
        batch = make_batch(self.vocab, dtype=self.dtype, temperature=self.temperature, lengths=lengths, seed=self.seed)
        tokens, draw = batch.tokens, torch.Generator().manual_seed(self.seed)
        every_other = torch.arange(len(tokens))[:, None] % 2 == 0
        banned = every_other & BANS[self.banned](torch.arange(self.vocab), tokens[:, None], self.vocab)
        logits = (batch.logits + self.offset).masked_fill(banned, -torch.inf)
        both = torch.stack([batch.logits, logits]).double(), tokens.expand(2, -1)
        before, after = reference_token_logprobs(*both, temperature=self.temperature)[0]
        shift = (after - before).nan_to_num(neginf=0).float()  # ratios stay as they are
        mask, some = torch.rand(2, len(tokens), generator=draw) >= torch.tensor([[self.masked or 0], [self.zeros]])
        credit = torch.rand(len(self.lengths), generator=draw) >= self.zeros
        garbage = torch.nan if self.seed % 2 else torch.inf

        def lay(x, hidden=garbage):
            x = torch.where(mask, x, hidden).view(shape).to(device)
            return x.repeat_interleave(2, -1)[..., ::2] if self.strided else x

        return Batch(
            logits=torch.where(mask[:, None], logits, garbage).unflatten(0, shape).to(device),
            tokens=lay(tokens.to(self.integers), -100),
            advantages=lay(SMALL * batch.advantages * some),
            mask=lay(mask * self.unmasked, False),
            old_logprobs=lay(batch.old_logprobs + shift),
            ref_logprobs=lay(batch.ref_logprobs + shift),
            rollout_weights=lay(batch.rollout_weights * some.flip(0)),
            per_response=(SMALL * batch.per_response * credit).to(device),
            cu_seqlens=None if padded else batch.cu_seqlens.to(device, self.integers),
        )

    def arguments(self, batch: Batch) -> tuple[torch.Tensor, dict]:
        """(advantages, keyword arguments of `policy_loss` that decide about its values)."""
        advantages, keywords = optional_arguments(
            batch, on_policy=not self.old, per_response=self.per_response, rollout=self.rollout, ref=self.ref,
            packed=self.layout != "flat",
        )  # fmt: skip
        if self.masked is None:
            del keywords["mask"]
        config = CONFIGS[self.config]
        config = replace(config, kl_coef=SMALL * config.kl_coef, entropy_coef=SMALL * config.entropy_coef,
                         temperature=self.temperature, aggregation=self.aggregation,
                         loss_scale_factor=self.scale_factor)  # fmt: skip
        return advantages, {"config": config, "normalizer": self.normalizer, **keywords}

    def run(self, batch: Batch, backend: str, **more) -> Result:
        """What lies beside the logits stays, and nothing else gets a gradient."""
        make, look = VIEWS[self.view]
        memory = make(batch.logits).clone(memory_format=torch.contiguous_format).requires_grad_()
        names = ("advantages", "old_logprobs", "ref_logprobs", "rollout_weights", "per_response")
        leaves = {name: getattr(batch, name).detach().requires_grad_() for name in names}
        advantages, keywords = self.arguments(replace(batch, **leaves))
        keywords |= {"inplace": self.inplace, "backend": PATH.get(self.dtype, backend), **more}
        out = policy_loss(look(memory), batch.tokens, advantages, **keywords)
        (out.loss * self.upstream).backward()
        beside = torch.ones_like(memory, dtype=torch.bool)
        look(beside).fill_(False)
        assert (memory[beside] == FILL).all() and not memory.grad[beside].any()
        assert all(x.grad is None for x in leaves.values())
        return Result(out.loss.detach(), out.logprobs, out.entropy, look(memory.grad))

    def credit(self, batch: Batch) -> torch.Tensor:
        """Which rows have a gradient."""
        advantages, keywords = self.arguments(batch)
        value = batch.spread(advantages) * keywords.get("rollout_weights", 1)
        return (batch.mask != 0) & ((value != 0) | (not CONFIGS[self.config].skips_zero_credit))


def drawn(make):
    """Strategy of `make(random)`. One integer: an example of many draws would be followed by five almost like it."""
    return st.integers(0, 2**24 - 1).map(lambda seed: make(Random(seed)))


def cases(**fixed):
    return drawn(lambda random: some_case(random, fixed))


def some_case(random: Random, fixed: dict) -> Case:
    case = Case(**{x.name: random.choice(x.metadata["values"]) for x in fields(Case)} | fixed)
    flat, kl = case.layout == "flat", CONFIGS[case.config].kl_coef != 0
    return replace(
        case,
        banned="nothing" if kl and case.banned == "sampled" else case.banned,  # an infinite KL
        per_response=case.per_response and not flat and case.lengths != (),
        ref=case.ref or kl,
        aggregation=case.aggregation.replace("seq-mean-", "").replace("-norm", "") if flat else case.aggregation,
        inplace=case.inplace and (case.layout == "padded" or case.view != "transposed"),  # V must stay together
    )


@settings(DRAWN, max_examples=200)
@given(case=cases())
def test_policy_loss(case, backend, exact_fma, device):
    batch = case.build(device)
    got = case.run(batch, backend)
    advantages, keywords = case.arguments(batch)
    assert_right(got, batch, advantages, upstream=case.upstream, **keywords)
    assert not any(x[batch.mask == 0].any() for x in (got.logprobs, got.entropy))
    assert not got.dlogits[~case.credit(batch)].any() and not got.dlogits[batch.logits == -torch.inf].any()


@settings(DRAWN, max_examples=80)
@given(case=cases(), used=st.sampled_from([slice(1), slice(1, 2), slice(2)]))
def test_token_logprobs(case, used, backend, exact_fma, device):
    """Log-probability, entropy or both in use; what comes in differs from row to row, and masked rows get some too."""
    batch = case.build(device)
    draw = torch.Generator().manual_seed(case.seed)
    idle = torch.rand(batch.tokens.shape, generator=draw).to(device) < case.zeros
    incoming = torch.where(idle, 0, SMALL * torch.randn(2, *idle.shape, generator=draw).to(device))

    def compute(function, logits, mask, **keywords):
        make, look = VIEWS[case.view]
        memory = make(logits).clone(memory_format=torch.contiguous_format).requires_grad_()
        outputs = function(look(memory), batch.tokens, mask=mask, temperature=case.temperature, **keywords)
        torch.autograd.backward(outputs[used], [dx.to(outputs[0].dtype) for dx in incoming[used]])
        return [x.detach() for x in outputs] + [look(memory.grad)]

    mask, path = None if case.masked is None else batch.mask, PATH.get(case.dtype, backend)
    got = compute(token_logprobs, batch.logits, mask, backend=path)
    dtypes = torch.float64, arithmetic_dtype(case.dtype)
    exact, plain = (compute(reference_token_logprobs, batch.logits.to(x), batch.mask != 0) for x in dtypes)
    assert_statistics(got[0], exact[0], case.dtype, "logprobs", plain[0])
    assert_statistics(got[1], exact[1], case.dtype, "entropy", plain[1])
    assert_gradient(got[2], exact[2], case.dtype, plain=plain[2])
    assert not any(x[batch.mask == 0].any() for x in got)
    assert not got[2][idle].any() and not got[2][batch.logits == -torch.inf].any()


@pytest.fixture
def two_threads():
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def assert_same_rows(got, expected, rows):
    """The first rows of `got` are these rows of `expected`."""
    for name in ("logprobs", "entropy", "dlogits"):
        value = getattr(expected, name)[rows]
        assert_bitwise(getattr(got, name)[: len(value)], value, name)


@settings(DRAWN, max_examples=40)
@given(case=cases(layout="flat", normalizer=6.0), order=drawn(lambda random: random.choices(range(12), k=4)))
@example(case=Case(vocab=16, config="entropy", view="transposed"), order=[0])
@example(case=Case(vocab=40_000, config="entropy"), order=[0, 3])  # long enough for two threads to share one row
def test_rows_do_not_know_each_other(case, order, backend, two_threads, device):
    """Alone, in any order, repeated, elsewhere in memory, beside a row of NaN, with another sign: the same bits."""
    batch = case.build(device)
    expected = case.run(batch, backend)
    elsewhere = replace(case, view="contiguous")
    if len(batch.tokens):
        order = [i % len(batch.tokens) for i in order]
        assert_same_rows(elsewhere.run(batch.rows(order[:1]), backend), expected, order[:1])
        beside = batch.rows([*order, 0])
        beside.logits[-1] = torch.nan
        got = replace(elsewhere, upstream=-case.upstream).run(beside, backend)
        assert_same_rows(replace(got, dlogits=-got.dlogits), expected, order)


@pytest.mark.parametrize(("backend", "rows"), [
    ("triton", 300), ("torch", 300), ("triton", 4096), ("torch", 4096), ("torch", 70_000),
    pytest.param("triton", 70_000, marks=pytest.mark.gpu),
])  # fmt: skip
def test_rows_among_many(backend, rows, device):
    """Each is as in a batch of seven, in every run. Of very many rows most are masked, which is quick."""
    case = Case(vocab=513 if rows == 300 else 3, config="entropy")
    seven = case.build(device)
    expected = case.run(seven, backend)
    for _ in range(19):
        assert_same(case.run(seven, backend), expected)
    index = torch.arange(rows, device=device) % 7
    many = seven.rows(index)
    many.mask[7:-7] = rows == 300
    got = case.run(many, backend)
    for name in ("logprobs", "entropy", "dlogits"):
        assert_bitwise(getattr(got, name)[many.mask], getattr(expected, name)[index[many.mask]], name)


@settings(DRAWN, max_examples=80)
@given(case=cases(layout="packed", normalizer=None, scale_factor=7.0))
def test_parts_add_up(case, backend, device):
    """Responses dealt to two calls, without masked rows, those without credit to none: the loss and the bits of the
    gradient are those of the whole, given its normaliser, which counts what has no credit. So are those of [B, T]."""
    batch = case.build(device)
    whole = case.run(batch, backend)
    draw = torch.Generator().manual_seed(case.seed)
    there, deal = batch.mask != 0, (torch.rand(len(case.lengths), generator=draw) < 0.5).to(device)
    owner = torch.arange(len(deal), device=device).repeat_interleave(batch.cu_seqlens.diff())
    lengths = partial(torch.bincount, minlength=len(deal))  # of the responses, given the owners of the rows
    responses = (lengths(owner[there]) > 0).sum().clamp(min=1)
    count = {"token-sum": 1.0, "token-mean": there.sum().clamp(min=1)}.get(case.aggregation, responses)
    loss = 0
    for side in (deal, ~deal):
        side = side & (lengths(owner[case.credit(batch)]) > 0)
        rows = there & side[owner]
        ends = pad(lengths(owner[rows])[side].cumsum(0), (1, 0))
        part = replace(batch.rows(rows), cu_seqlens=ends, per_response=batch.per_response[side])
        got = replace(case, view="contiguous", normalizer=count).run(part, backend)
        assert_same_rows(got, whole, rows)
        loss += got.loss
    assert_statistics(loss, whole.loss.double(), case.dtype, "loss")
    if len(set(case.lengths)) == 1:  # a packed batch that is a padded one
        case = replace(case, scale_factor=None, inplace=False)
        padded = replace(case, layout="padded")
        got = padded.run(padded.build(device), backend)
        got = Result(got.loss, *(x.flatten(0, 1) for x in (got.logprobs, got.entropy, got.dlogits)))
        assert_same(got, case.run(batch, backend))


@settings(DRAWN, max_examples=60)
@given(case=cases(), entropy=st.sampled_from(["active", "none"]))
def test_rows_that_nobody_asks_for_are_not_read(case, entropy, backend, device):
    """`entropy` leaves loss and gradient their bits; rows without credit may then hold anything and come back 0, and
    the metrics are means over the others. Frozen logits give a frozen loss."""
    batch = case.build(device)
    entropy = "active" if CONFIGS[case.config].entropy_coef else entropy
    read, whole = case.credit(batch), case.run(batch, backend)
    unread = replace(batch, logits=torch.where(read[..., None], batch.logits, torch.nan))
    logprobs, entropies = (torch.where(read, x, 0) for x in (whole.logprobs, whole.entropy))
    expected = replace(whole, logprobs=logprobs, entropy=entropies * (entropy == "active"))
    assert_same(case.run(unread, backend, entropy=entropy), expected)
    advantages, keywords = case.arguments(batch)
    keywords["backend"] = PATH.get(case.dtype, backend)
    leaf = advantages.detach().requires_grad_()
    out = policy_loss(unread.logits, batch.tokens, leaf, entropy=entropy, **keywords)
    metrics = policy_loss(batch.logits, batch.tokens, leaf, **{**keywords, "mask": read}).metrics
    assert_bitwise(out.loss, whole.loss, "loss")
    assert not out.loss.requires_grad
    metrics["tokens"] = (batch.mask != 0).sum().double()
    metrics["active_fraction"] = read.sum() / metrics["tokens"].clamp(min=1)
    unknown = "entropy" if entropy == "none" else "entropy_zero" if CONFIGS[case.config].skips_zero_credit else "-"
    assert set(out.metrics) == {name for name in metrics if not name.startswith(unknown)}
    for name, value in out.metrics.items():
        assert_bitwise(value, metrics[name], name)


def some_groups(random: Random) -> tuple[list[list[float]], Fraction, dict]:
    """(rewards of each group, level, options of `group_advantages`)."""
    values = [x / 8 for x in range(-16, 17)], [0.0, 1.0], [0.0, 1.0], [0.1]
    sizes = random.choices(range(1, 8), k=random.randint(1, 3))
    sizes = random.choice((sizes, sizes[:1] * len(sizes)))
    n = random.choice((2, 3, 5, 6, 7, 10))
    options = {
        "baseline": random.choice(("quantile", "quantile", "mean", "leave_one_out", "none", "passk", "median")),
        "interpolation": random.choice(("inverted_cdf", "inverted_cdf", "linear")),
        "scale": random.choice(("std", "std", "batch", "none")),
        "correction": random.randrange(3),
    }
    return [random.choices(random.choice(values), k=k) for k in sizes], Fraction(random.randrange(1, n), n), options


@settings(DRAWN, max_examples=30)
@given(groups=drawn(some_groups), seed=st.integers(0, 9))
def test_group_advantages(groups, seed, backend, device):
    """The quantile is inf{x: F(x) >= k} (arXiv 2509.22611, section 3) in exact arithmetic. The bits are the same in any
    order, for groups given by a size or by ids, for levels given by one number or one each, for multiples of the
    rewards; those of the quantile for shifted rewards too. Equal rewards have no advantage."""
    lists, k, options = groups
    rewards = torch.tensor([x for group in lists for x in group], device=device)
    index = torch.tensor([i for i, group in enumerate(lists) for _ in group], device=device)
    order = torch.randperm(len(index), generator=torch.Generator().manual_seed(seed)).to(device)
    levels = [k, 1 - k, k][: len(lists)]
    centred = options["baseline"] != "none"
    exact = options["baseline"] == "quantile" and options["interpolation"] == "inverted_cdf"

    def compute(rewards, groups, k):
        return group_advantages(rewards, groups, k=k, eps=0.0, backend=backend, **options)

    each = torch.tensor([float(level) for level in levels], dtype=torch.float64, device=device)
    got, sizes = compute(rewards, index, each), {len(group) for group in lists}
    if len(sizes) == 1:
        order, other = slice(None), compute(rewards, *sizes, each)
    else:
        other = compute(rewards[order], 7 * index[order] - 5, each)
    for name in ("advantages", "active", "baseline", "success_rate", "std"):
        expected = getattr(got, name)
        assert_bitwise(getattr(other, name), expected[order] if name in ("advantages", "active") else expected, name)
    factor, shift, even = 2.0 ** (seed - 5), 8 * seed * centred, index % 2 == 0
    scaled = got.advantages * (factor if options["scale"] == "none" else 1)
    assert_bitwise(compute(rewards * factor, index, float(k)).advantages[even], scaled[even], "of multiples")
    moved = compute(rewards + shift, index, float(k)).advantages
    atol = 0 if exact and options["scale"] != "batch" else 1e-3  # a mean is rounded anew, 0.1 as well
    torch.testing.assert_close(moved[even], got.advantages[even], rtol=0, atol=atol)
    for i, (group, level) in enumerate(zip(lists, levels, strict=True)):
        assert len(set(group)) > 1 or not centred or not got.active[index == i].any()
        if exact:
            center = min(x for x in group if sum(y <= x for y in group) >= level * len(group))
            assert got.baseline[i] == torch.tensor(center)
            if set(group) <= {0.0, 1.0}:
                assert (center == 0) == (Fraction(int(sum(group)), len(group)) <= 1 - level)  # hard


@pytest.mark.gpu
@pytest.mark.parametrize("call", [
    lambda x: policy_loss(x.logits, x.tokens, x.advantages, mask=x.mask, old_logprobs=x.old_logprobs),
    lambda x: policy_loss(x.logits, x.tokens, x.per_response, cu_seqlens=x.cu_seqlens, entropy="active"),
    lambda x: qae_dapo_loss(x.logits, x.tokens, x.per_response, 5, cu_seqlens=x.cu_seqlens),
    lambda x: sum(token_logprobs(x.logits, x.tokens, mask=x.mask)).sum().backward(),
    lambda x: group_advantages(x.per_response, 5).zero_fraction,
    lambda x: group_advantages(x.advantages, x.tokens).zero_fraction,
], ids=["dapo", "active", "qae", "statistics", "groups of one size", "groups by ids"])  # fmt: skip
def test_nothing_waits_for_the_device(call):
    batch = make_batch(57, device="cuda")
    batch.logits.requires_grad_()
    for mode in ("default", "error"):  # the first time compiles
        torch.cuda.set_sync_debug_mode(mode)
        try:
            out = call(batch)
            if hasattr(out, "loss"):
                (out.loss * 3).backward()
                assert {"entropy", "ratio_max", "kl"} <= set(out.metrics)
        finally:
            torch.cuda.set_sync_debug_mode("default")
