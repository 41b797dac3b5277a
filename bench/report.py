"""From bench/results/ to the tables of the README and docs/memory-and-speed.md, and the plots in docs/. None is typed.

    python -m bench.report            writes both pages between their markers, and docs/bench_*.png

A results file is what `python -m bench --json` writes; `make gpu` leaves several. What was not measured is said to be
not measured: there are no tables without rows, and no plots without points.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from functools import partial
from itertools import groupby
from pathlib import Path

from .bench_linear import GEMMS
from .bench_step import DENSE
from .harness import OURS, ROOT, Row

RESULTS, DOCS = ROOT / "bench" / "results", ROOT / "docs"
README, PAGE = ROOT / "README.md", DOCS / "memory-and-speed.md"
# Of `python -m bench.codegen --arch sm_90 --dtype bf16 --peers --json` and `python -m bench.traffic --json`.
CODEGEN, TRAFFIC = "codegen.json", "traffic.json"
# Contestant: (its kernels in codegen.json, its name in traffic.json).
PROVEN = {
    "qae_kernels": ("loss, entropy=all", "policy_loss"),
    "qae_kernels, entropy='active'": ("loss, entropy=active", "policy_loss, entropy=active"),
    "qae_kernels, entropy='none'": ("loss, entropy=none", "policy_loss, entropy=none"),
    "Liger": ("Liger, ", "Liger"), "TRL": ("TRL, ", "TRL"), "eager PyTorch": (None, "eager PyTorch"),
}  # fmt: skip
# Results files of a CPU that the README has tables of: what makes each.
ON_CPU = {"linear_cpu": "python -m bench linear --sweep", "step_cpu": "python -m bench step"}
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
ON_GPU = "Triton kernels"  # what `about` says of a GPU's results
FLOOR = "floor: the bytes that must move, at a copy's rate"
SWEPT = {"n": "N", "vocab": "V", "zero_credit": "share of zero credit"}


def load(folder: Path) -> list[Row]:
    """Every results file of `python -m bench` below the folder, those of GPUs first."""
    files = [(path, json.loads(path.read_text(encoding="utf-8"))) for path in sorted(folder.rglob("*.json"))]
    found = [{**x, "file": path.stem} for path, x in files if isinstance(x, dict) and {"about", "rows"} <= set(x)]
    found = [x for x in found if "copy_gb_per_s" in x["about"]]
    return sorted(found, key=lambda x: (x["about"]["paths"] != ON_GPU, x["about"]["device"], x["file"]))


def stage(row: Row) -> str:
    return row["benchmark"].split(",")[0].split()[0]


def variation(row: Row) -> str:
    """What distinguishes the column groups of one table; whole steps have a contestant for each share instead."""
    if "zero_credit" in row and stage(row) != "step":
        return f"zero credit {row['zero_credit']:.0%}" if row["zero_credit"] else "dense"
    return row.get("work", "")


def title(row: Row) -> str:
    if "n" not in row:
        return row["benchmark"]
    dim = f", D = {row['dim']:,}" if "dim" in row else ""
    return f"{stage(row)}, N = {row['n']:,}{dim}, V = {row['vocab']:,}, {row['dtype']}"


def ms(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def ratio(goal: Row) -> float:
    """Of CPU time where it was measured: that is disturbed least."""
    return goal.get("cpu_ratio", goal["ratio"])


def against(row: Row, reference: str) -> float | None:
    """How many times the reference's time."""
    return next((ratio(goal) for goal in row.get("goals", ()) if goal["relative_to"] == reference), None)


def cells(row: Row | None, columns: list[str], ceiling_gb_per_s: float) -> list[str]:
    if row is None or "median_ms" not in row:
        return ["not measured" if row is None else "failed", *[""] * (len(columns) - 1)]
    share = (row["floor_bytes"] or 0) / row["median_ms"] / 1e6 / ceiling_gb_per_s
    floor, dense = against(row, GEMMS), against(row, DENSE)
    values = {
        "CPU ms": ms(row["cpu_ms"]) if "cpu_ms" in row else "",
        "of the GEMMs": f"{floor:.2f}" if floor else "",
        "of the dense step": f"{dense:.2f}" if dense else "",
        "of the ideal saving": f"{row['active_share'] / dense:.0%}" if dense else "",
        "ms (p20 to p80)": f"{ms(row['median_ms'])} ({ms(row['p20_ms'])} to {ms(row['p80_ms'])})",
        "ms on the device": ms(row["device_ms"]) if "device_ms" in row else "",
        "of a copy": f"{share:.0%}" if row["floor_bytes"] else "",
        "times ours": f"{row['times_ours']:.2f}x" if "times_ours" in row else "",
        "extra GiB": f"{(row['extra_memory_bytes'] or 0) / 2**30:.2f}",
    }
    return [values[column] for column in columns]


