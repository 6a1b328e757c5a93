"""Data parallelism: two processes equal one with the same global batch."""

from __future__ import annotations

import os
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn import functional as F

from bilevel import Engine, EngineConfig, Problem
from tests.ranks import free_port

METHODS = ["finite_difference", "identity", "neumann", "conjugate_gradient", "exact", "unrolled"]


class Decay(Problem):
    def loss(self, batch):
        return F.cross_entropy(self.classifier(batch[0]), batch[1])


class Classifier(Problem):
    def loss(self, batch):
        # the outer parameter acts through the data, so that every product differs from rank to rank
        logits = self(batch[0] * self.decay.module[0].exp())
        return F.cross_entropy(logits, batch[1]) + 0.05 * sum(p.square().sum() for p in self.module.parameters())


def train(method: str, rank: int, size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(12, 4, generator=generator).double(), torch.randint(0, 3, (12,), generator=generator)
    share = slice(rank * 12 // size, (rank + 1) * 12 // size)
    torch.manual_seed(0)
    sgd = lambda params: torch.optim.SGD(params, lr=0.2)  # noqa: E731
    adam = lambda params: torch.optim.Adam(params, lr=0.05)  # noqa: E731
    batches = [(x[share], y[share])]
    decay = Decay(nn.ParameterList([torch.tensor(0.5).double()]), optimizer=sgd, data=batches)
    inner = Classifier(nn.Linear(4, 3).double(), optimizer=adam, data=batches, steps=2)
    engine = Engine([decay, inner], EngineConfig(progress=False), hypergradient=method)
    for _ in range(3):
        engine.step()
    return torch.cat([p.detach().reshape(-1) for p in (*decay.parameters, *inner.parameters)])


def worker(rank: int, port: int, folder: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    try:
        results = {method: train(method, rank, 2) for method in METHODS}
        torch.save(results, os.path.join(folder, f"{rank}.pt"))
        dist.barrier()  # gloo's threads do not like a peer that has gone
    finally:
        dist.destroy_process_group()


@pytest.mark.timeout(120)
def test_two_processes_equal_one_with_the_same_global_batch(tmp_path):
    port = free_port()
    mp.spawn(worker, args=(port, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    for method in METHODS:
        assert torch.equal(first[method], second[method]), method
        torch.testing.assert_close(first[method], train(method, 0, 1), rtol=1e-6, atol=1e-9, msg=method)
