"""Times the operations against their peers on the device at hand, after each has been checked.

    python -m bench                         advantages, policy_loss, token_logprobs
    python -m bench linear                  from hidden states and lm_head weight; minutes on a CPU
    python -m bench linear --sweep          its peak memory at other N as well
    python -m bench step                    whole training steps of a Qwen3; minutes on a CPU
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

from . import bench_advantages, bench_linear, bench_policy_loss, bench_step, bench_token_logprobs
from .harness import Row, about, compare, copy_gb_per_s, save

STAGES = {
    "advantages": bench_advantages, "policy_loss": bench_policy_loss, "token_logprobs": bench_token_logprobs,
    "linear": bench_linear, "step": bench_step,
}  # fmt: skip
DEFAULT_STAGES = ("advantages", "policy_loss", "token_logprobs")
REPEATS, SHARES = 10, (0.0, 0.8)  # where a stage does not say otherwise


def line(row: Row, ceiling_gb_per_s: float) -> str:
    """One contestant's, for people."""
    name = f"  {row['contestant']:<34} "
    for outcome in ("missing", "failed"):
        if outcome in row:
            return name + f"{outcome if outcome == 'missing' else 'FAILED'}: {row[outcome]}"
    text = ""
    if "median_ms" in row:
        text = f"{row['median_ms']:>10.3f} ms  p20 {row['p20_ms']:.3f}  p80 {row['p80_ms']:.3f}"
    if "cpu_ms" in row:
        text += f"  CPU {row['cpu_ms']:.3f} ms"
    if row["floor_bytes"] and "median_ms" in row:
        rate = row["floor_bytes"] / row["median_ms"] / 1e6
        text += f"  {rate:>6.0f} GB/s, {rate / ceiling_gb_per_s:>4.0%} of a copy"
    if "device_ms" in row:
        text += f"  {row['device_ms']:.4f} ms on the device"
    if row["extra_memory_bytes"] is not None:
        text += f"  +{row['extra_memory_bytes'] / 1e6:,.0f} MB"
        if "extra_memory_goal_bytes" in row:
            text += f" (goal at most {row['extra_memory_goal_bytes'] / 1e6:,.0f})"
    if row["errors"]:
        text += f"  off by {max(row['errors'].values()):.0e}"
    text += f"  {row['times_ours']:.2f}x {row['ours']}" if "times_ours" in row else ""
    for goal in row.get("goals", ()):
        text += f"\n      {goal['ratio']:.2f}x {goal['relative_to']}"
        text += f", CPU {goal['cpu_ratio']:.2f}x" if "cpu_ratio" in goal else ""
        text += f"; goal at most {goal['at_most']:.2f}x" if goal["at_most"] is not None else ""
    return name + text


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stages", nargs="*", help=f"{', '.join(STAGES)}; default: the first three")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--n", type=int, help="rows of logits; default 8192 on a GPU, 128 on a CPU, 1024 for linear")
    parser.add_argument(
        "--dim", type=int, nargs="+", help="of hidden states, for linear; default 1024 2048 4096 on a GPU, 256 on a CPU"
    )
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument(
        "--zero-credit", type=float, nargs="+",
        help="shares of responses without credit; default: 0 0.8, for step on a CPU 0 0.5 0.8 0.9",
    )  # fmt: skip
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="default: bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument(
        "--sweep", action="store_true", help="policy_loss over N, V and zero credit, linear's memory over N"
    )
    parser.add_argument("--without", nargs="+", default=[], metavar="CONTESTANT", help="contestants to leave out")
    parser.add_argument("--model", choices=tuple(bench_step.MODELS), help="for step; default: small")
    parser.add_argument("--repeats", type=int, help=f"default {REPEATS}; on a CPU fewer for linear and step")
    parser.add_argument("--threads", type=int, help="of PyTorch on a CPU; default: its own choice")
    parser.add_argument("--json", metavar="PATH", help="also write the results there, after each comparison")
    options = parser.parse_args(arguments)
    if options.repeats is not None and options.repeats < 2:
        parser.error(f"--repeats must be at least 2, for a spread; got {options.repeats}")
    unknown = sorted(set(options.stages) - set(STAGES))
    if unknown:
        parser.error(f"no such benchmark: {', '.join(unknown)}; there are {', '.join(STAGES)}")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    options.dtype = options.dtype or ("bfloat16" if device.type == "cuda" else "float32")

    facts = about(device) | {"copy_gb_per_s": copy_gb_per_s(device)}
    rows: list[Row] = []
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    if device.type == "cpu":
        print("CPU: the PyTorch paths are timed, not the Triton kernels")
    for stage in options.stages or DEFAULT_STAGES:
        repeats = options.repeats or getattr(STAGES[stage], "REPEATS", {}).get(device.type, REPEATS)
        shares = options.zero_credit or getattr(STAGES[stage], "SHARES", {}).get(device.type, SHARES)
        for comparison in STAGES[stage].comparisons(
            argparse.Namespace(**{**vars(options), "zero_credit": shares}), device
        ):
            for name in options.without:
                comparison.contestants.pop(name, None)
            print(f"\n{comparison.name}", flush=True)
            measured = compare(comparison, device, repeats)
            print("\n".join(line(row, facts["copy_gb_per_s"]) for row in measured), flush=True)
            rows += measured
            if options.json:
                save(options.json, {"about": facts, "rows": rows})


if __name__ == "__main__":
    main()
