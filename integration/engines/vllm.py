"""vLLM beside the trainer, on the same GPU (or CPU) and in turn with it: one engine for each training process.

The engine runs in a process of its own, which this one talks to over a pipe: one can wait for it with a time limit, and
kill it. Weights go over as tensors in shared host memory, one at a time, and vLLM's own reload puts them in place.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..config import TrainConfig
from ..parallel import full_parameters
from ..rollout import Rollout, assemble
from . import EngineError, Sampling, check_prompts, end_tokens, under_all_names

LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class VLLM:
    """Draws from a copy of the policy in vLLM."""

    def __init__(self, config: TrainConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path):
        """folder: checkpoint of `model`. Raises EngineError: it does not start."""
        self.model, self.tokenizer, self.timeout = model, tokenizer, config.rollout.timeout
        self.device, self.dtype = model.device, getattr(torch, config.dtype)
        self.ends, self.has_weights = end_tokens(model, tokenizer), True
        processes = torch.multiprocessing.get_context("spawn")
        self.pipe, theirs = processes.Pipe()
        self.process = processes.Process(target=serve, args=(theirs, self.device.index), daemon=True)
        self.process.start()
        theirs.close()  # so that the death of the engine closes the pipe
        try:
            self._exchange("the start", engine_options(config, self.device, folder))
        except EngineError:
            self.close()
            raise

    def generate(self, prompts: list[list[int]], seeds: list[int], sampling: Sampling) -> Rollout:
        """logprobs are those of the softmax at this temperature (1 if greedy); with top_p < 1, over the tokens within
        top_p. entropy is None."""
        check_prompts(prompts, seeds)
        if not self.has_weights:
            self.update_weights(self.model)
        requests = [sampling_parameters(seed, sampling, self.ends) for seed in seeds]
        responses, logprobs, finished = self._exchange("generate", ("generate", prompts, requests))
        prompts = [prompt for prompt in prompts for _ in range(sampling.group_size)]
        return assemble(prompts, responses, logprobs, finished, self.tokenizer, self.device)

    def update_weights(self, model: PreTrainedModel) -> None:
        self.model = model
        self._exchange("update_weights", ("update_weights",))
        for name, tensor in under_all_names(model, full_parameters(model)):
            # A copy: what is sent moves to shared memory.
            self._exchange("update_weights", (name, tensor.to("cpu", self.dtype, copy=True)))
        self._exchange("update_weights", None)
        self.has_weights = True

    def sleep(self) -> None:
        """The engine drops its KV cache and its weights; the next `generate` begins with what the model then has."""
        self._exchange("sleep", ("sleep",))
        self.has_weights = False

    def close(self) -> None:
        self.pipe.close()  # which ends the engine
        self.process.join(10)
        self.process.kill()
        self.process.join()

    def _exchange(self, command: str, message: Any) -> Any:
        """Sends a message and returns the answer; an engine without one after `timeout` seconds is killed."""
        started = time.monotonic()
        watchdog = threading.Timer(self.timeout, self.process.kill)  # its death ends a blocked send or recv
        watchdog.daemon = True
        watchdog.start()
        try:
            self.pipe.send(message)
            error, answer = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join()
            if time.monotonic() - started >= self.timeout:
                what = f"did not answer to {command} within {self.timeout} s (rollout.timeout) and was killed"
            else:
                what = f"died before or during {command} (exit code {self.process.exitcode}); its log says why"
            raise EngineError(f"the vLLM engine {what}") from None
        finally:
            watchdog.cancel()
        if error is not None:
            raise EngineError(f"the vLLM engine failed in {command}: {error}")
        return answer


def engine_options(config: TrainConfig, device: torch.device, folder: Path) -> dict[str, Any]:
    on_gpu = device.type == "cuda"
    return {
        "model": str(folder), "dtype": config.dtype, "seed": config.seed, "max_model_len": -1,  # what fits
        "gpu_memory_utilization": config.rollout.gpu_memory, "enable_sleep_mode": on_gpu, "enforce_eager": not on_gpu,
        "logprobs_mode": "processed_logprobs",  # after the temperature; vLLM's default is before
        "generation_config": "vllm", "disable_log_stats": True,
    }  # fmt: skip


def sampling_parameters(seed: int, sampling: Sampling, ends: list[int]) -> dict[str, Any]:
    """Arguments of vLLM's SamplingParams for the responses to one prompt.

    vLLM gives response i of a prompt the seed + i; spread out, so that neighbouring seeds share no response's.
    """
    return {
        "n": sampling.group_size, "max_tokens": sampling.max_new_tokens, "temperature": sampling.temperature,
        "top_p": sampling.top_p, "seed": random.Random(seed).getrandbits(62), "stop_token_ids": ends, "logprobs": 0,
        "detokenize": False,
    }  # fmt: skip


def serve(pipe: Connection, gpu: int | None) -> None:
    """The engine's process. In come options, then (command, *arguments); out go (None, result) or (error, None)."""
    for number in (signal.SIGINT, signal.SIGTERM):  # these are for the trainer, which ends its step first
        signal.signal(number, signal.SIG_IGN)
    for name in LAUNCHER_VARIABLES:  # of the trainer's ranks; the engine is alone
        os.environ.pop(name, None)
    if gpu is not None:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[gpu] if visible else str(gpu)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # this process is the engine's already
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    engine = EngineProcess(pipe)
    command, arguments = engine.start, (pipe.recv(),)
    while True:
        try:
            answer = (None, command(*arguments))
        except Exception as error:
            answer = (f"{type(error).__name__}: {error}", None)
        try:
            pipe.send(answer)
            name, *arguments = pipe.recv()
        except (EOFError, OSError):
            return  # the trainer is gone
        command = getattr(engine, name)


class EngineProcess:
    """The commands of `serve`."""

    def __init__(self, pipe: Connection):
        self.pipe = pipe
        self.asleep: set[str] = set()  # of "weights" and "kv_cache"

    def start(self, options: dict[str, Any]) -> None:
        from vllm import LLM

        self.llm, self.can_sleep = LLM(**options), options["enable_sleep_mode"]

    def generate(
        self, prompts: list[list[int]], requests: list[dict[str, Any]]
    ) -> tuple[list[list[int]], list[list[float]], list[bool]]:
        """Tokens, their log-probabilities and whether an end token came, of each response."""
        from vllm import SamplingParams

        self.wake("kv_cache")
        outputs = self.llm.generate(
            [{"prompt_token_ids": ids} for ids in prompts], [SamplingParams(**r) for r in requests], use_tqdm=False
        )
        responses = [response for output in outputs for response in output.outputs]
        tokens = [list(r.token_ids) for r in responses]
        logprobs = [[at[token].logprob for token, at in zip(r.token_ids, r.logprobs, strict=True)] for r in responses]
        return tokens, logprobs, [r.finish_reason == "stop" for r in responses]

    def update_weights(self) -> None:
        self.wake("weights")
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": self.incoming()})
        self.llm.reset_prefix_cache()  # it holds keys and values of the old policy

    def incoming(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) until None. Each is asked for with an answer, so that one at a time is on its way."""
        self.pipe.send((None, None))
        while (weight := self.pipe.recv()) is not None:
            yield weight
            self.pipe.send((None, None))

    def sleep(self) -> None:
        if self.can_sleep:
            self.llm.sleep(level=2)  # weights come anew from the trainer, so vLLM need not keep them
            self.asleep = {"weights", "kv_cache"}

    def wake(self, part: str) -> None:
        if part in self.asleep:
            self.llm.wake_up([part])
            self.asleep.remove(part)
