"""What ``hypergradcheck`` returns."""

from __future__ import annotations

import dataclasses
import math
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from bilevel.result import SolveInfo

__all__ = ["HypergradientReport", "ParameterComparison", "dtype_name"]

_LONGEST_TABLE = 20
_WIDTH = 100


@dataclass(frozen=True)
class ParameterComparison:
    """One outer parameter's part of a hypergradient.

    Attributes:
        relative_error: ``‖g − r‖ / ‖r‖`` for the method's g and the reference r; infinite where only r vanishes.
        cosine: Of the angle between them; NaN where one of them vanishes.
        norm: ``‖r‖``.
    """

    relative_error: float
    cosine: float
    norm: float


@dataclass(frozen=True)
class HypergradientReport:
    """How a method's hypergradient compares with a reference; ``print`` it.

    Attributes:
        passed: Whether ``relative_error <= rtol``, by a reference that is known as well as that.
        relative_error: ``‖g − r‖ / ‖r‖`` over all outer parameters.
        cosine: Of the angle between the two.
        rtol: The tolerance.
        per_parameter: The same by parameter.
        info: The method's own report.
        method: Its configuration.
        reference: Name of the reference.
        reference_dtype: Its precision: float64, or that of the parameters where the losses could not be run in float64.
        method_error: Relative distance to the same method computed in float64, which is rounding; NaN for an engine.
        inner_gradient_norm: ``‖∂f/∂w‖`` at the inner parameters.
        inner_distance: How far the inner parameters are from a solution of the inner problem, relative to their size:
            as the reference found where it solved the problem, and one Newton step otherwise; NaN where neither is
            known.
        asymmetry: Relative asymmetry of the inner gradient's Jacobian; above rounding, the field that the inner problem
            follows is no gradient: a ``detach()`` or a custom backward pass is in its loss.
        hidden: What autograd's derivative of the inner gradient misses, relatively: what a ``detach()`` hides. The
            reference ``"exact"`` is then taken by differences of the inner gradient. NaN where the losses do not run in
            float64.
        curvature: Smallest and largest eigenvalue of the inner Hessian (or Lanczos estimates of them, for many inner
            variables).
        causes: What may explain an error, or weaken a success, most likely first.
        reference_error: Estimated error of the reference, relative to its norm; infinite where it is not to be trusted.
        reference_details: How the reference was computed.
        reference_failure: Why the reference is not to be trusted; empty where it is.
        local_error: Distance from the exact formula at the inner parameters as they are, relatively: the method's own
            error, where the reference moved them to a solution first. NaN where it is not known.
    """

    passed: bool
    relative_error: float
    cosine: float
    rtol: float
    per_parameter: Mapping[str, ParameterComparison]
    info: SolveInfo
    method: str
    reference: str
    reference_dtype: torch.dtype
    method_error: float
    inner_gradient_norm: float
    inner_distance: float
    asymmetry: float
    hidden: float
    curvature: tuple[float, float]
    causes: tuple[str, ...] = ()
    reference_error: float = 0.0
    reference_details: str = ""
    reference_failure: str = ""
    local_error: float = math.nan

    @property
    def verdict(self) -> str:
        """``"passed"``, ``"FAILED"``, or ``"UNDECIDED"`` where the reference is too uncertain to tell."""
        if self.passed:
            return "passed"
        certain = self.relative_error > self.rtol + min(self.reference_error, 1e300) * (1 + self.relative_error)
        return "FAILED" if certain else "UNDECIDED"

    def explain(self) -> str:
        """Returns the report as text: verdict, inner problem, a table by parameter (worst first) and likely causes."""
        lines = [
            f"{self.method} against {self.reference} in {dtype_name(self.reference_dtype)}: {self.verdict}",
            f"  relative error {self.relative_error:.2e} (tolerance {self.rtol:.0e}), cosine {self.cosine:.6f}"
            if self._compared
            else "  not compared: there is no reference",
            *_wrapped("reference  ", f"{self._reference()}"),
            *_wrapped("inner      ", self._inner()),
            *_wrapped("method     ", self.info.explain()),
            *(("", *_table(self.per_parameter)) if self._compared else ()),
        ]
        if self.causes:
            lines += ["", "  what may explain this:" if not self.passed else "  what to know:"]
            for cause in self.causes:
                lines += textwrap.wrap(cause, _WIDTH, initial_indent="  - ", subsequent_indent="    ", **_UNBROKEN)
        return "\n".join(lines)

    @property
    def _compared(self) -> bool:
        return not (self.reference_failure and all(math.isnan(part.norm) for part in self.per_parameter.values()))

    def _reference(self) -> str:
        if self.reference_failure:
            return f"not to be trusted: {self.reference_failure} ({self.reference_details})"
        return f"known to {self.reference_error:.0e}: {self.reference_details}"

    def _inner(self) -> str:
        low, high = self.curvature
        known = not math.isnan(self.inner_distance)
        distance = f", about {self.inner_distance:.1e} (relative) from a solution" if known else ""
        return f"gradient norm {self.inner_gradient_norm:.2e}{distance}; curvature between {low:.2e} and {high:.2e}"

    def describe(self) -> dict[str, Any]:
        """Returns the report as numbers, strings and lists, for JSON; NaN and infinity become null and ``"inf"``."""
        plain = {**dataclasses.asdict(self), "verdict": self.verdict}
        plain["reference_dtype"] = dtype_name(self.reference_dtype)
        plain["info"]["status"] = self.info.status.value
        plain["per_parameter"] = {name: dataclasses.asdict(part) for name, part in self.per_parameter.items()}
        found: dict[str, Any] = _plain(plain)
        return found

    def __str__(self) -> str:
        """The same as :meth:`explain`."""
        return self.explain()


_UNBROKEN: Mapping[str, Any] = {"break_long_words": False, "break_on_hyphens": False}


def _wrapped(label: str, text: str) -> list[str]:
    indent = "  " + " " * len(label)
    return textwrap.wrap(text, _WIDTH, initial_indent=f"  {label}", subsequent_indent=indent, **_UNBROKEN)


def _plain(node: Any) -> Any:
    if isinstance(node, Mapping):
        return {str(key): _plain(value) for key, value in node.items()}
    if isinstance(node, (list, tuple)):
        return [_plain(value) for value in node]
    if isinstance(node, float) and not math.isfinite(node):
        return None if math.isnan(node) else ("inf" if node > 0 else "-inf")
    return node


def _table(parts: Mapping[str, ParameterComparison]) -> Iterator[str]:
    width = max(len("parameter"), *(len(name) for name in parts))
    yield f"  {'parameter':{width}}  relative error    cosine      norm"
    worst = sorted(parts.items(), key=lambda item: -item[1].relative_error)
    for name, part in worst[:_LONGEST_TABLE]:
        yield f"  {name:{width}}  {part.relative_error:14.2e}  {part.cosine:8.5f}  {part.norm:8.2e}"
    if len(parts) > _LONGEST_TABLE:
        yield f"  … and {len(parts) - _LONGEST_TABLE} more"


def dtype_name(dtype: torch.dtype) -> str:
    """Returns ``"float32"`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")
