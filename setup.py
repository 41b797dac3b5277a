import re
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
version = re.search(r'^__version__ = "(.+)"$', (here / "qae_kernels/__init__.py").read_text(encoding="utf-8"), re.M)[1]

setup(
    name="qae-kernels",
    version=version,
    description="Exact, fused policy updates for RLVR: Quantile Advantage Estimation and the DAPO loss in Triton",
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["qae_kernels", "qae_kernels.*"]),
    package_data={"qae_kernels": ["py.typed"]},
    install_requires=[
        "torch>=2.10",
        "numpy",
        # A CUDA build of torch brings the Triton it was built for; a CPU build brings none.
        "triton>=3.6; platform_system == 'Linux'",
    ],
    # verl imports what is in this group in each of its processes.
    entry_points={"verl.plugins": ["qae = qae_kernels.adapters.verl"]},
    extras_require={
        "train": [
            *("transformers>=5.0", "datasets>=4.0", "peft", "math-verify>=0.9", "reasoning-gym>=0.1.25"),
            *("tyro", "rich", "matplotlib", "jinja2"),
        ],
        "track": ["tensorboard", "wandb", "trackio"],
        "vllm": ["vllm>=0.32"],
        "flash-attn": ["flash-attn"],
        "trl": ["trl>=1.16"],
        "verl": ["verl>=0.9.1"],
        "bench": ["pytest", "pytest-benchmark", "matplotlib"],
        # What the benchmarks compare with, where it is installed. flash-attn and verl too, if they are there: see
        # bench/peers.py.
        "peers": ["liger-kernel>=0.8.5", "trl>=1.16", "cut-cross-entropy>=25.1.1"],
        # trackio brings gradio, 190 MB in all: its test skips itself where it is not installed.
        "dev": [
            *("pytest", "pytest-benchmark", "pytest-xdist", "pytest-cov", "hypothesis", "ruff", "pre-commit"),
            *("tensorboard", "wandb", "mypy", "setuptools>=77"),
        ],
        "docs": ["mkdocs>=1.6", "mkdocs-material>=9.7", "mkdocstrings[python]>=1.0"],
    },
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Typing :: Typed",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
