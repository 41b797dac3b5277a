"""Verdicts on responses: a pool of processes that no answer can hang, crash or outlive (verify_worker.py).

    with Verifier(config.verify) as verifier:
        verdicts = verifier.score(rollout.texts, problems)  # one problem per text

Every verifier has processes of its own, started when it is first needed, by a fresh interpreter and not by a fork:
they know nothing of CUDA. An answer that takes longer than `timeout` costs its process (SIGKILL) and scores 0; so does
one that its process dies of. The other answers go to the next process. On Linux a process also ends with the thread
that started it: score from a thread that lives as long as the run.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import wait
from typing import Any

from .config import VerifyConfig
from .problems import Problem
from .verifiers import IN_PROCESS, judge, resolve

BATCH = 8  # answers sent to a process at once; they are judged, timed and reported one by one
START_TIMEOUT = 120.0  # seconds, for importing what the verifier needs


class VerifierError(RuntimeError):
    """A verifier's process cannot start."""


@dataclass(frozen=True)
class Verdict:
    """What became of a response."""

    score: float
    """In [0, 1]; 0 where something went wrong."""
    reason: str = ""
    """What went wrong; empty where the answer is right, or plainly wrong."""


@dataclass(frozen=True)
class Job:
    """One response to judge. index: its place in the batch."""

    index: int
    text: str
    answer: Any


class Worker:
    """The parent's end of one process. Not ready until its verifier is loaded."""

    def __init__(self, name: str):
        self.ready = False
        self.jobs: deque[Job] = deque()  # sent and not yet judged
        self.deadline = time.monotonic() + START_TIMEOUT
        self.connection, theirs = Pipe()
        path = os.pathsep.join(folder or os.getcwd() for folder in sys.path)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "integration.verify_worker", str(theirs.fileno()), str(os.getpid()), name],
            pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the parent; and what a verifier of the user starts ends with it
            env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        )  # fmt: skip
        theirs.close()

    @property
    def idle(self) -> bool:
        return self.ready and not self.jobs

    def send(self, jobs: Iterable[Job], timeout: float) -> None:
        self.jobs.extend(jobs)
        self.deadline = time.monotonic() + timeout
        with contextlib.suppress(OSError):  # it died a moment ago; `receive` finds out
            self.connection.send([(job.text, job.answer) for job in self.jobs])

    def receive(self, timeout: float) -> tuple[Job, Verdict] | None:
        """The next verdict; None when the worker says that it is ready.

        Raises EOFError or OSError: it died. ValueError: it talks nonsense. VerifierError: it cannot load its verifier.
        """
        message = json.loads(self.connection.recv_bytes(2**16))
        if not self.ready:
            if message:
                raise VerifierError(message)
            self.ready = True
            return None
        score, reason = message
        self.deadline = time.monotonic() + timeout
        return self.jobs.popleft(), Verdict(score, reason)

    def kill(self) -> int:
        """Ends the process and what it started. Returns its exit status, as subprocess gives it."""
        with contextlib.suppress(ProcessLookupError):  # dead, and waited for
            os.killpg(self.process.pid, signal.SIGKILL)
        self.connection.close()
        return self.process.wait()


class Verifier:
    """Judges responses. A context manager: its processes end with it."""

    def __init__(self, config: VerifyConfig):
        if config.workers < 1:
            raise ValueError(f"verify.workers must be at least 1; got {config.workers}")
        if not config.timeout > 0:
            raise ValueError(f"verify.timeout must be positive; got {config.timeout}")
        self.config = config
        self._workers: dict[str, list[Worker]] = {}

    def __enter__(self) -> Verifier:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Ends all processes; the next `score` starts new ones."""
        for worker in [w for workers in self._workers.values() for w in workers]:
            worker.kill()
        self._workers.clear()

    def score(self, texts: list[str], problems: list[Problem]) -> list[Verdict]:
        """One verdict per response, in their order. problems: those that the responses answer, one for each.

        Raises ValueError: not as many texts as problems, or an unknown verifier. VerifierError: one whose process
        cannot start.
        """
        if len(texts) != len(problems):
            raise ValueError(f"expected one problem per text; got {len(texts)} texts and {len(problems)} problems")
        verdicts: dict[int, Verdict] = {}
        try:
            for name in dict.fromkeys(p.verifier for p in problems):
                jobs = [
                    Job(i, text, p.answer)
                    for i, (text, p) in enumerate(zip(texts, problems, strict=True))
                    if p.verifier == name
                ]
                verdicts |= judge_here(name, jobs) if name in IN_PROCESS else self._judge_apart(name, jobs)
        except BaseException:
            self.close()  # what the processes still have to say belongs to nobody
            raise
        return [verdicts[i] for i in range(len(texts))]

    def _judge_apart(self, name: str, jobs: list[Job]) -> dict[int, Verdict]:
        verdicts: dict[int, Verdict] = {}
        queue = deque(jobs)
        workers = self._workers.setdefault(name, [])
        workers += [Worker(name) for _ in range(self.config.workers - len(workers))]
        while len(verdicts) < len(jobs):
            for place, worker in enumerate(workers):
                if worker.idle and worker.process.poll() is not None:  # died when nobody had asked it anything
                    worker.kill()
                    workers[place] = Worker(name)
                elif worker.idle and queue:
                    worker.send([queue.popleft() for _ in range(min(BATCH, len(queue)))], self.config.timeout)
            busy = [w for w in workers if not w.idle]
            wait([w.connection for w in busy], max(0.0, min(w.deadline for w in busy) - time.monotonic()))
            for worker in busy:
                reason = self._collect(worker, verdicts)
                if reason:
                    workers[workers.index(worker)] = self._replace(worker, name, reason, verdicts, queue)
        return verdicts

    def _collect(self, worker: Worker, verdicts: dict[int, Verdict]) -> str:
        """Puts the verdicts that have come into `verdicts`. Returns why the process must go; empty if it may stay."""
        try:
            while worker.connection.poll():
                judged = worker.receive(self.config.timeout)
                if judged is not None:
                    verdicts[judged[0].index] = judged[1]
        except (EOFError, OSError):
            return "died"
        except (ValueError, TypeError):
            return "the process of the verifier gave no verdict"
        if not worker.idle and time.monotonic() > worker.deadline:
            return f"timeout after {self.config.timeout:g} s"
        return ""

    def _replace(
        self, worker: Worker, name: str, reason: str, verdicts: dict[int, Verdict], queue: deque[Job]
    ) -> Worker:
        """A new process. The answer that the old one was at scores 0, the others return to the queue."""
        if reason == "died":
            with contextlib.suppress(subprocess.TimeoutExpired):
                worker.process.wait(1.0)  # its end of the pipe closes a little before its status is known
        status = worker.kill()
        if reason == "died":
            reason = f"the process of the verifier ended: {describe(status)}"
        if not worker.ready:
            raise VerifierError(f"verifier {name!r} cannot start: {reason}")
        if worker.jobs:
            verdicts[worker.jobs.popleft().index] = Verdict(0.0, reason)
            queue.extendleft(reversed(worker.jobs))
        return Worker(name)


def judge_here(name: str, jobs: list[Job]) -> dict[int, Verdict]:
    verify = resolve(name)
    return {job.index: Verdict(*judge(verify, job.text, job.answer)) for job in jobs}


def describe(status: int) -> str:
    """An exit status in words."""
    if status < 0:
        return signal.strsignal(-status) or f"signal {-status}"
    return "out of memory" if status == errno.ENOMEM else f"exit status {status}"
