"""The linear head of this package in verl's fused-kernel path. Importing the module is the switch, made for verl's own
setting for modules to import in every worker:

    actor_rollout_ref.model.external_lib=qae_kernels.adapters.verl_head
    actor_rollout_ref.model.use_fused_kernels=True
    actor_rollout_ref.model.fused_kernel_options.impl_backend=triton

It takes the place of `verl.utils.kernel.linear_cross_entropy.linear_cross_entropy`, which those models look up at each
forward. verl has no other way in: its list of backends is closed.
"""

from __future__ import annotations

from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor, Partial
from verl.utils.kernel import linear_cross_entropy as kernels_of_verl

from ..ops import linear_token_logprobs


def linear_head(
    hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float = 1.0, reduction: str = "none",
    dist_process_group: ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """verl's signature. hidden [..., D], weight [V, D], labels [...] of two dimensions at most: the token after each.

    Returns (log-probabilities, entropy), f32, shape of labels, both differentiable.
    Raises ValueError: a reduction; a vocabulary that several ranks share (Megatron), where verl's kernel leaves the
    gradient of hidden for the caller to sum over the ranks and this one has it summed.
    """
    if reduction != "none":
        raise ValueError(f"reduction must be 'none': one value per token; got {reduction!r}")
    if dist_process_group is not None and dist_process_group.size() > 1:
        raise ValueError(
            f"the head of qae_kernels takes the whole vocabulary in verl; got one shared by "
            f"{dist_process_group.size()} ranks (tensor parallelism)"
        )
    if isinstance(weight, DTensor):  # FSDP2 shards the head of an untied model by itself, and averages gradients
        weight = weight.full_tensor(grad_placements=[Partial("avg")] * weight.device_mesh.ndim)
    return linear_token_logprobs(hidden, weight, labels, temperature=temperature)


def use_linear_head() -> None:
    """Also after something else has taken the place."""
    kernels_of_verl.linear_cross_entropy = linear_head


use_linear_head()
