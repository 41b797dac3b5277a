"""Times policy_loss with other launch configurations than the one in the code, each checked first; for tuning on a GPU.

    python -m bench.tune --threads 256 512 1024 --bytes 32 64 128 --json tune.json

Every pair of --threads (that work on one row) and --bytes (of the row that each has in flight) is patched in where the
kernels ask for `launch_config(vocab, dtype)`; the first line is the configuration in the code.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from unittest import mock

import torch

from qae_kernels.fused import policy_loss, token_stats
from qae_kernels.validate import DTYPES

from . import bench_policy_loss
from .__main__ import line
from .harness import OURS, Comparison, Contestant, about, compare, copy_gb_per_s, save

LaunchConfig = tuple[int, int]  # (BLOCK, THREADS)


@contextmanager
def launched_with(config: LaunchConfig) -> Iterator[None]:
    with (
        mock.patch.object(policy_loss, "launch_config", lambda *_: config),
        mock.patch.object(token_stats, "launch_config", lambda *_: config),
    ):
        yield


def with_config(contestant: Contestant, config: LaunchConfig) -> Contestant:
    def run(problem):
        with launched_with(config):
            return contestant.run(problem)

    return replace(contestant, run=run)


def comparison(base: Comparison, configs: list[LaunchConfig], variant: str) -> Comparison:
    """One of our variants with each configuration in the place of the contestants."""
    contestant = base.contestants[variant]
    found = {f"{OURS} as it is": contestant}
    found |= {
        f"BLOCK {block}, THREADS {threads}": with_config(contestant, (block, threads)) for block, threads in configs
    }
    return replace(
        base, name=f"{variant}, {base.name}", contestants=found, check=lambda _, result: base.check(variant, result),
        missing={},
    )  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.tune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--n", type=int, default=8192)
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--zero-credit", type=float, nargs="+", default=[0.0, 0.8])
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bfloat16")
    parser.add_argument("--threads", type=int, nargs="+", default=[128, 256, 512, 1024])
    parser.add_argument("--bytes", type=int, nargs="+", default=[16, 32, 64, 128])
    variants = list(bench_policy_loss.OUR_VARIANTS)
    parser.add_argument("--variant", nargs="+", choices=variants, default=variants[:1] + variants[2:3])
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--json", metavar="PATH", help="also write the results there, after each comparison")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error(f"needs a GPU; torch {torch.__version__} sees none")
    device = torch.device("cuda")
    facts, rows = about(device) | {"copy_gb_per_s": copy_gb_per_s(device)}, []
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    itemsize = DTYPES[options.dtype].itemsize
    configs = [(threads * size // itemsize, threads) for threads in options.threads for size in options.bytes]
    make = partial(bench_policy_loss.comparison, options.n, options.vocab, dtype=options.dtype, device=device)
    for share in options.zero_credit:
        base = make(zero_credit=share)
        for variant in options.variant:
            tuned = comparison(base, configs, variant)
            print(f"\n{tuned.name}", flush=True)
            measured = compare(tuned, device, options.repeats)
            print("\n".join(line(row, facts["copy_gb_per_s"]) for row in measured), flush=True)
            rows += measured
            if options.json:
                save(options.json, {"about": facts, "tuning": rows})


if __name__ == "__main__":
    main()
