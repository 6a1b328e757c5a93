"""One workload for all libraries: agreement first, then interleaved timings, then memory."""

from __future__ import annotations

import importlib
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers.environments import LIBRARIES
from benchmarks.peers.protocol import Remote, WorkerError
from benchmarks.peers.side import Arrays, NotOffered, Reference
from benchmarks.peers.timing import Ratio, median, ratio, rotated
from benchmarks.peers.verdict import cosine, error, reason

__all__ = ["Row", "Settings", "Workload", "measure"]

BASE = "hand"
SECONDS = 0.2  # of timed steps in one turn, at least one step


@dataclass(frozen=True)
class Settings:
    """How a workload is run.

    Attributes:
        size: A key of the workload's sizes.
        rounds: Turns that every library has.
        threads: Of torch and of JAX.
        device: ``"cpu"`` or ``"cuda"``.
        cpu_time: Processor time instead of the clock's.
        data: A folder with data sets, see the workloads.
        methods: Keys of the methods to run; all without any.
    """

    size: str = "full"
    rounds: int = 15
    threads: int = 1
    device: str = "cpu"
    cpu_time: bool = False
    data: Path | None = None
    methods: Sequence[str] | None = None


@dataclass
class Row:
    """One library with one method.

    Attributes:
        library: Its key.
        method: The method's key.
        passes: Evaluations of the losses, runs of autograd's engine; None where they cannot be counted (JAX).
        own_error: Relative distance to the method's own value in float64.
        exact_error: Relative distance to the exact hypergradient in float64; NaN where there is none.
        cosine: With the exact one, or with the method's own where there is no exact one.
        seconds: Of a step, the median over the rounds.
        ratio: To the hand-written loop in the same rounds; None where there is none.
        peak: Bytes at the peak of a step, above those before it.
        peak_kind: ``"allocated"`` by torch, or ``"planned"`` by XLA: temporary buffers and results.
        resident: The rise of the resident memory and its uncertainty, which also holds what the C heap cannot reuse.
        wrong: Why the hypergradient is wrong; empty where it is right.
        failed: Why there is no number.
        note: What a reader should know.
    """

    library: str
    method: str
    passes: tuple[int, int] | None = None
    own_error: float = math.nan
    exact_error: float = math.nan
    cosine: float = math.nan
    seconds: float = math.nan
    ratio: Ratio | None = None
    peak: float = math.nan
    peak_kind: str = ""
    resident: Sequence[int] | None = None
    wrong: str = ""
    failed: str = ""
    note: str = ""


@dataclass(frozen=True)
class Workload:
    """A workload's rows, and what else is to be said.

    Attributes:
        title: The workload's.
        source: What the data are.
        methods: Labels by keys.
        rows: Of the table.
        versions: Of what every library's environment holds.
        absent: Why libraries with a side for this workload are missing.
    """

    title: str
    source: str
    methods: Mapping[str, str]
    rows: Sequence[Row]
    versions: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    absent: Mapping[str, str] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def measure(name: str, pythons: Mapping[str, Path], absent: Mapping[str, str], settings: Settings) -> Workload:
    """Runs a workload.

    Args:
        name: A module of ``workloads``.
        pythons: The interpreter for every library that there is.
        absent: Why the others are not.
        settings: How.
    """
    module = importlib.import_module(f"benchmarks.peers.workloads.{name}")
    offered = getattr(module, "ROWS", {}).get(settings.size, module.METHODS)
    wanted = [key for key in offered if settings.methods is None or key in settings.methods]
    methods = {key: module.METHODS[key].label for key in wanted}
    arrays, source = module.data(settings.size, settings.data)
    libraries = [library for library in pythons if has_side(library, name)]
    with tempfile.TemporaryDirectory(prefix="peers-") as folder:
        file = Path(folder) / "data.npz"
        np.savez(file, **arrays)
        start = Starter(name, file, pythons, settings)
        remotes: dict[str, Remote] = {}
        rows: list[Row] = []
        try:
            for library in libraries:
                remotes[library] = start(library)
            for key in methods:
                rows += _method(module, key, arrays, remotes, start)
            versions = {library: remote.versions for library, remote in remotes.items()}
        finally:
            for remote in remotes.values():
                remote.close()
        for library in libraries if settings.device == "cpu" else ():
            _memory([row for row in rows if row.library == library and not row.failed], start)
    missing = {library: why for library, why in absent.items() if has_side(library, name)}
    return Workload(module.TITLE, source, methods, rows, versions, missing)


