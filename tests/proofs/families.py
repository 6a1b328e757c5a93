"""Bilevel problems beyond ridge and quadratics, each with its solution and derivatives in closed form or certified.

Everything is float64 and on flat vectors. A :class:`~tests.bilevel.strategies.Sample` subclass inherits the exact
hypergradient, its scale and the bound of rounding; the inverse that these take need not be of a positive matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from hypothesis import assume
from hypothesis import strategies as st
from torch import Tensor

from tests.bilevel.strategies import (
    DOUBLE,
    EPSILON,
    Sample,
    logarithmic,
    quadratics,
    ridges,
    spectrum_matrix,
)

__all__ = [
    "LinearNetwork",
    "Logistic",
    "Nest",
    "Stationary",
    "certificate_constants",
    "convex",
    "logistics",
    "make_logistic",
    "make_nest",
    "make_network",
    "make_stationary",
    "nests",
    "networks",
    "stationary_points",
]

# max |σ''|, the Lipschitz constant of σ'
LOGISTIC_THIRD = 1 / (6 * math.sqrt(3))


def normals(number: int) -> tuple[torch.Generator, Callable[..., Tensor]]:
    """A seeded generator and standard normal draws from it."""
    generator = torch.Generator().manual_seed(number)
    return generator, lambda *shape: torch.randn(*shape, generator=generator, dtype=DOUBLE)


class Logistic(Sample):
    """Logistic regression with one penalty for each group of coefficients.

    ``f = (1/n) Σ log(1 + exp(−yᵢ xᵢᵀw)) + ½ Σ_g exp(λ_g) ‖w_g‖²``; F is the logistic loss on other data plus
    ``‖Dλ‖²/2``. Its solution is certified: at a distance of at most ``‖∂f/∂w‖ / min_g exp(λ_g)`` from the true one.
    """

    def losses(self, dtype: torch.dtype = DOUBLE) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
        d = {key: value.to(dtype) for key, value in self.data.items()}

        def inner(w: Tensor, lam: Tensor) -> Tensor:
            return F.softplus(-(d["X"] @ w)).mean() + ((d["S"] @ lam).exp() * w.square()).sum() / 2

        def outer(w: Tensor, lam: Tensor) -> Tensor:
            return F.softplus(-(d["A"] @ w)).mean() + (d["D"] @ lam).square().sum() / 2

        return inner, outer

    def _gradient(self, w: Tensor, lam: Tensor) -> Tensor:
        X = self.data["X"]
        return -X.T @ torch.sigmoid(-(X @ w)) / len(X) + (self.data["S"] @ lam).exp() * w

    def _hessian(self, w: Tensor, lam: Tensor) -> Tensor:
        X = self.data["X"]
        slope = torch.sigmoid(X @ w) * torch.sigmoid(-(X @ w))
        return X.T @ (slope[:, None] * X) / len(X) + torch.diag((self.data["S"] @ lam).exp())

    @property
    def hessian(self) -> Tensor:
        return self._hessian(self.inner, self.outer)

    @property
    def mixed(self) -> Tensor:
        return ((self.data["S"] @ self.outer).exp() * self.inner)[:, None] * self.data["S"]

    @property
    def cotangent(self) -> Tensor:
        A = self.data["A"]
        return -A.T @ torch.sigmoid(-(A @ self.inner)) / len(A)

    def solution(self, lam: Tensor) -> Tensor:
        """By damped Newton steps to 1e-13; then two plain ones that autograd sees: right to the second derivative."""
        fixed, w = lam.detach(), torch.zeros(len(self.data["S"]), dtype=DOUBLE)
        loss = self.losses()[0]
        for _ in range(100):
            g = self._gradient(w, fixed)
            step, size = torch.linalg.solve(self._hessian(w, fixed), g), 1.0
            while loss(w - size * step, fixed) > loss(w, fixed) + 1e-14 and size > 1e-6:
                size /= 2
            w = w - size * step
            if float(g.norm()) <= 1e-13 * (1 + float(w.norm())):
                break
        for _ in range(2):
            w = w - torch.linalg.solve(self._hessian(w, lam), self._gradient(w, lam))
        return w


def make_logistic(groups: tuple[int, ...], rows: int, decay: float, number: int) -> Logistic:
    """Random separable or inseparable data; ``groups`` are the sizes of the groups."""
    _, normal = normals(number)
    size = sum(groups)
    S = torch.zeros(size, len(groups), dtype=DOUBLE)
    S[torch.arange(size), torch.repeat_interleave(torch.arange(len(groups)), torch.tensor(groups))] = 1
    data = {"X": normal(rows, size), "S": S, "A": normal(rows + 2, size), "D": normal(len(groups), len(groups))}
    lam = math.log(decay) + 0.5 * normal(len(groups))
    sample = Logistic("logistic", data, lam, torch.zeros(size, dtype=DOUBLE))
    return replace(sample, inner=sample.solution(lam))


class Indefinite(Sample):
    """A stationary point of any kind: what rounding does depends on the sizes of the eigenvalues."""

    def scale(self, damping: float = 0.0) -> float:
        size = float(torch.linalg.matrix_norm(self.mixed, 2)) * float(self.cotangent.norm())
        return size / float((self.eigenvalues + damping).abs().min())

    def rounding(self, damping: float = 0.0) -> float:
        sizes = (self.eigenvalues + damping).abs()
        solve = 100 * len(self.inner) * EPSILON * float(sizes.max() / sizes.min()) * self.scale(damping)
        return solve + 100 * EPSILON * (1 + float(self.direct.norm())) + 1e-300

    @property
    def kind_of_point(self) -> str:
        """``"minimum"``, ``"maximum"`` or ``"saddle"``."""
        if bool((self.eigenvalues > 0).all()):
            return "minimum"
        return "maximum" if bool((self.eigenvalues < 0).all()) else "saddle"


class LinearNetwork(Indefinite):
    """``f = ‖B A X − Y‖² / 2n + ½ Σᵢ (aᵢ ‖Aᵢ‖² + bᵢ ‖Bᵢ‖²)`` for ``w = (A, B)``, ``λ = log (a, b)`` and ``XXᵀ = nI``.

    Not convex. With ``YXᵀ/n = U diag(s) Vᵀ`` every assignment of singular triples j to hidden units i is a stationary
    point, ``Aᵢ = pᵢ Vⱼᵀ``, ``Bᵢ = qᵢ Uⱼ``: the unit's problem is ``(pq − s)²/2 + (a p² + b q²)/2``, solved by
    ``pq = s − √(ab)``, ``a p² = b q²`` where s > √(ab), and by zero always. Which kind it is the eigenvalues
    of the Hessian say. ``assignment`` holds j for each hidden unit, −1 for zero.
    """

    def _parts(self, w: Tensor) -> tuple[Tensor, Tensor]:
        hidden, inputs, outputs = len(self.data["assignment"]), len(self.data["X"]), len(self.data["Y"])
        return w[: hidden * inputs].reshape(hidden, inputs), w[hidden * inputs :].reshape(outputs, hidden)

    def losses(self, dtype: torch.dtype = DOUBLE) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
        d = {key: value.to(dtype) for key, value in self.data.items()}
        hidden = len(d["assignment"])

        def inner(w: Tensor, lam: Tensor) -> Tensor:
            A, B = self._parts(w)
            a, b = lam[:hidden].exp(), lam[hidden:].exp()
            fit = (B @ A @ d["X"] - d["Y"]).square().sum() / (2 * d["X"].shape[1])
            return fit + ((a * A.square().sum(1)).sum() + (b * B.square().sum(0)).sum()) / 2

        def outer(w: Tensor, lam: Tensor) -> Tensor:
            A, B = self._parts(w)
            return (B @ A - d["T"]).square().sum() / 2 + (d["t"] * w).sum() + (d["D"] @ lam).square().sum() / 2

        return inner, outer

    def solution(self, lam: Tensor) -> Tensor:
        U, s, Vh = torch.linalg.svd(self._target())
        hidden = len(self.data["assignment"])
        rows, columns = [], []
        for unit, triple in enumerate(self.data["assignment"].int().tolist()):
            a, b = lam[unit].exp(), lam[hidden + unit].exp()
            if triple < 0:
                rows.append(0 * a * Vh[0])
                columns.append(0 * b * U[:, 0])
                continue
            product = s[triple] - (a * b).sqrt()
            rows.append((product * (b / a).sqrt()).sqrt() * Vh[triple])
            columns.append((product * (a / b).sqrt()).sqrt() * U[:, triple])
        return torch.cat([torch.stack(rows).reshape(-1), torch.stack(columns, dim=1).reshape(-1)])

    def _target(self) -> Tensor:
        return self.data["Y"] @ self.data["X"].T / self.data["X"].shape[1]

    @property
    def hessian(self) -> Tensor:
        """``‖dB A + B dA‖² + 2⟨BA − M, dB dA⟩`` and the penalties, on row-major vectors."""
        A, B = self._parts(self.inner)
        (hidden, inputs), outputs = A.shape, len(B)
        eye = lambda size: torch.eye(size, dtype=DOUBLE)  # noqa: E731
        J = torch.cat([_kronecker(B, eye(inputs)), _kronecker(eye(outputs), A.T)], dim=1)
        H = J.T @ J
        cross = torch.einsum("kj,il->ijkl", B @ A - self._target(), eye(hidden))
        cross = cross.reshape(hidden * inputs, outputs * hidden)
        H[: hidden * inputs, hidden * inputs :] += cross
        H[hidden * inputs :, : hidden * inputs] += cross.T
        return H + torch.diag(self._penalties())

    def _penalties(self) -> Tensor:
        A, B = self._parts(self.inner)
        a, b = self.outer[: len(A)].exp(), self.outer[len(A) :].exp()
        return torch.cat([a[:, None].expand_as(A).reshape(-1), b.expand_as(B).reshape(-1)])

    @property
    def mixed(self) -> Tensor:
        A, B = self._parts(self.inner)
        units = torch.arange(len(A))
        owner = torch.cat([units[:, None].expand_as(A).reshape(-1), len(A) + units.expand_as(B).reshape(-1)])
        return F.one_hot(owner, len(self.outer)).to(DOUBLE) * (self._penalties() * self.inner)[:, None]

    @property
    def cotangent(self) -> Tensor:
        A, B = self._parts(self.inner)
        E = B @ A - self.data["T"]
        return torch.cat([(B.T @ E).reshape(-1), (E @ A.T).reshape(-1)]) + self.data["t"]


def make_network(
    inputs: int, outputs: int, assignment: tuple[int, ...], number: int, decay: float = 0.1
) -> LinearNetwork:
    """Singular values 3, 2, 1, …; penalties near ``decay``; the samples are an orthogonal design."""
    generator, normal = normals(number)
    rank, rows = min(inputs, outputs), inputs + 2
    s = torch.arange(rank, 0, -1, dtype=DOUBLE)
    U = spectrum_matrix(torch.linspace(1, 2, outputs, dtype=DOUBLE), generator)
    V = spectrum_matrix(torch.linspace(1, 2, inputs, dtype=DOUBLE), generator)
    U, V = torch.linalg.eigh(U)[1][:, :rank], torch.linalg.eigh(V)[1][:, :rank]
    X = torch.linalg.qr(normal(rows, inputs))[0].T * math.sqrt(rows)
    hidden = len(assignment)
    data = {
        "X": X,
        "Y": (U * s) @ V.T @ X + _residual(X, normal(outputs, rows)),
        "assignment": torch.tensor(assignment, dtype=DOUBLE),
        "T": normal(outputs, inputs),
        "t": normal(hidden * (inputs + outputs)),
        "D": normal(2 * hidden, 2 * hidden),
    }
    lam = math.log(decay) + 0.3 * normal(2 * hidden)
    sample = LinearNetwork("linear network", data, lam, torch.zeros(1, dtype=DOUBLE))
    return replace(sample, inner=sample.solution(lam))


def _kronecker(left: Tensor, right: Tensor) -> Tensor:
    """``torch.kron``, which refuses some strides."""
    blocks = torch.einsum("ij,kl->ikjl", left, right)
    return blocks.reshape(len(left) * len(right), left.shape[1] * right.shape[1])


def _residual(X: Tensor, noise: Tensor) -> Tensor:
    """The part of the targets that no linear map of X explains."""
    return noise - noise @ X.T @ X / X.shape[1]


class Stationary(Indefinite):
    """``f = ½ φ(z)ᵀ S φ(z)`` with ``z = w − m(λ)``, ``φ(z) = z + 0.3 sin z`` and ``m(λ) = Cλ + sin(Eλ)``.

    ``w* = m(λ)`` is stationary, of the kind that the signs of S's eigenvalues say, and φ being one-to-one the only one.
    """

    def _place(self, lam: Tensor) -> Tensor:
        return self.data["C"] @ lam + torch.sin(self.data["E"] @ lam)

    def losses(self, dtype: torch.dtype = DOUBLE) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
        d = {key: value.to(dtype) for key, value in self.data.items()}

        def inner(w: Tensor, lam: Tensor) -> Tensor:
            z = w - (d["C"] @ lam + torch.sin(d["E"] @ lam))
            image = z + 0.3 * torch.sin(z)
            return image @ (d["S"] @ image) / 2

        def outer(w: Tensor, lam: Tensor) -> Tensor:
            return (d["A"] @ w - d["t"]).square().sum() / 2 + (d["D"] @ lam).square().sum() / 2

        return inner, outer

    def solution(self, lam: Tensor) -> Tensor:
        return self._place(lam)

    @property
    def hessian(self) -> Tensor:
        return 1.3**2 * self.data["S"]

    @property
    def mixed(self) -> Tensor:
        E = self.data["E"]
        return -self.hessian @ (self.data["C"] + torch.cos(E @ self.outer)[:, None] * E)


def make_stationary(eigenvalues: tuple[float, ...], outer: int, number: int) -> Stationary:
    """A stationary point whose Hessian has 1.69 times these eigenvalues."""
    generator, normal = normals(number)
    size = len(eigenvalues)
    data = {
        "S": spectrum_matrix(torch.tensor(eigenvalues, dtype=DOUBLE), generator),
        "C": normal(size, outer),
        "E": normal(size, outer),
        "A": normal(size, size),
        "t": normal(size),
        "D": normal(outer, outer),
    }
    sample = Stationary("stationary", data, normal(outer), torch.zeros(size, dtype=DOUBLE))
    return replace(sample, inner=sample.solution(sample.outer))


@dataclass(frozen=True)
class Nest:
    """Three quadratic levels, ``λ → y*(λ) → w*(λ, y)``, the last two with closed forms.

    ``f₃ = ½ wᵀHw − wᵀ(Py + Qλ + b)``, ``f₂ = ½ yᵀKy − yᵀ(Rλ + c) + ½‖T w* − t‖² + γ Σ log cosh y``,
    ``F = ½‖A w* − s‖² + ½‖G y*‖² + ½‖Dλ‖²``. With γ = 0 all is quadratic.

    Attributes:
        data: The matrices.
        outer: λ.
        gamma: γ.
    """

    data: dict[str, Tensor]
    outer: Tensor
    gamma: float

    def lowest(self, w: Tensor, y: Tensor, lam: Tensor) -> Tensor:
        """f₃."""
        d = self.data
        return w @ (d["H"] @ w) / 2 - w @ (d["P"] @ y + d["Q"] @ lam + d["b"])

    def lowest_solution(self, y: Tensor, lam: Tensor) -> Tensor:
        """w*(λ, y), differentiable."""
        d = self.data
        return torch.linalg.solve(d["H"], d["P"] @ y + d["Q"] @ lam + d["b"])

    def middle(self, y: Tensor, lam: Tensor, respond: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """f₂ with w* computed by ``respond``."""
        d = self.data
        w = respond(y, lam)
        bend = self.gamma * (y + F.softplus(-2 * y)).sum()
        return y @ (d["K"] @ y) / 2 - y @ (d["R"] @ lam + d["c"]) + (d["T"] @ w - d["t"]).square().sum() / 2 + bend

    def middle_solution(self, lam: Tensor) -> Tensor:
        """y*(λ) by Newton's method in closed form; its last three steps are differentiable."""
        d = self.data
        W = torch.linalg.solve(d["H"], d["P"])
        curvature = d["K"] + W.T @ d["T"].T @ d["T"] @ W
        y = torch.zeros(len(d["K"]), dtype=DOUBLE)
        for place in range(43):
            at = lam if place >= 40 else lam.detach()
            residual = d["T"] @ self.lowest_solution(y, at) - d["t"]
            g = d["K"] @ y - d["R"] @ at - d["c"] + W.T @ d["T"].T @ residual + self.gamma * torch.tanh(y)
            y = y - torch.linalg.solve(curvature + self.gamma * torch.diag(1 - torch.tanh(y) ** 2), g)
        return y

    def middle_hessian(self, *, with_response: bool) -> Tensor:
        """``d²f₂/dy²`` at y*, with the response of w*, or what is left when w* is held."""
        d = self.data
        y = self.middle_solution(self.outer)
        own = d["K"] + self.gamma * torch.diag(1 - torch.tanh(y) ** 2)
        W = torch.linalg.solve(d["H"], d["P"])
        return own + W.T @ d["T"].T @ d["T"] @ W if with_response else own

    def top(self, y: Tensor, lam: Tensor, respond: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """F with w* computed by ``respond``."""
        d = self.data
        fit = (d["A"] @ respond(y, lam) - d["s"]).square().sum()
        return (fit + (d["G"] @ y).square().sum() + (d["D"] @ lam).square().sum()) / 2

    def hypergradient(self) -> Tensor:
        """``dF/dλ`` by differentiating both closed forms."""
        lam = self.outer.clone().requires_grad_()
        y = self.middle_solution(lam)
        (grad,) = torch.autograd.grad(self.top(y, lam, self.lowest_solution), lam)
        return grad


def make_nest(lowest: int, middle: int, outer: int, condition: float, gamma: float, number: int) -> Nest:
    """A random nest whose Hessians have eigenvalues in [1/condition, 1]."""
    generator, normal = normals(number)

    def positive(size: int) -> Tensor:
        exponents = torch.rand(size, generator=generator, dtype=DOUBLE)
        return spectrum_matrix(condition**-exponents, generator)

    shapes = {"P": (lowest, middle), "Q": (lowest, outer), "b": (lowest,), "R": (middle, outer), "c": (middle,)}
    shapes |= {"T": (lowest, lowest), "t": (lowest,), "A": (lowest, lowest), "s": (lowest,)}
    shapes |= {"G": (middle, middle), "D": (outer, outer)}
    data = {"H": positive(lowest), "K": positive(middle)} | {name: normal(*shape) for name, shape in shapes.items()}
    return Nest(data, normal(outer), gamma)


# Strategies


def logistics(max_groups: int = 3) -> st.SearchStrategy[Logistic]:
    """Logistic regressions of one to ``max_groups`` groups; also with fewer rows than coefficients."""
    return st.builds(
        make_logistic,
        groups=st.lists(st.integers(1, 3), min_size=1, max_size=max_groups).map(tuple),
        rows=st.integers(1, 12),
        decay=logarithmic(1e-3, 1e1),
        number=st.integers(0, 2**31 - 1),
    )


def convex(max_condition: float = 1e10) -> st.SearchStrategy[Sample]:
    """Strongly convex inner problems of every kind."""
    return st.one_of(quadratics(max_condition=max_condition), ridges(), logistics())


@st.composite
def networks(draw: st.DrawFn) -> LinearNetwork:
    """Linear networks at any of their known stationary points with an invertible Hessian."""
    inputs, outputs = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    triples = [-1, *range(min(inputs, outputs))]
    assignment = draw(st.lists(st.sampled_from(triples), min_size=1, max_size=2))
    used = [triple for triple in assignment if triple >= 0]
    assume(len(set(used)) == len(used))
    sample = make_network(inputs, outputs, tuple(assignment), draw(st.integers(0, 2**31 - 1)))
    assume(float(sample.eigenvalues.abs().min()) > 1e-3)
    return sample


@st.composite
def stationary_points(draw: st.DrawFn) -> Stationary:
    """Minima, saddle points and maxima with eigenvalues of sizes in [0.1, 10]."""
    sizes = draw(st.lists(logarithmic(0.1, 10.0), min_size=1, max_size=6))
    kind = draw(st.sampled_from(["minimum", "maximum", "saddle"]))
    if kind == "saddle":
        sizes = [size if place % 2 else -size for place, size in enumerate(sizes)]
    if kind == "maximum":
        sizes = [-size for size in sizes]
    return make_stationary(tuple(sizes), draw(st.integers(1, 4)), draw(st.integers(0, 2**31 - 1)))


def nests(max_condition: float = 1e2) -> st.SearchStrategy[Nest]:
    """Nests of three levels, quadratic or not."""
    return st.builds(
        make_nest,
        lowest=st.integers(1, 4),
        middle=st.integers(1, 4),
        outer=st.integers(1, 3),
        condition=logarithmic(1.0, max_condition),
        gamma=st.sampled_from([0.0, 1.0]),
        number=st.integers(0, 2**31 - 1),
    )


def certificate_constants(sample: Sample) -> dict[str, float]:
    """μ, ‖B‖ and the Lipschitz constants in w that an error bound needs, as a
    :class:`~bilevel.hypergrad.certificate.Certificate` names them, in closed form for convex samples.

    ``F`` does not mix λ and w, so that the direct part does not depend on w.
    """
    d = sample.data
    if sample.kind == "quadratic":
        mu, second, cross = float(sample.eigenvalues[0]), 0.0, 0.0
    else:
        decay = (d["S"] @ sample.outer).exp()
        mu, second, cross = float(decay.min()), 0.0, float(decay.max())
    slope = float(torch.linalg.matrix_norm(d["A"], 2)) ** 2
    if sample.kind == "logistic":
        second = LOGISTIC_THIRD * float(d["X"].norm(dim=1).pow(3).mean())
        slope /= 4 * len(d["A"])
    return {
        "strong_convexity": mu * (1 - 100 * EPSILON),
        "hessian_lipschitz": second,
        "mixed_lipschitz": cross,
        "cotangent_lipschitz": slope,
        "direct_lipschitz": 0.0,
    }
