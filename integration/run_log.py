"""Lines of JSON that survive what kills the run: a line is there in full or not at all, and never twice."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


class RunLog:
    """Appends to a file from a known length on; what a killed run wrote after that length is dropped.

    A resumed run opens its log with the length that its checkpoint knows; the steps after it are made and logged anew.
    """

    def __init__(self, path: Path, length: int = 0):
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        there = os.fstat(self._file).st_size
        if there < length:
            os.close(self._file)
            raise ValueError(f"{path} has {there:,} bytes, but the checkpoint was made when it had {length:,}")
        if there > length:
            os.ftruncate(self._file, length)
        self.path, self.length = path, length

    def write(self, record: dict[str, Any]) -> None:
        """Raises OSError, and leaves the file as it was, if the line does not fit on the disk."""
        line = (json.dumps(record) + "\n").encode()
        try:
            written = os.pwrite(self._file, line, self.length)
            if written < len(line):
                raise OSError(f"only {written} of {len(line)} bytes of a line fit into {self.path}")
        except OSError:
            os.ftruncate(self._file, self.length)
            raise
        self.length += len(line)

    def flush(self) -> int:
        """To the disk; returns the length."""
        os.fsync(self._file)
        return self.length

    def close(self) -> None:
        os.close(self._file)
