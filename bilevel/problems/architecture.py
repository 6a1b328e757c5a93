"""Architecture search: the weights of candidate operations are learned on validation data (DARTS)."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from bilevel.errors import ConfigError
from bilevel.problems.distillation import redraw
from bilevel.problems.search_space import NONE, Cell, CellGenotype, DiscreteCell, MixedOperation
from bilevel.problems.supervised import Training, Validation
from bilevel.validation import check_number

__all__ = ["Architecture", "SupernetTraining", "discretise", "genotype"]


class SupernetTraining(Training):
    """The inner problem of a search: trains every parameter of a network but its mixtures' λ.

    Args:
        module: The network, with mixtures anywhere in it.
        settings: Those of :class:`~bilevel.problems.Training`: criterion, optimizer, data, ….

    Raises:
        ConfigError: A network without mixtures.
    """

    def __init__(self, module: nn.Module, **settings: Any) -> None:
        logits = {id(p) for p in _logits(module)}
        if not isinstance(settings.get("optimizer"), Optimizer):
            settings.setdefault("params", lambda _, parameter: id(parameter) not in logits)
        super().__init__(module, **settings)


class Architecture(Validation):
    """The outer problem of a search: learns the λ of all mixtures in a network.

    ``min over λ of F(λ, w*(λ)) + β E(λ)`` where ``w*(λ)`` minimises the training loss of the network with weights w;
    E is the mean over mixtures of the entropy of ``π = softmax(λ / τ)``, relative to its maximum. DARTS writes α for λ.

    Any method differentiates w*. DARTS' own "second order" looks one plain gradient step ahead, with the product by
    central differences: ``OneStep(difference="central")`` with one inner step an outer step (exactly, and through the
    optimiser that makes the step: ``Unrolled(steps=1)``). Its "first order" leaves w* out:
    ``OneStep(learning_rate=0.0, difference="central")``.

    Known to fail where the search is long or the validation set small: skip connections win, since they train the
    fastest (Zela et al., ICLR 2020, arXiv 1909.09656). :meth:`evaluate` shows it as a rising share of candidates
    without parameters. ``start=`` trains the weights alone first, weight decay keeps them small, and stopping early
    helps. The mixture is not what it is cut to: train the network of :meth:`genotype` again before it is judged, and
    beside random ones of the same space.

    Args:
        module: The network that :class:`SupernetTraining` trains, with mixtures anywhere in it.
        entropy: β. Above 0 it drives the mixtures to a choice.
        settings: Those of :class:`~bilevel.problems.Validation`: training, criterion, optimizer, data, ….

    Raises:
        ConfigError: A network without mixtures.

    Cost: 1 forward pass of the network, with all candidates, a loss.

    Example::

        operations = image_operations(16)
        cell = Cell(operations, num_inputs=1, num_nodes=2)      # concatenates its nodes: 32 channels
        head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)]
        network = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), cell, *head)
        architecture = Architecture(network, optimizer=lambda p: torch.optim.Adam(p, lr=0.01), data=validation)
        training = SupernetTraining(network, optimizer=lambda p: torch.optim.SGD(p, lr=0.1), data=train)
        Engine([architecture, training], EngineConfig(steps=500), hypergradient="finite_difference").run()
        found = discretise(network, fresh=True)
    """

    def __init__(self, module: nn.Module, *, entropy: float = 0.0, **settings: Any) -> None:
        logits = {id(p) for p in _logits(module)}
        check_number("Architecture", "entropy", entropy)
        if not isinstance(settings.get("optimizer"), Optimizer):
            settings.setdefault("params", lambda _, parameter: id(parameter) in logits)
        super().__init__(module, **settings)
        self.entropy = entropy

    def weights(self) -> dict[str, dict[str, Tensor]]:
        """Returns π by the path of the mixture in the network and the candidate's name."""
        return {path: dict(zip(m.candidates, m.weights(), strict=True)) for path, m in _mixtures(self.module)}

    def mean_entropy(self) -> Tensor:
        """Returns E: 1 where all candidates count alike, 0 where every mixture has chosen."""
        # From log π: where π is rounded to 0, -π log π has no derivative.
        logs = [mixture.log_weights() for _, mixture in _mixtures(self.module)]
        return torch.stack([-(log.exp() * log).sum() / math.log(len(log)) for log in logs]).mean()

    def loss(self, batch: Any) -> Tensor | Mapping[str, Any]:
        """Returns the trained network's loss on a batch, plus β times the entropy."""
        found = super().loss(batch)
        assert isinstance(found, Tensor)
        return found + self.entropy * self.mean_entropy() if self.entropy else found

    def genotype(self, *, num_edges: int = 2) -> dict[str, CellGenotype | str]:
        """Returns what is chosen so far; see :func:`genotype`."""
        return genotype(self.module, num_edges=num_edges)

    def evaluate(self) -> Mapping[str, float]:
        """Returns ``entropy`` (1: undecided, 0: decided) and ``parameter_free``.

        The latter is the weight of candidates without parameters among all but ``"none"``.
        """
        shares = []
        for _, mixture in _mixtures(self.module):
            found = zip(mixture.candidates.items(), mixture.weights().tolist(), strict=True)
            chosen = [(part, weight) for (name, part), weight in found if name != NONE]
            free = sum(weight for part, weight in chosen if not list(part.parameters()))
            shares.append(free / sum(weight for _, weight in chosen))
        return {"entropy": float(self.mean_entropy().detach()), "parameter_free": sum(shares) / len(shares)}


