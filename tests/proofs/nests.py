"""Nests of any number of levels with their solutions and hypergradients, by torch.autograd and linear algebra alone.

A nest is a number of problems, each with a vector and a loss that reads its own vector and some others'. Those *below*
a problem are replaced, in its loss, by their best responses. All vectors together are one vector z, and what holds of
the problems below p is a matrix S with ``dz = S dz_free``: the identity for what p does not see through, the total
derivatives of the best responses for what it does. Then, for any acyclic structure and any number of levels,

    g_p = S[:, p]ᵀ ∂F_p/∂z,      dx_p = −(dg_p/dx_p)⁻¹ dg_p,      dg_p = (∂g_p/∂z) S dz_free

where S stands for explicit formulas in z (Hessians, third derivatives …), so that ∂g_p/∂z carries how they move.
Three independent ways lead there: matrices (quadratic losses), these formulas by ``torch.func``, and autograd through
Newton's method, each level solved anew inside the level above (:mod:`tests.proofs.nest_solves`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.bilevel.strategies import DOUBLE, spectrum_matrix
from tests.proofs.nest_structures import Structure

__all__ = ["Nest", "Quadratic", "eliminated", "make_bent", "make_quadratic"]


@dataclass(frozen=True)
class Nest:
    """Problems with losses, at a point.

    Attributes:
        structure: Who reads whom.
        sizes: Lengths of the vectors.
        losses: For each problem, its loss as a function of z, all vectors one after the other.
        point: A value of z, with nothing solved.
    """

    structure: Structure
    sizes: Mapping[str, int]
    losses: Mapping[str, Callable[[Tensor], Tensor]]
    point: Tensor

    def place(self, name: str) -> slice:
        """Where a problem's vector is in z."""
        names = self.structure.names
        start = sum(self.sizes[other] for other in names[: names.index(name)])
        return slice(start, start + self.sizes[name])

    def part(self, z: Tensor, name: str) -> Tensor:
        """A problem's vector."""
        return z[self.place(name)]

    def indices(self, names: tuple[str, ...]) -> list[int]:
        """Where several problems' vectors are in z."""
        return [index for name in names for index in range(*self.place(name).indices(len(self.point)))]

    def join(self, values: Mapping[str, Tensor]) -> Tensor:
        """z of the problems' vectors."""
        return torch.cat([values[name] for name in self.structure.names])

    def total_gradient(self, name: str, z: Tensor) -> Tensor:
        """g_p: what F_p's total derivative is where those below p have solved their problems; a formula in z."""
        partial = torch.func.grad(self.losses[name])(z)
        return self.substitution(name, z)[:, self.place(name)].T @ partial

    def response(self, name: str, z: Tensor, neglect: str = "") -> Tensor:
        """dx_p/dz as a (len p, len z) matrix, zero in the columns of p and of those below.

        ``neglect="response"``: the curvature of F_p with the lower vectors held, as Betty takes it; ``"curvature"``:
        with the second derivatives of the lower responses left out, that is S constant.
        """
        if neglect:
            J = torch.func.jacrev(torch.func.grad(self.losses[name]))(z)
            S = self.substitution(name, z, neglect) if neglect == "curvature" else torch.eye(len(z), dtype=DOUBLE)
            J = S[:, self.place(name)].T @ J @ S
        else:
            J = torch.func.jacrev(lambda z: self.total_gradient(name, z))(z) @ self.substitution(name, z)
        free = torch.ones(len(z), dtype=DOUBLE)
        free[self.indices((name, *self.structure.below[name]))] = 0.0
        return -torch.linalg.solve(J[:, self.place(name)], J) * free

    def substitution(self, name: str, z: Tensor, neglect: str = "") -> Tensor:
        """S: dz for what happens to the problems that are not below p."""
        below = self.structure.below[name]
        if not below:
            return torch.eye(len(z), dtype=DOUBLE)
        D = torch.cat([self.response(lower, z, neglect) for lower in below])
        return eliminated(D, self.indices(below), len(z))

    def hypergradient(self, name: str, z: Tensor, neglect: str = "") -> Tensor:
        """The total derivative where the problems below have solved theirs; with ``neglect``, a wrong one."""
        partial = torch.func.grad(self.losses[name])(z)
        return (self.substitution(name, z, neglect)[:, self.place(name)].T @ partial).detach()

    def solved(self, *names: str) -> Tensor:
        """The point with all that is below these problems (the outer ones by default) at their solutions.

        Raises:
            AssertionError: Newton's method did not converge.
        """
        rows = sorted({i for name in names or self.structure.outer for i in self.indices(self.structure.below[name])})
        place = torch.tensor(rows)
        lower = [name for name in self.structure.names if set(self.indices((name,))) <= set(rows)]

        def fields(x: Tensor) -> Tensor:
            z = self.point.index_copy(0, place, x)
            return torch.cat([self.total_gradient(name, z) for name in lower])

        x, value = self.point[rows], fields(self.point[rows])
        for _ in range(60):
            move, share = torch.linalg.solve(torch.func.jacrev(fields)(x), value), 1.0
            while share > 1e-3 and float(fields(x - share * move).norm()) > (1 - share / 4) * float(value.norm()):
                share /= 2
            ahead = fields(x - share * move)
            if float(value.norm()) < 1e-11 and float(ahead.norm()) >= float(value.norm()):
                return self.point.index_copy(0, place, x)
            x, value = x - share * move, ahead
        raise AssertionError(f"Newton's method did not converge: {value}")


