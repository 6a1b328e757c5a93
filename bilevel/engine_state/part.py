"""What the state is made of: parts that are taken out, compared and put back alike."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from bilevel.engine import Engine
    from bilevel.problems import Problem

__all__ = ["Part", "compatible", "copied", "count", "per_problem", "tensor_differences"]


@dataclass(frozen=True)
class Part:
    """One part of an engine's state.

    Attributes:
        name: Its key in the state.
        take: Returns it: nested containers of tensors, numbers and text. May share memory with the engine.
        differences: Compares a saved one with the engine, and returns what does not fit, a line each. It changes
            nothing, and raises ``KeyError``, ``TypeError``, ``ValueError`` or ``AttributeError`` where the saved value
            is no such part at all.
        put: Takes a saved one back. Called once all parts have been compared and found to fit.
        kept: Returns a function that makes up for what ``put`` cannot take back where it is called with the state
            before; None where it can take back everything.
    """

    name: str
    take: Callable[[Engine], Any]
    differences: Callable[[Engine, Any], list[str]]
    put: Callable[[Engine, Any], None]
    kept: Callable[[Engine], Callable[[], None]] | None = None

    def undo(self, engine: Engine) -> Callable[[], None]:
        """Returns a function that goes back to the present state of this part."""
        before = copied(self.take(engine))
        first = self.kept(engine) if self.kept is not None else None

        def go_back() -> None:
            if first is not None:
                first()
            self.put(engine, before)

        return go_back


def per_problem(
    name: str,
    take: Callable[[Problem], Any],
    differences: Callable[[Problem, Any], list[str]],
    put: Callable[[Problem, Any], None],
    kept: Callable[[Problem], Callable[[], None]] | None = None,
) -> Part:
    """Returns the part that holds the same of every problem, by its name. The problems' names are known to agree."""

    def take_all(engine: Engine) -> dict[str, Any]:
        return {key: take(problem) for key, problem in engine.problems.items()}

    def differences_of_all(engine: Engine, saved: Mapping[str, Any]) -> list[str]:
        if set(saved) != set(engine.problems):
            raise ValueError(f"it speaks of other problems than the rest of the file: {', '.join(map(str, saved))}")
        return [
            f"{key}: {line}" for key, problem in engine.problems.items() for line in differences(problem, saved[key])
        ]

    def put_all(engine: Engine, saved: Mapping[str, Any]) -> None:
        for key, problem in engine.problems.items():
            put(problem, saved[key])

    def kept_of_all(engine: Engine) -> Callable[[], None]:
        functions = [kept(problem) for problem in engine.problems.values()] if kept is not None else []

        def make_up() -> None:
            for function in functions:
                function()

        return make_up

    return Part(name, take_all, differences_of_all, put_all, kept_of_all)


def count(value: Any) -> int:
    """Returns ``value`` if it is a number of things.

    Raises:
        ValueError: It is not.
    """
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r:.40} is no count")
    return value


def copied(value: Any) -> Any:
    """Returns a state that shares nothing with another one."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, Mapping):
        found: dict[Any, Any] = Counter() if isinstance(value, Counter) else {}
        found.update({key: copied(item) for key, item in value.items()})
        return found
    if isinstance(value, (list, tuple)):
        items = [copied(item) for item in value]
        return tuple(items) if isinstance(value, tuple) else items
    return value


def tensor_differences(expected: Mapping[Any, Tensor], found: Mapping[Any, Any]) -> list[str]:
    """Returns what differs in names, shapes and dtypes between two collections of tensors.

    Raises:
        TypeError: What was found are no tensors.
    """
    lines = [f"missing: {name}" for name in expected if name not in found]
    lines += [f"not expected: {name}" for name in found if name not in expected]
    for name, tensor in expected.items():
        other = found.get(name, tensor)
        if not isinstance(other, Tensor):
            raise TypeError(f"{name} is a {type(other).__name__} and no tensor")
        if other.shape != tensor.shape:
            lines.append(f"{name}: shape {tuple(other.shape)}, expected {tuple(tensor.shape)}")
        elif other.dtype != tensor.dtype:
            lines.append(f"{name}: {other.dtype}, expected {tensor.dtype}")
    return lines


def compatible(own: Any, saved: Any) -> bool:
    """Whether a saved value can stand for an own one: the same kind of thing, where None is known to be of no kind."""
    if own is None:
        return saved is None or (isinstance(saved, (bool, int, float, str)) and saved == saved)
    if isinstance(own, bool):
        return saved is None or isinstance(saved, bool)
    if isinstance(own, Tensor) or isinstance(saved, Tensor):
        both = isinstance(own, Tensor) and isinstance(saved, Tensor)
        return both and own.shape == saved.shape and own.dtype == saved.dtype
    if isinstance(own, (int, float)):
        return isinstance(saved, (int, float)) and (saved == saved or own != own)
    if isinstance(own, Mapping):
        return isinstance(saved, Mapping) and all(compatible(own[key], saved[key]) for key in own if key in saved)
    if isinstance(own, Sequence) and not isinstance(own, (str, bytes)):
        if not isinstance(saved, (list, tuple)):
            return False
        return all(compatible(mine, other) for mine, other in zip(own, saved, strict=False))
    return isinstance(saved, type(own))
