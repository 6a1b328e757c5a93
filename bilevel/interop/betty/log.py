"""Lines on stdout, and numbers for TensorBoard or Weights & Biases."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from bilevel.callbacks.extras import require

__all__ = ["Log", "flat", "is_number", "line"]

FOLDER = "betty_tensorboard"


class Log:
    """The engine's ``logger``: every engine's own, so that nothing of the process is configured.

    Args:
        kind: Where :meth:`log` puts numbers: ``"none"``, ``"tensorboard"`` (a folder of its own under
            ``betty_tensorboard``) or ``"wandb"`` (the present run, or one that is begun with the first number).
        quiet: Whether to write no lines: on all ranks but the first.

    Raises:
        ConfigError: The package is not installed.
    """

    def __init__(self, kind: str = "none", *, quiet: bool = False) -> None:
        if kind != "none":
            require("EngineConfig.logger_type", kind, "logging")
        self.kind = kind
        self._quiet = quiet
        self._writer: Any = None
        self._lines = logging.Logger("bilevel.interop.betty", logging.INFO)

    def debug(self, message: str, *args: Any) -> None:
        """Writes a line of level DEBUG, which is not shown."""
        self._write(logging.DEBUG, message, *args)

    def info(self, message: str, *args: Any) -> None:
        """Writes a line."""
        self._write(logging.INFO, message, *args)

    def warning(self, message: str, *args: Any) -> None:
        """Writes a line of level WARNING."""
        self._write(logging.WARNING, message, *args)

    def log(self, stats: Mapping[str, Any], tag: str | None = None, step: int | None = None) -> None:
        """Records numbers under ``"tag/name"``; does nothing where ``kind`` is ``"none"``."""
        if self.kind == "none" or self._quiet:
            return
        numbers = {key if tag is None else f"{tag}/{key}": value for key, value in flat(stats).items()}
        if self.kind == "wandb":
            import wandb

            # Not as wandb's own step: a problem that counts its own steps would be behind, and be dropped.
            (wandb.run or wandb.init()).log({**numbers, "global_step": step})
            return
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(log_dir=str(_new_folder()))
        for key, value in numbers.items():
            if is_number(value):
                self._writer.add_scalar(key, value, global_step=step)

    def close(self) -> None:
        """Flushes what is waiting."""
        if self._writer is not None:
            self._writer.flush()

    def error(self, message: str, *args: Any) -> None:
        """Writes a line of level ERROR."""
        self._write(logging.ERROR, message, *args)

    def _write(self, level: int, message: str, *args: Any) -> None:
        if self._quiet:
            return
        # stdout as it is now: notebooks and tests replace it.
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(logging.Formatter("[%(asctime)s] [%(levelname)s] %(message)s", "%Y-%m-%d %H:%M:%S"))
        self._lines.handlers = [handler]
        self._lines.log(level, message, *args)


def is_number(value: Any) -> bool:
    """Whether a value is one that can be recorded."""
    return isinstance(value, (int, float))


def _new_folder() -> Path:
    """Makes a folder named by the time."""
    name, count = time.strftime("%Y-%m-%d_%H-%M-%S"), 1
    while True:
        folder = Path(FOLDER) / (name if count == 1 else f"{name}_{count}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            count += 1
        else:
            return folder


def line(stats: Mapping[str, Any]) -> str:
    """Returns numbers as one line: ``"loss: 0.5 || acc: 91.2"``."""
    return " || ".join(f"{key}: {value}" for key, value in flat(stats).items())


def flat(stats: Mapping[str, Any]) -> dict[str, Any]:
    """Returns one entry a number; lists and mappings of several get a number behind their name."""
    flat: dict[str, Any] = {}
    for key, value in stats.items():
        if isinstance(value, (list, tuple, Mapping)):
            parts = value.values() if isinstance(value, Mapping) else value
            flat.update({f"{key}_{place}": _number(part) for place, part in enumerate(parts)})
        else:
            flat[key] = _number(value)
    return flat


def _number(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
