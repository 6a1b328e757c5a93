"""Measures lines of one axis: ``python -m benchmarks.growth.worker FILE``.

The file holds ``{"axis", "lines", "size", "device", "threads", "cpu_time", "seconds", "out"}``; every
measurement is a line of JSON in ``out``. A line goes on to larger sizes until a step takes longer than ``seconds``, or
is about to take more memory than there is.
"""

from __future__ import annotations

import gc
import importlib.metadata
import json
import os
import statistics
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch

from benchmarks.growth.axes import AXES, Axis, Line, Run
from benchmarks.peers.environments import LIBRARIES
from benchmarks.peers.memory import keep_memory, peak_bytes
from benchmarks.peers.side import NotOffered, Side
from benchmarks.peers.timing import timed
from benchmarks.peers.verdict import error, reason
from benchmarks.peers.worker import as_array

__all__ = ["main", "measure"]

LEAST, MOST = 0.3, 15  # seconds to spend on a size once a step is known, and how many timings at most


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    os.dup2(2, 1)  # libraries print
    warnings.simplefilter("ignore")
    keep_memory()
    torch.set_num_threads(spec["threads"])
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    axis, run = AXES[spec["axis"]], Run(spec["size"], spec["device"])
    with open(spec["out"], "a", encoding="utf-8") as out:

        def say(**fields: Any) -> None:
            out.write(json.dumps(fields) + "\n")
            out.flush()

        libraries = dict.fromkeys(axis.line(key).library for key in spec["lines"])
        say(versions={library: versions(library) for library in libraries})
        for key in spec["lines"]:
            say(line=key)
            for found in measure(axis, axis.line(key), run, spec["seconds"], cpu_time=spec["cpu_time"]):
                say(line=key, **found)


def versions(library: str) -> dict[str, str]:
    found = {"python": ".".join(map(str, sys.version_info[:3])), "torch": torch.__version__}
    for name in LIBRARIES[library].distributions:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "source"
    return found


def measure(axis: Axis, line: Line, run: Run, seconds: float, *, cpu_time: bool = False) -> Any:
    """Yields ``{"error"|"wrong"|"failed"|"stopped"}`` and points ``{"x", "seconds", "bytes"}`` of a line."""
    try:
        yield from check(axis, line)
    except NotOffered as lack:
        yield {"failed": str(lack)}
        return
    except Exception as failure:
        traceback.print_exc()
        yield {"failed": f"{type(failure).__name__}: {failure}"[:200]}
        return
    last: dict[str, Any] | None = None
    for value in axis.values_of(line, run):
        why = too_much(last, value, run, seconds)
        if why:
            yield {"stopped": why, "at": value}
            return
        try:
            last = point(axis.build(line, value, run), value, run, seconds, cpu_time=cpu_time)
        except Exception as failure:
            traceback.print_exc()
            yield {"stopped": f"{type(failure).__name__}: {failure}"[:200], "at": value}
            return
        finally:
            gc.collect()
            if run.device == "cuda":
                torch.cuda.empty_cache()
        yield last


def check(axis: Axis, line: Line) -> Any:
    """Yields how far a line's first hypergradient is from its method's value, and why it is wrong where it is."""
    value, reference = axis.check(line)
    side = axis.build(line, value, Run("small", "cpu"))
    side.step()
    found = torch.cat([torch.as_tensor(as_array(part)).flatten() for part in side.hypergradient()]).numpy()
    tolerance = 3e-2 if line.kind in ("finite_difference", "conjugate_gradient") else 5e-3
    yield {"error": error(found, reference.own), "wrong": reason(found, reference, tolerance), "note": side.note}


def point(side: Side, value: int, run: Run, seconds: float, *, cpu_time: bool) -> dict[str, Any]:
    """Returns a size's median time of a step and its peak memory beyond what stands before."""

    def whole() -> None:
        side.step()
        side.wait()

    first = timed(side.step, side.wait, 1)
    slow = first > seconds / 4
    if slow and run.device == "cuda":  # there the peak costs nothing
        started = time.perf_counter()
        peak = peak_bytes(whole)
        return {"x": value, "seconds": time.perf_counter() - started, "bytes": peak}
    guess = first if slow else timed(side.step, side.wait, 1)
    steps = max(1, int(0.02 / max(guess, 1e-6)))
    count = 1 if slow else max(3, min(MOST, int(LEAST / max(guess * steps, 1e-6))))
    times = [timed(side.step, side.wait, steps, cpu_time=cpu_time) for _ in range(count)]
    return {"x": value, "seconds": statistics.median(times), "bytes": peak_bytes(whole)}


def too_much(last: dict[str, Any] | None, value: int, run: Run, seconds: float) -> str:
    """Returns why a line is not tried at its next size, or an empty text."""
    if last is None:
        return ""
    growth = value / last["x"]
    if last["seconds"] > seconds or (last["seconds"] > seconds / 10 and last["seconds"] * growth > 4 * seconds):
        return f"a step took {last['seconds']:.2g} s at {last['x']:,}"
    if last["bytes"] * growth > available(run.device):
        return f"a step took {last['bytes'] / 2**20:,.0f} MiB at {last['x']:,}"
    return ""


def available(device: str) -> int:
    """Returns the bytes that may be taken: two thirds of the free ones."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0] * 2 // 3
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    return free * 2 // 3


if __name__ == "__main__":
    main()
