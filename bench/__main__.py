"""Times the operations against their peers on the device at hand, after each has been checked.

    python -m bench                         everything
    python -m bench policy_loss --n 512 --vocab 32000 --zero-credit 0 0.8 --json result.json
    python -m bench policy_loss --sweep     N, V and the share of zero credit, one varied at a time
    pytest bench --benchmark-only           the same contestants through pytest-benchmark, on small shapes

On a CPU these are the PyTorch paths, not the Triton kernels. GB/s counts the bytes that have to move for what a
contestant delivers (logits read once where they must be, gradient written once), not those that it does move.
"""

from __future__ import annotations

import argparse

import torch

from qae_kernels.validate import DTYPES

from . import bench_advantages, bench_policy_loss, bench_token_logprobs
from .harness import Row, about, compare, copy_gb_per_s, save

STAGES = {"advantages": bench_advantages, "policy_loss": bench_policy_loss, "token_logprobs": bench_token_logprobs}


def line(row: Row, ceiling_gb_per_s: float) -> str:
    """One contestant's, for people."""
    name = f"  {row['contestant']:<34} "
    if "median_ms" not in row:
        return name + (f"missing: {row['missing']}" if "missing" in row else f"FAILED: {row['failed']}")
    text = f"{row['median_ms']:>10.3f} ms  p20 {row['p20_ms']:.3f}  p80 {row['p80_ms']:.3f}"
    if row["floor_bytes"]:
        rate = row["floor_bytes"] / row["median_ms"] / 1e6
        text += f"  {rate:>6.0f} GB/s, {rate / ceiling_gb_per_s:>4.0%} of a copy"
    if "device_ms" in row:
        text += f"  {row['device_ms']:.4f} ms on the device"
    if row["extra_memory_bytes"] is not None:
        text += f"  +{row['extra_memory_bytes'] / 2**30:.2f} GiB"
    return name + text + (f"  {row['times_ours']:.2f}x {row['ours']}" if "times_ours" in row else "")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stages", nargs="*", help=f"{', '.join(STAGES)}; default: all")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--n", type=int, help="rows of logits; default 8192 on a GPU, 128 on a CPU")
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument(
        "--zero-credit", type=float, nargs="+", default=[0.0, 0.8], help="shares of responses without credit"
    )
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="default: bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--sweep", action="store_true", help="policy_loss over N, V and shares of zero credit")
    parser.add_argument("--without", nargs="+", default=[], metavar="CONTESTANT", help="contestants to leave out")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--json", metavar="PATH", help="also write the results there, after each comparison")
    options = parser.parse_args(arguments)
    if options.repeats < 2:
        parser.error(f"--repeats must be at least 2, for a spread; got {options.repeats}")
    unknown = sorted(set(options.stages) - set(STAGES))
    if unknown:
        parser.error(f"no such benchmark: {', '.join(unknown)}; there are {', '.join(STAGES)}")
    device = torch.device(options.device)
    options.dtype = options.dtype or ("bfloat16" if device.type == "cuda" else "float32")

    facts = about(device) | {"copy_gb_per_s": copy_gb_per_s(device)}
    rows: list[Row] = []
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    if device.type == "cpu":
        print("CPU: the PyTorch paths are timed, not the Triton kernels")
    for stage in options.stages or STAGES:
        for comparison in STAGES[stage].comparisons(options, device):
            for name in options.without:
                comparison.contestants.pop(name, None)
            print(f"\n{comparison.name}", flush=True)
            measured = compare(comparison, device, options.repeats)
            print("\n".join(line(row, facts["copy_gb_per_s"]) for row in measured), flush=True)
            rows += measured
            if options.json:
                save(options.json, {"about": facts, "rows": rows})


if __name__ == "__main__":
    main()