def eliminated(D: Tensor, rows: list[int], size: int) -> Tensor:
    """S of ``dx_below = D dz``: solved for those below, which may respond to each other."""
    free = [index for index in range(size) if index not in rows]
    inside = torch.linalg.solve(torch.eye(len(rows), dtype=DOUBLE) - D[:, rows], D[:, free])
    unit = torch.eye(size, dtype=DOUBLE)
    # S = Σ over rows and columns, written without assignment so that torch.func can differentiate it.
    return unit[:, free] @ unit[free] + unit[:, rows] @ inside @ unit[free]


@dataclass(frozen=True)
class Quadratic(Nest):
    """Losses ``½ zᵀ A z + bᵀ z``: best responses are affine, and all is a matter of matrices.

    Attributes:
        A: By problem, symmetric; zero in the rows and columns of what it does not read.
        b: By problem.
    """

    A: Mapping[str, Tensor]
    b: Mapping[str, Tensor]

    def affine_gradient(self, name: str) -> tuple[Tensor, Tensor]:
        """(G, h) with ``g_p = G z + h``; G is zero in the columns of those below p."""
        S, s = self.affine_substitution(name)
        down = S[:, self.place(name)].T
        return down @ self.A[name] @ S, down @ (self.A[name] @ s + self.b[name])

    def affine_response(self, name: str) -> tuple[Tensor, Tensor]:
        """(D, d) with ``x_p = D z + d``."""
        G, h = self.affine_gradient(name)
        own = G[:, self.place(name)]
        others = G.clone()
        others[:, self.place(name)] = 0.0
        return -torch.linalg.solve(own, others), -torch.linalg.solve(own, h)

    def affine_substitution(self, name: str) -> tuple[Tensor, Tensor]:
        """(S, s) with ``z = S z + s`` where those below p have solved their problems."""
        below, size = self.structure.below[name], len(self.point)
        if not below:
            return torch.eye(size, dtype=DOUBLE), torch.zeros(size, dtype=DOUBLE)
        pairs = [self.affine_response(lower) for lower in below]
        D, d = torch.cat([D for D, _ in pairs]), torch.cat([d for _, d in pairs])
        rows = self.indices(below)
        shift = torch.zeros(size, dtype=DOUBLE)
        shift[rows] = torch.linalg.solve(torch.eye(len(rows), dtype=DOUBLE) - D[:, rows], d)
        return eliminated(D, rows, size), shift

    def closed_form(self, name: str, z: Tensor) -> Tensor:
        """The hypergradient of a problem at the solutions below it, whatever z holds there."""
        G, h = self.affine_gradient(name)
        return G @ z + h

    def solved(self, *names: str) -> Tensor:
        """The same by linear algebra."""
        z = self.point.clone()
        for name in names or self.structure.outer:
            S, s = self.affine_substitution(name)
            rows = self.indices(self.structure.below[name])
            z[rows] = (S @ z + s)[rows]
        return z

    def optimum(self) -> Tensor:
        """z where every problem has solved its own: the limit of training."""
        fields = [self.affine_gradient(name) for name in self.structure.names]
        return -torch.linalg.solve(torch.cat([G for G, _ in fields]), torch.cat([h for _, h in fields]))