def table(rows: list[Row], about: Row) -> str:
    """A line per contestant, a group of columns per variation."""
    measured = [row for row in rows if "missing" not in row]
    given = {
        "ms (p20 to p80)": True,
        "CPU ms": any("cpu_ms" in row for row in measured),
        "of the GEMMs": any(against(row, GEMMS) for row in measured),
        "of the dense step": any(against(row, DENSE) for row in measured),
        "of the ideal saving": any(against(row, DENSE) for row in measured),
        "ms on the device": any("device_ms" in row for row in measured),
        "of a copy": any(row["floor_bytes"] for row in measured),
        "times ours": True,
        "extra GiB": any(row.get("extra_memory_bytes") is not None for row in measured),
    }
    columns = [column for column, is_given in given.items() if is_given]
    variations = list(dict.fromkeys(variation(row) for row in measured))
    found = {(row["contestant"], variation(row)): row for row in measured}
    head = [title(rows[0]), "delivers"] + [f"{v}: {column}" if v else column for v in variations for column in columns]
    lines = [head, ["---"] * len(head)]
    for contestant, delivers in {row["contestant"]: row["delivers"] for row in measured}.items():
        groups = [cells(found.get((contestant, v)), columns, about["copy_gb_per_s"]) for v in variations]
        lines.append([contestant, delivers, *(cell for group in groups for cell in group)])
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    for word, key in (("Failed", "failed"), ("Not measured", "missing")):
        reasons: dict[str, list[str]] = {}
        for contestant, reason in dict.fromkeys((row["contestant"], row[key]) for row in rows if key in row):
            reasons.setdefault(reason, []).append(contestant)
        if reasons:
            listed = "; ".join(f"{', '.join(names)} ({reason})" for reason, names in reasons.items())
            text += f"\n\n{word}: {listed}."
    return text


def goals(rows: list[Row]) -> str:
    """A line on the goals that the rows have, those that are missed too; "" if they have none."""

    def where(row: Row) -> str:
        return f"{row['contestant']}{', ' + variation(row) if variation(row) else ''}"

    parts = []
    for row in rows:
        for goal in row.get("goals", ()):
            if goal["at_most"] is not None:
                outcome = "reached" if ratio(goal) <= goal["at_most"] else "missed"
                parts.append(
                    f"{where(row)}: {ratio(goal):.2f} of {goal['relative_to']}, at most {goal['at_most']:.2f} {outcome}"
                )
    limited = [row for row in rows if row.get("extra_memory_bytes") is not None and "extra_memory_goal_bytes" in row]
    if limited:
        most = max(limited, key=lambda row: row["extra_memory_bytes"])
        found, limit = most["extra_memory_bytes"], most["extra_memory_goal_bytes"]
        parts.append(
            f"{where(most)}: {found / 1e6:,.0f} MB extra, the most of ours, at most {limit / 1e6:,.0f} "
            f"{'reached' if found <= limit else 'missed'}"
        )
    of_cpu_time = any("cpu_ratio" in goal for row in rows for goal in row.get("goals", ()))
    head = "Ratios are of CPU time, run by run. Goals" if of_cpu_time else "Goals"
    return f"{head}: {'; '.join(parts)}." if parts else ""


