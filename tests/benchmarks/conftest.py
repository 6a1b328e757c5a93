"""Workers in this process, and a workload of a few images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.peers import run
from benchmarks.peers.protocol import Remote, WorkerError
from benchmarks.peers.side import Method, NotOffered
from benchmarks.peers.worker import Worker, answer
from benchmarks.peers.workloads import regularisation
from tests.benchmarks.images import noise


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few images of noise: reading real ones takes seconds."""
    monkeypatch.setattr(regularisation, "digits", noise)
    monkeypatch.setitem(regularisation.SIZES, "small", 60)


class Local:
    """A worker in this process, with the face of :class:`Remote`."""

    versions: dict[str, str] = {"torch": torch.__version__}  # noqa: RUF012

    def __init__(self, library: str, *arguments: Any, **fields: Any) -> None:
        self.worker = Worker(library)

    ask = Remote.ask

    def gradient(self, key: str) -> tuple[np.ndarray, dict[str, Any]]:
        passes = self.ask("gradient", key=key, file=str(self.file))
        with np.load(self.file) as arrays:
            return np.concatenate([arrays[name].ravel() for name in sorted(arrays.files)]), passes

    def close(self) -> None:
        pass

    def __enter__(self) -> Local:
        return self

    def __exit__(self, *error: object) -> None:
        pass


@pytest.fixture
def local(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def ask(self: Local, command: str, **fields: Any) -> Any:
        found = answer(self.worker, {"do": command, **fields})
        if "lacks" in found:
            raise NotOffered(found["lacks"])
        if "error" in found:
            raise WorkerError(found["error"])
        return found["ok"]

    monkeypatch.setattr(Local, "ask", ask)
    monkeypatch.setattr(Local, "file", tmp_path / "found.npz", raising=False)
    monkeypatch.setattr(run, "Remote", Local)
    monkeypatch.setattr(run, "SECONDS", 1e-3)
    monkeypatch.setattr(regularisation, "METHODS", {"neumann": Method("neumann", 3, regularisation.RATE)})
