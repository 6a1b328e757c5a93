"""Reverse accumulation of cotangents over the problems below one, from the lowest level up."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from bilevel.linear import gmres
from bilevel.result import SolveInfo
from bilevel.vector import Tensors, add, norm, promote, subtract, zeros_like

__all__ = ["Pull", "accumulate"]

Pull = Callable[[str, Tensors, bool], Mapping[str, Tensors]]
"""``(problem, cotangent, last) -> parts``: the best-response product of one problem, by the problem that it responds
to; ``last`` where no further product of it is taken with another cotangent."""

BLOCK_ITERATIONS = 30
BLOCK_RTOL = 1e-8


def accumulate(
    blocks: Sequence[Sequence[str]],
    cotangents: dict[str, Tensors],
    reached: set[str],
    pull: Pull,
    judge: Callable[[str, SolveInfo], None],
) -> dict[str, SolveInfo]:
    """Adds to every cotangent what comes through the problems in ``blocks``, one product a problem.

    Problems that respond to each other, ``b₁*(λ, b₂)`` and ``b₂*(λ, b₁)``, make one block. What arrives at them is

        u₁ = v₁ + (∂b₂*/∂b₁)ᵀ u₂,        u₂ = v₂ + (∂b₁*/∂b₂)ᵀ u₁,

    a linear system in ``(u₁, u₂)`` that GMRES solves by the problems' own products.

    Args:
        blocks: Each before those that it responds to; see :meth:`Dependencies.below`.
        cotangents: By problem, those in ``blocks`` and those above; changed.
        reached: The problems whose cotangent may not vanish; changed. Others are passed over.
        pull: The product.
        judge: Told how the system of a block was solved, with the members' names; raises where that is not good enough.

    Returns:
        Reports of the blocks' systems, by the members' names.
    """
    infos: dict[str, SolveInfo] = {}
    for block in blocks:
        if not reached.intersection(block):
            continue
        if len(block) > 1:
            solved, info = _together(block, cotangents, pull)
            together = " and ".join(block)
            judge(together, info)
            infos[together] = info
            cotangents.update(solved)
        for name in block:
            for other, part in pull(name, cotangents[name], True).items():
                if other not in block:
                    cotangents[other] = add(cotangents[other], part)
                    reached.add(other)
    return infos


def _together(
    block: Sequence[str], cotangents: Mapping[str, Tensors], pull: Pull
) -> tuple[dict[str, Tensors], SolveInfo]:
    sizes = [len(cotangents[name]) for name in block]

    def split(flat: Tensors) -> dict[str, Tensors]:
        parts, start = {}, 0
        for name, size in zip(block, sizes, strict=True):
            parts[name], start = flat[start : start + size], start + size
        return parts

    def coupled(flat: Tensors) -> Tensors:
        given = split(flat)
        arrived = {name: zeros_like(part) for name, part in given.items()}
        for name, part in given.items():
            for other, more in pull(name, part, False).items():
                if other in arrived:
                    arrived[other] = add(arrived[other], promote(more))
        return subtract(flat, tuple(part for name in block for part in arrived[name]))

    v = promote(tuple(part for name in block for part in cotangents[name]))
    solution = gmres(coupled, v, max_iterations=BLOCK_ITERATIONS, rtol=BLOCK_RTOL)
    size = float(norm(v))
    residual = float(norm(subtract(coupled(solution.q), v))) / size if size > 0.0 else 0.0
    info = SolveInfo(
        solution.status,
        residual=residual,
        iterations=solution.iterations,
        method="gmres",
        message="; ".join(part for part in (solution.message, "problems that respond to each other") if part),
    )
    return split(solution.q), info
