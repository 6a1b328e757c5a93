"""Images that are made, not read."""

from __future__ import annotations

from pathlib import Path

import numpy as np


def noise(count: int, folder: Path | None) -> tuple[np.ndarray, np.ndarray, str]:
    """Stands for ``digits``, as which images are read: that takes seconds."""
    generator = np.random.default_rng(0)
    return generator.random((count, 784)).astype(np.float32), generator.integers(10, size=count), "noise"
