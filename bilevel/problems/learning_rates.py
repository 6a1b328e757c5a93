"""Learning rates, learned through the updates that they make."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from bilevel.errors import ConfigError, GraphError
from bilevel.hypergrad import Estimator, as_estimator
from bilevel.hypergrad.inner_updates import InnerUpdates
from bilevel.problems.base import ParameterSelection, select_parameters
from bilevel.problems.hyperparameters import PerParameter, Tuned
from bilevel.problems.hyperparameters.per_parameter import parameter_key
from bilevel.problems.supervised import Criterion
from bilevel.slots import called_at

__all__ = ["LearningRate", "Paced"]

LINEAR: tuple[type[Optimizer], ...] = (torch.optim.SGD,)
"""Optimisers whose step grows with the gradient."""

SCALE_FREE: tuple[type[Optimizer], ...] = (
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.NAdam,
    torch.optim.Adamax,
    torch.optim.RMSprop,
    torch.optim.Adagrad,
)
"""Optimisers whose step is the same for a multiple of the gradient (but for their ε)."""


class LearningRate(PerParameter):
    """Factors ``r = exp(λ)`` of the inner optimiser's learning rate η: :class:`Paced` makes its updates with ``r η``.

    A part of :class:`~bilevel.problems.Hyperparameters`, alone or with others. The optimiser's own η (with its
    scheduler, if any) is where the rates start.

    Args:
        model: The inner problem's model.
        per: ``"model"`` for one factor, ``"tensor"`` for one a parameter tensor, ``"input"`` for one an input of each
            layer, ``"element"`` for one a number.
        initial: The factor that all start from.
        params: Which of the inner problem's parameters; all by default. The others keep η.

    Raises:
        ConfigError: ``initial`` is not above 0.
        UnknownNameError: An unknown ``per``, or a pattern that matches no trainable parameter.

    Source: learned by differentiating the updates, Maclaurin et al., ICML 2015 (arXiv 1502.03492); with one inner step
    it is the online rule of Baydin et al., ICLR 2018 (arXiv 1703.04782), one rate an element that of Meta-SGD.
    """

    inner: ClassVar[str] = "Paced"

    def __init__(
        self, model: nn.Module, *, per: str = "model", initial: float = 1.0, params: ParameterSelection | None = None
    ) -> None:
        super().__init__(model, per=per, initial=initial, params=params)

    def enters(self) -> bool:
        """It does, through :class:`Paced`."""
        return True


class Paced(Tuned):
    """An inner problem whose learning rates are hyper-parameters.

    What the optimiser moves is not the weights w but displacements d, with ``w = b + s ∘ d``. An SGD step on d then
    moves w by ``−η s² ∘ ∂f/∂w``, with momentum too, and Adam and its kin, whose steps do not depend on the gradient's
    scale, by s times what they would: with ``s = √r``, or ``s = r``, exactly by the learning rate ``r η``. Before each
    round of updates the base b takes w, d becomes 0, and the optimiser starts anew (momentum included).

    So the rates enter the loss, and methods that follow the updates see them. No other can: the *solution* of the inner
    problem does not depend on the rate that led to it, so the implicit derivative is zero. Nor can
    :func:`~bilevel.hypergradcheck` judge the rates after few updates, for its references are the derivative of the
    solution: with so many that they arrive there, both are zero.

    The model's own parameters become buffers, which hold w after every outer step: ``model(x)`` and its ``state_dict``
    are the trained model's; ``named_weights()`` has them too. What is loaded into the model is where the next round
    starts. The displacements are this problem's parameters.

    Args:
        module: The model; its trainable parameters (those that ``params`` selects) are replaced by buffers, in place.
        optimizer: A callable that makes SGD (with momentum if you like), Adam, AdamW, NAdam, Adamax, RMSprop or Adagrad
            from a list of parameters, without weight decay, which would shrink d.
        criterion: See :class:`~bilevel.problems.Tuned`.
        hyperparameters: See :class:`~bilevel.problems.Tuned`.
        params: Which of the model's trainable parameters are trained; all by default.
        hypergradient: ``"unrolled"``, or another method that follows updates (``"pzobo"``). The engine's own method is
            not used here.
        settings: Those of :class:`~bilevel.Problem`, less reset, warmup_steps, max_grad_norm and stop.

    Raises:
        ConfigError: Another optimiser, one with weight decay, a method that does not follow the updates, or a setting
            that has no meaning here.
        GraphError: No :class:`LearningRate` among the hyper-parameters (within the loss).

    Cost: as for :class:`~bilevel.problems.Tuned`, and three copies of the weights.

    Example::

        model = nn.Linear(64, 10)
        rate = LearningRate(model, per="tensor")    # before the model is handed over
        inner = Paced(model, optimizer=lambda p: torch.optim.SGD(p, lr=0.1), data=training, steps=10)
        outer = Hyperparameters({"rate": rate}, optimizer=lambda p: torch.optim.Adam(p, lr=0.1), data=validation)
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        optimizer: Any,
        criterion: Criterion = F.cross_entropy,
        hyperparameters: str | None = None,
        params: ParameterSelection | None = None,
        hypergradient: Estimator | str | Mapping[str, Any] = "unrolled",
        **settings: Any,
    ) -> None:
        method = as_estimator(hypergradient)
        if not isinstance(method, InnerUpdates):
            raise ConfigError(
                f"method {method.name!r} differentiates the solution of the inner problem, which does not depend on "
                "the learning rates that led there: use 'unrolled', or 'pzobo'"
            )
        without = [key for key in ("reset", "warmup_steps", "max_grad_norm") if settings.get(key)]
        if without:
            raise ConfigError(f"a Paced problem starts each round of updates anew and takes no {', '.join(without)}")
        if settings.get("stop") is not None:
            raise ConfigError(
                "a Paced problem takes no stop: the learning rates of the last round would still be learned, by a step "
                "that is past. Stop the run"
            )
        if isinstance(optimizer, Optimizer) or not callable(optimizer):
            raise ConfigError("a Paced problem moves displacements: pass optimizer=lambda params: …, not an optimizer")
        displaced = _Displaced(module, select_parameters(type(self).__name__, module, params))
        super().__init__(
            displaced,
            optimizer=optimizer,
            criterion=criterion,
            hyperparameters=hyperparameters,
            params="displacement.*",
            hypergradient=method,
            **settings,
        )
        assert self.optimizer is not None
        self._root = _refused_or_root(self.optimizer)
        displaced.take_over()  # nothing can go wrong any more

    @property
    def displaced(self) -> _Displaced:
        """The module, which keeps the base and the displacements."""
        return cast(_Displaced, self.module)

    def scales(self) -> dict[str, Tensor | float]:
        """Returns ``s`` by parameter, as it is at this evaluation."""
        parts = [part for part in self.parts().values() if isinstance(part, LearningRate)]
        if not parts:
            raise GraphError(
                f"problem {self.name!r} has learned learning rates, and its Hyperparameters no LearningRate: add one, "
                "or use Tuned"
            )
        found: dict[str, Tensor | float] = dict.fromkeys(self.displaced.names, 1.0)
        for part in parts:
            for name in part.chosen(self.displaced.displacements()):
                scale = part.of(name)
                found[name] = found[name] * (scale.sqrt() if self._root else scale)
        return found

    def named_weights(self) -> dict[str, Tensor]:
        """Returns w by name, as it is at this evaluation."""
        return self.displaced.weights(self.scales())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the model with w as it is at this evaluation."""
        return called_at(self.displaced.model, self.named_weights(), args, kwargs)

    def restart(self) -> None:
        """Lets the base take w, before a round of updates; the displacements and the optimiser start anew."""
        self.displaced.fold(self.scales())
        assert self.optimizer is not None
        self.optimizer.state.clear()

    def on_step_end(self, result: Any) -> None:
        """Shows the weights in the model."""
        self.displaced.show()


class _Displaced(nn.Module):
    """A model whose weights are ``base + scale ∘ displacement``.

    The scale with which a round's updates were made is kept: the learned one has moved on when they are folded.
    """

    def __init__(self, model: nn.Module, chosen: Mapping[str, nn.Parameter]) -> None:
        super().__init__()
        self.names = tuple(chosen)
        self.displacement, self.base, self.scale = nn.Module(), nn.Module(), nn.Module()
        for name, p in chosen.items():
            self.displacement.register_parameter(parameter_key(name), nn.Parameter(torch.zeros_like(p)))
            self.base.register_buffer(parameter_key(name), p.detach().clone())
            self.scale.register_buffer(parameter_key(name), torch.ones_like(p))
        self.model = model
        self.shown = True  # the model holds the weights, or others that were loaded into it

    def take_over(self) -> None:
        """Makes buffers of the model's parameters, wherever it holds them."""
        named = dict(self.model.named_parameters())
        buffers = {id(named[name]): named[name].detach() for name in self.names}
        for part in self.model.modules():
            for name, p in list(part._parameters.items()):
                if p is not None and id(p) in buffers:
                    del part._parameters[name]
                    part.register_buffer(name, buffers[id(p)])

    def displacements(self) -> dict[str, Tensor]:
        return {name: getattr(self.displacement, parameter_key(name)) for name in self.names}

    def weights(self, scales: Mapping[str, Tensor | float]) -> dict[str, Tensor]:
        moved = self.displacements().items()
        return {
            name: getattr(self.base, parameter_key(name)) + scales[name] * displacement for name, displacement in moved
        }

    def held(self) -> dict[str, Tensor]:
        """Returns the weights that the updates have led to."""
        return self.weights({name: getattr(self.scale, parameter_key(name)) for name in self.names})

    @torch.no_grad()
    def fold(self, scales: Mapping[str, Tensor | float]) -> None:
        """Moves the base to the weights, and takes new scales."""
        weights = {name: self.model.get_buffer(name) for name in self.names} if self.shown else self.held()
        self.shown = False
        for name, value in weights.items():
            getattr(self.base, parameter_key(name)).copy_(value)
            getattr(self.displacement, parameter_key(name)).zero_()
            scale = getattr(self.scale, parameter_key(name))
            scale.copy_(torch.as_tensor(scales[name]).expand_as(scale))

    @torch.no_grad()
    def show(self) -> None:
        """Copies the weights into the model."""
        for name, value in self.held().items():
            self.model.get_buffer(name).copy_(value)
        self.shown = True

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the model with the weights that the updates have led to."""
        return called_at(self.model, self.held(), args, kwargs)


def _refused_or_root(optimizer: Optimizer) -> bool:
    """Returns whether the scale is the root of the rate."""
    kind = type(optimizer)
    if kind not in (*LINEAR, *SCALE_FREE):
        known = ", ".join(each.__name__ for each in (*LINEAR, *SCALE_FREE))
        raise ConfigError(f"learning rates are learned of {known}; the inner problem's optimizer is {kind.__name__}")
    if any(group.get("weight_decay") for group in optimizer.param_groups):
        raise ConfigError(
            f"weight_decay of {kind.__name__} would shrink displacements instead of weights: add WeightDecay to the "
            "hyper-parameters, frozen by requires_grad_(False) if it is not to be learned"
        )
    return kind in LINEAR