def has_side(library: str, workload: str) -> bool:
    return (Path(__file__).parent / "sides" / library / f"{workload}.py").exists()


@dataclass(frozen=True)
class Starter:
    """Starts workers that have read a workload's data."""

    workload: str
    file: Path
    pythons: Mapping[str, Path]
    settings: Settings

    def __call__(self, library: str) -> Remote:
        remote = Remote(
            library,
            self.pythons[library],
            threads=self.settings.threads,
            distributions=LIBRARIES[library].distributions,
            environment={"MPLBACKEND": "Agg"},
        )
        remote.ask("load", data=self.workload, file=str(self.file))
        return remote

    def build(self, remote: Remote, key: str) -> str:
        """Builds a side under its method's key; returns its note."""
        found: dict[str, str] = remote.ask(
            "build",
            key=key,
            data=self.workload,
            workload=self.workload,
            method=key,
            size=self.settings.size,
            device=self.settings.device,
        )
        return found["note"]


def _method(module: Any, key: str, arrays: Arrays, remotes: Mapping[str, Remote], start: Starter) -> list[Row]:
    """Checks every library's hypergradient, then times them in turns."""
    settings, method = start.settings, module.METHODS[key]
    reference: Reference = module.reference(arrays, settings.size, method)
    rows, timed = [], {}
    for library, remote in remotes.items():
        row = Row(library, key)
        try:
            row.note = start.build(remote, key)
            found, passes = remote.gradient(key)
        except NotOffered:
            continue
        except WorkerError as failure:
            row.failed = str(failure)[:300]
            rows.append(row)
            continue
        judge(row, found, reference, method.tolerance, passes)
        rows.append(row)
        timed[library] = remote
    seconds = _times(key, timed, settings)
    for row in rows:
        if row.library in seconds:
            row.seconds = median(seconds[row.library])
            if BASE in seconds:
                row.ratio = ratio(seconds, row.library, BASE)
    for row in rows:
        if row.library in timed:
            if (
                settings.device != "cpu"
            ):  # the allocator of a GPU counts what lives in this process, whatever was before
                put_memory(row, remotes[row.library])
            remotes[row.library].ask("drop", key=key)
    return rows


def put_memory(row: Row, remote: Remote) -> None:
    """Measures the peak memory of a step."""
    try:
        found = remote.ask("memory", key=row.method)
    except WorkerError as failure:
        row.note = f"{row.note}; memory: {failure}".strip("; ")
        return
    row.peak, row.peak_kind, row.resident = found["peak"], found["kind"], found["resident"]


def judge(row: Row, found: np.ndarray, reference: Reference, tolerance: float, passes: Mapping[str, int]) -> None:
    """Fills in what is said of a hypergradient."""
    row.own_error = error(found, reference.own)
    row.exact_error = math.nan if reference.exact is None else error(found, reference.exact)
    row.cosine = cosine(found, reference.own if reference.exact is None else reference.exact)
    row.passes = (passes["forward"], passes["backward"]) if passes["backward"] else None
    row.wrong = reason(found, reference, tolerance)


def _times(key: str, remotes: Mapping[str, Remote], settings: Settings) -> dict[str, list[float]]:
    """Returns the seconds of a step in every round; the same number of steps for all."""
    if not remotes:
        return {}
    first = {library: remote.ask("time", key=key, steps=1) for library, remote in remotes.items()}
    first = {library: remote.ask("time", key=key, steps=1) for library, remote in remotes.items()}
    steps = max(1, math.ceil(SECONDS / max(first.get(BASE, min(first.values())), 1e-9)))
    steps = min(steps, 200)
    seconds: dict[str, list[float]] = {library: [] for library in remotes}
    for order in rotated(list(remotes), settings.rounds):
        for library in order:
            remotes[library].ask("restart", key=key)
            seconds[library].append(remotes[library].ask("time", key=key, steps=steps, cpu_time=settings.cpu_time))
    return seconds


def _memory(rows: Sequence[Row], start: Starter) -> None:
    """Measures the peak memory of one library's steps in a process that does nothing else."""
    if not rows:
        return
    with start(rows[0].library) as remote:
        for row in rows:
            start.build(remote, row.method)
            put_memory(row, remote)
            remote.ask("drop", key=row.method)
