"""Quantile Advantage Estimation (arXiv 2509.22611): exact, fused policy updates for RLVR."""

from .aggregation import token_weights
from .config import PRESETS, PolicyLossConfig
from .ops import group_advantages, policy_loss, qae_dapo_loss, quantile_advantages, token_logprobs
from .outputs import Advantages, PolicyLossOutput

__version__ = "0.1.0"

__all__ = [
    "PRESETS",
    "Advantages",
    "PolicyLossConfig",
    "PolicyLossOutput",
    "group_advantages",
    "policy_loss",
    "qae_dapo_loss",
    "quantile_advantages",
    "token_logprobs",
    "token_weights",
]
