"""Stackelberg games: players that move in turn, each foreseeing how those after it will answer."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from bilevel.errors import ConfigError
from bilevel.problems.base import Problem
from bilevel.validation import check_number

__all__ = ["Firm", "Player", "QuantityGame"]


class Player(Problem):
    """A player that maximises a payoff, which other players' decisions enter by their names.

    Players that are listed first move first. The last of two answers the first with ``y*(x) = argmax of its payoff``,
    and the first maximises ``payoff(x, y*(x))``: the hypergradient is what tells a leader what its followers will do.
    Without it (the derivative at fixed y) players would end where none gains by a move of its own, a Nash equilibrium.

    Write :meth:`payoff`; everything else is as in :class:`~bilevel.Problem`.

    Example::

        class Leader(Player):
            def payoff(self, batch):
                return self.module["price"] * demand(self.module["price"], self.follower.module["price"])
    """

    @abstractmethod
    def payoff(self, batch: Any) -> Tensor:
        """Returns what the player maximises: a scalar."""

    def loss(self, batch: Any) -> Mapping[str, Any]:
        """Returns the negative payoff, and the payoff as a metric."""
        payoff = self.payoff(batch)
        return {"loss": -payoff, "payoff": payoff.detach()}


class Firm(Player):
    """A firm of a :class:`QuantityGame`: it sells ``module["quantity"]``.

    Args:
        quantity: What it sells at the start.
        place: Its place among the firms.
        game: The market.
        settings: Those of :class:`~bilevel.Problem`; the name is ``firm_0``, ``firm_1``, … by default.
    """

    def __init__(self, quantity: float | Tensor, place: int, game: QuantityGame, **settings: Any) -> None:
        start = torch.as_tensor(quantity, dtype=torch.float64 if isinstance(quantity, float) else None)
        module = nn.ParameterDict({"quantity": start.detach().clone()})
        super().__init__(module, **{"name": f"firm_{place}", **settings})
        self.place, self.game = place, game

    def payoff(self, batch: Any) -> Tensor:
        """Returns the profit ``(price(Σ q) − c) q``."""
        firms: list[Any] = [getattr(self, f"firm_{place}") for place in range(len(self.game.costs))]
        quantities = torch.stack([firm.module["quantity"] for firm in firms])
        profit: Tensor = (self.game.price(quantities.sum()) - self.game.costs[self.place]) * quantities[self.place]
        return profit


@dataclass(frozen=True)
class QuantityGame:
    """Firms that choose quantities of one good, one after the other, at the price ``a − b Σ q`` and own costs c.

    With two firms it is Stackelberg's duopoly: the leader sells ``(a + c₂ − 2c₁) / 2b``, where it would sell
    ``(a + c₂ − 2c₁) / 3b`` if both moved at once (Cournot). Every number of firms has a closed form
    (:meth:`equilibrium`), and is that many levels in an engine.

    Attributes:
        costs: Of a unit, for each firm; the first moves first.
        intercept: a.
        slope: b.

    Raises:
        ConfigError: Fewer than two firms, a slope that is not positive, or a firm that would not sell anything.

    Source: von Stackelberg, Marktform und Gleichgewicht, 1934.

    Example:
        >>> from bilevel import Engine, EngineConfig
        >>> game = QuantityGame(costs=(1.0, 1.0), intercept=10.0)
        >>> engine = Engine(game.problems(), EngineConfig(progress=False), hypergradient="exact")
        >>> _ = engine.run(20)
        >>> [round(float(firm.module["quantity"].detach()), 3) for firm in engine.problems.values()]
        [4.5, 2.25]
        >>> [round(profit, 3) for profit in game.profits(game.equilibrium())]
        [10.125, 5.062]
        >>> [round(profit, 3) for profit in game.profits(game.simultaneous())]
        [9.0, 9.0]
    """

    costs: tuple[float, ...]
    intercept: float = 1.0
    slope: float = 1.0

    def __post_init__(self) -> None:
        """Validates the market."""
        for field in ("intercept", "slope"):
            check_number("QuantityGame", field, getattr(self, field), minimum=0.0, exclusive=True)
        for cost in self.costs:
            check_number("QuantityGame", "costs", cost)
        if len(self.costs) < 2:
            raise ConfigError(f"QuantityGame.costs must hold one cost for each of at least 2 firms, not {self.costs}")
        for moves, found in (("in turn", self.equilibrium()), ("at once", self.simultaneous())):
            if min(found) <= 0.0:
                place = min(range(len(found)), key=found.__getitem__)
                raise ConfigError(
                    f"QuantityGame: firm {place} with cost {self.costs[place]:g} would sell nothing where all move "
                    f"{moves}: leave it out, lower its cost, or raise the intercept ({self.intercept:g})"
                )

    def price(self, total: Any) -> Any:
        """Returns ``a − b Σ q``."""
        return self.intercept - self.slope * total

    def profits(self, quantities: Sequence[float]) -> list[float]:
        """Returns what each firm earns."""
        price = self.price(sum(quantities))
        return [(price - cost) * quantity for cost, quantity in zip(self.costs, quantities, strict=True)]

    def equilibrium(self) -> list[float]:
        """Returns the quantities where each firm foresees the answers of all after it.

        With Q sold by the firms before, those from k on make the price ``(A − bQ) / B``. The last one has ``A = a`` and
        ``B = 1`` before it moves, sells ``q = (A − bQ − Bc) / 2b``, and leaves ``A + Bc`` and ``2B`` to the one before.
        """
        A, B, rules = self.intercept, 1.0, []
        for cost in reversed(self.costs):
            rules.append((A - B * cost) / (2 * self.slope))
            A, B = A + B * cost, 2 * B
        quantities: list[float] = []
        for rule in reversed(rules):
            quantities.append(rule - sum(quantities) / 2)
        return quantities

    def simultaneous(self) -> list[float]:
        """Returns the quantities where all move at once: ``qᵢ = ((a + Σ c) / (n + 1) − cᵢ) / b`` (Cournot)."""
        price = (self.intercept + math.fsum(self.costs)) / (len(self.costs) + 1)
        return [(price - cost) / self.slope for cost in self.costs]

    def problems(
        self,
        quantities: Sequence[float] | None = None,
        *,
        optimizer: Callable[[Any], Optimizer] | None = None,
        dtype: torch.dtype = torch.float64,
        **settings: Any,
    ) -> list[Firm]:
        """Returns the firms, for an engine.

        Args:
            quantities: What they sell at the start; what they would if all moved at once, by default.
            optimizer: Makes the optimisers; Newton's step by default: the total payoff of the k-th from the end is a
                quadratic with the curvature ``2b / 2ᵏ``.
            dtype: Of the quantities.
            settings: Those of every firm but the first: steps, hypergradient, ….
        """
        starts = self.simultaneous() if quantities is None else quantities
        if len(starts) != len(self.costs):
            raise ConfigError(f"QuantityGame.problems: {len(starts)} quantities for {len(self.costs)} firms")
        made = []
        for place, start in enumerate(starts):
            rate = 2.0 ** (len(starts) - 1 - place) / (2 * self.slope)
            newton = lambda parameters, rate=rate: SGD(parameters, lr=rate)  # noqa: E731
            more = settings if place else {}
            made.append(Firm(torch.tensor(start, dtype=dtype), place, self, optimizer=optimizer or newton, **more))
        return made
