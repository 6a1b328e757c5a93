"""Worker processes as the parent sees them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers.side import NotOffered

__all__ = ["Remote", "WorkerError"]

ROOT = Path(__file__).resolve().parents[2]


class WorkerError(Exception):
    """The library failed; the text is its own error."""


class Remote:
    """A worker process.

    Args:
        library: Whose sides it runs.
        python: The interpreter of the library's environment.
        threads: Of torch and of JAX.
        environment: More environment variables.
        log: Where the worker's output goes; nowhere without it.
    """

    def __init__(
        self,
        library: str,
        python: Path | str = sys.executable,
        *,
        threads: int = 1,
        environment: Mapping[str, str] | None = None,
        log: Path | None = None,
        distributions: Sequence[str] = (),
    ) -> None:
        self.library = library
        self.folder = tempfile.TemporaryDirectory(prefix=f"peers-{library}-")
        self.count = 0
        self.log = open(log, "ab") if log else open(os.devnull, "ab")  # noqa: SIM115  (closed with the process)
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        limits = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NPROC")}
        flags = f"--xla_cpu_multi_thread_eigen={str(threads > 1).lower()} intra_op_parallelism_threads={threads}"
        self.process = subprocess.Popen(
            [str(python), "-m", "benchmarks.peers.worker", library],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            cwd=self.folder.name,
            env={**os.environ, "PYTHONPATH": path, **limits, "XLA_FLAGS": flags, **(environment or {})},
        )
        self.versions: dict[str, str] = self.ask("hello", distributions=list(distributions), threads=threads)

    def ask(self, command: str, **fields: Any) -> Any:
        """Sends a command and waits for the answer.

        Raises:
            NotOffered: The library has no such thing.
            WorkerError: It failed, or the process ended.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps({"do": command, **fields}) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise WorkerError(f"the process of {self.library} ended with status {self.process.wait()}")
        found = json.loads(line)
        if "lacks" in found:
            raise NotOffered(found["lacks"])
        if "error" in found:
            raise WorkerError(found["error"])
        return found["ok"]

    def file(self) -> Path:
        """Returns a new name for arrays."""
        self.count += 1
        return Path(self.folder.name) / f"{self.count:06d}.npz"

    def place(self, key: str, inner: Sequence[np.ndarray], outer: Sequence[np.ndarray]) -> None:
        file = self.file()
        parts = {f"{name}{i:04d}": x for name, part in (("inner", inner), ("outer", outer)) for i, x in enumerate(part)}
        np.savez(file, **parts)
        self.ask("place", key=key, file=str(file))
        file.unlink()

    def gradient(self, key: str) -> tuple[np.ndarray, dict[str, Any]]:
        """Takes a step; returns the hypergradient in one piece, and the passes."""
        file = self.file()
        passes = self.ask("gradient", key=key, file=str(file))
        with np.load(file) as arrays:
            parts = [arrays[name].ravel() for name in sorted(arrays.files)]
        file.unlink()
        return np.concatenate(parts), passes

    def close(self) -> None:
        """Ends the process."""
        if self.process.stdin is not None and not self.process.stdin.closed:
            self.process.stdin.close()
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()
        self.log.close()
        self.folder.cleanup()

    def __enter__(self) -> Remote:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
