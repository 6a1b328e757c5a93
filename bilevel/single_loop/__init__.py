"""Single-loop stochastic bilevel optimisation of finite sums.

These methods move the inner parameters w, the solution q of the adjoint system ``(∂²f/∂w²) q = ∂F/∂w`` and the outer
parameters λ together, a cheap stochastic step each. An :class:`~bilevel.Engine` with the estimators of the same names
(``"soba"``, ``"amigo"``, …) does so for any problem, module and optimiser; this package has the whole published
algorithms, variance reduction included, for problems whose samples can be indexed.

1. Write both losses as means over the samples with given indices, and say how many samples there are:

   >>> import torch
   >>> from bilevel.single_loop import SABA, FiniteSum, single_loop
   >>> generator = torch.Generator().manual_seed(0)
   >>> X, Y = (torch.randn(40, 3, generator=generator, dtype=torch.float64) for _ in range(2))
   >>> truth = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
   >>> a, b = X @ truth, Y @ truth + 1.0
   >>> def inner_loss(w, lam, indices):  # ridge regression; λ is the logarithm of the penalty
   ...     return (X[indices] @ w - a[indices]).square().mean() / 2 + (lam.exp() * w.square()).sum() / 2
   >>> def outer_loss(w, lam, indices):
   ...     return (Y[indices] @ w - b[indices]).square().mean() / 2 + lam.square().sum() / 2
   >>> problem = FiniteSum(inner_loss, len(X), outer_loss, len(Y))

2. Choose a method: :class:`SOBA`, :class:`SABA`, :class:`SRBA`, :class:`FSLA`, :class:`AmIGO`, :class:`StocBiO` or
   :class:`TTSA`, with its step lengths, decays and batch sizes (None: all samples). Defaults of the decays are the
   published ones.

   >>> method = SABA(inner_step=0.1, outer_step=0.1, inner_batch=4, outer_batch=4)

3. Run it, with a record of the iterates and of what they have cost:

   >>> w, lam = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
   >>> run = single_loop(problem, w, lam, method, steps=400, seed=1, record=100)
   >>> run.status.value, [iterate.step for iterate in run.iterates]
   ('stopped at cap', [0, 100, 200, 300, 400])
   >>> run.iterates[-1].counts.gradients  # per sample: 40 + 40 for the first tables, 4 + 4 a step
   3280
   >>> hessian = X.T @ X / 40 + torch.diag(run.outer.exp())
   >>> bool((run.inner - torch.linalg.solve(hessian, X.T @ a / 40)).norm() < 1e-6)
   True

4. Or own the loop: ``state = method.init(problem, w, lam, generator)``, then ``state = method.update(problem, state)``.
   Both are pure. A state holds everything, the random generator included: ``torch.save(state.as_dict(), path)``, and
   ``State.from_dict(torch.load(path))`` goes on to the bit. ``single_loop(..., state=state)`` does too.

Samples are cut into blocks of successive ones: shuffle the data once before, if its order means something.
"""

from bilevel.single_loop.amigo import AmIGO
from bilevel.single_loop.base import Method, State
from bilevel.single_loop.driver import Iterate, Run, single_loop
from bilevel.single_loop.fsla import FSLA
from bilevel.single_loop.problem import Counts, FiniteSum
from bilevel.single_loop.saba import SABA
from bilevel.single_loop.soba import SOBA
from bilevel.single_loop.srba import SRBA
from bilevel.single_loop.stocbio import StocBiO
from bilevel.single_loop.ttsa import TTSA

__all__ = [
    "FSLA",
    "SABA",
    "SOBA",
    "SRBA",
    "TTSA",
    "AmIGO",
    "Counts",
    "FiniteSum",
    "Iterate",
    "Method",
    "Run",
    "State",
    "StocBiO",
    "single_loop",
]
