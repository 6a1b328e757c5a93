"""Games: a leader that foresees how followers answer, and training against an adversary."""

from bilevel.problems.games.adversarial import AdversarialTraining, Perturbation, RobustValidation, attack
from bilevel.problems.games.stackelberg import Firm, Player, QuantityGame

__all__ = ["AdversarialTraining", "Firm", "Perturbation", "Player", "QuantityGame", "RobustValidation", "attack"]
