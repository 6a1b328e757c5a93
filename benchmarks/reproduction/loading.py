"""Reading the real data sets from a folder that the user names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

__all__ = ["CONTENTS", "MissingDataError", "load_classification", "load_digits"]

CONTENTS = {
    "ijcnn1": "X_train (49990, 22), y_train, X_test (15000, 22), y_test; labels -1 and 1",
    "adult_a9a": "X_train (32561, 16) and X_test (16281, 16), 123 features a row packed with np.packbits(axis=1), "
    "y_train, y_test, n_features; labels -1 and 1",
    "mnist10k": "x (10000, 28, 28) of uint8, y (10000,): the test part of MNIST",
}


class MissingDataError(Exception):
    """A data set is not where it was said to be."""


def load_classification(folder: Path | None, name: str) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Returns the training and the test part of a binary problem: features in float32, labels of -1 and 1."""
    file = _open(folder, name)
    packed = "n_features" in file

    def part(split: str) -> tuple[Tensor, Tensor]:
        x = file[f"X_{split}"]
        if packed:
            x = np.unpackbits(x, axis=1, count=int(file["n_features"]))
        return torch.from_numpy(x.astype(np.float32)), torch.from_numpy(file[f"y_{split}"].astype(np.float32))

    return part("train"), part("test")


def load_digits(folder: Path | None) -> tuple[Tensor, Tensor]:
    """Returns 10,000 images as rows of 784 numbers between 0 and 1, and their digits."""
    file = _open(folder, "mnist10k")
    return torch.from_numpy(file["x"].reshape(-1, 784)).float() / 255, torch.from_numpy(file["y"].astype(np.int64))


def _open(folder: Path | None, name: str) -> dict[str, np.ndarray]:
    where = "no --data folder was named" if folder is None else f"{folder / name / 'data.npz'} does not exist"
    path = None if folder is None else folder / name / "data.npz"
    if path is None or not path.is_file():
        raise MissingDataError(
            f"problem on {name}: {where}. Expected is a file {name}/data.npz in the folder that --data names, with the "
            f"arrays {CONTENTS[name]}. Nothing is downloaded: ijcnn1 and a9a are at the LIBSVM data page, MNIST at its "
            "mirrors. To run without data: --problems quadratics"
        )
    with np.load(path, allow_pickle=False) as file:
        return {key: file[key] for key in file}
