"""A weight network: weights as a learned function of an example's loss, for any number of examples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bilevel.problems.examples import example_losses
from bilevel.problems.supervised import Criterion, Training, Validation, batch_parts, counterpart
from bilevel.validation import check_choice, check_integer

__all__ = ["LossWeighted", "WeightNetwork"]

FORMS = ("integral", "product")


class WeightNetwork(Validation):
    """The outer problem of Meta-Weight-Net: a function V of an example's loss, the same for all examples.

        min over Θ of F(w*(Θ)),      w*(Θ) = argmin over w of (1/n) Σᵢ U(ℓ(w; xᵢ, yᵢ); Θ) + α/2 ‖w‖²

    F is the trained model's loss on examples that can be trusted (this problem's ``data``). The inner problem is
    :class:`LossWeighted`, which says what U is. Against wrong labels V learns to fall with the loss, against rare
    classes to rise.

    Args:
        module: From losses of shape (b, 1) to logits of the same shape: ``V(ℓ) = σ(module(ℓ))``. Smooth, for U to be
            integrated and differentiated twice. By default one hidden layer of tanh units.
        hidden: Units of the default's hidden layer.
        training: See :class:`~bilevel.problems.Validation`.
        criterion: See :class:`~bilevel.problems.Validation`.
        settings: Those of :class:`~bilevel.Problem`: optimizer, data, ….

    Raises:
        ConfigError: ``hidden`` below 1.

    Cost: 1 forward pass of the model a loss.

    Source: Shu et al., "Meta-Weight-Net: Learning an Explicit Mapping For Sample Weighting", arXiv 1902.07379.

    Example:
        >>> import torch
        >>> from bilevel import Engine, EngineConfig
        >>> x, y = torch.randn(40, 3), torch.randint(0, 2, (40,))
        >>> trusted = torch.randn(10, 3), torch.randint(0, 2, (10,))
        >>> engine = Engine(
        ...     [
        ...         WeightNetwork(data=[trusted], optimizer=lambda params: torch.optim.Adam(params, lr=0.01)),
        ...         LossWeighted(
        ...             nn.Linear(3, 2), data=[(x, y)], optimizer=lambda params: torch.optim.SGD(params, lr=0.5)
        ...         ),
        ...     ],
        ...     EngineConfig(steps=2, progress=False),
        ...     hypergradient="one_step",
        ... )
        >>> result = engine.run()
        >>> engine.problems["weight_network"].weights(torch.linspace(0, 5, 6)).shape
        torch.Size([6])
    """

    def __init__(
        self,
        module: nn.Module | None = None,
        *,
        hidden: int = 100,
        training: str | None = None,
        criterion: Criterion | None = None,
        **settings: Any,
    ) -> None:
        check_integer(type(self).__name__, "hidden", hidden, minimum=1)
        if module is None:
            module = nn.Sequential(nn.Linear(1, hidden), nn.Tanh(), nn.Linear(hidden, 1))
        super().__init__(module, training=training, criterion=criterion, **settings)

    def weights(self, losses: Tensor) -> Tensor:
        """Returns ``V(ℓ)``, each in (0, 1), of the losses' shape and dtype; the module's own dtype may be another."""
        logits: Tensor = self(losses.reshape(-1, 1).to(self.parameters[0].dtype))
        return logits.sigmoid().reshape(losses.shape).to(losses.dtype)


class LossWeighted(Training):
    """The inner problem of Meta-Weight-Net: a model fitted to examples that are weighted by their losses.

    The loss is ``(1/b) Σᵢ U(ℓᵢ; Θ) + weight_decay/2 ‖w‖²`` over a batch ``(inputs, targets)``, with V of the engine's
    :class:`WeightNetwork` in

    - ``form="integral"``: ``U(ℓ) = ∫₀^ℓ V(s) ds``, whose gradient is ``V(ℓᵢ) ∇ℓᵢ``: each example pulls by its weight.
    - ``form="product"``: ``U(ℓ) = V(ℓ) ℓ``, whose gradient is ``(V(ℓᵢ) + ℓᵢ V'(ℓᵢ)) ∇ℓᵢ``. Where V falls faster than
      ``1/ℓ`` this *raises* the loss of an example, without bound.

    The published update is ``Σᵢ V(ℓᵢ) ∇ℓᵢ`` too, from the product with ``V(ℓᵢ.detach())``. There autograd sees the
    right first derivative, and of the Hessian ``V ∇²ℓ + V' ∇ℓ ∇ℓᵀ`` only the first term: every method that takes
    products with it is wrong, by a term that is largest where V is steep. The integral has the same gradient and is a
    loss, so that all its derivatives are what autograd says; :func:`~bilevel.hypergradcheck` agrees. (Weights that are
    divided by their sum over a batch are no gradient of anything.)

    The Hessian is indefinite where V falls steeply, so that conjugate gradients may meet negative curvature:
    ``"one_step"`` is what the paper does, and ``"identity"``, ``"minres"``, ``"unrolled"`` need no definiteness.

    Args:
        module: The model.
        weights: The name of the problem that holds V; None where the engine has one :class:`WeightNetwork` only.
        criterion: ``(outputs, targets, reduction="none") -> one value an example``, from 0 up for the integral; the
            cross-entropy by default.
        form: ``"integral"`` or ``"product"``.
        nodes: Of the Gauss–Legendre rule for the integral, which is exact for polynomials V of degree
            ``2 nodes − 1``. For any number the rule is a loss with exact derivatives; more make its gradient closer to
            ``V(ℓᵢ) ∇ℓᵢ``.
        settings: Those of :class:`~bilevel.problems.Training`: weight_decay (α), optimizer, data, steps, ….

    Raises:
        ConfigError: A negative ``weight_decay``, or no node.
        UnknownNameError: Another form.
        LossError: A criterion that reduces.

    Cost: 1 forward pass of the model a loss, and of V on b examples (``nodes`` times b for the integral).
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        weights: str | None = None,
        form: str = "integral",
        nodes: int = 8,
        **settings: Any,
    ) -> None:
        owner = type(self).__name__
        check_choice(owner, "form", form, FORMS)
        check_integer(owner, "nodes", nodes, minimum=1)
        super().__init__(module, **settings)
        self.weights_name = weights
        self.form = form
        places, shares = np.polynomial.legendre.leggauss(nodes)
        # from [−1, 1] to [0, 1]
        self._places, self._shares = torch.tensor((places + 1) / 2), torch.tensor(shares / 2)

    def weight_network(self) -> WeightNetwork:
        """Returns the outer problem."""
        return counterpart(self, WeightNetwork, self.weights_name)

    def weighted(self, losses: Tensor) -> Tensor:
        """Returns ``U(ℓ)``, of shape (b,)."""
        network = self.weight_network()
        if self.form == "product":
            return network.weights(losses) * losses
        points = losses[:, None] * self._places.to(losses)
        return losses * (network.weights(points) @ self._shares.to(losses))

    def loss(self, batch: Any) -> Tensor | Mapping[str, Any]:
        """Returns the weighted loss on a batch, with the model's outputs."""
        inputs, targets = batch_parts(self.name, batch, "inputs", "targets")
        outputs = self(inputs)
        losses = example_losses(self.name, self.criterion, outputs, targets, len(targets))
        return {"loss": self.weighted(losses).mean() + self.decay(), "outputs": outputs}
