"""Few-shot learning whose classifier starts from the prototypes of the classes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from bilevel.data.episodes import TaskBatch
from bilevel.errors import DataError, ParameterError
from bilevel.problems.few_shot.learning import MetaLearner

__all__ = ["PrototypeMetaLearner"]


class PrototypeMetaLearner(MetaLearner):
    """Few-shot learning whose classifier starts from the classes' mean features (ProtoMAML).

    With the features φ of the network below its head, and ``c_k`` their mean over the support examples of class k, ::

        W_k = 2 c_k,    b_k = −‖c_k‖²,

    so that the head starts as the classifier by squared distance to the prototypes, and is adapted from there.
    Prototypes are computed at λ before adaptation and depend on it, also where a derivative is taken. The head's own
    values are unused, and not owned. Source: Triantafillou et al., ICLR 2020 (arXiv 1903.03096, section 3).

    Args:
        network: The network; it must end with the head.
        head: The name of the head in the network, a linear layer with bias: as many outputs as a task has classes.
        settings: Those of :class:`MetaLearner`; ``params`` takes all but the head by default.

    Raises:
        ParameterError: No such layer, or another kind.
        DataError: Later, a class without support examples.

    Cost: 1 more forward pass of the support sets, in this loss and in that of :class:`Adaptation`.
    """

    def __init__(self, network: nn.Module, *, head: str, **settings: Any) -> None:
        linear = {name: part for name, part in network.named_modules() if isinstance(part, nn.Linear)}
        linear = {name: part for name, part in linear.items() if "bias" in dict(part.named_parameters())}
        if head not in linear:
            known = ", ".join(map(repr, linear))
            raise ParameterError(
                f"head must name a linear layer with a bias, not {head!r}; the network has: {known or 'none'}"
            )
        self._weight, self._bias = (f"{head}.{part}" if head else part for part in ("weight", "bias"))
        self._sizes = linear[head].out_features, linear[head].in_features
        if not isinstance(settings.get("optimizer"), Optimizer):  # which owns what it holds
            settings.setdefault("params", self._is_none_of_ihe_head)
        super().__init__(network, **settings)

    def _is_none_of_ihe_head(self, name: str, parameter: nn.Parameter) -> bool:
        return name.removeprefix("network.") not in (self._weight, self._bias)

    def initial_values(self, tasks: TaskBatch) -> Mapping[str, Tensor]:
        """See :meth:`MetaLearner.initial_values`: the head's parameters are those of the prototypes."""
        values = dict(super().initial_values(tasks))
        prototypes = self.prototypes(values, tasks)
        return {**values, self._weight: 2 * prototypes, self._bias: -prototypes.square().sum(-1)}

    def prototypes(self, values: Mapping[str, Tensor], tasks: TaskBatch) -> Tensor:
        """Returns the mean features of every class, ``(M, classes, features)``.

        Args:
            values: The network's parameters.
            tasks: The batch.
        """
        classes, size = self._sizes
        weight = values[self._weight]
        # A head whose matrix is the identity passes the features through.
        bare = {
            **values,
            self._weight: weight.new_zeros(size, size).fill_diagonal_(1.0),
            self._bias: weight.new_zeros(size),
        }
        features = self.adaptation().outputs(bare, tasks.support_inputs)
        member = F.one_hot(tasks.support_targets, classes).to(features.dtype)
        counts = member.sum(1)
        if not bool((counts > 0).all()):
            raise DataError(
                f"problem {self.name!r}: the head has {classes} outputs, and a task has no support example for one of "
                "them: give the head as many outputs as a task has classes"
            )
        return member.transpose(1, 2) @ features / counts.unsqueeze(-1)
