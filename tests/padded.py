"""The padded way through a model, which the loop does not take: what its packed one is compared with."""

import torch

from integration.rollout import positions


def padded_logits(model, rollout, rows):
    """(logits [n, R', V], response columns' mask [n, R']) of the given rows under `model`; cut to their longest.

    Row r, column t holds the distribution that response token t was sampled from.
    """
    longest = int(rollout.lengths[rows].max())
    mask = torch.cat([rollout.prompt_mask[rows], rollout.response_mask[rows, :longest]], 1)
    ids = torch.cat([rollout.prompt_ids[rows], rollout.response_ids[rows, :longest]], 1)
    logits = model(
        input_ids=ids[:, :-1], attention_mask=mask[:, :-1].long(), position_ids=positions(mask[:, :-1]),
        use_cache=False, logits_to_keep=longest,
    ).logits  # fmt: skip
    return logits, rollout.response_mask[rows, :longest]
