"""BiDoRA's two problems: the direction (inner) and the magnitude (outer) of DoRA's weight decomposition.

    min over m of L(D_val; m, V*(m))     where     V*(m) = argmin over V of L(D_tr; m, V) + γ R(V)

with ``W' = m ⊙ V/‖V‖``, ``V = W₀ + s·BA`` and R the orthogonality penalty. Source: Qin, Zhang, Xie, TMLR 2025 (arXiv
2410.09758).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from peft import PeftModel
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from bidora.model import parameter_roles
from bidora.orthogonality import orthogonality as orthogonality_penalty
from bilevel import Automatic, Estimator, FiniteDifference, Identity, Problem
from bilevel.errors import DataError
from bilevel.hypergrad import InnerProblem, Pullback, Response

__all__ = ["ComputeLoss", "Direction", "Magnitude", "model_loss"]

ComputeLoss = Callable[[nn.Module, Mapping[str, Any]], Tensor]
"""``(model, batch) -> scalar loss``."""


def model_loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Returns the loss that a transformers model computes itself, on the model's device.

    Raises:
        DataError: The batch has no labels, so that the model returns no loss.
    """
    device = next(model.parameters()).device
    moved = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
    loss = model(**moved).loss
    if not isinstance(loss, Tensor):
        raise DataError(f"the model returned no loss: the batch needs 'labels', it has {', '.join(batch)}")
    return loss


class Direction(Problem):
    """The inner problem: A and B of every DoRA layer and the task head, on the training split.

    Its loss is the model's, plus γ times the mean over layers of the orthogonality penalty.

    Args:
        model: What :func:`bidora.get_bidora_model` returned.
        optimizer: A callable that makes a torch optimiser from a list of parameters.
        data: Batches of the training split: mappings that the model takes as keyword arguments.
        scheduler: See :class:`bilevel.Problem`.
        steps: Updates for each update of the magnitude.
        hypergradient: How the magnitude is differentiated through this problem.
        max_grad_norm: Clips the gradient's norm.
        orthogonality: γ.
        compute_loss: How to compute the loss; :func:`model_loss` by default.
        name: Its name in the engine.
    """

    def __init__(
        self,
        model: PeftModel,
        *,
        optimizer: Callable[[Any], Optimizer] | None = None,
        data: Iterable[Any] | None = None,
        scheduler: Callable[[Any], LRScheduler] | None = None,
        steps: int = 1,
        hypergradient: Estimator | str | Mapping[str, Any] | None = None,
        max_grad_norm: float | None = None,
        orthogonality: float = 1e-5,
        compute_loss: ComputeLoss = model_loss,
        name: str = "direction",
    ) -> None:
        roles = parameter_roles(model)
        owned = {*roles.direction, *roles.head}
        super().__init__(
            model,
            optimizer=optimizer,
            data=data,
            scheduler=scheduler,
            params=lambda key, _: key in owned,
            steps=steps,
            hypergradient=hypergradient,
            max_grad_norm=max_grad_norm,
            name=name,
        )
        self._orthogonality = orthogonality
        self._penalised = True
        self._compute_loss = compute_loss

    def loss(self, batch: Any) -> Mapping[str, Any]:
        """Returns the task loss plus the penalty, and both apart."""
        task = self._compute_loss(self.module, batch)
        if self._orthogonality == 0.0 or not self._penalised:
            return {"loss": task}
        penalty = orthogonality_penalty(self.module)
        return {
            "loss": task + self._orthogonality * penalty,
            "task_loss": task.detach(),
            "orthogonality": penalty.detach(),
        }

    def respond(self, estimator: Estimator, lower: InnerProblem) -> Response:
        """Returns the response, without the penalty in the passes of methods that take a mixed product alone.

        The penalty does not depend on m, and so has no part in ``∂²f/∂V∂m``.
        """
        response = super().respond(estimator, lower)
        if isinstance(estimator, (Automatic, FiniteDifference, Identity)):
            return _WithoutPenalty(self, response)
        return response

    @contextmanager
    def without_penalty(self) -> Iterator[None]:
        """Lets :meth:`loss` be the task loss alone in its body."""
        before, self._penalised = self._penalised, False
        try:
            yield
        finally:
            self._penalised = before


@dataclass(frozen=True)
class _WithoutPenalty(Response):
    problem: Direction
    response: Response

    @property
    def point(self) -> tuple[Tensor, ...]:  # type: ignore[override]
        return self.response.point

    def pullback(self, cotangent: tuple[Tensor, ...], state: Mapping[str, tuple[Tensor, ...]]) -> Pullback:
        with self.problem.without_penalty():
            return self.response.pullback(cotangent, state)


class Magnitude(Problem):
    """The outer problem: the magnitude m of every DoRA layer, on the validation split.

    Args:
        model: The same model as the direction's.
        optimizer: A callable that makes a torch optimiser from a list of parameters.
        data: Batches of the validation split.
        scheduler: See :class:`bilevel.Problem`.
        max_grad_norm: Clips the hypergradient's norm.
        compute_loss: How to compute the loss; :func:`model_loss` by default.
        name: Its name in the engine.
    """

    def __init__(
        self,
        model: PeftModel,
        *,
        optimizer: Callable[[Any], Optimizer] | None = None,
        data: Iterable[Any] | None = None,
        scheduler: Callable[[Any], LRScheduler] | None = None,
        max_grad_norm: float | None = None,
        compute_loss: ComputeLoss = model_loss,
        name: str = "magnitude",
    ) -> None:
        owned = {*parameter_roles(model).magnitude}
        super().__init__(
            model,
            optimizer=optimizer,
            data=data,
            scheduler=scheduler,
            params=lambda key, _: key in owned,
            max_grad_norm=max_grad_norm,
            name=name,
        )
        self._compute_loss = compute_loss

    def loss(self, batch: Any) -> Tensor:
        """Returns the task loss."""
        return self._compute_loss(self.module, batch)
