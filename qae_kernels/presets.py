"""Published settings of the policy loss by name, each with the paper it is from."""

from __future__ import annotations

from .config import PolicyLossConfig
from .reference import objectives  # noqa: F401  registers what the names below mean

PRESETS: dict[str, PolicyLossConfig] = {
    # DAPO: clip-higher, mean over all tokens of the batch (arXiv 2503.14476, eq. 8 and section 3.1).
    "dapo": PolicyLossConfig(eps_low=0.2, eps_high=0.28, aggregation="token-mean"),
    # GRPO: symmetric clip, mean over each response first (DeepSeekMath, arXiv 2402.03300, eq. 3). The paper adds
    # the k3 penalty with kl_coef=0.04; today's trainers leave it out, and it needs ref_logprobs: dataclasses.replace.
    "grpo": PolicyLossConfig(eps_low=0.2, eps_high=0.2, aggregation="seq-mean-token-mean"),
    # BNPO as TRL names it: GRPO's symmetric clip, mean over the tokens of the batch.
    "bnpo": PolicyLossConfig(eps_low=0.2, eps_high=0.2, aggregation="token-mean"),
    # Dr.GRPO: neither length nor std normalisation; take advantages with scale="none" (arXiv 2503.20783, eq. 2).
    "dr_grpo": PolicyLossConfig(eps_low=0.2, eps_high=0.2, aggregation="seq-mean-token-sum-norm"),
    # PPO's clip with the dual clip that verl's default loss always has (arXiv 1707.06347, eq. 7; 1912.09729, eq. 5).
    "ppo": PolicyLossConfig(eps_low=0.2, eps_high=0.2, dual_clip=3.0, aggregation="token-mean"),
    # Two-sided clipping: GRPO with TRL's delta = 4 (INTELLECT-2, arXiv 2505.07291).
    "two_sided": PolicyLossConfig(eps_low=0.2, eps_high=0.2, dual_clip=4.0, aggregation="token-mean"),
    # GSPO: one ratio per response, clipped much tighter (arXiv 2507.18071, eq. 5; bounds: section 5.1).
    "gspo": PolicyLossConfig(ratio="sequence", eps_low=3e-4, eps_high=4e-4, aggregation="seq-mean-token-mean"),
    # GSPO-token: the same ratio, with each token's own gradient and advantage (arXiv 2507.18071).
    "gspo_token": PolicyLossConfig(
        ratio="sequence-token", eps_low=3e-4, eps_high=4e-4, aggregation="seq-mean-token-mean"
    ),
    # LUSPO: GSPO with each response's loss times its length (arXiv 2602.05261).
    "luspo": PolicyLossConfig(ratio="sequence", eps_low=2e-3, eps_high=2.5e-3, aggregation="seq-mean-token-sum"),
    # CISPO: weights clipped from above only (MiniMax-M1, arXiv 2506.13585, eq. 4), at 5 (ScaleRL, arXiv 2510.13786).
    "cispo": PolicyLossConfig(objective="cispo", eps_low=1.0, eps_high=4.0, aggregation="token-mean"),
    # SAPO: a soft gate in place of the clip, steeper for negative advantages (arXiv 2511.20347).
    "sapo": PolicyLossConfig(objective="sapo", aggregation="seq-mean-token-mean"),
    # VESPO: a gamma-shaped weight of the ratio of the whole response (arXiv 2602.10693).
    "vespo": PolicyLossConfig(objective="vespo", aggregation="token-mean"),
    # GMPO: geometric mean of the token ratios, each bounded by e^-0.4, e^0.4 (arXiv 2507.20673).
    "gmpo": PolicyLossConfig(objective="gmpo", eps_low=0.4, eps_high=0.4, aggregation="seq-mean-token-mean"),
    # REINFORCE; with the mean as baseline and no std GPG (arXiv 2504.02546).
    "reinforce": PolicyLossConfig(objective="reinforce", aggregation="token-mean"),
    # Clip-Cov: a few tokens of high covariance lose their gradient (arXiv 2505.22617).
    "clip_cov": PolicyLossConfig(objective="clip_cov", eps_low=0.2, eps_high=0.2, hyper={"share": 2e-4}),
    # KL-Cov: the tokens of highest covariance are pulled to the old policy; share for a model of 7B (arXiv 2505.22617).
    "kl_cov": PolicyLossConfig(objective="kl_cov", hyper={"share": 2e-3, "coef": 1.0}),
    # DAPO on the fifth of the tokens that has the highest entropy (arXiv 2506.01939).
    "top_entropy": PolicyLossConfig(eps_low=0.2, eps_high=0.28, top_entropy=0.2, aggregation="token-mean"),
}
