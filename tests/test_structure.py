"""What may import what, what is public under which parameter names, and that the tests' own poison works."""

import ast
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import qae_kernels

ROOT = Path(qae_kernels.__file__).parent
FILES = sorted(path.relative_to(ROOT) for path in ROOT.rglob("*.py"))
FRAMEWORKS = {"transformers", "trl", "verl"}
# Every layer with the layers that it may import; a file's layer is its folder, or its name at the top.
LAYERS = {
    "checks": set(),
    "diagnostics": set(),
    "aggregation": set(),
    "outputs": {"diagnostics"},
    "config": {"checks"},
    "rows": {"aggregation"},
    "order_statistics": {"checks"},
    "schedules": {"checks"},
    "whitening": {"checks", "order_statistics"},
    "reference": {"checks", "config", "order_statistics", "outputs", "rows"},
    "presets": {"config", "reference"},
    "credit": {"checks", "config", "presets"},
    "fused": {"checks", "config", "outputs", "rows"},
    "factors": {"config", "reference", "rows"},
    "chunked": {"config", "factors", "reference", "rows"},
    "metrics": {"config", "diagnostics", "reference", "rows"},
    "prepass": {"checks", "config", "reference", "rows"},
    "vocab_parallel": set(),
    "two_pass": {"config", "factors", "reference", "rows"},
    "linear_head": {"config", "factors", "reference", "rows", "two_pass", "vocab_parallel"},
    "library": {"checks", "config", "outputs", "rows", "fused", "chunked", "reference", "two_pass", "vocab_parallel",
                "linear_head"},
    "ops": {"checks", "config", "prepass", "presets", "aggregation", "rows", "diagnostics", "outputs", "metrics",
            "reference", "vocab_parallel", "library"},
}  # fmt: skip
BELOW_THE_TOP = set(LAYERS)


def layer(path: Path) -> str:
    return path.parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Absolute module names that a file imports, at any depth of its code."""
    package = ["qae_kernels", *path.parent.parts]
    found = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*parents, *([node.module] if node.module else [])])
            found |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return found


@pytest.mark.parametrize("path", FILES, ids=str)
def test_import_direction(path):
    names = {tuple(name.split(".")) for name in imports(path)}
    layers = {parts[1] for parts in names if parts[0] == "qae_kernels" and len(parts) > 1} & BELOW_THE_TOP
    allowed = LAYERS.get(layer(path), BELOW_THE_TOP) | {layer(path)}
    assert layers <= allowed, f"{path} imports {sorted(layers - allowed)}"
    outside = {parts[0] for parts in names}
    if layer(path) != "adapters":
        assert not outside & FRAMEWORKS
    if layer(path) in LAYERS and layer(path) != "fused":
        assert "triton" not in outside


def test_imports_are_seen():
    """The parser above sees relative imports, those inside functions, and those of a module from its package."""
    assert {
        "torch",
        "qae_kernels.checks",
        "qae_kernels.fused.policy_loss",
        "qae_kernels.reference.advantages",
    } <= imports(Path("library.py"))
    assert {"qae_kernels.fused.objectives", "qae_kernels.config", "triton"} <= imports(Path("fused/policy_loss.py"))


IMPORT = """
import sys, torch, qae_kernels
sys.exit("triton.language" in sys.modules or "torch._dynamo" in sys.modules)
"""
RUN_WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # importing it raises ImportError
import torch, qae_kernels as q
logits = torch.zeros(4, 3, requires_grad=True)
tokens = torch.zeros(4, dtype=torch.long)
q.qae_dapo_loss(logits, tokens, torch.tensor([1., 0, 0, 0]), 4, cu_seqlens=torch.arange(5)).loss.backward()
q.token_logprobs(logits, tokens)
"""


