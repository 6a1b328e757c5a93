"""A display in a notebook's cell that is drawn anew in its place."""

from __future__ import annotations

import importlib
import io
from collections.abc import Callable
from typing import Any

from rich.console import Console, RenderableType

__all__ = ["NotebookDisplay"]

WIDTH = 110
PAGE = '<pre style="white-space:pre;overflow-x:auto;line-height:normal;font-family:monospace">{code}</pre>'


class NotebookDisplay:
    """What :class:`rich.live.Live` is in a terminal. Rich's own one for notebooks is blank without ``ipywidgets``.

    Args:
        render: Makes what to show.
    """

    def __init__(self, render: Callable[[], RenderableType]) -> None:
        self._render = render
        self._handle: Any = None

    def start(self, refresh: bool = True) -> None:
        """Shows it."""
        display = importlib.import_module("IPython.display").display
        self._handle = display(self._bundle(), raw=True, display_id=True)

    def refresh(self) -> None:
        """Shows it as it is now, in the same place."""
        self._handle.update(self._bundle(), raw=True)

    def stop(self) -> None:
        """Leaves what is shown."""

    def _bundle(self) -> dict[str, str]:
        console = Console(file=io.StringIO(), record=True, width=WIDTH, force_jupyter=False, force_terminal=True)
        console.print(self._render())
        html = console.export_html(inline_styles=True, code_format=PAGE, clear=False)
        return {"text/html": html, "text/plain": console.export_text()}
