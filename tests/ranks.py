"""Real processes that talk through gloo, for tests of what several ranks compute together."""

import multiprocessing
import tempfile
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist


def uneven_shares(rank, world_size):
    """A function that picks this rank's part of a tensor along its first dimension: the last rank gets none of it where
    there are three, and two ranks share 1 : 4."""
    parts = {2: (0, 0.2, 1), 3: (0, 0.7, 1, 1)}[world_size]
    return lambda x: x[round(parts[rank] * len(x)) : round(parts[rank + 1] * len(x))]


def run_ranks(function, world_size, device, map_location=None):
    """The results, by rank, of `function(rank, world_size, group, device)`, a function of a test module."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_work, args=(function, rank, world_size, folder, device))
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        results = [torch.load(f"{folder}/{rank}", map_location=map_location) for rank in range(world_size)]
    for rank, result in enumerate(results):
        assert not isinstance(result, str), f"rank {rank} of {world_size}:\n{result}"
    return results


def _work(function, rank, world_size, folder, device):
    """One rank; leaves what it got, or why it failed, in the folder."""
    try:
        torch.set_num_threads(1)
        if device == "cuda":  # one GPU for all ranks: gloo carries its tensors
            torch.cuda.set_device(0)
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size,
                                timeout=timedelta(minutes=2))  # fmt: skip
        result = function(rank, world_size, dist.group.WORLD, device)
    except BaseException:
        result = traceback.format_exc()
    finally:
        torch.save(result, f"{folder}/{rank}")
        if dist.is_initialized():
            dist.destroy_process_group()
