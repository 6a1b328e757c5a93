"""What the problems of all workloads share: BOAT's settings."""

from __future__ import annotations

import os
from typing import Any

import matplotlib
import torch
from torch import nn

matplotlib.use("Agg")  # BOAT imports pyplot

import boat_torch

from benchmarks.peers.side import KeepingSGD, KeepingSide

SETTINGS: dict[str, Any] = {
    "fo_op": None,
    "gm_op": ["NGD"],
    "accumulate_grad": False,
    "copy_last_param": True,
    "return_grad": False,
    "GDA": {"alpha_init": 0.0, "alpha_decay": 0.0},
    "RGT": {"truncate_iter": 0},
    "loss_log_path": os.devnull,
}


class ProblemSide(KeepingSide):
    """Naive gradient descent (``NGD``) inside, and an operation for the hypergradient.

    BOAT evaluates both losses for a log, of which every step writes all anew; it is dropped, for a step would cost the
    more, the more there were before it (10 µs for each).
    """

    note = "it evaluates both losses once more a step, for its log"

    def start(
        self,
        module: str,
        feed: Any,
        lower: nn.Module,
        upper: nn.Module,
        *,
        rates: tuple[float, float],
        steps: int,
        device: torch.device,
        **settings: Any,
    ) -> None:
        """Makes the problem.

        Args:
            module: Where ``inner_loss`` and ``outer_loss`` are, as BOAT calls them: by their dotted path.
            feed: What the losses get.
            lower: Of the inner parameters.
            upper: Of the outer parameters.
            rates: Inner and outer learning rate.
            steps: Inner steps.
            device: Where.
            **settings: More of BOAT's settings, or others than :data:`SETTINGS`.
        """
        self.feed, self.count = feed, 0
        self.outer = KeepingSGD(upper.parameters(), lr=rates[1])
        config = {
            **SETTINGS,
            "lower_level_model": lower,
            "upper_level_model": upper,
            "lower_level_var": list(lower.parameters()),
            "upper_level_var": list(upper.parameters()),
            "lower_level_opt": torch.optim.SGD(lower.parameters(), lr=rates[0]),
            "upper_level_opt": self.outer,
            "lower_iters": steps,
            "device": str(device),
            **settings,
        }
        names = {"lower_level_loss": "inner_loss", "upper_level_loss": "outer_loss"}
        losses = {level: {"function": f"{module}.{name}"} for level, name in names.items()}
        self.problem = boat_torch.Problem(config, losses)
        self.problem.build_ll_solver()
        self.problem.build_ul_solver()

    def step(self) -> None:
        self.problem.run_iter(self.feed, self.feed, self.count)
        self.count += 1
        self.problem._log_results.clear()
        self.problem.loss_history.clear()