def memory_table(rows: list[Row]) -> str:
    """Peak extra memory over N, dense: of the rows measured for that alone and of those timed at the same D and V."""
    shape = next((row["dim"], row["vocab"], row["dtype"]) for row in rows if row.get("memory_only"))
    found = {
        (row["contestant"], row["n"]): row["extra_memory_bytes"]
        for row in rows
        if (row.get("dim"), row.get("vocab"), row.get("dtype")) == shape and not row["zero_credit"]
        and row.get("extra_memory_bytes") is not None
    }  # fmt: skip
    sizes = sorted({n for _, n in found})
    head = [f"linear, D = {shape[0]:,}, V = {shape[1]:,}, {shape[2]}, dense: peak extra MB"]
    lines = [head + [f"N = {n:,}" for n in sizes], ["---"] * (1 + len(sizes))]
    for contestant in dict.fromkeys(name for name, _ in found):
        measured = (found.get((contestant, n)) for n in sizes)
        lines.append([contestant, *("not measured" if x is None else f"{x / 1e6:,.0f}" for x in measured)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def origin(about: Row) -> str:
    """One line: where and when, with what."""
    versions = {"torch": about["torch"], "Triton": about["triton"], "Python": about["python"], **about["peers"]}
    commit = (about["commit"] or "unknown") + (" with changes" if about["dirty"] else "")
    cpu = "" if about["paths"] == ON_GPU else f" with {about['threads']} threads"
    return (
        f"{about['device']}{cpu}; {about['paths']}; {', '.join(f'{n} {v}' for n, v in versions.items())}; "
        f"commit {commit}; {about['date'][:10]}; a copy moves {about['copy_gb_per_s']:,.0f} GB/s."
    )


def proofs(folder: Path) -> list[str]:
    """What needs no GPU: a table of instructions, bytes and launches, and a line on it; [] if it was not counted."""
    if not ((folder / CODEGEN).exists() and (folder / TRAFFIC).exists()):
        return []
    codegen, traffic = (json.loads((folder / name).read_text(encoding="utf-8")) for name in (CODEGEN, TRAFFIC))
    head = ["forward + backward, per bf16 logit", "instructions", "EX2", "bytes, dense", "bytes, 80% zero credit",
            "launches: Triton", "launches: PyTorch"]  # fmt: skip
    lines = [head, ["---"] * len(head)]
    for contestant, (case, name) in PROVEN.items():
        kernels = [k for k in codegen["kernels"] if case and k["case"].startswith(case) and k["target"] == "sm_90"]
        loops = [loop for k in kernels for loop in k["loops"]]
        parts = [next((x for x in loops if x["name"] == "statistics"), None),
                 next((x for x in loops if x["name"].startswith("gradient")), None)]  # fmt: skip
        counted = [
            " + ".join("?" if part is None else f"{part[key]:.2f}" for part in parts) if kernels else ""
            for key in ("instructions", "ex2")
        ]
        dense, sparse = (next((row for row in traffic["rows"] if row["name"] == name and f"{share} of the rows" in
                               row["table"]), None) for share in (" 0%", "80%"))  # fmt: skip
        if dense is None:
            continue
        launches = (str(sum(dense[f"{kind}_launches"].values())) for kind in ("triton", "aten"))
        lines.append([contestant, *counted, f"{dense['total']:.2f}", f"{sparse['total']:.2f}", *launches])
    versions = ", ".join(f"{name} {value}" for name, value in traffic.items() if isinstance(value, str))
    text = (
        f"Proven without a GPU: instructions of the hot loops (statistics + gradient) compiled for sm_90 at V = "
        f"{codegen['kernels'][0]['vocab']:,}; bytes of global memory and launches counted in Triton's interpreter. "
        f"A question mark: no loop to count. With {versions}."
    )
    return ["\n".join("| " + " | ".join(line) + " |" for line in lines), text]


def summary(results: list[Row], folder: Path = RESULTS, page: Path = README) -> str:
    """What stands between the markers of the README: what is proven without a GPU, and the plots of those that were
    measured."""
    drawn = [path.relative_to(page.parent) for path in plots(results)]
    parts = proofs(folder) + [f"![{path.stem.replace('_', ' ')}]({path.as_posix()})" for path in drawn]
    if not any(result["about"]["paths"] == ON_GPU for result in results):
        parts.append("GPU: not measured.")
    return "\n\n".join(parts)


def block(results: list[Row], folder: Path = RESULTS) -> str:
    """What stands between the markers of docs/memory-and-speed.md: the summary, and a table for every measurement."""
    parts = [summary(results, folder, PAGE)]
    for result in results:
        if result["file"] == "sweep":  # in the plots
            continue
        if result["about"]["paths"] != ON_GPU:
            parts.append("On a CPU, the PyTorch paths and not the Triton kernels:")
        timed = [row for row in result["rows"] if not row.get("memory_only")]
        for rows in (list(group) for _, group in groupby(timed, key=title)):
            parts += [text for text in (table(rows, result["about"]), goals(rows)) if text]
        if len(timed) < len(result["rows"]):
            parts.append(memory_table(result["rows"]))
        parts.append(origin(result["about"]))
    measured = {result["file"] for result in results}
    parts += [f"`{command}` on a CPU: not measured." for name, command in ON_CPU.items() if name not in measured]
    return "\n\n".join(parts)


def plots(results: list[Row]) -> dict[Path, Callable[[Path], None]]:
    """Where the plots that the results have points for belong, and what draws each. Of GPUs only."""
    found = {}
    for result in results:
        about = result["about"]
        rows = [row for row in result["rows"] if stage(row) == "policy_loss" and "median_ms" in row]
        if about["paths"] == ON_GPU and rows:
            name = re.sub(r"[^a-z0-9]+", "_", about["device"].lower()).strip("_")
            swept = result["file"] == "sweep"
            path = DOCS / f"bench_{name}{'_scaling' if swept else ''}.png"
            found[path] = partial(draw_scaling if swept else draw_bars, rows, about)
    return found


def draw_bars(rows: list[Row], about: Row, path: Path) -> None:
    """Milliseconds of each contestant; the line on a bar is its floor: the bytes that must move, at a copy's rate."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    variations = list(dict.fromkeys(variation(row) for row in rows))
    figure, axes = plt.subplots(
        1, len(variations), figsize=(5.5 * len(variations), 4), layout="constrained", squeeze=False
    )
    for axis, wanted in zip(axes[0], variations, strict=True):
        shown = [row for row in rows if variation(row) == wanted][::-1]
        names = [row["contestant"] for row in shown]
        medians = [row["median_ms"] for row in shown]
        spread = [
            [row["median_ms"] - row["p20_ms"] for row in shown],
            [row["p80_ms"] - row["median_ms"] for row in shown],
        ]
        colors = ["C0" if name.startswith(OURS) else "0.7" for name in names]
        axis.barh(names, medians, xerr=spread, color=colors, error_kw={"linewidth": 1})
        floors = [row["floor_bytes"] / about["copy_gb_per_s"] / 1e6 for row in shown]
        axis.scatter(floors, names, marker="|", s=300, color="black", zorder=3, label=FLOOR)
        axis.set_xlim(left=0)
        axis.set_xlabel("ms")
        axis.set_title(f"{title(shown[0])}\n{wanted}", fontsize=9)
        axis.grid(axis="x", alpha=0.3)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), fontsize=8, loc="outside lower center")
    figure.suptitle(about["device"], fontsize=10)
    figure.savefig(path, dpi=130, metadata={"Software": None})
    plt.close(figure)


def draw_scaling(rows: list[Row], about: Row, path: Path) -> None:
    """Milliseconds against N, V and the share of zero credit, the other two as in the middle of the sweep."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = [(key, points) for key in SWEPT if (points := varying(rows, key))]
    figure, axes = plt.subplots(1, len(panels), figsize=(4.5 * len(panels), 4), layout="constrained", squeeze=False)
    for axis, (key, points) in zip(axes[0], panels, strict=True):
        for contestant in dict.fromkeys(row["contestant"] for row in points):
            line = sorted((row[key], row["median_ms"]) for row in points if row["contestant"] == contestant)
            style = "-" if contestant.startswith(OURS) else "--"
            axis.plot(*zip(*line, strict=True), style, marker="o", markersize=3, label=contestant)
        axis.set_xlabel(SWEPT[key])
        axis.set_ylabel("ms")
        if key == "zero_credit":
            axis.set_ylim(bottom=0)
        else:
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
        axis.grid(alpha=0.3)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), fontsize=8, loc="outside right center")
    figure.suptitle(f"{about['device']}, policy_loss, {rows[0]['dtype']}", fontsize=10)
    figure.savefig(path, dpi=130, metadata={"Software": None})
    plt.close(figure)


def varying(rows: list[Row], key: str) -> list[Row]:
    """The rows that differ in `key` alone, the others as most rows have them; [] if they do not differ."""
    others = [name for name in SWEPT if name != key]
    values = {name: [row[name] for row in rows] for name in others}
    middle = {name: max(dict.fromkeys(found), key=found.count) for name, found in values.items()}
    points = [row for row in rows if all(row[name] == middle[name] for name in others)]
    return points if len({row[key] for row in points}) > 1 else []


def with_block(page: str, text: str) -> str:
    """The page with `text` between its markers."""
    if page.count(BEGIN) != 1 or page.count(END) != 1:
        raise ValueError(f"the page must have {BEGIN} and {END} once each")
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args(arguments)
    results = load(RESULTS)
    for path, draw in plots(results).items():
        draw(path)
    for page, text in ((README, summary(results)), (PAGE, block(results))):
        page.write_text(with_block(page.read_text(encoding="utf-8"), text), encoding="utf-8")
    drawn = [path.name for path in plots(results)]
    print(f"{README.name} and {PAGE.name} from {len(results)} results files; plots: {drawn}")


if __name__ == "__main__":
    main()
