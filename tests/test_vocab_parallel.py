"""Vocabularies dealt out over 2 and 4 ranks, real processes that talk through gloo, against one process."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from cases import CONFIGS, optional_arguments
from head_cases import make_head_case, run_head
from ranks import run_ranks
from tolerances import assert_bitwise, assert_gradient, assert_statistics

from qae_kernels import library, linear_policy_loss, linear_token_logprobs, policy_loss, token_logprobs
from qae_kernels.linear_head import LinearHead
from qae_kernels.vocab_parallel import VocabParallel

SLICES = {2: (20, 37), 4: (16, 1, 31, 9)}  # columns of each rank, of 57
BACKENDS = ("triton", "torch")
PAIRS = ((0, 2), (1, 3))
CHUNK = 57 * 4 * 5
HEADS = {"plain": {}, "all": {"bias": True, "logit_scale": 1.7, "logit_softcap": 4.0}}
LOSSES = [  # (config, layout, entropy, dtype)
    ("dapo", "packed", "all", torch.float32), ("grpo", "padded", "active", torch.float32),
    ("everything", "padded", "all", torch.float32), ("dapo", "packed", "none", torch.float64),
    ("entropy", "packed", "all", torch.bfloat16), ("everything of responses", "packed", "active", torch.float32),
    ("several clip_cov", "padded", "all", torch.float32), ("gmpo", "padded", "active", torch.float32),
]  # fmt: skip


def losses_from_logits(case, columns, group, **keywords):
    """Of each way to call it, on the given columns: what comes back for the rows, and the gradient of the slice."""
    advantages, given = optional_arguments(case.batch, ref=True, rollout=True)
    results = []
    for inplace in (False, True):
        logits = case.batch.logits[..., columns].clone().requires_grad_()
        out = policy_loss(logits * 1, case.batch.tokens, advantages, process_group=group, inplace=inplace,
                          **given, **keywords)  # fmt: skip
        (0.5 * out.loss).backward()
        results.append({"loss": out.loss.detach(), "logprobs": out.logprobs, "entropy": out.entropy,
                        "metric": out.metrics["clip_fraction_low"], "sliced": logits.grad})  # fmt: skip
    return results


def from_hidden(case, columns, group, config, entropy, backend):
    """The same from the head's slice; the gradient of hidden is whole on every rank."""
    advantages, given = optional_arguments(case.batch, ref=True)
    results = []
    for name in ("loss", "log-probabilities"):
        hidden = case.hidden.clone().requires_grad_()
        weight = case.weight[columns].clone().requires_grad_()
        bias = None if case.bias is None else case.bias[columns].clone().requires_grad_()
        keywords = {"bias": bias, "process_group": group, "max_chunk_bytes": CHUNK, "backend": backend, **case.options}
        if name == "loss":
            out = linear_policy_loss(hidden, weight, case.batch.tokens, advantages, config=config, entropy=entropy,
                                     **given, **keywords)  # fmt: skip
            (0.5 * out.loss).backward()
            rows = {"loss": out.loss.detach(), "logprobs": out.logprobs, "entropy": out.entropy}
        else:
            logprobs, entropies = linear_token_logprobs(
                hidden, weight, case.batch.tokens, mask=case.batch.mask, temperature=0.7, **keywords
            )
            (logprobs * case.batch.advantages - 0.3 * entropies).sum().backward()
            rows = {"logprobs": logprobs.detach(), "entropy": entropies.detach()}
        sliced = {"sliced": weight.grad} | ({} if bias is None else {"sliced bias": bias.grad})
        results.append({**rows, "hidden": hidden.grad, **sliced})
    return results


def with_banned_slice(case):
    """-inf in every column of the first rank in one row, and a sampled token among them in another."""
    logits = case.batch.logits.clone()
    logits[0, : SLICES[2][0]] = -torch.inf
    tokens = case.batch.tokens.clone()
    tokens[0] = 50
    logits[2, : SLICES[2][0]] = -torch.inf
    tokens[2] = 3
    return replace(case, batch=replace(case.batch, logits=logits, tokens=tokens))


