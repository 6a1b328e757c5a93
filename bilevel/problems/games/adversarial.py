"""Training against an adversary that perturbs inputs, with a regulariser that is learned for it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Adam

from bilevel.errors import ConfigError, DataError, GraphError, ParameterError
from bilevel.problems.base import Problem
from bilevel.problems.constraints import Ball, Box, Constrained, Constraint
from bilevel.problems.examples import check_indices
from bilevel.problems.supervised import Criterion, Training, Validation, batch_parts, counterpart
from bilevel.validation import check_choice, check_integer, check_number

__all__ = ["AdversarialTraining", "Perturbation", "RobustValidation", "attack"]

Bounds = tuple[float, float]


class Perturbation(Constrained):
    """The adversary: a perturbation δᵢ of every example of a set that makes a model's loss as large as it can.

        δ*(w) = argmax meanᵢ ℓ(model_w(xᵢ + δᵢ), yᵢ)        subject to  ‖δᵢ‖ ≤ radius,  xᵢ + δᵢ within bounds

    It stands below the model in an engine, and goes on from its last δ: a step or two for each of the model's are
    enough (Shafahi et al., arXiv 1904.12843). By default its steps are signed gradients (Madry et al., arXiv
    1706.06083).

    The model's loss is largest at δ*, so its gradient needs no derivative of δ* (Danskin), but its Hessian does. Where
    δᵢ is in a corner of its box, as all are for a linear model, it does not respond; ``evaluate()["active"]`` says how
    much is. Elsewhere −ℓ need not curve upwards and a solver may find no minimum. With ``norm="inf"`` the method is
    therefore ``identity`` by default: exact for what is in a corner, and a response of order 1/n of the loss's own
    gradient, for n examples, for what is not.

    Args:
        inputs: x, one example a row.
        targets: y.
        radius: How far a perturbation may go.
        norm: ``"inf"`` (the largest change of a feature) or ``"2"``.
        bounds: The smallest and the largest value that a perturbed input may have (``(0, 1)`` for pixels); None for no
            bounds, as with ``norm="2"``.
        victim: Name of the problem that has the model; None where the engine has one :class:`Training` only.
        settings: Those of :class:`Constrained`. ``norm="2"`` needs an optimizer.

    Raises:
        ConfigError: A radius that is not positive, inputs out of bounds, bounds together with ``norm="2"``, inputs in
            float16 without an optimizer.
        DataError: Not as many targets as inputs.

    Memory: one δ for each input. Batches are indices of examples; None (no data) for all of them.
    """

    def __init__(
        self,
        inputs: Tensor,
        targets: Tensor,
        *,
        radius: float,
        norm: str = "inf",
        bounds: Bounds | None = None,
        victim: str | None = None,
        **settings: Any,
    ) -> None:
        if len(inputs) != len(targets) or len(inputs) == 0:
            raise DataError(f"Perturbation: {len(inputs)} inputs and {len(targets)} targets, where as many are needed")
        allowed = _allowed(inputs, radius, norm, bounds)
        if norm == "inf" and inputs.dtype == torch.float16 and "optimizer" not in settings:
            raise ConfigError(
                "Perturbation: steps of signed gradients need squares of gradients, which float16 cannot hold: keep "
                "inputs in float32 or bfloat16 (EngineConfig(precision=...) computes in float16), or pass optimizer="
            )
        if norm == "inf":  # Adam without memory: η sign(g)
            signed = lambda p: Adam(p, lr=radius / 4, betas=(0.0, 0.0), eps=1e-30)  # noqa: E731
            settings = {"optimizer": signed, "hypergradient": "identity", **settings}
        elif settings.get("optimizer") is None:
            raise ConfigError("Perturbation: norm='2' needs optimizer=, such as SGD with steps of the radius's size")
        module = nn.ParameterDict({"delta": torch.zeros_like(inputs)})
        super().__init__(module, constraints=allowed, **settings)
        self.inputs, self.targets, self.victim_name = inputs, targets, victim

    def perturbed(self, indices: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Returns ``x + δ`` and the targets: of all examples, or of those with the given indices.

        Raises:
            DataError: An index that no example has.
        """
        delta = _held(self, "delta")
        inputs, targets = self.inputs.to(delta), self.targets.to(delta.device)
        if indices is None:
            return inputs + delta, targets
        check_indices(self.name, indices, len(inputs))
        return inputs[indices] + delta[indices], targets[indices]

    def loss(self, batch: Any) -> Tensor:
        """Returns the negative mean of the model's losses."""
        victim = counterpart(self, Training, self.victim_name)
        inputs, targets = self.perturbed(batch)
        return -victim.criterion(victim(inputs), targets)


