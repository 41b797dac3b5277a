"""A vLLM server on GPUs of its own, over HTTP. It is started by hand, e.g.

    VLLM_SERVER_DEV_MODE=1 vllm serve <folder or name> --logprobs-mode processed_logprobs --enable-scale-out

The development mode has the routes that change weights, `--enable-scale-out` the one that takes and gives tokens: they
are for a network where nobody else reaches the server. New weights go through a folder that both sides see
(`<runs>/<name>/rollout_weights`), which the server reloads in place.
"""

from __future__ import annotations

import http.client
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .. import parallel
from ..config import TrainConfig
from ..rollout import Rollout, assemble
from . import EngineError, Sampling, check_prompts, end_tokens, under_all_names
from .vllm import sampling_parameters

CONNECTIONS = 64  # prompts at the server at a time, each with all its responses
START = "expected `VLLM_SERVER_DEV_MODE=1 vllm serve ... --logprobs-mode processed_logprobs --enable-scale-out`"


class VLLMServer:
    """Draws from the copy of the policy at the server, which it takes over: the server then has these weights."""

    def __init__(self, config: TrainConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
        """Raises EngineError: no such server, or one that was started otherwise."""
        address = urlsplit(config.rollout.server)
        if address.scheme not in ("http", "https") or not address.hostname:
            raise ValueError(f"rollout.server must be like http://localhost:8000; got {config.rollout.server!r}")
        self.address, self.timeout = address, config.rollout.timeout
        self.tokenizer, self.device = tokenizer, model.device
        self.ends, self.dtype = end_tokens(model, tokenizer), getattr(torch, config.dtype)
        self.weights = (config.folder / "rollout_weights").absolute()
        mode = self._request("GET", "/server_info?config_format=json")["vllm_config"]["model_config"]["logprobs_mode"]
        if mode != "processed_logprobs":
            raise EngineError(f"the vLLM server tells {mode}, which knows of no temperature; {START}")
        self.update_weights(model)

    def generate(self, prompts: list[list[int]], seeds: list[int], sampling: Sampling) -> Rollout:
        """logprobs are those of the softmax at this temperature (1 if greedy); with top_p < 1, over the tokens within
        top_p. entropy is None."""
        check_prompts(prompts, seeds)

        def respond(prompt: list[int], seed: int) -> list[dict[str, Any]]:
            request = {"token_ids": prompt, "sampling_params": sampling_parameters(seed, sampling, self.ends)}
            choices = self._request("POST", "/inference/v1/generate", request)["choices"]
            return sorted(choices, key=lambda choice: choice["index"])

        threads = ThreadPoolExecutor(CONNECTIONS)
        try:
            responses = [r for group in threads.map(respond, prompts, seeds) for r in group]
        finally:
            threads.shutdown(wait=False, cancel_futures=True)
        return assemble(
            [prompt for prompt in prompts for _ in range(sampling.group_size)],
            [r["token_ids"] for r in responses],
            [[token["logprob"] for token in r["logprobs"]["content"]] for r in responses],
            [r["finish_reason"] == "stop" for r in responses], self.tokenizer, self.device,
        )  # fmt: skip

    def update_weights(self, model: PreTrainedModel) -> None:
        """All ranks take part; the first writes, and has the server read."""
        leads = parallel.leads()
        if leads:
            shutil.rmtree(self.weights, ignore_errors=True)
            self.weights.mkdir(parents=True)
        # A file for each tensor: no more than one is in this process's memory.
        for i, (name, tensor) in enumerate(under_all_names(model, parallel.full_parameters(model))):
            if leads:
                save_file({name: tensor.to("cpu", self.dtype).contiguous()}, self.weights / f"{i:05}.safetensors")
        failure = None
        if leads:
            reload = {"method": "reload_weights", "kwargs": {"weights_path": str(self.weights)}}
            try:
                self._request("POST", "/collective_rpc", reload)
                self._request("POST", "/reset_prefix_cache")  # it holds keys and values of the old policy
            except EngineError as error:
                failure = str(error)
        failure = parallel.gather(failure)[0]  # nobody generates before the server has the weights
        if failure:
            raise EngineError(failure)

    def sleep(self) -> None:
        """Nothing: the server's GPUs are its own."""

    def close(self) -> None:
        if parallel.leads():
            shutil.rmtree(self.weights, ignore_errors=True)

    def _request(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """The answer's JSON, or None where it is empty."""
        kind = http.client.HTTPSConnection if self.address.scheme == "https" else http.client.HTTPConnection
        connection = kind(self.address.hostname, self.address.port, timeout=self.timeout)
        server = f"the vLLM server at {self.address.geturl()}"
        try:
            headers = {"Content-Type": "application/json"}
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            response = connection.getresponse()
            text = response.read().decode()
        except TimeoutError:
            raise EngineError(f"{server} did not answer to {path} within {self.timeout} s (rollout.timeout)") from None
        except (OSError, http.client.HTTPException) as error:
            raise EngineError(f"{server} cannot be reached at {path}: {type(error).__name__}: {error}") from None
        finally:
            connection.close()
        if response.status in (403, 404):
            raise EngineError(f"{server} does not offer {path}; {START}")
        if response.status != 200:
            raise EngineError(f"{server} answered {response.status} to {path}: {text}")
        return json.loads(text) if text else None
