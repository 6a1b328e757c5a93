"""Coresets: the few examples of a data set that a model needs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from bilevel.errors import ConfigError
from bilevel.problems.examples import check_index_range, check_indices, example_losses, indexed_batch
from bilevel.problems.supervised import Training, Validation, counterpart
from bilevel.validation import check_integer, check_number
from bilevel.vector import Tensors

__all__ = ["Coreset", "CoresetTraining", "project_capped_simplex"]


class Coreset(Validation):
    """Learns which examples of a training set to keep, under a budget, such that a model trained on them does well.

    With a weight sᵢ for each of n examples, and the model's parameters w,

        min over s of F(w*)   subject to   0 ≤ s ≤ 1,  Σ s = k      with      w* = argmin over w of f(w, s)
        f(w, s) = 1/k Σᵢ sᵢ ℓᵢ(w) + α/2 ‖w‖²

    where F is the loss on validation batches. After each update s is projected onto its constraints, which makes most
    weights exactly 0 or 1; an example of weight 0 comes back where its gradient says so. This relaxes the choice of k
    examples; the cardinality-constrained problem itself is what Borsos et al. (2020) solve greedily. Between the
    weights found and the :meth:`selected` examples at equal weights there may be a gap: train on the latter to see it.

    Args:
        num_examples: n, of the training set.
        budget: k, in (0, n]; need not be whole.
        settings: Those of :class:`Validation`: ``data``, optimizer, training, …. Weights start at ``k / n``.

    Raises:
        ConfigError: A budget outside (0, n].

    Cost: 1 forward pass of the model a loss; 60 sums over the weights an update. Source: arXiv 2006.03875.

    Example:
        >>> import torch, torch.nn.functional as F
        >>> from bilevel import Engine, EngineConfig
        >>> x = torch.tensor([[1.0], [1.0], [-1.0], [-1.0]])
        >>> y = torch.tensor([[2.0], [-3.0], [-2.0], [5.0]])  # the even ones follow y = 2 x
        >>> sgd = lambda params: torch.optim.SGD(params, lr=0.3)
        >>> outer = Coreset(4, budget=2, data=[(x[:1], y[:1])], optimizer=sgd)
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> losses = lambda outputs, targets, reduction="mean": F.mse_loss(outputs, targets, reduction=reduction)
        >>> data = [(x, y, torch.arange(4))]
        >>> inner = CoresetTraining(model, criterion=losses, optimizer=sgd, data=data, steps=20)
        >>> result = Engine([outer, inner], EngineConfig(steps=30, progress=False), "conjugate_gradient").run()
        >>> outer.selected().tolist()
        [0, 2]
    """

    def __init__(self, num_examples: int, *, budget: float, **settings: Any) -> None:
        check_integer("Coreset", "num_examples", num_examples, minimum=1)
        check_number("Coreset", "budget", budget, minimum=0.0, exclusive=True)
        if budget > num_examples:
            raise ConfigError(
                f"Coreset.budget must be in (0, n], where n = {num_examples} is the number of examples, not {budget!r}"
            )
        weights = torch.full((num_examples,), budget / num_examples)
        super().__init__(nn.ParameterDict({"weights": nn.Parameter(weights)}), **settings)
        self.budget = float(budget)

    def weights(self, indices: Tensor | None = None) -> Tensor:
        """Returns the weights of the examples with these indices; of all by default.

        Raises:
            DataError: An index that no example has.
        """
        found = cast("Tensor", self.module.weights)
        if indices is None:
            return found
        check_indices(self.name, indices, len(found))
        return found[indices.to(found.device)]

    def selected(self, count: int | None = None) -> Tensor:
        """Returns the indices, in order, of the examples with the largest weights.

        Args:
            count: How many; the budget, rounded, by default.

        Raises:
            ConfigError: Fewer than 1 or more than there are.
        """
        weights = self.weights().detach()
        number = max(1, round(self.budget)) if count is None else count
        if not 1 <= number <= len(weights):
            raise ConfigError(f"selected() takes 1 to {len(weights)} examples, not {number}")
        return weights.topk(number).indices.sort().values

    def project(self, values: Tensors) -> Tensors:
        """Returns the nearest weights in [0, 1] that sum to the budget."""
        (weights,) = values
        return (project_capped_simplex(weights, self.budget),)

    def evaluate(self) -> Mapping[str, float]:
        """Returns how many examples have a weight above 0, and how many below 1 of these."""
        weights = self.weights()
        return {
            "kept": float((weights > 0).sum()),
            "fractional": float(((weights > 0) & (weights < 1)).sum()),
        }


class CoresetTraining(Training):
    """Trains a model on the examples as a :class:`Coreset` weighs them.

    Batches are ``(inputs, targets, indices)``. A batch of b of the n examples gives ``n/k · 1/b Σ sᵢ ℓᵢ + α/2 ‖w‖²``,
    whose mean over uniformly drawn batches is f.

    Args:
        module: The model.
        coreset: The name of the outer problem; None where the engine has one :class:`Coreset` only.
        settings: Those of :class:`Training`: weight_decay (α), optimizer, data, steps, …; ``criterion(outputs, targets,
            reduction="none")`` gives one value an example, the cross-entropy by default.

    Raises:
        DataError: Weights for examples that are not in the data set, where its size is known.

    Cost: 1 forward pass a loss.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        coreset: str | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(module, **settings)
        self.coreset_name = coreset

    def attach(self, siblings: Mapping[str, Any]) -> None:
        """Compares the number of weights with that of the training examples, where it is known."""
        super().attach(siblings)
        outer = self.coreset()
        check_index_range(self, outer.name, len(outer.weights()), "weights")

    def coreset(self) -> Coreset:
        """Returns the outer problem."""
        return counterpart(self, Coreset, self.coreset_name)

    def loss(self, batch: Any) -> Tensor | Mapping[str, Any]:
        """Returns the weighted loss on a batch.

        Raises:
            DataError: A batch without indices; an index of an example that has no weight.
            LossError: A criterion that does not give values for each example.
        """
        inputs, targets, indices = indexed_batch(self.name, batch)
        coreset = self.coreset()
        outputs = self(inputs)
        each = example_losses(self.name, self.criterion, outputs, targets, len(indices))
        shares = coreset.weights(indices) * (len(coreset.weights()) / coreset.budget)
        value = (shares.to(each) * each).mean()
        return {"loss": value + self.decay(), "outputs": outputs}


def project_capped_simplex(values: Tensor, total: float) -> Tensor:
    """Returns the point of ``{0 ≤ s ≤ 1, Σ s = total}`` that is nearest to a vector: ``min(max(v − τ, 0), 1)``.

    τ is found by bisection; it is where ``Σ min(max(v − τ, 0), 1)``, which falls with τ, is the total. On the way back
    ``dτ`` is the mean of ``dv`` over the entries strictly between 0 and 1.

    Args:
        values: v, ``(n,)``.
        total: In (0, n].
    """
    v = values.detach().double()
    low, high = v.min() - 1, v.max()
    for _ in range(60):
        middle = (low + high) / 2
        above = (v - middle).clamp(0, 1).sum() > total
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    shift = (low + high) / 2
    free = ((v > shift) & (v < shift + 1)).to(values)
    # Its value is the shift, its derivative that of the shift which keeps the sum.
    mean = (free * values).sum() / free.sum().clamp(min=1)
    return (values - (shift.to(values) + mean - mean.detach())).clamp(0, 1)
