"""Weights of the aggregations against a plain transcription of their definitions."""

import itertools

import pytest
import torch
from cases import AGGREGATIONS, make_batch

from qae_kernels import token_weights


def weights_by_hand(mask, mode, normalizer, loss_scale_factor):
    """The definitions in PolicyLossConfig's docstring, sequence by sequence; mask: list of lists."""
    tokens = sum(map(sum, mask))
    sequences = sum(any(row) for row in mask)
    longest = max((len(row) for row in mask), default=1)
    rows = []
    for row in mask:
        weight = {
            "token-mean": 1 / (normalizer or max(tokens, 1)),
            "token-sum": 1 / (normalizer or 1),
            "seq-mean-token-sum": 1 / (normalizer or max(sequences, 1)),
            "seq-mean-token-mean": 1 / max(sum(row), 1) / (normalizer or max(sequences, 1)),
            "seq-mean-token-sum-norm": 1 / (normalizer or max(sequences, 1)) / (loss_scale_factor or max(longest, 1)),
        }[mode]
        rows.append([weight if m else 0.0 for m in row])
    return rows


MASKS = {
    "ragged": [[1, 0, 1, 1], [1, 1], [], [0, 0, 0], [1], [0, 1, 0, 0, 1]],
    "rectangular": [[1, 1, 0], [0, 0, 0], [1, 0, 1]],
    "empty": [[0, 0], [0, 0]],
    "one": [[1]],
}


@pytest.mark.parametrize("normalizer", [None, 5, 0, "tensor"])
@pytest.mark.parametrize("loss_scale_factor", [None, 16.0])
@pytest.mark.parametrize("mode", AGGREGATIONS)
@pytest.mark.parametrize("rows", MASKS.values(), ids=MASKS)
def test_token_weights(rows, mode, loss_scale_factor, normalizer, device):
    number = {"tensor": 3, 0: 1}.get(normalizer, normalizer)
    expected = weights_by_hand(rows, mode, number, loss_scale_factor)
    keywords = {"loss_scale_factor": loss_scale_factor, "dtype": torch.float64,
                "normalizer": torch.tensor(3, device=device) if normalizer == "tensor" else normalizer}  # fmt: skip
    cu_seqlens = torch.tensor([0, *itertools.accumulate(map(len, rows))], dtype=torch.int32, device=device)
    flat = torch.tensor([m for row in rows for m in row], dtype=torch.bool, device=device)
    exact = torch.tensor([w for row in expected for w in row], dtype=torch.float64, device=device)
    packed = token_weights(flat, mode, cu_seqlens=cu_seqlens, **keywords)
    torch.testing.assert_close(packed, exact, rtol=1e-15, atol=0)
    assert (packed[~flat] == 0).all()
    if len(set(map(len, rows))) == 1:
        padded = token_weights(flat.view(len(rows), -1), mode, **keywords)
        torch.testing.assert_close(padded.view(-1), exact, rtol=1e-15, atol=0)


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean"])
def test_means_weigh_one_in_all(mode, device):
    batch = make_batch(5, device=device)
    total = token_weights(batch.mask, mode, cu_seqlens=batch.cu_seqlens, dtype=torch.float64).sum()
    assert abs(total.item() - 1) < 1e-15
