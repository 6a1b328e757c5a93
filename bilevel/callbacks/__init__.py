"""What watches a run without taking part in it."""

from bilevel.callbacks.base import Callback
from bilevel.callbacks.progress import Progress

__all__ = ["Callback", "Progress"]
