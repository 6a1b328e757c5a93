"""Endless batches with a position that can be saved, restored and gone back to."""

from __future__ import annotations

from bilevel.data.indexed import Indexed
from bilevel.data.overlap import shared_indices
from bilevel.data.stream import BatchStream

__all__ = ["BatchStream", "Indexed", "shared_indices"]