@pytest.mark.parametrize("code", [IMPORT, RUN_WITHOUT_TRITON], ids=["import", "run"])
def test_triton_is_imported_only_when_it_runs(code):
    """Importing the package is cheap, and a machine without Triton runs its PyTorch path."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT.parent, env=environment, check=True)


SIGNATURES = {
    "group_advantages": "rewards groups baseline k outcomes lengths interpolation scale eps correction backend",
    "quantile_advantages": "rewards groups k outcomes interpolation scale eps correction backend",
    "policy_loss": "logits tokens advantages old_logprobs mask cu_seqlens ref_logprobs rollout_weights normalizer "
    "config entropy process_group inplace backend",
    "linear_policy_loss": "hidden weight tokens advantages bias logit_scale logit_softcap entropy process_group "
    "old_logprobs mask cu_seqlens ref_logprobs rollout_weights normalizer config max_chunk_bytes backend",
    "linear_token_logprobs": "hidden weight tokens temperature mask bias logit_scale logit_softcap process_group "
    "backend",
    "qae_dapo_loss": "logits tokens rewards groups cu_seqlens mask old_logprobs k eps_low eps_high backend",
    "token_logprobs": "logits tokens temperature backend",
    "PolicyLossConfig": "objective ratio aggregation eps_low eps_high dual_clip kl_coef kl_estimator entropy_coef "
    "temperature",
}
POSITIONAL = {
    "group_advantages": "rewards groups",
    "quantile_advantages": "rewards groups k",
    "policy_loss": "logits tokens advantages",
    "linear_policy_loss": "hidden weight tokens advantages",
    "linear_token_logprobs": "hidden weight tokens",
    "qae_dapo_loss": "logits tokens rewards groups",
    "token_logprobs": "logits tokens",
}
DEFAULTS = {
    "group_advantages": {"k": 0.4, "outcomes": None, "lengths": None, "scale": "std", "eps": 1e-6,
                         "baseline": "quantile"},
    "quantile_advantages": {"k": 0.4, "interpolation": "inverted_cdf", "scale": "std", "eps": 1e-6, "correction": 1},
    "policy_loss": {"old_logprobs": None, "config": qae_kernels.PRESETS["dapo"], "inplace": False, "backend": "auto"},
    "linear_policy_loss": {"bias": None, "logit_scale": 1.0, "logit_softcap": None, "process_group": None},
    "linear_token_logprobs": {"temperature": 1.0},
    "qae_dapo_loss": {"k": 0.4, "eps_low": 0.2, "eps_high": 0.28},
    "token_logprobs": {"temperature": 1.0},
    "PolicyLossConfig": {"eps_low": 0.2, "eps_high": 0.28, "dual_clip": None, "kl_coef": 0.0, "kl_estimator": "k3",
                         "entropy_coef": 0.0, "temperature": 1.0, "aggregation": "token-mean", "objective": "clip"},
}  # fmt: skip


@pytest.mark.parametrize("name", SIGNATURES)
def test_public_signature(name):
    """The names that callers use; more may be added, none renamed."""
    parameters = inspect.signature(getattr(qae_kernels, name)).parameters
    assert set(SIGNATURES[name].split()) <= set(parameters)
    for parameter, default in DEFAULTS[name].items():
        assert parameters[parameter].default == default, parameter
    if name in POSITIONAL:
        by_position = [p.name for p in parameters.values() if p.kind == p.POSITIONAL_OR_KEYWORD]
        assert by_position == POSITIONAL[name].split()


def test_presets():
    """Published settings; see the papers cited beside them."""
    presets = qae_kernels.PRESETS
    assert (presets["dapo"].eps_low, presets["dapo"].eps_high, presets["dapo"].aggregation) == (0.2, 0.28, "token-mean")
    assert (presets["grpo"].eps_high, presets["grpo"].aggregation) == (0.2, "seq-mean-token-mean")
    assert (presets["bnpo"].eps_high, presets["bnpo"].aggregation) == (0.2, "token-mean")
    assert (presets["dr_grpo"].eps_high, presets["dr_grpo"].aggregation) == (0.2, "seq-mean-token-sum-norm")
    assert {name for name, preset in presets.items() if not preset.skips_zero_credit} == {"kl_cov"}


def test_everything_public_is_documented():
    assert set(qae_kernels.__all__) <= set(vars(qae_kernels))
    for name in qae_kernels.__all__:
        value = getattr(qae_kernels, name)
        if callable(value):
            assert inspect.getdoc(value) and not inspect.getdoc(value).startswith(f"{name}("), name
    for path in FILES:
        assert ast.get_docstring(ast.parse((ROOT / path).read_text())), f"{path} has no docstring"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int32, torch.int64, torch.bool])
def test_fresh_memory_is_poisoned(dtype, device):
    like = torch.zeros(3, dtype=dtype, device=device)
    for fresh in (
        torch.empty(3, dtype=dtype, device=device),
        torch.empty((3, 2), dtype=dtype, device=device),
        torch.empty_like(like),
        torch.empty_strided((3,), (1,), dtype=dtype, device=device),
        like.new_empty(3),
    ):
        if dtype.is_floating_point:
            assert fresh.isnan().all()
        else:
            assert (fresh == (1 if dtype == torch.bool else torch.iinfo(dtype).max)).all()
