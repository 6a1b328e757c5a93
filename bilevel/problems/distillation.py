"""Dataset distillation: a few synthetic examples on which a model learns what it would from the real ones."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bilevel.errors import ConfigError, DataError, ParameterError
from bilevel.problems.supervised import Training, Validation, counterpart
from bilevel.randomness import generator_devices, preserved
from bilevel.validation import check_integer, check_number
from bilevel.vector import Tensors

__all__ = ["Distillation", "DistilledTraining", "SyntheticSet", "redraw"]

_SURE = 0.9  # what a soft label starts with for its class


class SyntheticSet(nn.Module):
    """Synthetic examples, as parameters.

    Args:
        inputs: Where the inputs start from: n of them, ``(n, *shape)``.
        targets: Their classes, ``(n,)`` integers, or ``(n, *)`` real targets.
        learn_targets: Whether the targets are learned too. Classes become soft labels, softmax of a logit for each
            class, which start at 0.9 for the given one; real targets are parameters as they are.
        num_classes: Of soft labels; one more than the largest class by default.
        learn_rate: Whether a factor of the training loss, 1 at the start, is learned. Where SGD trains, with momentum
            or without, that is a factor of its learning rate. It means nothing to Adam, which normalises, and nothing
            to the solution of the inner problem: implicit methods give it the derivative 0. Use ``unrolled``.

    Raises:
        DataError: No examples, another number of targets than of inputs, inputs that are no real numbers, or classes
            that are not in ``[0, num_classes)``.
    """

    def __init__(
        self,
        inputs: Tensor,
        targets: Tensor,
        *,
        learn_targets: bool = False,
        num_classes: int | None = None,
        learn_rate: bool = False,
    ) -> None:
        super().__init__()
        if not len(inputs) or len(inputs) != len(targets):
            raise DataError(
                f"synthetic examples need as many targets as inputs, and one at least; got {len(inputs)} inputs and "
                f"{len(targets)} targets"
            )
        if not inputs.is_floating_point():
            raise DataError(f"synthetic inputs are learned and must be floating-point numbers, not {inputs.dtype}")
        self.inputs = nn.Parameter(inputs.detach().clone())
        self.soft = learn_targets and not targets.is_floating_point()
        if self.soft:
            targets = _logits(targets, num_classes).to(inputs)
        if learn_targets:
            self.targets: Tensor = nn.Parameter(targets.detach().clone())
        else:
            self.register_buffer("targets", targets.detach().clone())
        self.log_rate = nn.Parameter(inputs.new_zeros(())) if learn_rate else None

    @classmethod
    def sample(
        cls,
        inputs: Tensor,
        targets: Tensor,
        per_class: int,
        *,
        generator: torch.Generator | None = None,
        learn_targets: bool = False,
        num_classes: int | None = None,
        learn_rate: bool = False,
    ) -> SyntheticSet:
        """Returns a set that starts at real examples, drawn without repetition.

        Args:
            inputs: The real examples, ``(N, *shape)``.
            targets: Their classes, ``(N,)`` integers.
            per_class: How many of each class.
            generator: Draws them; torch's default generator where it is None.
            learn_targets: As for the class, with the two below.
            num_classes: Likewise.
            learn_rate: Likewise.

        Raises:
            DataError: A class has fewer examples than ``per_class``.
        """
        check_integer(cls.__name__, "per_class", per_class, minimum=1)
        chosen = []
        for label in targets.unique().tolist():  # type: ignore[no-untyped-call]
            members = (targets == label).nonzero().squeeze(1)
            if len(members) < per_class:
                raise DataError(
                    f"per_class={per_class} synthetic examples are to start at real ones, but class {label} has "
                    f"{len(members)}: lower per_class, or make the set from inputs of your own: SyntheticSet(inputs, …)"
                )
            chosen.append(members[torch.randperm(len(members), generator=generator)[:per_class].to(members.device)])
        found = torch.cat(chosen)
        return cls(
            inputs[found],
            targets[found],
            learn_targets=learn_targets,
            num_classes=num_classes,
            learn_rate=learn_rate,
        )

    def labels(self) -> Tensor:
        """Returns the targets as a criterion wants them: classes, probabilities ``(n, num_classes)``, or numbers."""
        return self.targets.softmax(1) if self.soft else self.targets

    def rate(self) -> Tensor | float:
        """Returns the factor of the training loss."""
        return 1.0 if self.log_rate is None else self.log_rate.exp()

    def examples(self) -> tuple[Tensor, Tensor]:
        """Returns copies of inputs and labels, to train other models on."""
        return self.inputs.detach().clone(), self.labels().detach().clone()


class Distillation(Validation):
    """Learns synthetic examples such that a model trained on them alone does well on real ones.

    With synthetic inputs x, targets y and factor r, all three λ, and the model's parameters w,

        min over λ of F(w*)    with    w* = argmin over w of r (1/n Σᵢ ℓ(w; xᵢ, yᵢ) + α/2 ‖w‖²)

    where F is the loss on batches of real examples. The original method (Wang et al. 2018) differentiates a few
    gradient steps from the model's initial parameters: ``unrolled``, with a :class:`DistilledTraining` that is reset.
    With α > 0 and training to convergence implicit methods apply, whose memory does not grow with the steps.

    Args:
        module: The synthetic examples.
        bounds: Between which the inputs are kept, by clamping them after each update: ``(0.0, 1.0)`` for images.
            Synthetic inputs need not look like real ones, and go anywhere by default.
        settings: Those of :class:`Validation`: ``data`` (batches of real examples), optimizer, training, ….

    Raises:
        ParameterError: ``module`` is no :class:`SyntheticSet`.
        ConfigError: The lower bound is not below the upper one.

    Cost: 1 forward pass of the model over a real batch a loss. Source: arXiv 1811.10959.

    Example:
        >>> import torch
        >>> from bilevel import Engine, EngineConfig
        >>> x = torch.cat([torch.randn(50, 2) - 2, torch.randn(50, 2) + 2])
        >>> y = torch.arange(100) // 50
        >>> adam = lambda params: torch.optim.Adam(params, lr=0.1)
        >>> sgd = lambda params: torch.optim.SGD(params, lr=0.5)
        >>> outer = Distillation(SyntheticSet.sample(x, y, per_class=1), data=[(x, y)], optimizer=adam)
        >>> inner = DistilledTraining(torch.nn.Linear(2, 2), initialize=redraw, optimizer=sgd, steps=5)
        >>> result = Engine([outer, inner], EngineConfig(steps=20, progress=False), "unrolled").run()
        >>> result.losses["distillation"] < 0.1
        True
    """

    module: SyntheticSet

    def __init__(self, module: SyntheticSet, *, bounds: tuple[float, float] | None = None, **settings: Any) -> None:
        super().__init__(module, **settings)
        if not isinstance(module, SyntheticSet):
            raise ParameterError(f"problem {self.name!r} learns a SyntheticSet, not a {type(module).__name__}")
        if bounds is not None:
            low, high = bounds
            check_number(self.name, "bounds[0]", low)
            check_number(self.name, "bounds[1]", high, minimum=low, exclusive=True)
        self.bounds = bounds

    @property
    def projects(self) -> bool:
        """Whether there are bounds."""
        return self.bounds is not None

    def project(self, values: Tensors) -> Tensors:
        """Returns the values with the inputs clamped to their bounds."""
        if self.bounds is None:
            return values
        pairs = zip(self.parameter_names, values, strict=True)
        return tuple(value.clamp(*self.bounds) if name == "inputs" else value for name, value in pairs)


class DistilledTraining(Training):
    """Trains a model on the synthetic examples of a :class:`Distillation`, from its initial parameters each time.

    Args:
        module: The model.
        initialize: Draws new initial values for the module it is given, in place, each time before the training starts
            again, so that the examples serve any model of this architecture and not one: :func:`redraw`, say. None to
            start from the same values always.
        seed: What ``initialize`` draws follows from it and from the number of updates made: the same on all ranks and
            after resuming, whatever else draws random numbers.
        distillation: The name of the outer problem; None where the engine has one :class:`Distillation` only.
        reset: ``"initial"``, the default; None for a model that is trained on and on.
        settings: Those of :class:`Training`: weight_decay (α), criterion, optimizer, steps, …. Batches of ``data``, if
            it is given, are indices of synthetic examples; all of them make one batch otherwise.

    Raises:
        ConfigError: ``initialize`` without a reset.

    Cost: 1 forward pass over the synthetic batch a loss.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        initialize: Callable[[nn.Module], object] | None = None,
        seed: int = 0,
        distillation: str | None = None,
        reset: str | None = "initial",
        **settings: Any,
    ) -> None:
        super().__init__(module, reset=reset, **settings)
        check_integer(self.name, "seed", seed, minimum=0)
        if initialize is not None and reset != "initial":
            raise ConfigError(
                f"problem {self.name!r} draws initial values each time it is reset, and reset={reset!r} does not go to "
                "its own: leave reset out, or initialize"
            )
        self.initialize = initialize
        self.seed = seed
        self.distillation_name = distillation

    def synthetic(self) -> SyntheticSet:
        """Returns the synthetic examples."""
        return counterpart(self, Distillation, self.distillation_name).module

    def loss(self, batch: Any) -> Tensor | Mapping[str, Any]:
        """Returns the regularised loss on the synthetic examples, or on those that a batch of indices names.

        Raises:
            DataError: An index that no synthetic example has.
        """
        synthetic = self.synthetic()
        chosen = slice(None) if batch is None else _indices(batch, len(synthetic.inputs), self.name)
        inputs, targets = synthetic.inputs[chosen], synthetic.labels()[chosen]
        outputs = self(inputs)
        value = self.criterion(outputs, targets) + self.decay()
        return {"loss": synthetic.rate() * value, "outputs": outputs}

    def restart(self) -> None:
        """Puts the parameters where the training starts, to values drawn anew where that is asked for."""
        super().restart()
        if self.initialize is None:
            return
        owned = set(self.parameter_names)
        others = {name: p.detach().clone() for name, p in self.module.named_parameters() if name not in owned}
        here = {id(self): self, **{id(other): other for other in self._siblings.values()}}
        with torch.no_grad(), preserved(generator_devices(p for one in here.values() for p in one.parameters)):
            torch.manual_seed(zlib.crc32(f"{self.seed} {self.num_updates}".encode()))
            self.initialize(self.module)
            for name, parameter in self.module.named_parameters():
                if name in others:
                    parameter.copy_(others[name])


