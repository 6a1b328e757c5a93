"""Label correction: what a training example's label should have been, learned from examples whose labels are right."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bilevel.errors import ConfigError, DataError
from bilevel.problems.examples import check_index_range, check_indices, indexed_batch
from bilevel.problems.supervised import Criterion, Training, Validation, counterpart
from bilevel.validation import check_integer, check_number

__all__ = ["Relabelled", "SoftLabels"]


class SoftLabels(Validation):
    """The outer problem of label correction: a distribution over the classes for each training example.

        min over λ of F(w*(λ)),      w*(λ) = argmin over w of (1/n) Σᵢ ℓ(w; xᵢ, softmax(λᵢ)) + α/2 ‖w‖²

    F is the trained model's loss on examples whose labels are right (this problem's ``data``). The inner problem is
    :class:`Relabelled`. At the start every given label has the probability ``confidence``, and the other classes share
    the rest. With the cross-entropy the inner loss is linear in the labels: ``dF/dλᵢ`` is the softmax's derivative of
    ``⟨∂ log p(·|xᵢ)/∂w, q⟩/n``, which is the same whatever the label is: unlike a weight of zero, a label that was
    given up can come back.

    There are more unknowns here than in :class:`~bilevel.problems.ExampleWeights`, by the number of classes: what is
    said there about too few trusted examples holds all the more.

    Args:
        labels: The given labels of the training set, integers of shape (n,).
        num_classes: C.
        confidence: The probability of the given labels at the start, above 1/C and below 1.
        training: See :class:`~bilevel.problems.Validation`.
        criterion: See :class:`~bilevel.problems.Validation`.
        settings: Those of :class:`~bilevel.Problem`: optimizer, data, ….

    Attributes:
        module: Holds λ as ``logits``, of shape (n, C).
        given: The given labels.

    Raises:
        DataError: Labels that are no classes.
        ConfigError: Fewer than two classes, or a ``confidence`` out of its range.

    Cost: 1 forward pass of the model a loss; n C numbers, and the optimiser's state for them.

    Source: learned targets as in Algan and Ulusoy, "Meta Soft Label Generation for Noisy Labels", arXiv 2007.05836; a
    network that makes them is in Zheng et al., "Meta Label Correction for Noisy Label Learning", arXiv 1911.03809.

    Example:
        >>> import torch
        >>> labels = SoftLabels(torch.tensor([0, 2, 1]), 3, confidence=0.8)
        >>> labels.probabilities(torch.tensor([1])).detach()
        tensor([[0.1000, 0.1000, 0.8000]])
        >>> labels.corrected()
        tensor([0, 2, 1])
    """

    given: Tensor

    def __init__(
        self,
        labels: Tensor,
        num_classes: int,
        *,
        confidence: float = 0.9,
        training: str | None = None,
        criterion: Criterion | None = None,
        **settings: Any,
    ) -> None:
        owner = type(self).__name__
        check_integer(owner, "num_classes", num_classes, minimum=2)
        check_number(owner, "confidence", confidence, minimum=1 / num_classes, exclusive=True)
        if confidence >= 1:
            raise ConfigError(f"{owner}.confidence must be a probability below 1, not {confidence!r}")
        given = torch.as_tensor(labels)
        if given.ndim != 1 or given.dtype not in (torch.int64, torch.int32) or not len(given):
            raise DataError(
                f"{owner}.labels must be integers of shape (n,), not {given.dtype} of shape {tuple(given.shape)}"
            )
        if not 0 <= int(given.min()) <= int(given.max()) < num_classes:
            raise DataError(
                f"{owner}.labels must be classes from 0 to {num_classes - 1}, and are from {int(given.min())} to "
                f"{int(given.max())}"
            )
        advantage = torch.tensor(confidence * (num_classes - 1) / (1 - confidence)).log()
        logits = advantage * F.one_hot(given.long(), num_classes)
        super().__init__(nn.ParameterDict({"logits": logits}), training=training, criterion=criterion, **settings)
        self.given = given

    @property
    def num_examples(self) -> int:
        """The number of training examples."""
        return len(self.given)

    def probabilities(self, indices: Tensor | None = None) -> Tensor:
        """Returns the labels of some examples, or of all, of shape (number of them, C).

        Raises:
            DataError: An index for which there is no label.
        """
        logits = self.module.logits
        assert isinstance(logits, Tensor)
        if indices is None:
            return logits.softmax(1)
        check_indices(self.name, indices, self.num_examples)
        return logits[indices].softmax(1)

    def corrected(self) -> Tensor:
        """Returns each example's most probable label, of shape (n,)."""
        return self.probabilities().detach().argmax(1)

    def evaluate(self) -> Mapping[str, float]:
        """Returns the share of labels that changed, and the mean probability that is left to the given ones."""
        given = self.given.to(self.probabilities().device).long()
        kept = self.probabilities().detach().gather(1, given[:, None])
        return {"changed": float((self.corrected() != given).float().mean()), "confidence": float(kept.mean())}


class Relabelled(Training):
    """The inner problem of label correction: a model fitted to the learned labels.

    The loss is ``criterion(model(inputs), labels) + weight_decay/2 ‖w‖²`` on batches ``(inputs, targets, indices)``,
    with the labels of the engine's :class:`SoftLabels`, of shape (b, C), in the place of the batch's targets, which are
    not looked at; :class:`~bilevel.data.Indexed` adds the indices to a data set.

    Args:
        module: The model; with C outputs.
        labels: The name of the problem that holds the labels; None where the engine has one :class:`SoftLabels` only.
        criterion: ``(outputs, probabilities) -> scalar``; the cross-entropy by default.
        settings: Those of :class:`~bilevel.problems.Training`: weight_decay (α), optimizer, data, steps, ….

    Raises:
        ConfigError: A negative ``weight_decay``.
        DataError: Batches without indices, or labels for examples that are not in the data set.

    Cost: 1 forward pass a loss.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        labels: str | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(module, **settings)
        self.labels_name = labels

    def attach(self, siblings: Mapping[str, Any]) -> None:
        """Compares the number of labels with that of the training examples, where it is known."""
        super().attach(siblings)
        outer = self.soft_labels()
        check_index_range(self, outer.name, outer.num_examples, "labels")

    def soft_labels(self) -> SoftLabels:
        """Returns the outer problem."""
        return counterpart(self, SoftLabels, self.labels_name)

    def loss(self, batch: Any) -> Tensor | Mapping[str, Any]:
        """Returns the loss on a batch by its learned labels, with the model's outputs."""
        inputs, _, indices = indexed_batch(self.name, batch)
        outputs = self(inputs)
        value = self.criterion(outputs, self.soft_labels().probabilities(indices))
        return {"loss": value + self.decay(), "outputs": outputs}