class AdversarialTraining(Training):
    """The model, fitted to clean and perturbed examples with a regulariser that :class:`RobustValidation` learns.

        f(w; λ) = (1 − π) ℓ(x) + π ℓ(x + δ*(w)) + ½ Σ_l exp(ρ_l) ‖w_l‖²,        λ = (logit π, ρ)

    with mean losses ℓ and the sum over the owned parameter tensors; ρ has an entry for every trainable one.

    Args:
        module: The model.
        adversary: Name of the :class:`Perturbation` of its examples.
        validation: Name of the problem that learns the regulariser; None where there is one only.
        settings: Those of :class:`Training`, but ``weight_decay``. Batches are ``(inputs, targets)`` with all examples
            in the order of the perturbation, or ``(inputs, targets, indices)``.

    Raises:
        ConfigError: A ``weight_decay``; a :class:`RobustValidation` of another model (within the loss).

    Cost: 2 forward passes a loss.
    """

    def __init__(
        self, module: nn.Module, *, adversary: str = "adversary", validation: str | None = None, **settings: Any
    ) -> None:
        if "weight_decay" in settings:
            raise ConfigError(
                "AdversarialTraining takes its decay from RobustValidation(decay=...): leave weight_decay out"
            )
        super().__init__(module, **settings)
        self.adversary_name, self.validation_name = adversary, validation
        self._places = {name: place for place, name in enumerate(_trainable(module))}

    def loss(self, batch: Any) -> Mapping[str, Any]:
        """Returns f on a batch, with its parts as metrics."""
        inputs, targets, indices = _parts(self.name, batch)
        upper = counterpart(self, RobustValidation, self.validation_name)
        share = upper.share()
        clean, robust = _losses(self, counterpart(self, Perturbation, self.adversary_name), inputs, targets, indices)
        decay = upper.decay()
        if len(decay) != len(self._places):
            raise ConfigError(
                f"problem {upper.name!r} has a decay for {len(decay)} parameter tensors, and the model of problem "
                f"{self.name!r} has {len(self._places)} that are trainable: make both from the same model"
            )
        weights = dict(self.module.named_parameters())
        squares = [decay[self._places[name]] * weights[name].square().sum() for name in self.parameter_names]
        value = (1 - share) * clean + share * robust + torch.stack(squares).sum() / 2
        return {"loss": value, "clean": clean.detach(), "robust": robust.detach()}