def redraw(module: nn.Module) -> None:
    """Draws a module's parameters anew, as each layer's ``reset_parameters`` does.

    Raises:
        ParameterError: A layer has parameters of its own and no ``reset_parameters``.
    """
    for name, layer in module.named_modules():
        reset = getattr(layer, "reset_parameters", None) or getattr(layer, "_reset_parameters", None)
        if reset is not None:
            reset()
        elif next(layer.parameters(recurse=False), None) is not None:
            raise ParameterError(
                f"{type(layer).__name__} {name!r} has parameters but no reset_parameters(), so that they cannot be "
                "drawn anew: give it one, or draw them by a function of your own"
            )


def _logits(targets: Tensor, num_classes: int | None) -> Tensor:
    count = int(targets.max()) + 1 if num_classes is None else num_classes
    check_integer("SyntheticSet", "num_classes", count, minimum=2)
    if targets.dim() != 1 or int(targets.min()) < 0 or int(targets.max()) >= count:
        raise DataError(
            f"soft labels of {count} classes start at one class an example, in [0, {count}); got a tensor of shape "
            f"{tuple(targets.shape)} with values in [{int(targets.min())}, {int(targets.max())}]"
        )
    chances = torch.full((len(targets), count), (1 - _SURE) / (count - 1), dtype=torch.float64, device=targets.device)
    return chances.scatter(1, targets[:, None].long(), _SURE).log()


def _indices(batch: Any, count: int, name: str) -> Tensor:
    indices: Tensor = torch.as_tensor(batch)
    if indices.is_floating_point() or not indices.numel() or int(indices.min()) < 0 or int(indices.max()) >= count:
        raise DataError(
            f"problem {name!r} takes batches of indices of its {count} synthetic examples, in [0, {count}); got "
            f"{indices.dtype} {tuple(indices.shape)}"
        )
    return indices