def genotype(network: nn.Module, *, num_edges: int = 2) -> dict[str, CellGenotype | str]:
    """Returns what the mixtures of a network have chosen, by the path of the cell or mixture in it.

    A cell gives a :meth:`Cell.genotype`, a mixture outside cells the name of its strongest candidate but ``"none"``.

    Raises:
        ConfigError: No mixtures, or equally strong candidates, as before a search.
    """
    _logits(network)
    cells = {path: module for path, module in network.named_modules() if isinstance(module, Cell)}
    within = {id(edge) for cell in cells.values() for edge in cell.edges.values()}
    found: dict[str, CellGenotype | str] = {}
    for path, module in network.named_modules():
        if isinstance(module, Cell):
            found[path] = module.genotype(num_edges=num_edges)
        elif isinstance(module, MixedOperation) and id(module) not in within:
            found[path] = module.choice()[0]
    return found


def discretise(network: nn.Module, *, num_edges: int = 2, fresh: bool = False) -> nn.Module:
    """Returns a copy of a network in which every cell and mixture is cut to what it has chosen.

    A kept operation now has the weight 1, no longer π: train the copy before it is judged.

    Args:
        network: The searched network; it is not changed.
        num_edges: Incoming edges that a node keeps; see :meth:`Cell.genotype`.
        fresh: Draws all parameters anew, by :func:`~bilevel.problems.redraw`, instead of copying the weights.

    Raises:
        ConfigError: No mixtures, or equally strong candidates.
        ParameterError: With ``fresh``, a layer with parameters and no ``reset_parameters``.
    """
    _logits(network)
    result = _cut(copy.deepcopy(network), num_edges, {})
    if fresh:
        redraw(result)
    return result


def _mixtures(network: nn.Module) -> Iterator[tuple[str, MixedOperation]]:
    return ((path, module) for path, module in network.named_modules() if isinstance(module, MixedOperation))


def _logits(network: nn.Module) -> list[nn.Parameter]:
    found = [mixture.logits for _, mixture in _mixtures(network)]
    if not found:
        raise ConfigError(
            f"{type(network).__name__} has no MixedOperation, on its own or in a Cell: there is nothing to search"
        )
    return found


def _cut(module: nn.Module, num_edges: int, done: dict[int, nn.Module]) -> nn.Module:
    """Replaces what is to be cut below a module and returns what takes its own place; shared modules stay shared."""
    if id(module) in done:
        return done[id(module)]
    result = module
    if isinstance(module, MixedOperation):
        return _cut(module.candidates[module.choice()[0]], num_edges, done)
    if isinstance(module, Cell):
        chosen = module.genotype(num_edges=num_edges)

        def candidates(source: int, node: int) -> dict[str, nn.Module]:
            return dict(module.mixture(source, node).candidates.items())

        result = DiscreteCell(chosen, candidates, num_inputs=module.num_inputs, combine=module.combine)
    done[id(module)] = result
    for name, child in result._modules.items():
        if child is not None:
            result._modules[name] = _cut(child, num_edges, done)
    return result