class RobustValidation(Validation):
    """Learns the regulariser of :class:`AdversarialTraining` by how the model does on clean and attacked held-out data.

        F(λ) = (1 − a) ℓ(x') + a ℓ(x' + δ'*(w)),        w = w*(λ)

    with an adversary δ' of its own, which an engine must list before the model: problems of one depth are updated the
    last listed first, and the adversary is to answer the model that it finds. What is learned: the share π of perturbed
    examples in training, and a weight decay ``exp(ρ_l)`` for each parameter tensor. ``params="decay"`` learns the decay
    alone.

    Args:
        model: The model to be trained, for the number of its parameter tensors.
        share: π at the start, between 0 and 1.
        decay: ``exp(ρ_l)`` at the start.
        weight: a: what robustness counts beside accuracy.
        adversary: Name of the :class:`Perturbation` of the validation examples.
        settings: Those of :class:`Validation`.

    Raises:
        ConfigError: A share or a weight that is no share, or a decay that is not positive.
        ParameterError: A model without trainable parameters.
        GraphError: An engine that lists the model before this problem's adversary.

    Example::

        train, held_out = ((torch.rand(8, 64), torch.arange(8)) for _ in range(2))
        adam = lambda p: torch.optim.Adam(p, lr=0.05)
        Engine([
            RobustValidation(model, data=[held_out], optimizer=adam),
            Perturbation(*held_out, radius=0.1, name="validation_adversary", steps=8),
            AdversarialTraining(model, data=[train], optimizer=sgd, steps=20),
            Perturbation(*train, radius=0.1, name="adversary", steps=2),
        ], hypergradient="minres")

    Sources: Zhang et al., "Revisiting and advancing fast adversarial training through the lens of bi-level
    optimization", ICML 2022 (arXiv 2112.12376), for the attack as an inner problem; Pang et al., ICLR 2021 (arXiv
    2010.00467), for how much weight decay matters to it.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        share: float = 0.5,
        decay: float = 1e-3,
        weight: float = 0.5,
        adversary: str = "validation_adversary",
        **settings: Any,
    ) -> None:
        owner = type(self).__name__
        check_number(owner, "decay", decay, minimum=0.0, exclusive=True)
        for field, number in (("share", share), ("weight", weight)):
            check_number(owner, field, number, minimum=0.0)
            if number > 1.0 or (field == "share" and number in (0.0, 1.0)):
                raise ConfigError(f"{owner}.{field} must be between 0 and 1, not {number!r}")
        trainable = list(_trainable(model).values())
        if not trainable:
            raise ParameterError(f"{owner} has a decay for each trainable parameter of the model, which has none")
        like = trainable[0]
        rho = torch.full((len(trainable),), math.log(decay), dtype=like.dtype, device=like.device)
        logit = torch.full((), math.log(share / (1 - share)), dtype=like.dtype, device=like.device)
        super().__init__(nn.ParameterDict({"decay": rho, "share": logit}), **settings)
        self.weight, self.adversary_name = weight, adversary

    def attach(self, siblings: Mapping[str, Problem]) -> None:
        """Compares the order of adversary and model."""
        super().attach(siblings)
        order = list(siblings)
        adversary, training = counterpart(self, Perturbation, self.adversary_name), self.trained()
        if order.index(adversary.name) > order.index(training.name):
            raise GraphError(
                f"list {adversary.name!r} before {training.name!r}: problems of one depth are updated the last listed "
                f"first, and {adversary.name!r} is to answer the model that {self.name!r} judges"
            )

    def share(self) -> Tensor:
        """Returns π."""
        return _held(self, "share").sigmoid()

    def decay(self) -> Tensor:
        """Returns ``exp(ρ)``, one for each parameter tensor of the model."""
        return _held(self, "decay").exp()

    def loss(self, batch: Any) -> Mapping[str, Any]:
        """Returns F on a batch, with its parts as metrics."""
        inputs, targets, indices = _parts(self.name, batch)
        adversary = counterpart(self, Perturbation, self.adversary_name)
        clean, robust = _losses(self.trained(), adversary, inputs, targets, indices)
        return {
            "loss": (1 - self.weight) * clean + self.weight * robust,
            "clean": clean.detach(),
            "robust": robust.detach(),
        }


def attack(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    *,
    radius: float,
    bounds: Bounds | None = None,
    steps: int = 40,
    restarts: int = 1,
    criterion: Criterion = F.cross_entropy,
) -> Tensor:
    """Returns perturbed inputs on which a model does worst, to measure robustness with: projected signed gradients.

    Each restart begins at a random point of the box ``|x' − x| ≤ radius`` and takes steps of ``2.5 radius / steps``
    (Madry et al., arXiv 1706.06083); the worst point of all is kept for each example. The model's parameters get no
    gradients.

    Args:
        model: Returns what the criterion takes.
        inputs: x.
        targets: y.
        radius: Largest change of a feature.
        bounds: Smallest and largest value of a feature.
        steps: Steps of each restart.
        restarts: How often to begin.
        criterion: With ``reduction="none"``, one value an example.

    Raises:
        ConfigError: A number out of range.
    """
    check_integer("attack", "steps", steps, minimum=1)
    check_integer("attack", "restarts", restarts, minimum=1)
    allowed = _allowed(inputs, radius, "inf", bounds)
    worst, largest = inputs.clone(), torch.full((len(inputs),), -math.inf).to(inputs)
    for _ in range(restarts):
        delta = allowed.project((2 * torch.rand_like(inputs) - 1) * radius)
        for step in range(steps + 1):
            moved = (inputs + delta).detach().requires_grad_()
            with torch.enable_grad():
                losses = criterion(model(moved), targets, reduction="none")
                losses = losses.reshape(len(losses), -1).sum(1)
                (slope,) = torch.autograd.grad(losses.sum(), moved)
            higher = losses.detach() > largest
            largest = torch.where(higher, losses.detach(), largest)
            worst[higher] = moved.detach()[higher]
            if step < steps:
                delta = allowed.project(delta + 2.5 * radius / steps * slope.sign())
    return worst


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _held(problem: Problem, name: str) -> Tensor:
    module: Any = problem.module
    value: Tensor = module[name]
    return value


def _parts(name: str, batch: Any) -> tuple[Any, Any, Any]:
    if isinstance(batch, (tuple, list)) and len(batch) == 3:
        inputs, targets, indices = batch
        return inputs, targets, indices
    inputs, targets = batch_parts(name, batch, "inputs", "targets", remedy="or (inputs, targets, indices)")
    return inputs, targets, None


def _losses(
    training: Training, adversary: Perturbation, inputs: Tensor, targets: Tensor, indices: Tensor | None
) -> tuple[Tensor, Tensor]:
    if indices is None and len(inputs) != len(adversary.inputs):
        raise DataError(
            f"problem {adversary.name!r} perturbs {len(adversary.inputs)} examples, and the batch has {len(inputs)}: "
            "give batches (inputs, targets, indices)"
        )
    perturbed, labels = adversary.perturbed(indices)
    return training.criterion(training(inputs), targets), training.criterion(training(perturbed), labels)


def _allowed(inputs: Tensor, radius: float, norm: str, bounds: Bounds | None) -> Constraint:
    check_number("Perturbation", "radius", radius, minimum=0.0, exclusive=True)
    check_choice("Perturbation", "norm", norm, ("inf", "2"))
    if norm == "2":
        if bounds is not None:
            raise ConfigError("Perturbation: bounds go with norm='inf' only, where both together are a box")
        return Ball(radius, dim=tuple(range(1, inputs.dim()))) if inputs.dim() > 1 else Box(-radius, radius)
    if bounds is None:
        return Box(-radius, radius)
    low, high = bounds
    outside = int(((inputs < low) | (inputs > high)).sum())
    if outside:
        raise ConfigError(
            f"Perturbation: {outside} elements of the inputs are out of bounds {bounds}: scale the inputs"
        )
    return Box((low - inputs).clamp_min(-radius), (high - inputs).clamp_max(radius))