def _normals(number: int) -> tuple[torch.Generator, Callable[..., Tensor]]:
    generator = torch.Generator().manual_seed(number)
    return generator, lambda *shape: torch.randn(*shape, generator=generator, dtype=DOUBLE)


def _couplings(structure: Structure, sizes: Mapping[str, int], coupling: float, number: int) -> dict[str, Any]:
    """By problem: a matrix over z that is zero where the loss does not look."""
    _, normal = _normals(number)
    matrices = {}
    for name in structure.names:
        seen = (name, *structure.reads[name])
        blocks = [normal(sizes[name] + 1, sizes[other]) * (other in seen) for other in structure.names]
        matrices[name] = coupling * torch.cat(blocks, 1) / (sizes[name] + 1) ** 0.5
    return matrices


def make_quadratic(
    structure: Structure, sizes: Mapping[str, int], *, coupling: float = 0.7, condition: float = 4.0, number: int = 0
) -> Quadratic:
    """``½ x_pᵀ H x_p + ½ ‖M z − m‖²`` with eigenvalues of H in [1/condition, 1].

    Jointly convex, so that whatever affine response is put in for those below, the total loss has at least the
    curvature of H: every level is well posed at every structure.
    """
    generator, normal = _normals(number)
    Ms, total = _couplings(structure, sizes, coupling, number + 1), sum(sizes.values())
    blank = Nest(structure, sizes, {}, normal(total))
    A, b = {}, {}
    for name in structure.names:
        H = spectrum_matrix(condition ** -torch.rand(sizes[name], generator=generator, dtype=DOUBLE), generator)
        A[name] = Ms[name].T @ Ms[name]
        A[name][blank.place(name), blank.place(name)] += H
        b[name] = -Ms[name].T @ normal(sizes[name] + 1)

    losses = {name: lambda z, A=A[name], b=b[name]: z @ (A @ z) / 2 + b @ z for name in structure.names}
    return Quadratic(structure, sizes, losses, blank.point, A, b)


def make_bent(structure: Structure, sizes: Mapping[str, int], *, coupling: float = 0.8, number: int = 0) -> Nest:
    """Strongly convex losses that are quadratic nowhere.

    ``½ x_pᵀ H x_p + Σ softplus(M z − m) + logsumexp(N z) + ⅛ Σ (M z)⁴ + ¼ Σ x_p⁴`` with eigenvalues of H in [1, 2]: the
    third derivatives of a lower loss move its response, and so the curvature of the level above.
    """
    generator, normal = _normals(number)
    Ms, Ns = (_couplings(structure, sizes, coupling, number + shift) for shift in (1, 2))
    blank = Nest(structure, sizes, {}, 0.7 * normal(sum(sizes.values())))

    def loss(name: str) -> Callable[[Tensor], Tensor]:
        H = spectrum_matrix(1 + torch.rand(sizes[name], generator=generator, dtype=DOUBLE), generator)
        M, N, m, place = Ms[name], Ns[name], normal(sizes[name] + 1), blank.place(name)

        def value(z: Tensor) -> Tensor:
            x, seen = z[place], M @ z
            smooth = F.softplus(2.0 * (seen - m)).sum() + torch.logsumexp(2.0 * (N @ z), 0)
            return x @ (H @ x) / 2 + smooth + (seen**4).sum() / 8 + (x**4).sum() / 4

        return value

    return Nest(structure, sizes, {name: loss(name) for name in structure.names}, blank.point)
