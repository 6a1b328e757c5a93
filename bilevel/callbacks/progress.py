"""Progress of a run: a live display in a terminal, a line now and then elsewhere."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from bilevel.callbacks.base import Callback
from bilevel.callbacks.notebook_display import NotebookDisplay

if TYPE_CHECKING:
    from bilevel.engine import Engine
    from bilevel.result import SolveInfo, StepResult

__all__ = ["Progress"]

SECONDS_BETWEEN_REFRESHES = 0.1


class Progress(Callback):
    """Shows steps, elapsed and remaining time, and for every problem its loss, gradient norm and solve.

    Below stand the last step's forward and backward passes and second-order products, how many steps of the run were
    skipped, and in the end why it was stopped, where it was. ``Engine.run`` adds one by itself unless
    ``EngineConfig(progress=False)``. The gradient norm of a problem that has others below it is that of its
    hypergradient. Where the output is no terminal, a line is printed at about every tenth of the run and at its end.

    Args:
        console: Where to show it; standard error by default.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._live: Live | NotebookDisplay | None = None
        self._total = 0
        self._before = 0
        self._done = 0
        self._printed = 0
        self._skipped = 0
        self._started = 0.0
        self._refreshed = 0.0
        self._last: StepResult | None = None

    def on_run_start(self, engine: Engine, steps: int) -> None:
        """See :meth:`Callback.on_run_start`."""
        self._total, self._before, self._last = steps, 0, None
        self._done = self._printed = self._skipped = 0
        self._started = self._refreshed = time.monotonic()
        if self._console.is_jupyter:
            self._live = NotebookDisplay(lambda: self._display(engine))
        elif self._console.is_terminal:
            # Drawn between steps, by no thread of its own: data loaders fork.
            self._live = Live(console=self._console, auto_refresh=False, get_renderable=lambda: self._display(engine))
        if self._live is not None:
            self._live.start(refresh=True)

    def on_step_end(self, engine: Engine, result: StepResult) -> None:
        """See :meth:`Callback.on_step_end`."""
        if self._total == 0:  # steps that somebody else's loop takes
            return
        self._done, self._last = self._done + 1, result
        if self._done == 1:
            self._before = result.step - 1  # a resumed run goes on counting
        self._skipped += result.skipped is not None
        if self._live is not None:
            now = time.monotonic()
            if now - self._refreshed >= SECONDS_BETWEEN_REFRESHES:
                self._refreshed = now
                self._live.refresh()
        elif self._done * 10 // self._total > (self._done - 1) * 10 // self._total or self._done == 1:
            self._print(self._line(engine, result))
            self._printed = self._done

    def on_run_end(self, engine: Engine) -> None:
        """See :meth:`Callback.on_run_end`."""
        if self._live is not None:
            self._live.refresh()
            self._live.stop()
        elif self._last is not None and self._total:
            if self._printed < self._done:
                self._print(self._line(engine, self._last))
            if engine.stop_reason:
                self._print(f"stopped: {engine.stop_reason}")
        self._live, self._total = None, 0

    def _print(self, line: str) -> None:
        self._console.print(line, soft_wrap=True, markup=False, highlight=False)

    def _times(self) -> str:
        elapsed = time.monotonic() - self._started
        left = _clock(elapsed / self._done * (self._total - self._done)) if self._done else "-:--"
        return f"{_clock(elapsed)} elapsed, {left} left"

    def _display(self, engine: Engine) -> RenderableType:
        head = _head(self._before + self._done, self._before + self._total, self._times())
        if self._last is None:
            return head
        foot = [_cell(f"{_passes(self._last)}{self._skips()}", "dim")]
        foot += [Text(f"stopped: {engine.stop_reason}")] if engine.stop_reason else []
        return Group(head, _problems(engine, self._last), *foot)

    def _skips(self) -> str:
        return f", {self._skipped} skipped so far" if self._skipped else ""

    def _line(self, engine: Engine, result: StepResult) -> str:
        losses = "  ".join(f"{name} {_number(result.losses, name, '.4g')}" for name in engine.problems)
        norms = "  ".join(f"{name} {_number(result.gradient_norms, name, '.2e')}" for name in engine.problems)
        solves = "; ".join(
            " ".join(filter(None, (info.method, info.status.shown, _residual(info, "residual "))))
            for info in result.solves.values()
        )
        skipped = f" | skipped: {result.skipped} not finite" if result.skipped else ""
        return (
            f"step {self._before + self._done}/{self._before + self._total} | loss {losses} | "
            f"gradient norm {norms} | {solves} | "
            f"{_passes(result)}{self._skips()} | {self._times()}{skipped}"
        )


def _head(done: int, total: int, times: str) -> Table:
    row = Table.grid(padding=(0, 2, 0, 0), expand=True)
    row.add_column(no_wrap=True)
    row.add_column(ratio=1, min_width=4, max_width=40)
    row.add_column()
    row.add_row(f"step {done}/{total}", ProgressBar(total, done), _cell(times))
    return row


def _problems(engine: Engine, result: StepResult) -> Table:
    """Makes a row for every problem; a solve stands beside the inner problem that it differentiates through."""
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(min_width=5, max_width=20)
    table.add_column(justify="right", no_wrap=True, min_width=9)
    table.add_column(justify="right", no_wrap=True, min_width=8)
    table.add_column()
    table.add_column()
    table.add_column(justify="right", no_wrap=True, min_width=8)
    table.add_row("problem", "loss", "‖grad‖", "method", "status", "residual", style="dim")
    for name in engine.problems:
        loss, size = _number(result.losses, name, ".4g"), _number(result.gradient_norms, name, ".2e")
        info = result.solves.get(name)
        method, status, residual = "", _cell(""), ""
        if info is not None:
            method, residual = info.method, _residual(info)
            status = _cell(info.status.shown or "–", "red" if info.status.failed else "")
        if result.skipped == name:
            status = _cell("skipped: not finite", "red")
        table.add_row(_cell(name), loss, size, _cell(method), status, residual)
    return table


def _cell(text: str, style: str = "") -> Text:
    """Makes text that is cut rather than wrapped where the terminal is narrow; numbers keep their width."""
    return Text(text, style, no_wrap=True, overflow="ellipsis")


def _number(values: Mapping[str, float], name: str, form: str) -> str:
    """Formats a value; one that the step did not have, because it was skipped or the problem was at rest, is a dash."""
    return format(values[name], form) if name in values else "–"


def _passes(result: StepResult) -> str:
    products = sum(info.products for info in result.solves.values())
    more = f" and {products} products" if products else ""
    return f"{result.passes[0]} + {result.passes[1]} passes{more}/step"


def _residual(info: SolveInfo, label: str = "") -> str:
    return "" if math.isnan(info.residual) else f"{label}{info.residual:.1e}"


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