def everything(columns, group, device, backends=BACKENDS):
    """All results, by what was computed."""
    results = {}
    for backend in backends:
        for config, layout, entropy, dtype in LOSSES:
            if dtype == torch.float64 and backend == "triton":
                continue
            key = f"{backend}, {config}, {layout}, {entropy}, {dtype}"
            case = make_head_case(57, layout, device=device, temperature=CONFIGS[config].temperature)
            case = replace(case, batch=replace(case.batch, logits=case.batch.logits.to(dtype)))
            results[f"logits, {key}"] = losses_from_logits(
                case, columns, group, config=CONFIGS[config], entropy=entropy, backend=backend
            )
            for name, options in HEADS.items():
                case = make_head_case(57, layout, dtype, device, temperature=CONFIGS[config].temperature, **options)
                results[f"hidden, {name}, {key}"] = from_hidden(case, columns, group, CONFIGS[config], entropy, backend)
        case = with_banned_slice(make_head_case(57, device=device))
        case = replace(case, batch=replace(case.batch, logits=case.batch.logits.float()))
        results[f"logits, {backend}, banned"] = losses_from_logits(case, columns, group, backend=backend)
    return results


def of_a_pair(group, device):
    """Groups beside each other, as of tensor parallel ranks under data parallel ones: what one of them gets."""
    columns = slice(None) if group is None else (slice(0, 20), slice(20, 57))[dist.get_rank(group)]
    case = make_head_case(57, device=device)
    return from_hidden(case, columns, group, CONFIGS["dapo"], "all", "torch")


def errors(columns, group, device):
    """A token that no rank has is named with the size of the whole vocabulary."""
    case = make_head_case(57, device=device)
    tokens = case.batch.tokens.clone()
    tokens[3] = 57
    for call in (
        lambda: policy_loss(case.batch.logits[:, columns], tokens, case.batch.advantages, process_group=group,
                            validate=True),
        lambda: linear_token_logprobs(case.hidden, case.weight[columns], tokens, process_group=group, validate=True),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"tokens must lie in \[0, 57\).*; tokens\[3\] is 57"):
            call()


def of_a_rank(rank, world_size, group, device):
    before = sum(SLICES[world_size][:rank])
    columns = slice(before, before + SLICES[world_size][rank])
    # Four processes share the cores of a small machine: the kernels are tested in two.
    results = everything(columns, group, device, BACKENDS if world_size == 2 else ("torch",))
    if world_size == 4:
        groups = [dist.new_group(ranks) for ranks in PAIRS]
        results["pairs"] = of_a_pair(groups[rank % 2], device)
    errors(columns, group, device)
    return results


@pytest.fixture(scope="module")
def alone(device):
    return everything(slice(None), None, device)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", SLICES)
def test_same_as_one_process(world_size, alone, device):
    """Loss, statistics and the gradient of hidden whole on every rank, every other gradient a slice."""
    ranks = run_ranks(of_a_rank, world_size, device, map_location="cpu")
    done = {key: expected for key, expected in alone.items() if key in ranks[0]}
    assert len(done) >= len(alone) // 2
    for key, expected in done.items():
        dtype = torch.float64 if "float64" in key else torch.float32
        for i, whole in enumerate(expected):
            for name, exact in whole.items():
                exact, what = exact.cpu(), f"{key}, call {i}, {name}"
                parts = [rank[key][i][name] for rank in ranks]
                if name.startswith("sliced"):
                    along = -1 if key.startswith("logits") else 0
                    assert_close(torch.cat(parts, along), exact, what)
                    continue
                for part in parts:
                    assert torch.equal(part, parts[0]) or (part.isnan() & parts[0].isnan()).any(), what
                if name == "hidden":
                    assert_close(parts[0], exact, what)
                else:
                    assert_statistics(parts[0], exact.double(), dtype, what)
    for rank in ranks if world_size == 4 else ():
        for got, expected in zip(rank["pairs"], of_a_pair(None, device), strict=True):
            for name in ("logprobs", "entropy", "hidden"):
                assert_close(got[name], expected[name].cpu(), f"pairs, {name}")
    banned = [r for key, r in ranks[0].items() if "banned" in key]
    assert banned and all(r["logprobs"][2] == -torch.inf and r["logprobs"][0].isfinite() for rs in banned for r in rs)


