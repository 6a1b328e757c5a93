"""JAXopt's side of the comparison. Runs in an environment of its own, on problems that a folder holds as arrays.

    python benchmarks/differential/jaxopt_side.py FOLDER

Writes ``FOLDER/jaxopt.json``: for each problem and linear solver the hypergradient by ``custom_root``, and the Hessian
of the outer objective by differentiating twice. It shares no code with the library that it is compared with.
"""

import functools
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxopt import implicit_diff, linear_solve

jax.config.update("jax_enable_x64", True)

SOLVERS = {
    "cg": functools.partial(linear_solve.solve_cg, tol=1e-14, maxiter=500),
    "normal_cg": functools.partial(linear_solve.solve_normal_cg, tol=1e-14, maxiter=500),
    "gmres": functools.partial(linear_solve.solve_gmres, tol=1e-14, maxiter=500),
    "bicgstab": functools.partial(linear_solve.solve_bicgstab, tol=1e-14, maxiter=500),
    "lu": linear_solve.solve_lu,
}


def losses(kind, d):
    """The inner and the outer loss of a family, written for jax."""

    def squares(w, lam):
        return jnp.sum((d["A"] @ w - d["t"]) ** 2) / 2 + jnp.sum((d["D"] @ lam) ** 2) / 2

    if kind == "quadratic":
        return lambda w, lam: w @ d["H"] @ w / 2 - w @ (d["C"] @ lam + d["b"]), squares
    if kind == "ridge":

        def ridge(w, lam):
            fit = jnp.sum((d["X"] @ w - d["y"]) ** 2) / (2 * len(d["y"]))
            return fit + jnp.sum(jnp.exp(d["S"] @ lam) * w**2) / 2

        return ridge, squares
    if kind == "logistic":

        def logistic(w, lam):
            return jnp.mean(jax.nn.softplus(-(d["X"] @ w))) + jnp.sum(jnp.exp(d["S"] @ lam) * w**2) / 2

        return logistic, lambda w, lam: jnp.mean(jax.nn.softplus(-(d["A"] @ w))) + jnp.sum((d["D"] @ lam) ** 2) / 2
    if kind == "stationary":

        def stationary(w, lam):
            z = w - (d["C"] @ lam + jnp.sin(d["E"] @ lam))
            image = z + 0.3 * jnp.sin(z)
            return image @ d["S"] @ image / 2

        return stationary, squares
    hidden, inputs = len(d["assignment"]), len(d["X"])

    def parts(w):
        return w[: hidden * inputs].reshape(hidden, inputs), w[hidden * inputs :].reshape(-1, hidden)

    def network(w, lam):
        A, B = parts(w)
        fit = jnp.sum((B @ A @ d["X"] - d["Y"]) ** 2) / (2 * d["X"].shape[1])
        a, b = jnp.exp(lam[:hidden]), jnp.exp(lam[hidden:])
        return fit + (jnp.sum(a * jnp.sum(A**2, 1)) + jnp.sum(b * jnp.sum(B**2, 0))) / 2

    def outer(w, lam):
        A, B = parts(w)
        return jnp.sum((B @ A - d["T"]) ** 2) / 2 + jnp.sum(d["t"] * w) + jnp.sum((d["D"] @ lam) ** 2) / 2

    return network, outer


@functools.partial(jax.jit, static_argnames=("kind", "solver", "order"))
def derivative(d, *, kind, solver, order):
    """The hypergradient by one solver, or (order 2) the Hessian of the outer objective."""
    inner, outer = losses(kind, d)
    # The solution is a constant here: only the implicit function theorem knows how it moves.
    solution = implicit_diff.custom_root(jax.grad(inner), solve=SOLVERS[solver])(lambda start, lam: d["inner"])
    grad = jax.grad(lambda lam: outer(solution(None, lam), lam))
    return (grad if order == 1 else jax.jacrev(grad))(d["outer"])


def answers(kind, d):
    """Returns what every solver makes of one problem."""
    found = {}
    for solver in SOLVERS:
        found[solver] = {"grad": derivative(d, kind=kind, solver=solver, order=1).tolist()}
        if solver in ("cg", "lu"):
            found[solver]["hessian"] = derivative(d, kind=kind, solver=solver, order=2).tolist()
    return found


def main(folder):
    """Reads every problem of a folder and writes the answers."""
    results = {}
    for path in sorted(folder.glob("*.npz")):
        with np.load(path) as arrays:
            data = {name: jnp.asarray(array) for name, array in arrays.items() if name != "kind"}
            results[path.stem] = answers(str(arrays["kind"]), data)
    (folder / "jaxopt.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
