"""The architecture, enforced: who imports whom, and which names are public."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Lowest first. A module imports from layers below its own and from its own package, never sideways or upward.
LAYERS = (
    ("errors", "precision", "randomness", "result", "vector"),
    ("interrupt",),
    ("checkpoint", "data", "double_backward", "faults", "hooks", "optim", "optimizer_state", "slots"),
    ("sources", "structure", "validation"),
    ("engine_state", "feed", "functional", "loss_scale", "stepper"),
    ("distributed", "linear", "products"),
    ("compiled",),
    ("hypergrad",),
    ("implicit_function", "single_loop"),
    ("argmin", "callbacks", "problems", "schema", "settings"),
    ("levels",),
    ("config", "notices", "planning", "policy", "snapshot", "step"),
    ("engine",),
    ("recipe",),
    ("check", "interop"),
    ("cli",),
)
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}

PUBLIC = {
    "AmIGO",
    "Automatic",
    "BOME",
    "BilevelError",
    "Callback",
    "Certificate",
    "ConjugateGradient",
    "Engine",
    "EngineConfig",
    "Estimator",
    "Exact",
    "F2SA",
    "FSLA",
    "FiniteDifference",
    "GMRES",
    "Hypergradient",
    "Identity",
    "MINRES",
    "Neumann",
    "Nystrom",
    "OneStep",
    "PZOBO",
    "Problem",
    "RunConfig",
    "SAMA",
    "SOBA",
    "SolveInfo",
    "Status",
    "StepResult",
    "StocBiO",
    "TTSA",
    "Unrolled",
    "argmin",
    "as_estimator",
    "dump_config",
    "hypergradcheck",
    "hypergradient",
    "load_config",
}
PUBLIC_MODULES = (
    "bilevel",
    "bilevel.errors",
    "bilevel.callbacks",
    "bilevel.hypergrad",  # what a method or a response of one's own is made of: docs/extending.md
    "bilevel.interop.betty",
    "bilevel.validation",
)


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imports(path: Path) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yields (module, names) of every import that runs; those for a type checker only do not."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    guarded = {
        id(part)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for statement in node.body
        for part in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if id(node) in guarded:
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, ()) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield str(node.module), tuple(alias.name for alias in node.names)


def is_module(dotted: str) -> bool:
    path = ROOT.joinpath(*dotted.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def units(module: str, names: tuple[str, ...]) -> Iterator[str]:
    """Yields the top-level parts of ``bilevel`` that an import reaches; "" for the package itself."""
    parts = module.split(".")
    if parts[0] != "bilevel":
        return
    if len(parts) > 1:
        yield parts[1]
        return
    for name in names or ("",):
        yield name if is_module(f"bilevel.{name}") else ""


def unit_of(path: Path) -> str:
    return path.relative_to(ROOT / "bilevel").parts[0].removesuffix(".py")


def test_every_module_has_a_place() -> None:
    found = {unit_of(path) for path in sources("bilevel")} - {"__init__"}
    assert found <= set(RANK), f"give them a place in LAYERS: {sorted(found - set(RANK))}"


@pytest.mark.parametrize("path", sources("bilevel"), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_strictly_downward(path: Path) -> None:
    own = unit_of(path)
    if own == "__init__":
        return
    for module, names in imports(path):
        for unit in units(module, names):
            assert unit, f"{path}: imports the package itself, which imports everything: {module} {names}"
            assert unit == own or RANK[unit] < RANK[own], f"{own} imports {unit}, which is not below it"


@pytest.mark.parametrize("forbidden", ["bidora", "peft", "transformers", "accelerate", "datasets", "sklearn"])
def test_bilevel_needs_nothing_of_bidoras(forbidden: str) -> None:
    for path in sources("bilevel"):
        for module, _ in imports(path):
            assert module.partition(".")[0] != forbidden, f"{path} imports {module}"


def test_importing_bilevel_loads_nothing_heavy() -> None:
    heavy = {"betty", "bidora", "peft", "transformers", "matplotlib", "torchdata", "tensorboard", "wandb"}
    code = f"import sys, bilevel.cli; print(*{heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_bidora_uses_public_names_only() -> None:
    for path in sources("bidora"):
        for module, names in imports(path):
            if module.partition(".")[0] != "bilevel":
                continue
            assert module in PUBLIC_MODULES, f"{path} imports {module}, which is not public"
            assert names, f"{path}: write from {module} import …, so that the names can be checked"
            unknown = set(names) - set(importlib.import_module(module).__all__)
            assert not unknown, f"{path} imports {sorted(unknown)} from {module}, which are not public"


def test_public_names_are_pinned() -> None:
    bilevel = importlib.import_module("bilevel")
    assert set(bilevel.__all__) == PUBLIC


@pytest.mark.parametrize("module", PUBLIC_MODULES)
def test_public_names_exist_and_are_documented(module: str) -> None:
    loaded = importlib.import_module(module)
    for name in loaded.__all__:
        assert getattr(loaded, name).__doc__, f"{module}.{name} has no docstring"


def test_the_package_root_holds_re_exports_and_nothing_else() -> None:
    tree = ast.parse((ROOT / "bilevel" / "__init__.py").read_text(encoding="utf-8"))
    for node in tree.body:
        is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        is_all = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
        assert is_docstring or is_all or isinstance(node, ast.ImportFrom), ast.unparse(node)