def assert_close(got, expected, what):
    """Gradients that are both computed: twice the roundings of either."""
    assert_gradient(got.to(expected.dtype), expected.double(), expected.dtype, what, roundings=4)


@pytest.fixture
def group_of_one(tmp_path):
    """The other way of computing, in this process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_rows_without_credit_are_formed_once(group_of_one, backend, device, monkeypatch):
    """For their entropy, and not for a gradient that they do not have; a slice alone could not tell."""
    formed, chunks = [], LinearHead.chunks

    def counted(head, rows, **more):
        formed.append(len(rows))
        return chunks(head, rows, **more)

    monkeypatch.setattr(LinearHead, "chunks", counted)
    case = make_head_case(57, device=device)
    _, keywords = optional_arguments(case.batch)
    run_head(case, case.batch.per_response, CONFIGS["gspo"], backend=backend, process_group=group_of_one, **keywords)
    credit = (case.batch.spread(case.batch.per_response) != 0) & case.batch.mask
    assert formed == [case.batch.mask.sum(), credit.sum()] and formed[1] < formed[0]


@pytest.mark.parametrize("inference", [False, True])
def test_a_group_of_one(inference, group_of_one, backend, device):
    case = make_head_case(57, device=device)
    logits = case.batch.logits.float()
    expected = token_logprobs(logits, case.batch.tokens, backend=backend)
    with torch.inference_mode(inference):
        out = policy_loss(logits, case.batch.tokens, case.batch.advantages, process_group=group_of_one,
                          backend=backend)  # fmt: skip
    for x, alone in zip((out.logprobs, out.entropy), expected, strict=True):
        torch.testing.assert_close(x, alone, rtol=1e-6, atol=1e-6)


def test_a_token_that_no_rank_has_is_nan(group_of_one, backend, device):
    """Where nobody looks at the ids: a GPU without validate=True."""
    path = VocabParallel(library._token_stats_path(backend == "triton"), group_of_one, 57, torch.device(device))
    tokens, mask = torch.tensor([57, -1, 3], device=device), torch.ones(3, dtype=torch.bool, device=device)
    logprobs, entropy, _, _ = path.token_logprobs_rows(torch.zeros(3, 57, device=device), tokens, mask, 1.0)
    assert logprobs[:2].isnan().all() and logprobs[2].isfinite() and entropy.isfinite().all()


def test_masked_rows_may_hold_anything(group_of_one, backend, device):
    case = make_head_case(57, device=device)
    advantages, keywords = optional_arguments(case.batch, ref=True, rollout=True)
    mask = case.batch.mask
    dirty = {
        name: x if name in ("mask", "cu_seqlens") else torch.where(mask, x, torch.nan) for name, x in keywords.items()
    }
    results = []
    for values, given in ((advantages, keywords), (torch.where(mask, advantages, torch.nan), dirty)):
        logits = case.batch.logits.float().requires_grad_()
        out = policy_loss(logits, case.batch.tokens, values, process_group=group_of_one, backend=backend, **given)
        out.loss.backward()
        results.append((out.loss.detach(), logits.grad))
    for clean, got in zip(*results, strict=True):
        assert_bitwise(got, clean, "masked rows")


def test_in_place_off_its_alignment(group_of_one, device):
    """Logits that the kernels can read from a copy only: the gradient comes back to where they were."""
    case = make_head_case(56, device=device)
    gradients = []
    for offset in (0, 1):
        leaf = case.batch.logits.float().requires_grad_()
        buffer = torch.empty(16 * 56 + 4, device=device)
        logits = buffer[offset : offset + 16 * 56].view(16, 56).copy_(leaf)
        out = policy_loss(logits, case.batch.tokens, case.batch.advantages, process_group=group_of_one,
                          backend="triton", inplace=True)  # fmt: skip
        out.loss.backward()
        gradients.append(leaf.grad)
    assert_bitwise(*gradients, "gradient")
