"""One process that judges answers, one at a time; verify_pool.py starts, watches and kills it.

It ends when its parent does, writes no core, gets no more memory than `MEMORY` beyond what its verifier needs when
loaded, and says nothing on stdout and stderr once it is ready. It answers in JSON and not with pickles, so that one
which an answer has taken over cannot take over its parent.

This is a seat belt and no sandbox: hostile code that runs here runs with the rights of the training process. The
verifiers of this package keep answers from becoming code; `refuse` stops most of what would come through nevertheless.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import resource
import signal
import sys
from multiprocessing.connection import Connection

from .verifiers import VERIFIERS, judge, resolve

MEMORY = 2 * 2**30
"""Bytes that judging may take, on top of the loaded verifier."""
PR_SET_PDEATHSIG = 1
FORBIDDEN = (
    "ctypes.", "ftplib.", "http.", "os.chmod", "os.chown", "os.exec", "os.fork", "os.kill", "os.link", "os.mkdir",
    "os.posix_spawn", "os.putenv", "os.remove", "os.rename", "os.rmdir", "os.spawn", "os.symlink", "os.system",
    "os.truncate", "os.unsetenv", "pty.", "shutil.", "signal.", "smtplib.", "socket.", "sqlite3.", "subprocess.",
    "tempfile.", "urllib.", "webbrowser.",
)  # fmt: skip
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def refuse(event: str, arguments: tuple) -> None:
    """Audit hook of CPython: no verifier of this package starts processes, opens connections or changes files."""
    if event.startswith(FORBIDDEN) or (event == "open" and arguments[2] & WRITING):
        raise PermissionError(f"a verifier must not do this: {event}")


def end_with(parent: int) -> None:
    """The kernel kills this process when its parent ends, even where it hangs; elsewhere the closed pipe ends it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit()


def limit() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        with open("/proc/self/statm", encoding="ascii") as statm:
            loaded = int(statm.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (loaded + MEMORY, loaded + MEMORY))


def silence() -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)


def serve(connection: Connection, name: str) -> None:
    """Says "" when ready, or what is wrong; then a pair (score, reason) for each (text, answer) that it gets."""
    try:
        verify = resolve(name)
    except ValueError as error:
        connection.send_bytes(json.dumps(str(error)).encode())
        return
    limit()
    silence()
    connection.send_bytes(json.dumps("").encode())
    if name in VERIFIERS:
        sys.addaudithook(refuse)
    while True:
        for text, answer in connection.recv():
            connection.send_bytes(json.dumps(judge(verify, text, answer)).encode())


def main() -> None:
    descriptor, parent, name = sys.argv[1:]
    end_with(int(parent))
    try:
        serve(Connection(int(descriptor)), name)
    except (EOFError, ConnectionError):
        pass  # the parent needs this process no more
    except MemoryError:
        os._exit(errno.ENOMEM)


if __name__ == "__main__":
    main()
