"""Times the operations against their peers on the device at hand.

    python -m bench                         everything
    python -m bench policy_loss --n 512 --vocab 32000 --zero-credit 0 0.8 --json result.json
    pytest bench --benchmark-only           the same contestants through pytest-benchmark, on small shapes

On a CPU these are the PyTorch paths, not the Triton kernels.
"""

from __future__ import annotations

import argparse
import json
from itertools import groupby

import torch

from . import bench_advantages, bench_policy_loss
from .harness import about, compare

STAGES = {"advantages": bench_advantages, "policy_loss": bench_policy_loss}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stages", nargs="*", help=f"{', '.join(STAGES)}; default: all")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--n", type=int, help="rows of logits; default 8192 on a GPU, 128 on a CPU")
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument(
        "--zero-credit", type=float, nargs="+", default=[0.0, 0.8], help="shares of rows without credit"
    )
    parser.add_argument("--dtype", choices=tuple(bench_policy_loss.DTYPES))
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--json", metavar="PATH", help="also write the results there")
    options = parser.parse_args()
    if options.repeats < 2:
        parser.error(f"--repeats must be at least 2, for a spread; got {options.repeats}")
    unknown = sorted(set(options.stages) - set(STAGES))
    if unknown:
        parser.error(f"no such benchmark: {', '.join(unknown)}; there are {', '.join(STAGES)}")
    device = torch.device(options.device)
    options.dtype = options.dtype or ("bfloat16" if device.type == "cuda" else "float32")

    facts, rows = about(device), []
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    if device.type == "cpu":
        print("CPU: the PyTorch paths are timed, not the Triton kernels")
    for stage in options.stages or STAGES:
        for comparison in STAGES[stage].comparisons(options, device):
            rows += compare(comparison, device, options.repeats)
    for name, group in groupby(rows, key=lambda row: row["benchmark"]):
        group = list(group)
        print(f"\n{name}")
        for row in group:
            print(f"  {row['contestant']:<20} {row['median_ms']:>10.3f} ms   p20 {row['p20_ms']:.3f}  "
                  f"p80 {row['p80_ms']:.3f}   {row['median_ms'] / group[0]['median_ms']:.2f}x")  # fmt: skip
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump({"about": facts, "rows": rows}, file, indent=2)


if __name__ == "__main__":
    main()
