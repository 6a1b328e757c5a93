"""MAML here and with higher (archived, ``pip install --no-deps higher``), on the same tasks from the same weights.

python -m benchmarks.tutorials.few_shot_peer --data FOLDER      # Omniglot's two files; digits without --data
"""

from __future__ import annotations

import argparse
import copy
import time
from dataclasses import replace
from typing import Any

import higher
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.tutorials.study import Estimate, Table
from bilevel import Engine, EngineConfig, Unrolled
from bilevel.problems import Problem, TaskBatch
from examples import few_shot as recipe

TEST_BATCHES = 15  # of 20 tasks


def take_gradient(network: nn.Module, batch: TaskBatch, steps: int, rate: float) -> None:
    """Puts MAML's gradient into the network's parameters: higher's own loop over tasks."""
    for sx, sy, qx, qy in zip(*batch, strict=True):
        sgd = torch.optim.SGD(network.parameters(), lr=rate)
        with higher.innerloop_ctx(network, sgd, copy_initial_weights=False) as (fast, optimizer):
            for _ in range(steps):
                optimizer.step(F.cross_entropy(fast(sx), sy))
            (F.cross_entropy(fast(qx), qy) / len(batch.query_targets)).backward()


def accuracy(network: nn.Module, batch: TaskBatch, steps: int, rate: float) -> list[float]:
    """Returns the share of right answers of every task after plain fine-tuning."""
    found = []
    for sx, sy, qx, qy in zip(*batch, strict=True):
        tuned = copy.deepcopy(network)
        sgd = torch.optim.SGD(tuned.parameters(), lr=rate)
        for _ in range(steps):
            sgd.zero_grad()
            F.cross_entropy(tuned(sx), sy).backward()
            sgd.step()
        found.append(float((tuned(qx).argmax(1) == qy).float().mean()))
    return found


def built(config: Any) -> tuple[Engine, Problem, Any]:
    engine = recipe.build(config)
    return engine, engine.problems["meta_learner"], engine.problems["adaptation"]


def disagreement(config: Any, dtype: torch.dtype) -> float:
    """Returns ``‖g − g'‖ / ‖g'‖`` of the gradients of the first outer step."""
    engine, meta, inner = built(config)
    made = inner.source[0]
    batch = TaskBatch(*(part.to(dtype) if part.is_floating_point() else part for part in made))
    network = copy.deepcopy(inner.network).to(dtype)
    take_gradient(network, batch, inner.steps, config.recipe.rate)
    twin = copy.deepcopy(inner.network).to(dtype)
    sgd = lambda params: torch.optim.SGD(params, lr=config.recipe.rate)  # noqa: E731
    outer = lambda params: torch.optim.SGD(params, lr=1.0)  # noqa: E731
    ours = Engine(
        [type(meta)(twin, optimizer=outer), type(inner)(twin, [batch], optimizer=sgd, steps=inner.steps)],
        config.engine,
        config.hypergradient,
    )
    before = [p.detach().clone() for p in twin.parameters()]
    ours.step()
    found = torch.cat([(b - p.detach()).flatten() for b, p in zip(before, twin.parameters(), strict=True)])
    expected = torch.cat([_grad(p).flatten() for p in network.parameters()])
    del engine
    return float((found - expected).norm() / expected.norm())


def _grad(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def trained(config: Any, outer_steps: int) -> list[tuple[str, list[float], float]]:
    """Trains with all on the same tasks from the same weights; returns accuracies and processor seconds."""
    found = []
    for name, memory in (("here, steps evaluated again", "replay"), ("here, graphs kept", "graph")):
        engine, _, inner = built(replace(config, hypergradient=Unrolled(memory=memory)))
        started = time.process_time()
        for _ in range(outer_steps):
            engine.step()
        spent = time.process_time() - started
        found.append((name, inner.assess(inner.held_out, TEST_BATCHES).accuracies.tolist(), spent))
    _, _, inner = built(config)
    peer, rate = inner.network, config.recipe.rate
    adam = torch.optim.Adam(peer.parameters(), lr=config.recipe.outer_rate)
    started = time.process_time()
    for number in range(outer_steps):
        adam.zero_grad()
        take_gradient(peer, inner.source[number], inner.steps, rate)
        adam.step()
    spent = time.process_time() - started
    batches = [inner.held_out[number] for number in range(TEST_BATCHES)]
    rights = [right for batch in batches for right in accuracy(peer, batch, inner.steps, rate)]
    return [*found, ("higher", rights, spent)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="", help="folder with Omniglot's files")
    parser.add_argument("--outer-steps", type=int, default=300)
    parser.add_argument("--shots", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    settings = replace(recipe.DEFAULTS.recipe, data=arguments.data, shots=arguments.shots)
    base = replace(recipe.DEFAULTS, engine=EngineConfig(progress=False), recipe=settings)
    for dtype in (torch.float64, torch.float32):
        for steps in (1, 5):
            config = replace(base, recipe=replace(settings, steps=steps))
            print(f"first outer step, {steps} inner, {dtype}: relative difference {disagreement(config, dtype):.1e}")
    results: dict[str, list[tuple[float, float]]] = {}
    for seed in range(arguments.seeds):
        config = replace(base, recipe=replace(settings, seed=seed))
        for name, rights, seconds in trained(config, arguments.outer_steps):
            results.setdefault(name, []).append((sum(rights) / len(rights), seconds))
    rows = [
        [
            name,
            Estimate.of([right for right, _ in runs], digits=1, percent=True),
            Estimate.of([1e3 * seconds / arguments.outer_steps for _, seconds in runs], digits=0),
        ]
        for name, runs in results.items()
    ]
    columns = ["MAML by", f"accuracy after {arguments.outer_steps} outer steps", "processor ms an outer step"]
    print(*Table(columns, rows).lines(), sep="\n")


if __name__ == "__main__":
    main()
