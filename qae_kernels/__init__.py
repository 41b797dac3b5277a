"""Quantile Advantage Estimation (arXiv 2509.22611): exact, fused policy updates for RLVR."""

from .aggregation import token_weights
from .config import PolicyLossConfig, register_objective
from .credit import CreditPlan, plan_credit
from .diagnostics import Diagnostics
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
from .prepass import rollout_correction, select_tokens, top_entropy_mask
from .presets import PRESETS
from .schedules import DifficultyK, EntropyTargetK, KSchedule
from .whitening import quantile_whiten

__version__ = "0.1.0"

__all__ = [
    "PRESETS",
    "Advantages",
    "CreditPlan",
    "Diagnostics",
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
    "register_objective",
    "rollout_correction",
    "select_tokens",
    "token_logprobs",
    "token_weights",
    "top_entropy_mask",
]
