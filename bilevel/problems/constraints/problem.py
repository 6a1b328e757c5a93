"""Inner problems with simple constraints: updates that end with a projection, and the derivative of where they lead."""

from __future__ import annotations

import fnmatch
import functools
import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from bilevel.errors import ConfigError, LossError, unknown_name
from bilevel.problems.base import Problem
from bilevel.problems.constraints.sets import Constraint
from bilevel.problems.supervised import Training
from bilevel.slots import ParameterSlots
from bilevel.validation import check_number
from bilevel.vector import Tensors

__all__ = ["Constrained", "ConstrainedTraining"]


class Constrained(Problem):
    """An inner problem whose parameters are kept in a set C: ``w*(λ) = argmin over w in C of f(w, λ)``.

    Every update ends with the projection: ``w ← P(w − η ∂f/∂w)``. Where that stands still, the constraints that are
    pushed against hold w on a face of C, and the derivative of ``w = P(w − η ∂f/∂w(w, λ))`` is

        dw*/dλ = −(Π H Π)⁺ Π ∂²f/∂w∂λ,

    with Π the projector on the face's tangent space and H the Hessian (that of the Lagrangian, where the face is
    curved). What is held by a constraint does not respond. This is an ordinary implicit derivative of another loss,

        L(u, λ) = f(E(u), λ) + c/2 ‖u − E(u)‖²,        E(u): the nearest point to u on the face's surface,

    which has its minimum at ``w*(λ)``, the Hessian ``Π H Π + c (I − Π)`` there and the mixed derivative
    ``Π ∂²f/∂w∂λ``. :meth:`response_loss` is L, on the face where the last update ended; updates follow f. So every
    method but ``one_step`` (whose step knows no projection) serves as it is: implicit ones, penalty methods, and those
    that follow the updates through the projection.

    The derivative exists where every constraint that is met is pushed against (strict complementarity), which is so at
    almost every λ. Elsewhere w* has a kink; what is returned is the derivative on one side of it. Before the first
    update the face is that of the start.

    A loss must read the parameters from this problem's own module.

    Args:
        module: What holds the parameters.
        constraints: One for every owned parameter, or a mapping from glob patterns over their names.
        normal_curvature: c: of the size of the Hessian's eigenvalues, so that solvers see no worse a condition.
        settings: Those of :class:`~bilevel.Problem`: optimizer, data, steps, …. With a simplex or a ball the optimiser
            must be SGD (with or without momentum): a step that scales elements differently ends elsewhere.

    Raises:
        ConfigError: Constraints that do not fit their parameter, two for one, or none at all; an optimiser that does
            not go with them.
        UnknownNameError: A pattern that matches no owned parameter.

    Cost: as without constraints; a projection an update. Source: for the fixed point's derivative, Blondel et al.,
    NeurIPS 2022 (arXiv 2105.15183), section 2.

    Example::

        class Weights(Constrained):
            def loss(self, batch):
                return risk(self.module.weights, self.market.module)

        Weights(nn.ParameterDict({"weights": torch.full((10,), 0.1)}), constraints=Simplex(), optimizer=sgd, steps=50)
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        constraints: Constraint | Mapping[str, Constraint],
        normal_curvature: float = 1.0,
        **settings: Any,
    ) -> None:
        super().__init__(module, **settings)
        check_number(self.name, "normal_curvature", normal_curvature, minimum=0.0, exclusive=True)
        self.normal_curvature = normal_curvature
        self.constraints = _by_name(self.name, constraints, self.parameter_names)
        for name, parameter in self._constrained(self.parameters):
            self.constraints[name].check(name, parameter)
        self._check_optimizer()
        for name, parameter in self._constrained(self.parameters):
            face = self.constraints[name].face(parameter.detach())
            # Kept with the model, so that checkpoints hold it, but not among what a user saves of it.
            module.register_buffer(_buffer(name), face, persistent=False)
        self._put_projected()
        if self.initial is not None:
            self.initial = tuple(p.detach().clone() for p in self.parameters)
        self._guards: list[RemovableHandle] = []
        self._slots = ParameterSlots([module])

    def attach(self, siblings: Mapping[str, Problem]) -> None:
        """See :meth:`Problem.attach`; the problem may be a copy, with parameters of its own."""
        super().attach(siblings)
        self._slots = ParameterSlots([self.module])
        _remove(self._guards)

    def project(self, values: Tensors) -> Tensors:
        """Returns the nearest points of the sets."""
        return tuple(
            self.constraints[name].project(value) if name in self.constraints else value
            for name, value in zip(self.parameter_names, values, strict=True)
        )

    def response_loss(self, batch: Any) -> Tensor | Mapping[str, Any]:
        """Returns L, the loss on the face where the last update ended."""
        self._guard()
        values = tuple(_held(self.module, name) for name in self.parameter_names)
        placed = tuple(
            self.constraints[name].onto(value, self._face(name)) if name in self.constraints else value
            for name, value in zip(self.parameter_names, values, strict=True)
        )
        with self._slots.swapped(self.parameters, placed):
            found = self.loss(batch)
        away = [value - onto for value, onto in zip(values, placed, strict=True) if value is not onto]
        more = self.normal_curvature / 2 * sum(part.square().sum() for part in away)
        if not isinstance(found, Mapping):
            return found + more
        return {**found, "loss": found["loss"] + more}

    def active(self) -> dict[str, Tensor]:
        """Returns, by parameter, where constraints hold it: a mask over elements (box, simplex) or groups (ball)."""
        return {name: self._face(name) != 0 for name in self.constraints}

    def evaluate(self) -> Mapping[str, float]:
        """Returns ``"active"``: the share of elements, or groups, that constraints hold."""
        masks = [mask.reshape(-1) for mask in self.active().values()]
        return {"active": float(torch.cat(masks).double().mean())}

    @torch.no_grad()
    def _put_projected(self) -> None:
        """Remembers the face on which an update ends."""
        for name, parameter in self._constrained(self.parameters):
            self._face(name).copy_(self.constraints[name].face(parameter))
        super()._put_projected()

    def _guard(self) -> None:
        """Refuses, for as long as there is this problem, that the module is evaluated again in a backward pass."""
        if self._guards:
            return
        for part in self.module.modules():
            hook = functools.partial(_refuse_recomputation, self.name, id(part))
            self._guards.append(part.register_forward_pre_hook(hook))
        weakref.finalize(self, _remove, self._guards)

    def _constrained(self, values: Tensors) -> list[tuple[str, Tensor]]:
        named = zip(self.parameter_names, values, strict=True)
        return [(name, value) for name, value in named if name in self.constraints]

    def _face(self, name: str) -> Tensor:
        face = self.module._buffers[_buffer(name)]
        assert face is not None
        return face

    def _check_optimizer(self) -> None:
        coupled = sorted({str(c) for c in self.constraints.values() if not c.separable})
        if coupled and self.optimizer is not None and not isinstance(self.optimizer, torch.optim.SGD):
            raise ConfigError(
                f"problem {self.name!r}: projected steps of {type(self.optimizer).__name__} on {', '.join(coupled)} "
                "end elsewhere than at the constrained minimum, since they scale each element differently: use "
                "torch.optim.SGD (with momentum, if you like), or a Box"
            )


class ConstrainedTraining(Constrained, Training):
    """:class:`~bilevel.problems.Training` under constraints: ``criterion(model(inputs), targets)`` over a set C.

    Args:
        module: The model.
        constraints: See :class:`Constrained`.
        settings: Those of :class:`Constrained` and of :class:`~bilevel.problems.Training`.

    Example::

        ConstrainedTraining(model, constraints={"*.weight": Ball(1.0, dim=1)}, optimizer=sgd, data=loader)
    """


def _by_name(owner: str, given: Constraint | Mapping[str, Constraint], names: Iterable[str]) -> dict[str, Constraint]:
    known = list(names)
    if isinstance(given, Constraint):
        return dict.fromkeys(known, given)
    if not given or not all(isinstance(c, Constraint) for c in dict(given).values()):
        raise ConfigError(
            f"constraints of problem {owner!r} must be a Constraint (Box, Simplex, Ball), or a mapping from patterns "
            f"over parameter names to such, with at least one entry; not {given!r:.80}"
        )
    found: dict[str, Constraint] = {}
    for pattern, constraint in given.items():
        matched = [name for name in known if fnmatch.fnmatchcase(name, pattern)]
        if not matched:
            raise unknown_name(f"pattern of constraints of problem {owner!r}", pattern, known)
        twice = sorted(found.keys() & set(matched))
        if twice:
            raise ConfigError(f"problem {owner!r}: two constraints for parameter {twice[0]!r}: one is possible")
        found |= dict.fromkeys(matched, constraint)
    return found


def _buffer(name: str) -> str:
    return f"face_of_{name.replace('.', '/')}"  # a buffer's name has no dots


def _held(module: nn.Module, name: str) -> Tensor:
    """Returns what a module holds in the place of a parameter: itself, or what it is evaluated at."""
    path, _, last = name.rpartition(".")
    held = module.get_submodule(path)._parameters[last]
    assert held is not None
    return held


def _remove(guards: list[RemovableHandle]) -> None:
    while guards:
        guards.pop().remove()


def _refuse_recomputation(name: str, guarded: int, module: nn.Module, arguments: Any) -> None:
    """Raises within a backward pass of the guarded module; a copy, which has the hook too, is no one's business."""
    if torch._C._current_graph_task_id() != -1 and id(module) == guarded:
        raise LossError(
            f"the module of problem {name!r} uses activation checkpointing, which evaluates again in a backward pass "
            "with the parameters themselves, and not with their places on the face of the constraints: leave the "
            "checkpoint out"
        )
