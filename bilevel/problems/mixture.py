"""Mixtures: how much of each source of data to train on, so that a model does well on what it is for."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, Dataset, Sampler

from bilevel.data.indexed import View
from bilevel.data.overlap import DrawsAll
from bilevel.errors import ConfigError, DataError
from bilevel.problems.examples import per_example
from bilevel.problems.supervised import Training, Validation, batch_parts, counterpart
from bilevel.validation import check_integer, check_number

__all__ = ["BalancedBatches", "DomainWeights", "Mixture", "Sources"]


class Sources(View):
    """Several named data sets as one, whose examples say where they come from: ``(inputs, targets, source)``.

    Args:
        datasets: Map-style data sets of ``(inputs, targets)``, by the sources' names, in the order of their numbers.

    Raises:
        ConfigError: Fewer than two sources.
        DataError: A source without examples.
    """

    def __init__(self, datasets: Mapping[str, Dataset[Any]]) -> None:
        _check_names(tuple(datasets))
        sets: Mapping[str, Any] = datasets
        empty = [name for name, one in sets.items() if not len(one)]
        if empty:
            raise DataError(f"sources without examples: {', '.join(empty)}. Leave them out")
        self.datasets = dict(sets)
        self.dataset = ConcatDataset(sets.values())
        self.names = tuple(sets)
        self.sizes = {name: len(one) for name, one in sets.items()}
        """Examples of each source."""
        sizes = torch.tensor(list(self.sizes.values()))
        self.ids = torch.arange(len(sizes)).repeat_interleave(sizes)
        """The source of each example."""
        self._first = [0, *sizes.cumsum(0).tolist()]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> tuple[Any, Any, int]:
        source = int(self.ids[index])
        inputs, targets = self.datasets[self.names[source]][index % len(self) - self._first[source]]
        return inputs, targets, source

    def rates(self) -> dict[str, float]:
        """Returns the share of each source among the examples: its rate in batches that are drawn uniformly."""
        return {name: size / len(self) for name, size in self.sizes.items()}

    def example_weights(self, proportions: Mapping[str, float]) -> Tensor:
        """Returns a weight for each example by which sources are drawn in given proportions.

        For ``torch.utils.data.WeightedRandomSampler``, in a training after the search.

        Args:
            proportions: By the sources' names, as :meth:`DomainWeights.proportions` returns them.

        Raises:
            ConfigError: Other sources than these, or proportions that are no numbers above or at 0.
        """
        shares = _by_name(proportions, self.names, "proportions")
        return torch.tensor(shares, dtype=torch.float64)[self.ids] / torch.tensor(list(self.sizes.values()))[self.ids]


class BalancedBatches(Sampler[list[int]], DrawsAll):
    """Batches with the same number of examples of every source, for ``DataLoader(…, batch_sampler=…)``.

    In an epoch the largest source is seen once; smaller ones begin again, in a new order, as often as needed. A large
    batch costs time and no bias: a source that is in each of them has its mean loss estimated by each.

    Args:
        ids: The source of each example: ``Sources.ids``.
        per_source: Examples of every source in a batch.
        generator: Draws the order; torch's default generator where it is None. Within an engine both are seeded and
            restored with the position in the data.

    Raises:
        ConfigError: Fewer than two sources, or ``per_source`` below 1.
        DataError: A source in ``range(max(ids) + 1)`` without examples.
    """

    def __init__(self, ids: Tensor | Sequence[int], per_source: int, generator: torch.Generator | None = None) -> None:
        check_integer("BalancedBatches", "per_source", per_source, minimum=1)
        known = torch.as_tensor(ids)
        count = int(known.max()) + 1 if len(known) else 0
        if count < 2:
            raise ConfigError(f"a mixture is of two sources or more; the examples' source numbers are of {count}")
        self._members = [(known == source).nonzero().squeeze(1) for source in range(count)]
        empty = [source for source, members in enumerate(self._members) if not len(members)]
        if empty:
            raise DataError(f"sources {empty} of {count} have no examples, and every batch is to hold some of each")
        self.per_source = per_source
        self.generator = generator

    def __len__(self) -> int:
        return math.ceil(max(map(len, self._members)) / self.per_source)

    def __iter__(self) -> Iterator[list[int]]:
        streams = [self._endless(members) for members in self._members]
        for _ in range(len(self)):
            yield [next(stream) for stream in streams for _ in range(self.per_source)]

    def _endless(self, members: Tensor) -> Iterator[int]:
        while True:
            yield from members[torch.randperm(len(members), generator=self.generator)].tolist()


class DomainWeights(Validation):
    """Learns the proportions in which to mix k sources of training data.

    With π = softmax(λ / τ), the mean loss ℓ_d of source d, and the model's parameters w,

        min over λ of F(w*) + β KL(π ‖ uniform)      with      w* = argmin over w of Σ_d π_d ℓ_d(w)

    where F is the loss on batches of what the model is for. The hypergradient compares sources by one number each,
    ``c_d = −⟨q, ∇ℓ_d⟩`` with ``H q = ∂F/∂w``: how much more of d would change F. It is ``π_d (c_d − Σ_e π_e c_e) / τ``.

    DoReMi (arXiv 2305.10429) learns weights without a target: those of the source on which a model is worst, beside a
    reference model trained before (excess loss), so that no source is left behind. Here a validation set says what is
    useful, no reference model is needed, and a source that does not help goes to 0. With ``identity`` and one inner
    step it is what DoGE (arXiv 2310.15393) does.

    Args:
        sources: The sources' names, in the order of their numbers, or how many there are.
        temperature: τ; the larger, the slower the weights move away from uniform ones.
        uniformity: β, in the units of the loss: keeps sources that make no difference near each other.
        settings: Those of :class:`Validation`: ``data`` (the target's batches), optimizer, criterion, training, ….

    Raises:
        ConfigError: Fewer than two sources, a name twice, a temperature that is not above 0, a negative β.

    Cost: 1 forward pass of the model a loss.

    Example:
        >>> import torch, torch.nn.functional as F
        >>> from bilevel import Engine, EngineConfig
        >>> x, slopes = torch.randn(90, 1), torch.tensor([2.0, -1.0, 0.0]).repeat(30)  # three sources, in turn
        >>> adam = lambda params: torch.optim.Adam(params, lr=0.3)
        >>> sgd = lambda params: torch.optim.SGD(params, lr=0.1)
        >>> weights = DomainWeights(["double", "minus", "zero"], data=[(x, 2 * x)], optimizer=adam)
        >>> data = [(x, slopes[:, None] * x, torch.arange(3).repeat(30))]
        >>> model = torch.nn.Linear(1, 1)
        >>> mixture = Mixture(model, criterion=F.mse_loss, data=data, optimizer=sgd, steps=10)
        >>> result = Engine([weights, mixture], EngineConfig(steps=30, progress=False), "conjugate_gradient").run()
        >>> {name: round(share, 1) for name, share in weights.proportions().items()}
        {'double': 1.0, 'minus': 0.0, 'zero': 0.0}
    """

    def __init__(
        self, sources: Sequence[str] | int, *, temperature: float = 1.0, uniformity: float = 0.0, **settings: Any
    ) -> None:
        if isinstance(sources, int):
            check_integer("DomainWeights", "sources", sources, minimum=2)
        names = tuple(map(str, range(sources))) if isinstance(sources, int) else tuple(sources)
        _check_names(names)
        check_number("DomainWeights", "temperature", temperature, minimum=0.0, exclusive=True)
        check_number("DomainWeights", "uniformity", uniformity, minimum=0.0)
        super().__init__(nn.ParameterDict({"logits": nn.Parameter(torch.zeros(len(names)))}), **settings)
        self.names = names
        self.temperature = temperature
        self.uniformity = uniformity

    def weights(self) -> Tensor:
        """Returns π, ``(k,)``."""
        return self._scores().softmax(0)

    def proportions(self) -> dict[str, float]:
        """Returns π by the sources' names: sampling rates for a training after the search."""
        return dict(zip(self.names, self.weights().detach().tolist(), strict=True))

    def loss(self, batch: Any) -> Tensor | Mapping[str, Any]:
        """Returns the trained model's loss on a batch of the target, and the penalty."""
        inputs, targets = batch_parts(self.name, batch, "inputs", "targets")
        training = self.trained()
        value = (self.criterion or training.criterion)(training(inputs), targets)
        if self.uniformity:
            logs = self._scores().log_softmax(0)
            value = value + self.uniformity * ((logs.exp() * logs).sum() + math.log(len(self.names)))
        return value

    def evaluate(self) -> Mapping[str, float]:
        """Returns the proportions."""
        return self.proportions()

    def _scores(self) -> Tensor:
        return cast("Tensor", self.module.logits) / self.temperature


class Mixture(Training):
    """Trains a model on several sources, weighed as :class:`DomainWeights` says: ``Σ_d π_d ℓ_d(w) + α/2 ‖w‖²``.

    Batches are ``(inputs, targets, sources)``, with the number of its source for each example. How ℓ_d is taken from a
    batch of b examples depends on how they come:

    - every batch holds examples of every source (:class:`BalancedBatches`): the mean over those of source d. A batch
      without one is an error, for leaving the source out would weigh it less than π says.
    - examples are drawn at known ``rates`` r, whichever sources a batch then holds: ``1/b Σ ℓᵢ / r_d`` over those of d,
      whose mean over batches is ℓ_d, at the price of a larger variance.

    Args:
        module: The model.
        rates: At which the sources' examples come: by name, or in the order of their numbers. ``Sources.rates()`` for a
            shuffled loader.
        weights: The name of the outer problem; None where the engine has one :class:`DomainWeights` only.
        settings: Those of :class:`Training`: weight_decay (α), optimizer, data, steps, …; ``criterion(outputs, targets,
            reduction="none")`` gives one value an example, or several, of which the mean is taken: ``(b,)``, or
            ``(b, length)`` for the tokens of texts. With padding, give one of your own that returns each text's mean.
            The cross-entropy by default.

    Raises:
        ConfigError: Rates that are not above 0 or do not sum to 1.

    Cost: 1 forward pass a loss.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        rates: Mapping[str, float] | Sequence[float] | None = None,
        weights: str | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(module, **settings)
        self.rates = rates
        self.weights_name = weights
        if rates is not None:
            values = list(rates.values()) if isinstance(rates, Mapping) else list(rates)
            for place, rate in enumerate(values):
                check_number(self.name, f"rates[{place}]", rate, minimum=0.0, exclusive=True)
            if abs(sum(values) - 1) > 1e-6:
                raise ConfigError(f"{self.name}.rates must sum to 1, not to {sum(values):g}: {rates}")

    def loss(self, batch: Any) -> Tensor | Mapping[str, Any]:
        """Returns the weighed loss on a batch.

        Raises:
            DataError: A source's number that has no weight, or a source that is missing in the batch where no rates
                are given.
            LossError: A criterion that does not give values for each example.
        """
        remedy = "wrap the data sets in bilevel.problems.Sources, which adds the sources' numbers"
        inputs, targets, sources = batch_parts(self.name, batch, "inputs", "targets", "sources", remedy=remedy)
        outputs = self(inputs)
        losses = self.source_losses(self.criterion(outputs, targets, reduction="none"), sources)
        weights = counterpart(self, DomainWeights, self.weights_name).weights()
        value = (weights.to(losses) * losses).sum()
        return {"loss": value + self.decay(), "outputs": outputs}

    def source_losses(self, losses: Tensor, sources: Tensor) -> Tensor:
        """Returns each source's mean loss, ``(k,)``, from the values of a batch, ``(b, *)``; raises as :meth:`loss`."""
        names = counterpart(self, DomainWeights, self.weights_name).names
        _check_ids(self.name, sources, names)
        each = per_example(self.name, losses, len(sources))
        sums = each.new_zeros(len(names)).index_add(0, sources, each)
        if self.rates is not None:
            shares = _by_name(self.rates, names, f"{self.name}.rates")
            return sums / (len(each) * each.new_tensor(shares))
        counts = sources.bincount(minlength=len(names))
        if int(counts.min()) == 0:
            missing = [name for name, count in zip(names, counts.tolist(), strict=True) if not count]
            raise DataError(
                f"a batch of problem {self.name!r} has no example of {', '.join(missing)}, whose loss it would leave "
                "out: take batches with all sources (batch_sampler=BalancedBatches(sources.ids, per_source=…)), or say "
                "at which rates examples come (rates=sources.rates() for a shuffled loader)"
            )
        return sums / counts


def _check_names(names: Sequence[str]) -> None:
    if len(names) < 2:
        raise ConfigError(f"a mixture is of two sources or more; got {', '.join(names) or 'none'}")
    if len(set(names)) < len(names):
        raise ConfigError(f"sources need different names; got {', '.join(names)}")


def _check_ids(name: str, sources: Tensor, names: Sequence[str]) -> None:
    wrong = sources.is_floating_point() or not sources.numel()
    if wrong or int(sources.min()) < 0 or int(sources.max()) >= len(names):
        found = f"in [{int(sources.min())}, {int(sources.max())}]" if sources.numel() else "none"
        raise DataError(
            f"a batch of problem {name!r} must say by an integer in [0, {len(names)}) for each example which source it "
            f"is from ({', '.join(names)}); its {sources.dtype} numbers are {found}"
        )


def _by_name(values: Mapping[str, float] | Sequence[float], names: Sequence[str], what: str) -> list[float]:
    given = values if isinstance(values, Mapping) else dict(zip(names, values, strict=False))
    if len(values) != len(names) or set(given) != set(names):
        raise ConfigError(f"{what} must be given for each of the sources {', '.join(names)}, not as {values}")
    for name in names:
        check_number(what, name, given[name], minimum=0.0)
    return [given[name] for name in names]
