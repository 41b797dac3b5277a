"""Quantile Advantage Estimation (arXiv 2509.22611): exact, fused policy updates for RLVR."""

from .aggregation import token_weights
from .config import PRESETS, PolicyLossConfig
from .credit import CreditPlan, plan_credit
from .ops import (
    group_advantages,
    linear_policy_loss,
    linear_token_logprobs,
    policy_loss,
    qae_dapo_loss,
    quantile_advantages,
    token_logprobs,
)
from .outputs import Advantages, PolicyLossOutput
from .schedules import DifficultyK, EntropyTargetK, KSchedule
from .whitening import quantile_whiten

__version__ = "0.1.0"

__all__ = [
    "PRESETS",
    "Advantages",
    "CreditPlan",
    "DifficultyK",
    "EntropyTargetK",
    "KSchedule",
    "PolicyLossConfig",
    "PolicyLossOutput",
    "group_advantages",
    "linear_policy_loss",
    "linear_token_logprobs",
    "plan_credit",
    "policy_loss",
    "qae_dapo_loss",
    "quantile_advantages",
    "quantile_whiten",
    "token_logprobs",
    "token_weights",
]
