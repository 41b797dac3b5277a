"""What the compiler makes of every kernel, for GPUs that need not be there: registers, spills, and the hot loops.

    python -m bench.codegen                       every target, bf16, fp16 and fp32
    python -m bench.codegen --arch sm_90 --dtype bf16 --peers --json codegen.json

The launchers run as they are, on CPU tensors; their kernels are compiled and not launched. Read off the machine code:

    stack, local, spills   bytes of local memory per thread; instructions that load or store it
    fp64                   double-precision instructions (the advantages need some, a vocabulary-sized kernel none)
    CTAs/SM                resident at a time, by registers, warps and shared memory
    loads, stores          of global memory: how many x width in bits
    loops                  per logit: instructions, EX2 and bytes; and the loads that an SM has in flight at most

For AMD: vector registers, bytes of scratch memory, spilled vector registers, widths. The last block of a row, which is
not full, is no loop and is not shown.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)  # read when triton is imported; the interpreter compiles nothing

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32), "sm_90": GPUTarget("cuda", 90, 32), "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}  # fmt: skip
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SHARED_BYTES = {"sm_80": 164 * 1024, "sm_90": 228 * 1024, "sm_100": 228 * 1024}  # of an SM, like the next line
REGISTERS, WARPS, CTAS, SHARED_BYTES_OF_THE_SYSTEM = 65536, 64, 32, 1024  # the last per CTA
Case = tuple[str, Callable[[], Any]]


# ---- Compiling without a device


@contextmanager
def compile_only(target: str) -> Iterator[list[Any]]:
    """Within, `kernel[grid](...)` compiles for this target, with the arguments' own specialisation, and returns.

    Yields the list of what was compiled (Triton's `CompiledKernel`). Outputs of the launchers hold nothing.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("the interpreter compiles nothing: unset TRITON_INTERPRET before triton is imported")
    properties = {"max_shared_mem": 232448, "multiprocessor_count": 132}
    no_device = SimpleNamespace(
        get_current_target=lambda: TARGETS[target],
        get_current_device=lambda: target,  # by which a kernel keeps what it has compiled
        get_current_stream=lambda device=None: 0,
        utils=SimpleNamespace(get_device_properties=lambda device: properties),
    )
    compiled = []
    launch, active = JITFunction.run, driver._active

    def run(kernel, *args, grid, warmup, **keywords):
        compiled.append(launch(kernel, *args, grid=grid, warmup=True, **keywords))
        return compiled[-1]

    JITFunction.run = run
    driver.set_active(no_device)
    try:
        yield compiled
    finally:
        JITFunction.run = launch
        driver._active = active


# ---- Reading machine code


class Instruction(NamedTuple):
    address: int
    predicated: bool
    text: str  # without its predicate

    @property
    def kind(self) -> str:
        return re.match(r"\w+", self.text)[0]

    @property
    def bits(self) -> int:
        """Width of a load or store."""
        width = re.match(r"\S*?\.[US]?(8|16|64|128|256)\b", self.text)
        return int(width[1]) if width else 32

    @property
    def branch_target(self) -> int | None:
        address = re.search(r" 0x([0-9a-f]+)$", self.text) if self.kind in ("BRA", "CALL") else None
        return int(address[1], 16) if address else None

    @property
    def registers(self) -> list[int]:
        """As written: of a range, the first."""
        return [int(number) for number in re.findall(r"\bR(\d+)\b", self.text)]


def disassemble(cubin: bytes) -> tuple[dict[str, int], list[Instruction]]:
    """(registers, stack, local memory per thread by cuobjdump's names; the instructions in order)."""
    shipped = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    cuobjdump = shipped if shipped.exists() else shutil.which("cuobjdump")
    if cuobjdump is None:
        raise RuntimeError("no cuobjdump, neither in this Triton nor on the PATH; CUDA's toolkit has it")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        done = subprocess.run([cuobjdump, "-res-usage", "-sass", path], capture_output=True, text=True, check=True)
    usage = {name: int(number) for name, number in re.findall(r"(\w+):(\d+)", done.stdout + done.stderr)}
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/ +(@\S+ +)?(.*?) *;", done.stdout)
    return usage, [Instruction(int(address, 16), bool(predicate), text) for address, predicate, text in lines]


def innermost_loops(code: list[Instruction]) -> list[list[Instruction]]:
    """The natural loops that hold no other: every way into the body leads through its head.

    A jump backwards alone makes no loop: the compiler puts rare code behind the rest, and jumps back from there.
    """
    index = {instruction.address: i for i, instruction in enumerate(code)}
    before: list[list[int]] = [[] for _ in code]
    jumps_back = []
    for i, instruction in enumerate(code):
        target = index.get(instruction.branch_target)
        if target is not None:
            before[target].append(i)
            if target <= i:
                jumps_back.append((target, i))
        goes_on = instruction.kind not in ("BRA", "EXIT", "RET") or instruction.predicated or "," in instruction.text
        if goes_on and i + 1 < len(code):
            before[i + 1].append(i)
    bodies = []
    for head, tail in jumps_back:
        body, todo = {head}, [tail]
        while todo:
            i = todo.pop()
            if i not in body:
                body.add(i)
                todo += before[i]
        if 0 not in body:
            bodies.append(body)
    return [[code[i] for i in sorted(body)] for body in bodies if not any(other < body for other in bodies)]


def unrolled_zeros(code: list[Instruction]) -> list[list[Instruction]]:
    """Stretches without a branch that store much, in one width, and neither load nor compute: an unrolled loop."""
    targets = {instruction.branch_target for instruction in code}
    stretches, width = [[]], None
    for instruction in code:
        stores = instruction.kind == "STG"
        other_width, width = stores and instruction.bits != width, instruction.bits if stores else width
        breaks = instruction.kind in ("BRA", "EXIT", "LDG", "MUFU")
        if other_width or breaks or instruction.address in targets:
            stretches.append([])
        if not breaks:
            stretches[-1].append(instruction)
    return [stretch for stretch in stretches if sum(i.kind == "STG" for i in stretch) >= 16]


def bytes_in_flight(body: list[Instruction]) -> int:
    """The most bytes that a thread has asked for while no instruction has needed them yet."""
    most, pending = 0, []
    for instruction in body * 2:  # the second time with what the first has left pending
        needed = [i for i, (registers, _) in enumerate(pending) if registers & set(instruction.registers)]
        if needed:  # loads come back in order
            pending = pending[needed[-1] + 1 :]
        if instruction.kind == "LDG":
            first, words = instruction.registers[0], max(1, instruction.bits // 32)
            pending.append((set(range(first, first + words)), instruction.bits // 8))
            most = max(most, sum(size for _, size in pending))
    return most


def describe_loop(body: list[Instruction], itemsize: int, threads_per_sm: int) -> dict[str, Any] | None:
    """None if it touches no global memory."""
    kinds = Counter(instruction.kind for instruction in body)
    loads = [instruction.bits for instruction in body if instruction.kind == "LDG"]
    stores = [instruction.bits for instruction in body if instruction.kind == "STG"]
    if not loads and not stores:
        return None
    logits = sum(loads or stores) / 8 / itemsize
    ex2 = sum(instruction.text.startswith("MUFU.EX2") for instruction in body)
    flops = sum(kinds[op] + 2 * kinds[f"{op}2"] for op in ("FADD", "FMUL", "FFMA"))  # FFMA2: two in one
    if not loads or not stores:
        name = "statistics" if loads else "zeros"
    elif not ex2:
        name = "scale"
    else:  # of ours: p times a number is two operations per logit; p times (a + b log p) is three
        name = "gradient" if flops < 2.5 * logits else "gradient with entropy term"
    return {
        "name": name, "instructions": len(body) / logits, "ex2": ex2 / logits,
        "bytes_loaded": sum(loads) / 8 / logits, "bytes_stored": sum(stores) / 8 / logits,
        "load_bits": sorted(set(loads)), "store_bits": sorted(set(stores)),
        "kb_in_flight": bytes_in_flight(body) * threads_per_sm / 1024,
    }  # fmt: skip


def read_cubin(kernel: Any, target: str, itemsize: int | None) -> dict[str, Any]:
    """itemsize: of a logit; None where there are none, and no loops to describe."""
    usage, code = disassemble(kernel.asm["cubin"])
    warps, shared = kernel.metadata.num_warps, kernel.metadata.shared
    registers_of_warp = -(-usage["REG"] // 8) * 8 * 32
    fitting_warps = min(WARPS, REGISTERS // 4 // registers_of_warp * 4)  # each quarter of an SM has its own registers
    ctas = min(CTAS, fitting_warps // warps, SHARED_BYTES[target] // (shared + SHARED_BYTES_OF_THE_SYSTEM))
    loops = []
    if itemsize:
        bodies = innermost_loops(code) + unrolled_zeros(code)
        loops = [loop for body in bodies if (loop := describe_loop(body, itemsize, ctas * warps * 32))]
        statistics = [loop for loop in loops if loop["name"] == "statistics"]
        for loop in sorted(statistics, key=lambda loop: loop["instructions"])[1:]:
            loop["name"] = "statistics, careful"  # for the rows that the leanest loop cannot do
    return {
        "registers": usage["REG"], "stack_bytes": usage["STACK"], "local_bytes": usage["LOCAL"],
        "spills": sum(i.kind in ("LDL", "STL") for i in code), "shared_bytes": shared,
        "fp64": sum(bool(re.match(r"D(ADD|MUL|FMA|SETP|MNMX)\b|\S*\.F64|MUFU\.\w+64H", i.text)) for i in code),
        "warps": warps, "ctas_per_sm": ctas, "loads": Counter(i.bits for i in code if i.kind == "LDG"),
        "stores": Counter(i.bits for i in code if i.kind == "STG"), "loops": loops,
    }  # fmt: skip


def read_amdgcn(kernel: Any, target: str, itemsize: int | None) -> dict[str, Any]:
    assembly = kernel.asm["amdgcn"]
    number = {name: int(value) for name, value in re.findall(r"\.(\w+): +(\d+)$", assembly, re.MULTILINE)}
    widths = {"load": Counter(), "store": Counter()}
    accesses = r"\b(?:global|buffer|flat)_(load|store)_[us]?(byte|short|dword)x?(\d?)"
    for kind, size, words in re.findall(accesses, assembly):
        widths[kind][{"byte": 8, "short": 16, "dword": 32}[size] * int(words or 1)] += 1
    return {
        "registers": number["vgpr_count"], "stack_bytes": number["private_segment_fixed_size"], "local_bytes": 0,
        "spills": number["vgpr_spill_count"], "shared_bytes": kernel.metadata.shared,
        "fp64": None, "warps": kernel.metadata.num_warps, "ctas_per_sm": None,
        "loads": widths["load"], "stores": widths["store"], "loops": [],
    }  # fmt: skip


# ---- The production kernels


def vocabulary_cases(vocab: int, dtype: torch.dtype) -> Iterator[Case]:
    """(name, launch): what the launchers of the vocabulary-sized kernels choose between."""
    from qae_kernels import PolicyLossConfig
    from qae_kernels.fused.objectives import KL_ESTIMATORS, OBJECTIVES
    from qae_kernels.fused.policy_loss import policy_loss_rows, scale_gradient
    from qae_kernels.fused.token_stats import token_logprobs_gradient, token_logprobs_rows
    from qae_kernels.rows import Rows

    logits = torch.empty(16, vocab, dtype=dtype)
    tokens, row = torch.zeros(16, dtype=torch.long), torch.zeros(16)

    def loss(dlogits=logits, old=row, others=None, entropy="all", softcap=None, **settings):
        config = PolicyLossConfig(**settings)
        policy_loss_rows(logits, dlogits, Rows(tokens, row, row, old, others, others), config, entropy, softcap)

    for entropy in ("all", "active", "none"):
        yield f"loss, entropy={entropy}", partial(loss, entropy=entropy)
    yield "loss, soft cap", partial(loss, softcap=30.0)
    if dtype == torch.float32:
        yield "loss, bfloat16 gradient", partial(loss, dlogits=logits.bfloat16())
    yield "loss, on-policy", partial(loss, old=None)
    yield "loss, on-policy, no gradient", partial(loss, old=None, dlogits=None)
    pairs = [(objective, "k3") for objective in OBJECTIVES] + [("clip", kl) for kl in KL_ESTIMATORS if kl != "k3"]
    for objective, kl in pairs:
        launch = partial(loss, others=row, objective=objective, kl_estimator=kl, kl_coef=0.1)
        yield f"loss, {objective}, {kl}, every input", launch
    yield "scale", lambda: scale_gradient(logits, torch.ones(()))
    yield "logprobs", lambda: token_logprobs_rows(logits, tokens, tokens == 0, 1.0)
    yield (
        "logprobs, backward",
        lambda: token_logprobs_gradient(logits, logits, tokens, tokens == 0, row, row, row, row, row, 1.0),
    )


def advantages_cases() -> Iterator[Case]:
    """Every baseline, contiguous and ragged, with a level per group and without."""
    from qae_kernels.fused.advantages import BASELINES, QUANTILES, group_advantages

    ids = torch.arange(64) // 16
    layouts = {"contiguous": (16, 0.4, "std"), "ragged": (ids, 0.4, "none"),
               "ragged, K per group": (ids, torch.full((4,), 0.4), "batch")}  # fmt: skip
    for name in (*BASELINES, *QUANTILES):
        for layout, (groups, k, scale) in layouts.items():
            yield f"advantages, {name}, {layout}", partial(
                group_advantages, torch.zeros(64), groups, baseline="quantile" if name in QUANTILES else name, k=k,
                interpolation=name, outcomes=None, scale=scale, eps=1e-6, correction=1,
                lengths=torch.ones(64) if name == "opo" else None,
            )  # fmt: skip


def peer_cases(vocab: int, dtype: torch.dtype) -> Iterator[Case]:
    """Forward and backward of the installed peers that have Triton kernels."""
    from .peers import LOGITS_PEERS, Problem

    problem = Problem.random(8, vocab, dtype=dtype)
    for name, peer in LOGITS_PEERS.items():
        if peer.needs == "triton":
            try:
                peer.load()
            except ImportError as error:
                print(f"{name}: missing ({error})")
            else:
                yield name, partial(peer, problem)


def compile_all(target: str, dtypes: list[str], vocab: int, peers: bool = False) -> list[dict[str, Any]]:
    read = read_amdgcn if target.startswith("gfx") else read_cubin
    jobs = [(dtype, vocab, case) for dtype in dtypes for case in vocabulary_cases(vocab, DTYPES[dtype])]
    if peers:
        jobs += [(dtype, vocab, case) for dtype in dtypes for case in peer_cases(vocab, DTYPES[dtype])]
    jobs += [(None, None, case) for case in advantages_cases()]
    records = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # one kernel is disassembled while the next is compiled
        for dtype, size, (case, launch) in jobs:
            with compile_only(target) as compiled:
                launch()
            for kernel in compiled:
                name = kernel.metadata.name
                about = {"target": target, "dtype": dtype, "vocab": size, "case": case, "kernel": name}
                if len(compiled) > 1:  # a peer's forward and backward
                    about["case"] = f"{case}, {name}"
                facts = pool.submit(read, kernel, target, DTYPES[dtype].itemsize if dtype else None)
                records.append((about, facts))
        return [about | facts.result() for about, facts in records]


# ---- The command

COLUMNS = "{:<40}{:>5}{:>6}{:>6}{:>7}{:>7}{:>5}{:>6}{:>8}  {:<26}{}"
LOOP_COLUMNS = "    {:<27}{:>6} instr {:>5} EX2 {:>5} B loaded {:>5} B stored  {:>7} /{:>4} bits  {:>3.0f} KB in flight"


def print_table(records: list[dict[str, Any]]) -> None:
    part, seen = None, {}
    for r in records:
        if part != (r["target"], r["dtype"]):
            part, seen = (r["target"], r["dtype"]), {}
            print(f"\n{r['target']}" + (f", {r['dtype']}, V = {r['vocab']}; loops per logit" if r["dtype"] else ""))
            print(COLUMNS.format("", "regs", "stack", "local", "spills", "shared", "fp64", "warps", "CTAs/SM",
                                 "loads x bits", "stores x bits"))  # fmt: skip
        numbers = (r[name] for name in ("registers", "stack_bytes", "local_bytes", "spills", "shared_bytes", "fp64",
                                        "warps", "ctas_per_sm"))  # fmt: skip
        widths = (" ".join(f"{n}x{bits}" for bits, n in sorted(r[x].items())[::-1]) for x in ("loads", "stores"))
        print(COLUMNS.format(r["case"], *("-" if x is None else x for x in numbers), *widths))
        if r["loops"] and (first := seen.setdefault(str(r["loops"]), r["case"])) != r["case"]:
            print(f"    loops as in: {first}")
            continue
        for loop in r["loops"]:
            rates = (f"{loop[x]:.2f}" for x in ("instructions", "ex2", "bytes_loaded", "bytes_stored"))
            widths = ("+".join(map(str, loop[x])) or "-" for x in ("load_bits", "store_bits"))
            print(LOOP_COLUMNS.format(loop["name"], *rates, *widths, loop["kb_in_flight"]))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.codegen", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", nargs="+", choices=tuple(TARGETS), default=list(TARGETS))
    parser.add_argument("--dtype", nargs="+", choices=tuple(DTYPES), default=list(DTYPES))
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--peers", action="store_true", help="the peers' kernels too, where they are installed")
    parser.add_argument("--json", metavar="PATH", help="also write everything there")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", "TRITON_DEFAULT_FP_FUSION")
    report = {"torch": torch.__version__, "triton": triton.__version__, "kernels": [], "failures": {}}
    print(f"torch {torch.__version__}, triton {triton.__version__}")
    for target in options.arch:
        try:
            records = compile_all(target, options.dtype, options.vocab, options.peers)
        except Exception as error:  # the other targets are still worth seeing
            report["failures"][target] = f"{type(error).__name__}: {error}"
            print(f"\n{target}: {report['failures'][target]}")
        else:
            print_table(records)
            report["kernels"] += records
    if options.json:
        Path(options.json).write_text(json.dumps(report, indent=1), encoding="utf-8")
    if report["failures"]:
        sys.exit(f"not compiled: {', '.join(report['failures'])}")


if __name__ == "__main__":
    main()
