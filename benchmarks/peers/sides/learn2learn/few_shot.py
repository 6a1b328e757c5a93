"""(d) by learn2learn: ``MAML``, a loop over tasks, each backward at its end.

The class is imported past the package's ``__init__`` modules, which import gym, torchvision and Lightning.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from benchmarks.peers.side import Method, NotOffered
from benchmarks.peers.sides.loops import TaskLoop
from benchmarks.peers.workloads.few_shot import FewShot, Tasks


@functools.cache
def maml() -> Any:
    """Returns the class ``MAML``."""
    found = importlib.util.find_spec("learn2learn")
    if found is None or found.submodule_search_locations is None:
        raise NotOffered("it is not installed")
    folder = found.submodule_search_locations[0]
    for name, path in (("learn2learn", folder), ("learn2learn.algorithms", f"{folder}/algorithms")):
        package = ModuleType(name)
        package.__path__ = [path]
        sys.modules.setdefault(name, package)
    return importlib.import_module("learn2learn.algorithms.maml").MAML


class Library(TaskLoop):
    note = "its MAML class alone: the package imports torchvision, whose wheels need the CUDA build of torch"

    def __init__(self, problem: FewShot) -> None:
        self.learner = maml()(problem.copy(), lr=problem.rate, first_order=False)
        super().__init__(problem, self.learner.parameters())

    @contextmanager
    def adapted(self, number: int) -> Iterator[Any]:
        fast = self.learner.clone()
        for _ in range(self.problem.steps):
            fast.adapt(self.problem.support_loss(fast, number))
        yield fast


def build(tasks: Tasks, method: Method) -> Library:
    if method.options["implicit"]:
        raise NotOffered("no implicit differentiation")
    return Library(tasks.case(method))
