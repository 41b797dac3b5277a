"""Validation at the border: a `ValueError` that says what was got and what was expected, before anything runs.

Checks that read values would make the host wait for a GPU: they run on CPU tensors always, on others with
`validate=True`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

NANO = 10**9
TENSOR_K_SLACK = 100  # float32 holds K only to 6e-8


def k_in_nano(k: float) -> int:
    """K in units of 1e-9, less one unit: `ceil(k_in_nano(k) * G / 1e9)` is then the rank ceil(K G) for the K meant,
    whatever its binary rounding (0.7 * 10 is 7.000000000000001 in floating point, and 1 - 0.8 is not 0.2)."""
    return round(k * NANO) - 1


def one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}; got {value!r}")


def is_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} must be a torch.Tensor; got {type(value).__name__}")


def floating(name: str, value: Tensor) -> None:
    is_tensor(name, value)
    if not value.is_floating_point():
        raise ValueError(f"{name} must have a floating-point dtype; got {value.dtype}")
    if value.itemsize < 2:
        raise ValueError(f"{name} must have a floating-point dtype of at least 16 bits; got {value.dtype}")


def integer(name: str, value: Tensor) -> None:
    is_tensor(name, value)
    if value.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name} must have an integer dtype, int32 or int64; got {value.dtype}")


def same_device(name: str, value: Tensor, device: torch.device) -> None:
    if value.device != device:
        raise ValueError(f"{name} is on {value.device}, the other tensors are on {device}")


def shape(name: str, value: Tensor, expected: torch.Size | tuple[int, ...]) -> None:
    if value.shape != torch.Size(expected):
        raise ValueError(f"{name} must have shape {tuple(expected)}; got {tuple(value.shape)}")


def reads_values(device: torch.device, validate: bool) -> bool:
    """Whether checks that look at tensor values run: they cost nothing on a CPU, a synchronisation elsewhere.

    Never while `torch.compile` traces: there are no values yet.
    """
    return (validate or device.type == "cpu") and not torch.compiler.is_compiling()


def group_arguments(
    rewards: Tensor, groups: int | Tensor, k: float | Tensor, outcomes: Tensor | None, lengths: Tensor | None,
    baseline: str, eps: float, correction: int, validate: bool,
) -> None:  # fmt: skip
    """Arguments of `group_advantages`."""
    floating("rewards", rewards)
    if rewards.dim() != 1:
        raise ValueError(f"rewards must have shape [B], one per response; got {tuple(rewards.shape)}")
    if outcomes is not None:
        is_tensor("outcomes", outcomes)
        shape("outcomes", outcomes, rewards.shape)
        same_device("outcomes", outcomes, rewards.device)
    look = reads_values(rewards.device, validate)
    _lengths(lengths, rewards, baseline, look)
    num_groups = _groups(groups, rewards, look)
    if isinstance(k, Tensor):
        if k.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"k as a tensor must be float32 or float64; got {k.dtype}")
        same_device("k", k, rewards.device)
        if num_groups is None:
            if k.dim() != 1:
                raise ValueError(f"k as a tensor must have shape [num_groups]; got {tuple(k.shape)}")
        else:
            shape("k", k, (num_groups,))
        if look and not bool(((k > 0) & (k < 1)).all()):
            bad = int((~((k > 0) & (k < 1))).nonzero()[0])
            raise ValueError(f"k must lie strictly between 0 and 1; k[{bad}] is {k[bad].item()}")
    elif isinstance(k, bool) or not isinstance(k, int | float) or not 0 < k < 1:
        raise ValueError(f"k must be a number strictly between 0 and 1, or a tensor [num_groups]; got {k!r}")
    if isinstance(eps, bool) or not isinstance(eps, int | float) or not 0 <= eps < math.inf:
        raise ValueError(f"eps must be a finite number >= 0; got {eps!r}")
    if isinstance(correction, bool) or not isinstance(correction, int) or correction < 0:
        raise ValueError(f"correction must be an integer >= 0 (1: divide by G - 1); got {correction!r}")
    if look:
        finite("rewards", rewards.float())
        if outcomes is not None:
            finite("outcomes", outcomes.float())


def _lengths(lengths: Tensor | None, rewards: Tensor, baseline: str, look: bool) -> None:
    if (lengths is None) == (baseline == "opo"):
        raise ValueError(
            "baseline='opo' needs lengths [B], the number of tokens of each response; got None"
            if lengths is None
            else f"lengths are read by baseline='opo' only; got lengths with baseline={baseline!r}"
        )
    if lengths is None:
        return
    is_tensor("lengths", lengths)
    if not lengths.is_floating_point():
        integer("lengths", lengths)
    shape("lengths", lengths, rewards.shape)
    same_device("lengths", lengths, rewards.device)
    if look:
        finite("lengths", lengths.float())
        if bool((lengths < 0).any()):
            bad = int((lengths < 0).nonzero()[0])
            raise ValueError(f"lengths must be >= 0; lengths[{bad}] is {lengths[bad].item()}")


def _groups(groups: int | Tensor, rewards: Tensor, look: bool) -> int | None:
    """Checks `groups`; returns the number of groups, None where only the device knows it."""
    batch = rewards.numel()
    if isinstance(groups, Tensor):
        integer("groups", groups)
        shape("groups", groups, rewards.shape)
        same_device("groups", groups, rewards.device)
        return groups.unique().numel() if look else None
    if isinstance(groups, bool) or not isinstance(groups, int):
        raise ValueError(f"groups must be an int (group size) or a tensor [B] of ids; got {type(groups).__name__}")
    if groups < 1:
        raise ValueError(f"groups, the group size, must be at least 1 (no group may be empty); got {groups}")
    if batch % groups:
        raise ValueError(f"group size {groups} does not divide the number of rewards, {batch}")
    return batch // groups


def finite(name: str, value: Tensor) -> None:
    bad = (~torch.isfinite(value)).nonzero()
    if len(bad):
        index = ", ".join(str(i) for i in bad[0].tolist())
        raise ValueError(
            f"{name} must be finite; {name}[{index}] is {value[tuple(bad[0])].item()} ({len(bad)} such values)"
        )


def logits(value: Tensor) -> None:
    floating("logits", value)
    if value.dim() not in (2, 3):
        raise ValueError(f"logits must have shape [N, V] or [B, T, V]; got {tuple(value.shape)}")
    if value.shape[-1] == 0:
        raise ValueError(f"logits need a vocabulary of at least 1; got shape {tuple(value.shape)}")


def head(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, logit_scale: float, logit_softcap: float | None,
    max_chunk_bytes: int | None,
) -> None:  # fmt: skip
    """Checks hidden [..., D] against weight [V, D] and bias [V], and what is done to the logits."""
    given = {"hidden": hidden, "weight": weight} | ({} if bias is None else {"bias": bias})
    for name, value in given.items():
        floating(name, value)
        if hasattr(value, "full_tensor"):
            raise ValueError(
                f"{name} is a DTensor; expected a plain tensor. Where ranks have different rows (data parallel, FSDP): "
                "full_tensor(grad_placements=[Partial()]), so that its gradient is summed over them. Where all ranks "
                "have the same rows and each a slice of the vocabulary (tensor parallel): to_local() and process_group"
            )
        same_device(name, value, hidden.device)
    if hidden.dim() not in (2, 3):
        raise ValueError(f"hidden must have shape [N, D] or [B, T, D]; got {tuple(hidden.shape)}")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1] or 0 in weight.shape:
        raise ValueError(
            f"weight must have shape [V, D] with D = {hidden.shape[-1]}, as hidden; got {tuple(weight.shape)}"
        )
    if bias is not None:
        shape("bias", bias, weight.shape[:1])
    for name, factor in (("logit_scale", logit_scale), ("logit_softcap", logit_softcap)):
        if factor is None and name == "logit_softcap":
            continue
        if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 < factor < math.inf:
            raise ValueError(f"{name} must be a finite number > 0; got {factor!r}")
    if max_chunk_bytes is not None and (
        isinstance(max_chunk_bytes, bool) or not isinstance(max_chunk_bytes, int) or max_chunk_bytes < 1
    ):
        raise ValueError(f"max_chunk_bytes must be a number of bytes, at least 1, or None; got {max_chunk_bytes!r}")


def group_name(process_group: object) -> str | None:
    """Of a `torch.distributed.ProcessGroup`, None for None."""
    if process_group is None:
        return None
    if not isinstance(process_group, torch.distributed.ProcessGroup):
        raise ValueError(f"process_group must be a torch.distributed.ProcessGroup; got {type(process_group).__name__}")
    return process_group.group_name


def process_group(value: torch.distributed.ProcessGroup | None) -> torch.distributed.ProcessGroup | None:
    """The value, which must be a group of this process or None."""
    group_name(value)
    return value


def tokens_and_mask(
    tokens: Tensor, mask: Tensor | None, rows: torch.Size, vocab: int | None, device: torch.device, validate: bool
) -> Tensor:
    """Checks tokens against the `rows` [...] of logits or hidden, and against the number of ids, None if not known.

    Returns the mask as bool, [...], all True where none was given.
    """
    integer("tokens", tokens)
    shape("tokens", tokens, rows)
    same_device("tokens", tokens, device)
    if mask is None:
        mask = torch.ones(tokens.shape, dtype=torch.bool, device=tokens.device)
    else:
        is_tensor("mask", mask)
        shape("mask", mask, tokens.shape)
        same_device("mask", mask, device)
        mask = mask != 0
    if vocab is not None and reads_values(device, validate):
        bad = (mask & ((tokens < 0) | (tokens >= vocab))).nonzero()
        if len(bad):
            index = ", ".join(str(i) for i in bad[0].tolist())
            got = tokens[tuple(bad[0])].item()
            raise ValueError(f"tokens must lie in [0, {vocab}) where the mask is not 0; tokens[{index}] is {got}")
    return mask


def offsets(cu_seqlens: Tensor | None, num_rows: int, packed: bool, device: torch.device, validate: bool) -> None:
    """Checks cu_seqlens [B + 1]: 0 = cu[0] <= cu[1] <= ... <= cu[B] = N, for the packed layout only."""
    if cu_seqlens is None:
        return
    integer("cu_seqlens", cu_seqlens)
    same_device("cu_seqlens", cu_seqlens, device)
    if not packed:
        raise ValueError("cu_seqlens goes with packed tensors ([N, V] logits); these are padded ([B, T, V])")
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1:
        raise ValueError(f"cu_seqlens must have shape [B + 1]; got {tuple(cu_seqlens.shape)}")
    if reads_values(device, validate):
        first, last = cu_seqlens[0].item(), cu_seqlens[-1].item()
        if first != 0 or last != num_rows or bool((cu_seqlens[1:] < cu_seqlens[:-1]).any()):
            raise ValueError(
                f"cu_seqlens must rise from 0 to the number of rows, {num_rows}; got {_short(cu_seqlens.tolist())}"
            )


def row_values(name: str, value: Tensor | None, rows: torch.Size, cu_seqlens: Tensor | None, validate: bool) -> None:
    """Checks a per-token ([N] or [B, T]) or per-response ([B]) float argument of a loss."""
    if value is None:
        return
    floating(name, value)
    if value.shape == rows:
        if (
            name in ("advantages", "rollout_weights")
            and cu_seqlens is not None
            and cu_seqlens.numel() - 1 == rows[0]
            and reads_values(value.device, validate)
            and bool((cu_seqlens[1:] != cu_seqlens[:-1] + 1).any())
        ):
            raise ValueError(
                f"{name} has shape ({rows[0]},), and cu_seqlens describes {rows[0]} responses of {rows[0]} tokens: "
                "expected one value per token, but these could be one per response; leave the empty responses out"
            )
        return
    if len(rows) == 2 and value.shape == rows[:1]:
        return
    if cu_seqlens is not None and value.shape == (cu_seqlens.numel() - 1,):
        return
    if len(rows) == 2:
        expected = f"[B, T] = {tuple(rows)} or [B] = ({rows[0]},)"
    elif cu_seqlens is not None:
        expected = f"[N] = ({rows[0]},) or [B] = ({cu_seqlens.numel() - 1},), as cu_seqlens says"
    else:
        expected = f"[N] = ({rows[0]},); one value per response needs [B, T, V] logits, or cu_seqlens"
    raise ValueError(f"{name} must have shape {expected}; got {tuple(value.shape)}")


def responses_known(config: Any, offsets: Tensor | None) -> None:
    """Checks that a loss that looks at responses was told which tokens those are."""
    if config.needs_responses and offsets is None:
        raise ValueError(
            f"objective {config.objective!r} with ratio {config.ratio!r} and off_policy_threshold "
            f"{config.off_policy_threshold} needs to know the responses: pass [B, T] tensors, or cu_seqlens"
        )


def boolean(name: str, value: Tensor, rows: torch.Size, cu_seqlens: Tensor | None) -> Tensor:
    """Checks a bool of one entry a token or a response, and returns it."""
    is_tensor(name, value)
    if value.dtype != torch.bool:
        raise ValueError(f"{name} must be bool; got {value.dtype}")
    allowed = {tuple(rows)}
    if len(rows) == 2:
        allowed.add((rows[0],))
    elif cu_seqlens is not None:
        allowed.add((cu_seqlens.numel() - 1,))
    if tuple(value.shape) not in allowed:
        raise ValueError(f"{name} must have shape {' or '.join(map(str, sorted(allowed)))}; got {tuple(value.shape)}")
    return value


def selected(
    value: Tensor | None, objective: str, by_selection: tuple[str, ...], rows: torch.Size, device: torch.device
) -> None:
    if value is None:
        return
    is_tensor("selected", value)
    if objective not in by_selection:
        raise ValueError(f"selected goes with the objectives {', '.join(by_selection)}; the objective is {objective!r}")
    if value.dtype != torch.bool:
        raise ValueError(f"selected must be bool; got {value.dtype}")
    shape("selected", value, rows)
    same_device("selected", value, device)


def normalizer(value: Any, validate: bool) -> None:
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"normalizer must be a number or a tensor of one element; got shape {tuple(value.shape)}")
        if not reads_values(value.device, validate):
            return
        value = value.item()
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0):
        raise ValueError(f"normalizer must be a count of tokens or sequences, >= 0; got {value!r}")


def no_double_backward(name: str) -> None:
    """To be called in a backward, which autograd runs with gradients enabled under create_graph=True only."""
    if torch.is_grad_enabled():
        raise RuntimeError(f"{name} cannot be differentiated twice: its gradient has no graph (create_graph=True)")


def _short(values: list[int], most: int = 8) -> str:
    return str(values) if len(values) <= most else str(values[:most])[:-1] + ", ...]"
