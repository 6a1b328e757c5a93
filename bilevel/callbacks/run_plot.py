"""A picture of the run, kept up to date."""

from __future__ import annotations

import io
import os
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bilevel import distributed
from bilevel.callbacks.base import Callback
from bilevel.callbacks.extras import require
from bilevel.callbacks.history import History
from bilevel.callbacks.replace_file import replace_file
from bilevel.callbacks.run_drawing import draw_run
from bilevel.errors import BilevelWarning, ConfigError
from bilevel.validation import check_integer
from bilevel.vector import norm

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from bilevel.engine import Engine
    from bilevel.problems import Problem
    from bilevel.result import StepResult

__all__ = ["RunPlot"]

FORMATS = (".svg", ".png", ".pdf")
MOST_ENTRIES = 1000
MOST_LINES = 8
SHARE_OF_TIME = 0.05


class RunPlot(Callback):
    """Draws losses, outer parameters and residuals of the solves over the steps, to a file or in a notebook.

    - Losses have a panel each. The axis is logarithmic where they are positive and span a factor above 30. NaN and
      infinities are gaps.
    - Outer parameters are those of the problems that have none above: each one where they are few (8), else the norms
      of the tensors, else a norm for each problem.
    - Residuals are relative; a red cross marks a solve that failed. There is no such panel where nothing is solved.

    At most 1000 steps are kept, evenly spread over the run so far; a resumed run draws the picture of an uninterrupted
    one. Needs the extra ``plot``; matplotlib is imported at the first drawing and needs no display. Under data
    parallelism, rank 0 draws its own values. Where the file cannot be written the run goes on, with a warning.

    Args:
        path: The picture: ``.svg``, ``.png`` or ``.pdf``; replaced as a whole each time. None to show it only.
        every: Steps between drawings, beside the one at the end of the run; 0 for that one only. A drawing that is due
            waits as long as drawing would take more than 5 % of the time.
        display: Whether to show it in the notebook that the run is started in, updated in place.

    Raises:
        ConfigError: Neither path nor display, a suffix that is none of these, or matplotlib is not installed.

    Example:
        >>> plot = RunPlot("run.svg", every=500)  # Engine(..., callbacks=[plot])
    """

    def __init__(self, path: str | os.PathLike[str] | None = None, *, every: int = 100, display: bool = False) -> None:
        require("RunPlot", "matplotlib", "plot")
        check_integer("RunPlot", "every", every, minimum=0)
        self._path = None if path is None else Path(path)
        if self._path is None and not display:
            raise ConfigError("RunPlot needs a path, or display=True in a notebook")
        if self._path is not None and self._path.suffix.lower() not in FORMATS:
            raise ConfigError(f"RunPlot.path must end in {', '.join(FORMATS)}, not {self._path.name!r}")
        self.history = History(limit=MOST_ENTRIES)
        self._every = every
        self._display = display
        self._shown: Any = None
        self._earliest = 0.0
        self._warned = False
        self._step = 0

    def on_step_end(self, engine: Engine, result: StepResult) -> None:
        """Notes the step."""
        self._step = result.step
        if distributed.rank() != 0:
            return
        self.history.append(result.step, _values(engine, result) if self.history.due else {})

    def on_step_complete(self, engine: Engine, result: StepResult) -> None:
        """Draws, where it is time."""
        if self._every and result.step % self._every == 0 and time.monotonic() >= self._earliest:
            self._update(engine)

    def on_run_end(self, engine: Engine) -> None:
        """Draws a last time."""
        self._update(engine)

    def draw(self, engine: Engine) -> Figure:
        """Returns the picture as a matplotlib figure."""
        title = f"step {self._step}"
        title += f", {engine.skipped_steps} skipped" if engine.skipped_steps else ""
        title += f", stopped: {engine.stop_reason}" if engine.stop_reason else ""
        return draw_run(self.history.steps, dict(self.history), title)

    def state_dict(self) -> dict[str, Any]:
        """Returns what is drawn."""
        return {"history": self.history.state_dict(), "step": self._step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See :meth:`Callback.load_state_dict`."""
        self.history.load_state_dict(state["history"])
        self._step = int(state["step"])

    def _update(self, engine: Engine) -> None:
        if distributed.rank() != 0 or not len(self.history.steps):
            return
        started = time.monotonic()
        figure = self.draw(engine)
        try:
            if self._path is not None:
                replace_file(self._path, lambda temporary: _save(figure, temporary))
        except OSError as error:
            if not self._warned:
                warnings.warn(f"RunPlot cannot write {self._path}: {error}", BilevelWarning, stacklevel=2)
            self._warned = True
        if self._display:
            self._show(figure)
        now = time.monotonic()
        self._earliest = now + (now - started) / SHARE_OF_TIME

    def _show(self, figure: Figure) -> None:
        from IPython.display import Image, display

        data = io.BytesIO()
        figure.savefig(data, format="png")
        picture = Image(data=data.getvalue(), format="png")  # type: ignore[no-untyped-call]  # no types there
        if self._shown is None:
            self._shown = display(picture, display_id=True)  # type: ignore[no-untyped-call]
        else:
            self._shown.update(picture)


def _save(figure: Figure, path: Path) -> None:
    import matplotlib

    # No date and no random ids: the same run gives the same file.
    metadata = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(path.suffix.lower(), {})
    with matplotlib.rc_context({"svg.hashsalt": "bilevel"}):
        figure.savefig(path, metadata=metadata)


def _values(engine: Engine, result: StepResult) -> dict[str, float]:
    nan = float("nan")
    values = {f"loss/{name}": result.losses.get(name, nan) for name in engine.problems}
    for name, info in result.solves.items():
        values[f"residual/{name}"] = info.residual
        values[f"failed/{name}"] = float(info.status.failed)
    outer = [engine.problems[name] for name in engine.dependencies.outer]
    values.update({f"outer/{label}": value for label, value in _parameters(outer).items()})
    return values


def _parameters(problems: list[Problem]) -> dict[str, float]:
    tensors = {
        f"{problem.name}.{key}": p.detach()
        for problem in problems
        for key, p in zip(problem.parameter_names, problem.parameters, strict=True)
    }
    if sum(p.numel() for p in tensors.values()) <= MOST_LINES:
        return {
            label if p.ndim == 0 else f"{label}[{place}]": value
            for label, p in tensors.items()
            for place, value in enumerate(p.flatten().tolist())
        }
    if len(tensors) <= MOST_LINES:
        return {f"‖{label}‖": float(norm([p])) for label, p in tensors.items()}
    return {f"‖{problem.name}‖": float(norm([p.detach() for p in problem.parameters])) for problem in problems}
