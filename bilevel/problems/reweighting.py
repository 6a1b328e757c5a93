"""Per-example weights: how far each training example is to be trusted, learned from examples that are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bilevel.errors import ConfigError
from bilevel.problems.examples import check_index_range, check_indices, example_losses, indexed_batch
from bilevel.problems.supervised import Criterion, Training, Validation, counterpart
from bilevel.validation import check_choice, check_integer, check_number

__all__ = ["ExampleWeights", "Reweighted"]

FORMS = ("sigmoid", "softmax")


class ExampleWeights(Validation):
    """The outer problem of hyper-cleaning: one weight for each training example.

        min over λ of F(w*(λ)),      w*(λ) = argmin over w of (1/n) Σᵢ sᵢ(λ) ℓ(w; xᵢ, yᵢ) + α/2 ‖w‖²

    F is the trained model's loss on examples that can be trusted (this problem's ``data``), the weights are
    ``sᵢ = σ(λᵢ)``, each in (0, 1), or ``s = n softmax(λ)``, which have the mean 1. The inner problem is
    :class:`Reweighted`. The hypergradient is ``dF/dλᵢ = −(1/n) ∂sᵢ/∂λᵢ ⟨∇ℓᵢ, q⟩`` with ``q = H⁻¹ ∂F/∂w``: an example
    gains weight where a step on it alone would lower F.

    With more weights than trusted examples, F can be fitted by choosing among wrong examples too: watch a part of the
    trusted examples that F does not see, and stop when its loss rises.

    Args:
        num_examples: n, the size of the training set.
        form: ``"sigmoid"`` or ``"softmax"``.
        initial: Every weight at the start, between 0 and 1, for ``"sigmoid"``. Where most examples are expected to be
            wrong, a small one lets them earn their weight.
        training: See :class:`~bilevel.problems.Validation`.
        criterion: See :class:`~bilevel.problems.Validation`.
        settings: Those of :class:`~bilevel.Problem`: optimizer, data, ….

    Attributes:
        module: Holds λ as ``logits``, of shape (n,).

    Raises:
        ConfigError: ``num_examples`` below 1, or an ``initial`` that is no weight.
        UnknownNameError: Another form.

    Cost: 1 forward pass of the model a loss; n numbers, and the optimiser's state for them.

    Source: Franceschi et al., "Forward and Reverse Gradient-Based Hyperparameter Optimization", arXiv 1703.01785,
    section 5.1.

    Example:
        >>> import torch
        >>> from bilevel import Engine, EngineConfig
        >>> x, y = torch.randn(40, 3), torch.randint(0, 2, (40,))
        >>> trusted = torch.randn(10, 3), torch.randint(0, 2, (10,))
        >>> engine = Engine(
        ...     [
        ...         ExampleWeights(40, data=[trusted], optimizer=lambda params: torch.optim.Adam(params, lr=0.1)),
        ...         Reweighted(
        ...             nn.Linear(3, 2),
        ...             weight_decay=0.01,
        ...             data=[(x, y, torch.arange(40))],
        ...             optimizer=lambda params: torch.optim.SGD(params, lr=0.5),
        ...             steps=5,
        ...         ),
        ...     ],
        ...     EngineConfig(steps=2, progress=False),
        ...     hypergradient="identity",
        ... )
        >>> result = engine.run()
        >>> engine.problems["example_weights"].weights().shape
        torch.Size([40])
    """

    def __init__(
        self,
        num_examples: int,
        *,
        form: str = "sigmoid",
        initial: float = 0.5,
        training: str | None = None,
        criterion: Criterion | None = None,
        **settings: Any,
    ) -> None:
        owner = type(self).__name__
        check_integer(owner, "num_examples", num_examples, minimum=1)
        check_choice(owner, "form", form, FORMS)
        check_number(owner, "initial", initial, minimum=0.0, exclusive=True)
        if initial >= 1:
            raise ConfigError(f"{owner}.initial must be a weight between 0 and 1, not {initial!r}")
        if form == "softmax" and initial != 0.5:
            raise ConfigError(f"{owner}: weights of the form 'softmax' have the mean 1: drop initial={initial!r}")
        logits = torch.full((num_examples,), initial).logit()
        super().__init__(nn.ParameterDict({"logits": logits}), training=training, criterion=criterion, **settings)
        self.num_examples = num_examples
        self.form = form

    def weights(self, indices: Tensor | None = None) -> Tensor:
        """Returns the weights of some examples, or of all, of shape (number of them,).

        Raises:
            DataError: An index for which there is no weight.
        """
        if indices is not None:
            check_indices(self.name, indices, self.num_examples)
        logits = self.module.logits
        assert isinstance(logits, Tensor)
        if self.form == "softmax":
            weights = self.num_examples * logits.softmax(0)
            return weights if indices is None else weights[indices]
        return (logits if indices is None else logits[indices]).sigmoid()

    def evaluate(self) -> Mapping[str, float]:
        """Returns the mean weight, and how many examples of equal weight would vary as little: ``(Σ s)² / Σ s²``."""
        weights = self.weights().detach()
        return {
            "mean_weight": float(weights.mean()),
            "effective_examples": float(weights.sum().square() / weights.square().sum()),
        }


class Reweighted(Training):
    """The inner problem of hyper-cleaning: a model fitted to examples by their weights.

    The loss is ``(1/b) Σᵢ sᵢ ℓᵢ + weight_decay/2 ‖w‖²`` over a batch ``(inputs, targets, indices)`` of b examples, with
    the weights of the engine's :class:`ExampleWeights`; :class:`~bilevel.data.Indexed` adds the indices to a data set.
    It is divided by b, not by the sum of the weights, so that batches are unbiased.

    Args:
        module: The model.
        weights: The name of the problem that holds the weights; None where the engine has one
            :class:`ExampleWeights` only.
        criterion: ``(outputs, targets, reduction="none") -> one value an example``; the cross-entropy by default. Where
            it returns more (tokens, pixels), their mean is the example's loss.
        settings: Those of :class:`~bilevel.problems.Training`: weight_decay (α), optimizer, data, steps, ….

    Raises:
        ConfigError: A negative ``weight_decay``.
        DataError: Batches without indices, or weights for examples that are not in the data set.
        LossError: A criterion that reduces.

    Cost: 1 forward pass a loss.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        weights: str | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(module, **settings)
        self.weights_name = weights

    def attach(self, siblings: Mapping[str, Any]) -> None:
        """Compares the number of weights with that of the training examples, where it is known."""
        super().attach(siblings)
        outer = self.example_weights()
        check_index_range(self, outer.name, outer.num_examples, "weights")

    def example_weights(self) -> ExampleWeights:
        """Returns the outer problem."""
        return counterpart(self, ExampleWeights, self.weights_name)

    def loss(self, batch: Any) -> Tensor | Mapping[str, Any]:
        """Returns the weighted loss on a batch, with the model's outputs."""
        inputs, targets, indices = indexed_batch(self.name, batch)
        outputs = self(inputs)
        losses = example_losses(self.name, self.criterion, outputs, targets, len(indices))
        weights = self.example_weights().weights(indices)
        return {"loss": (weights * losses).mean() + self.decay(), "outputs": outputs}
