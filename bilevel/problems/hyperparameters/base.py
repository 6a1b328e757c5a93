"""What every kind of hyper-parameter promises: where it enters the training loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

__all__ = ["Hyperparameter", "Value"]

Value = Tensor | Mapping[str, Tensor]


class Hyperparameter(nn.Module):
    """One kind of hyper-parameter, and where it enters the training loss.

    A subclass holds what is learned as parameters, in a form without constraints, and overrides one of the hooks (or
    several): :meth:`inputs`, :meth:`targets`, :meth:`losses`, :meth:`penalty`; and :meth:`value`, for people to read.
    With ``part.requires_grad_(False)`` it applies as it is and is not learned.

    Example::

        class Temperature(Hyperparameter):          # a penalty of one's own
            def __init__(self):
                super().__init__()
                self.log = nn.Parameter(torch.zeros(()))

            def penalty(self, weights):
                return self.log.exp() * weights["head.weight"].abs().pow(1.5).sum()

            def value(self):
                return self.log.exp()
    """

    hooks: ClassVar[tuple[str, ...]] = ("inputs", "targets", "losses", "penalty")
    """Where it may enter the training loss."""
    inner: ClassVar[str] = "Tuned"
    """Class of the inner problem that it needs, by name."""
    tasks: tuple[str, ...] | None = None
    """The tasks that it is for, where the criterion is :class:`Tasks`; None for all."""

    def inputs(self, inputs: Any) -> Any:
        """Returns what the model is trained on, from a batch's inputs: augmentation."""
        return inputs

    def targets(self, targets: Any, outputs: Any, task: str) -> Any:
        """Returns what the outputs are compared with; ``task`` is ``""`` unless the criterion is :class:`Tasks`."""
        return targets

    def losses(self, losses: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Returns the losses by task, whose sum is the training loss, before penalties."""
        return losses

    def penalty(self, weights: Mapping[str, Tensor]) -> Tensor | float:
        """Returns what is added to the training loss, from the model's trainable parameters by name."""
        return 0.0

    def enters(self) -> bool:
        """Whether it enters at all: one of the hooks is overridden."""
        return any(getattr(type(self), hook) is not getattr(Hyperparameter, hook) for hook in self.hooks)

    def value(self) -> Value:
        """Returns the hyper-parameters as people speak of them: a tensor, or several by name."""
        return dict(self.named_parameters())

    def project(self, values: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Returns the nearest admissible values of the parameters, by name, after an update; see `Problem.project`."""
        return values
