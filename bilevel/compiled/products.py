"""A retained gradient graph whose set-up and products are compiled, and the choice between it and others."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from bilevel import distributed
from bilevel.compiled.capture import Derivatives, Request, capture
from bilevel.errors import ConfigError, unknown_name
from bilevel.functional import Evaluate, Objective, independent, require_finite
from bilevel.products import GaussNewtonGraph, GradientGraph
from bilevel.vector import Tensors

__all__ = ["DEFAULT_COMPILER", "CompiledGraph", "Iteration", "check_compile", "graph_kind"]

DEFAULT_COMPILER = "inductor"
KNOWN_COMPILERS = ("inductor", "aot_eager", "eager")

Iteration = Callable[..., Tensors]


def check_compile(owner: str, value: object, products: str, curvature: str) -> None:
    """Raises unless a field says whether to compile, or names a back end of ``torch.compile``, and that can be done.

    Args:
        owner: The class that has the field, for the message.
        value: What came.
        products: How products are taken.
        curvature: Which ones.
    """
    if not isinstance(value, (bool, str)):
        raise ConfigError(f"{owner}.compile must be True, False or the name of a back end, not {value!r}")
    if isinstance(value, str) and not _is_back_end(value):
        usual = sorted({*KNOWN_COMPILERS, *torch._dynamo.list_backends()})
        raise unknown_name(f"value of {owner}.compile", value, usual)
    if value and (products != "autodiff" or curvature != "hessian"):
        raise ConfigError(
            f"{owner}.compile is for products='autodiff' with curvature='hessian', not products={products!r} with "
            f"curvature={curvature!r}"
        )


def _is_back_end(name: str) -> bool:
    return name in KNOWN_COMPILERS or name in torch._dynamo.list_backends(exclude_tags=())


def graph_kind(curvature: str, compiler: bool | str) -> Callable[..., GradientGraph]:
    """Returns what makes the retained graph that an estimator's fields ask for."""
    if compiler:
        return functools.partial(CompiledGraph, compiler=compiler if isinstance(compiler, str) else DEFAULT_COMPILER)
    return GaussNewtonGraph if curvature == "gauss_newton" else GradientGraph


class CompiledGraph(GradientGraph):
    """As :class:`GradientGraph`, by compiled graphs.

    The first product at a loss captures and compiles: seconds, and again for other shapes, dtypes, devices, or Python
    values in the loss. Later points, batches and buffers only run what was compiled: 1 forward and 1 backward pass in
    one graph for the set-up, 1 backward pass a product.

    Args:
        objective: Whose gradient.
        evaluate: What ``within`` passes to its body.
        inner: The inner variables, leaves that require gradients.
        outer: The outer variables, likewise.
        compiler: The back end of ``torch.compile``.

    Raises:
        LossError: The loss cannot be captured as one graph, draws random numbers, has no second derivative, or is not
            reached by any inner variable.
        ConfigError: The objective is more than a loss (it holds best responses of problems below).
        NonFiniteError: The loss is NaN or infinite.
    """

    def __init__(
        self, objective: Objective, evaluate: Evaluate, inner: Tensors, outer: Tensors, compiler: str = DEFAULT_COMPILER
    ) -> None:
        self._objective = objective
        self._outer = outer
        request = Request(objective.name, inner, outer, compiler)
        capture(objective, request)
        assert request.derivatives is not None
        self._graphs: Derivatives = request.derivatives
        self._kept = request.kept
        self.report = request.report
        self.active = self._graphs.active
        self._inner = self.select(inner)
        self.value = request.value
        self.gradient = request.gradient
        objective.passes.forward += 1
        objective.passes.backward += 1
        require_finite(self.value, objective.name)
        if not any(self.active):
            raise independent(objective.name)

    @property
    def message(self) -> str:  # type: ignore[override]
        """That products are compiled, and what had to be compiled on the way."""
        return str(self.report)

    def hessian(self, q: Tensors) -> Tensors:
        """Returns ``(∂g/∂w)ᵀ q`` over the active variables."""
        return self._product("hessian", q)

    def mixed(self, q: Tensors) -> Tensors:
        """Returns ``(∂g/∂λ)ᵀ q``."""
        return self._product("mixed", q)

    def mixed_again(self, q: Tensors) -> Tensors:
        """Returns ``(∂g/∂λ)ᵀ q``."""
        return self._product("mixed", q)

    def hessian_and_mixed(self, q: Tensors, *, last: bool = True) -> tuple[Tensors, Tensors]:
        """Returns both products from one graph."""
        both = self._product("both", q)
        return both[: len(self._inner)], both[len(self._inner) :]

    def iteration(self, name: str, body: Callable[..., Tensors]) -> Iteration | None:
        """Returns one iteration of a solver as a compiled graph, or None where products must be reduced over ranks.

        Args:
            name: By which it is kept; another body needs another name.
            body: Takes the product and the solver's tensors, and returns new ones; without a look at their values.
        """
        if distributed.size() > 1:
            return None

        def step(*tensors: Tensor) -> Tensors:
            with torch.no_grad():
                found = self._graphs.iteration(name, body, self._kept, tensors, self.report)
            self._objective.passes.backward += 1
            self._objective.reduce(tuple(found[:1]))  # a limit of time looks at its clock here
            return found

        return step

    def _product(self, kind: str, q: Tensors) -> Tensors:
        parts = tuple(part.to(g.dtype) for part, g in zip(q, self.gradient, strict=True))
        with torch.no_grad():
            found = self._graphs.product(kind, self._kept, parts, self.report)
        self._objective.passes.backward += 1
        return self._objective.reduce(found)
