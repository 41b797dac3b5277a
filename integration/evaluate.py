"""Accuracy on problems that are not trained on: pass@1, the mean over a problem's samples, and pass@k.

    python -m integration.evaluate runs/tiny                        a run: its model, its data sets, its prompts
    python -m integration.evaluate runs/tiny --checkpoint best      the best it had, also before it has finished
    python -m integration.evaluate Qwen/Qwen3-8B-Base --data aime-2024 aime-2025 --samples 32 --temperature 0.7

A table is printed; the same numbers with the success count of every problem, the sampling, the versions and a hash of
the weights go to a JSON file.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import transformers
import tyro
from huggingface_hub import snapshot_download
from transformers import PreTrainedTokenizerBase

import qae_kernels

from . import parallel
from .accuracy import RESAMPLES, bootstrap_interval, pass_at_k
from .checkpoint import CheckpointError
from .config import LoraConfig, TrainConfig
from .data import Problem, open_evals
from .engines import Engine, EngineError, Sampling, make_engine
from .export import export_checkpoint
from .models import open_policy
from .problems import encode
from .progress import Progress
from .run import config_of, is_run
from .seeds import EVALUATION, seed_of
from .verify_pool import Verdict, Verifier, VerifierError

EVAL_SEED = 1
SHOWN_PROBLEMS, SHOWN_RESPONSES = 4, 4  # kept as samples to read


def evaluate(
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    problems: list[Problem],
    verifier: Verifier,
    config: TrainConfig,
    seed: int = EVAL_SEED,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(metrics, samples to read) of `eval_samples` responses to each problem, always from the same random numbers. Each
    rank draws for its share of the problems; all of them get everything.

    A response is a success at score 1 and not below; `score` is the mean score. `successes` are per problem, `samples`
    of each. sampler_entropy: nats per token; None where the engine does not tell.
    """
    if not problems:
        raise ValueError("an evaluation needs problems; got none")
    count = config.eval_samples
    temperature = config.temperature if config.eval_temperature is None else config.eval_temperature
    sampling = Sampling(count, config.max_new_tokens, temperature, config.rollout.top_p)
    # No call of the engine draws more responses than this rank's share of a rollout in training, which is known to fit.
    _, world_size = parallel.rank_and_world_size()
    size = max(1, config.prompts_per_step * config.group_size // (count * world_size))

    texts, verdicts, lengths, finished, entropies = [], [], [], [], []
    mine = parallel.share(list(range(len(problems))))
    for start in range(0, len(mine), size):
        batch = mine[start : start + size]
        prompts = [encode(problems[i], tokenizer, config.data.chat_template) for i in batch]
        rollout = engine.generate(prompts, [seed_of(EVALUATION, seed, i) for i in batch], sampling)
        texts += rollout.texts
        verdicts += verifier.score(rollout.texts, [problems[i] for i in batch for _ in range(count)])
        lengths += rollout.lengths.tolist()
        finished += rollout.finished.tolist()
        entropies.append(None if rollout.entropy is None else rollout.entropy.sum().item())
    gathered = parallel.gather((texts, verdicts, lengths, finished, entropies))
    texts, verdicts, lengths, finished, entropies = (
        [x for part in parts for x in part] for parts in zip(*gathered, strict=True)
    )

    scores = np.array([v.score for v in verdicts], float).reshape(len(problems), count)
    successes = (scores == 1.0).sum(1).tolist()
    metrics = {
        "pass@1": pass_at_k(successes, count, 1).mean().item(),
        f"pass@{count}": pass_at_k(successes, count, count).mean().item(),
        "score": scores.mean().item(),
        "samples": count,
        "successes": successes,
        "sampler_entropy": None if None in entropies else sum(entropies) / sum(lengths),
        "response_length": sum(lengths) / len(lengths),
        "truncated_fraction": 1 - sum(finished) / len(finished),
    }
    return metrics, to_read(problems, texts, verdicts)


def to_read(problems: list[Problem], texts: list[str], verdicts: list[Verdict]) -> list[dict[str, Any]]:
    """The first responses to a few problems, which are the same problems in every evaluation."""
    count = len(texts) // len(problems)
    samples = []
    for i in np.unique(np.linspace(0, len(problems) - 1, SHOWN_PROBLEMS).astype(int)).tolist():
        problem = problems[i]
        rows = range(i * count, i * count + min(count, SHOWN_RESPONSES))
        responses = [{"text": texts[r], "score": verdicts[r].score, "reason": verdicts[r].reason} for r in rows]
        answer = problem.answer.get("answer") if isinstance(problem.answer, dict) else problem.answer
        samples.append(
            {"source": problem.source, "prompt": problem.prompt, "answer": str(answer), "responses": responses}
        )
    return samples


# --- the command


@dataclass(frozen=True)
class EvaluateConfig:
    """Evaluates a model. None: as in the run, or as in `python -m integration.train` where no run is given."""

    model: tyro.conf.Positional[str]
    """A run's folder, a model's folder, or a name on the Hugging Face hub."""
    checkpoint: str | None = None
    """Of a run: "newest", "best", or a step. None: the model that it left, or the newest where it has not finished."""
    data: tuple[str, ...] | None = None
    """Data sets, e.g. aime-2024 aime-2025 amc-2023; as `data.evals` of a run."""
    samples: int = 32
    """Responses per problem, n; pass@k is reported for the powers of two up to n."""
    temperature: float = 0.7
    top_p: float = 1.0
    max_new_tokens: int | None = None
    chat_template: bool | None = None
    instruction: str | None = None
    prompt_column: str | None = None
    answer_column: str | None = None
    verifier: str | None = None
    engine: Literal["sampler", "transformers", "vllm", "vllm_server"] | None = None
    responses_per_call: int = 512
    """Most responses that the engine draws at a time."""
    workers: int | None = None
    """Processes of the verifier."""
    device: str | None = None
    seed: int = EVAL_SEED
    """Of the samples. The same seed draws the same random numbers for the same problems."""
    out: Path | None = None
    """The JSON file. None: evaluation.json in the run's folder, or in this one."""

    def __post_init__(self):
        for name in ("samples", "responses_per_call"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        if self.temperature < 0:
            raise ValueError(f"temperature must not be negative; got {self.temperature}")


def training_config(settings: EvaluateConfig) -> TrainConfig:
    """The run's configuration, or the default one, with what the command line changes."""
    base, init, run = TrainConfig(), settings.model, Path(settings.model)
    if is_run(run):
        base = config_of(run)
        finished = settings.checkpoint is None and (run / "model").is_dir()
        init = str(run / "model" if finished else export_checkpoint(run, settings.checkpoint or "newest"))
    elif settings.checkpoint is not None:
        raise ValueError(f"checkpoint {settings.checkpoint!r} is of a run; {settings.model} is none")

    def given(**values: Any) -> dict[str, Any]:
        return {name: x for name, x in values.items() if x is not None}

    data = given(
        evals=settings.data, chat_template=settings.chat_template, instruction=settings.instruction,
        prompt_column=settings.prompt_column, answer_column=settings.answer_column, verifier=settings.verifier,
    )  # fmt: skip
    return replace(
        base, init=init, lora=LoraConfig(), eval_samples=settings.samples, eval_temperature=settings.temperature,
        prompts_per_step=max(1, settings.responses_per_call // max(2, settings.samples)),
        group_size=max(2, settings.samples),
        minibatches=1, old_logprobs="recompute", overlong_buffer=0,  # settings of training that others must agree with
        max_tokens=max(base.max_tokens, 1 + (settings.max_new_tokens or 0)), data=replace(base.data, **data),
        rollout=replace(base.rollout, top_p=settings.top_p, **given(engine=settings.engine)),
        verify=replace(base.verify, **given(workers=settings.workers)),
        **given(max_new_tokens=settings.max_new_tokens, device=settings.device),
    )  # fmt: skip


def with_intervals(metrics: dict[str, Any]) -> dict[str, Any]:
    """The metrics and, under "pass@k", the unbiased estimate for k = 1, 2, 4, ... with 95% intervals over problems."""
    count, successes = metrics["samples"], metrics["successes"]
    powers = [2**i for i in range(count.bit_length())]
    per_problem = {k: pass_at_k(successes, count, k) for k in powers}
    intervals = {
        k: {"value": values.mean().item(), "interval": list(bootstrap_interval(values))}
        for k, values in per_problem.items()
    }
    return {**metrics, "pass@k": {str(k): x for k, x in intervals.items()}}


def weights_hash(model: str) -> str:
    """sha256 over names and contents of a model's weight files: the folder's, or of what is cached of a hub's name."""
    folder = Path(model) if Path(model).is_dir() else Path(snapshot_download(model, local_files_only=True))
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    if not files:
        raise FileNotFoundError(f"no weights at {folder}: expected .safetensors or .bin files")
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.name.encode())
        with open(path, "rb") as file:
            while part := file.read(1 << 20):
                digest.update(part)
    return digest.hexdigest()


def format_results(results: dict[str, dict[str, Any]]) -> str:
    """Markdown, one row per data set: pass@k in percent and its 95% interval."""
    powers = list(next(iter(results.values()))["pass@k"])
    cells = [["data set", "problems", "samples", *(f"pass@{k}" for k in powers), "tokens"]]
    for name, result in results.items():
        found = [[100 * y for y in (x["value"], *x["interval"])] for x in result["pass@k"].values()]
        shares = [f"{value:.1f} [{low:.1f}, {high:.1f}]" for value, low, high in found]
        counts = [str(len(result["successes"])), str(result["samples"])]
        cells.append([name, *counts, *shares, f"{result['response_length']:.0f}"])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["| " + " | ".join(x.ljust(w) for x, w in zip(row, widths, strict=True)) + " |" for row in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def write_json(value: Any, path: Path) -> None:
    """All of it or nothing: a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_text(json.dumps(value, indent=2, default=str) + "\n", encoding="utf-8")
    os.replace(unfinished, path)


def evaluate_model(settings: EvaluateConfig, progress: Progress) -> tuple[dict[str, Any], Path]:
    """(what is known of the evaluation, the JSON file that holds it)."""
    config = training_config(settings)
    here = Path(settings.model) if is_run(Path(settings.model)) else Path()
    model, tokenizer = open_policy(config, parallel.resolve_device(config.device))
    model.eval()
    engine, results = make_engine(config, model, tokenizer, Path(config.init)), {}
    try:
        with Verifier(config.verify) as verifier:
            for name, problems in open_evals(config, tokenizer).items():
                progress.say(f"{name}: {len(problems)} problems, {config.eval_samples} samples each")
                metrics, _ = evaluate(engine, tokenizer, problems, verifier, config, settings.seed)
                results[name] = with_intervals(metrics)
    finally:
        engine.close()
    about = {
        "model": config.init, "weights_sha256": weights_hash(config.init), "results": results,
        "settings": asdict(settings), "config": asdict(config), "device": str(model.device),
        "versions": {
            "qae_kernels": qae_kernels.__version__, "torch": torch.__version__,
            "transformers": transformers.__version__, "python": platform.python_version(),
        },
    }  # fmt: skip
    out = settings.out or here / "evaluation.json"
    write_json(about, out)
    return about, out


def main(arguments: list[str] | None = None) -> None:
    settings = tyro.cli(EvaluateConfig, args=arguments, description=__doc__, prog="python -m integration.evaluate")
    try:
        about, out = evaluate_model(settings, Progress())
    except (OSError, ValueError, ImportError, CheckpointError, EngineError, VerifierError) as error:
        sys.exit(f"error: {error}")
    print(f"{format_results(about['results'])}\n")
    print(f"In percent, with 95% intervals: problems drawn anew, {RESAMPLES} times. {out}")


if __name__ == "__main__":
    main(sys.argv[1:])
