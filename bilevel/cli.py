"""The command line: ``bilevel run | check | methods``."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import sys
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TextIO

import numpy as np
import torch
import typer
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from bilevel.callbacks import Checkpoints
from bilevel.check import REFERENCES, hypergradcheck
from bilevel.config import RunConfig, dump_config, load_config
from bilevel.engine import Engine
from bilevel.engine_state import resume_engine
from bilevel.errors import BilevelError, ConfigError
from bilevel.hypergrad import Estimator, as_estimator, available_methods
from bilevel.recipe import Recipe, RecipeError, load_recipe, place_in
from bilevel.result import StepResult

__all__ = ["app", "main"]

CHECK_FAILED = 1
USER_ERROR = 2
INTERRUPTED = 130

app = typer.Typer(
    help="Nested optimisation with interchangeable hypergradients.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

RecipePath = Annotated[
    Path, typer.Argument(metavar="RECIPE.py", help="A Python file that defines build(config) -> Engine.")
]
ConfigPath = Annotated[
    Path | None,
    typer.Option("--config", "-c", metavar="FILE", help="Settings as TOML, YAML or JSON.", show_default=False),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="KEY.SUB=VALUE", help="Overrides one setting; repeatable.", show_default=False),
]
Seed = Annotated[
    int | None,
    typer.Option(help="Short for --set engine.seed=…; seeds torch, NumPy and Python too.", show_default=False),
]
_REFERENCE_HELP = (
    "exact: the dense inner Hessian at the parameters as they are, which judges the method alone. unrolled: gradient "
    "steps to the inner solution, differentiated. central_difference: the inner problem solved again for changed outer "
    "parameters. The last two also judge how well the inner problem is solved."
)
Debug = Annotated[bool, typer.Option("--debug", help="Show the whole traceback of an error.")]


@app.command()
def run(
    recipe: RecipePath,
    config: ConfigPath = None,
    overrides: Overrides = None,
    steps: Annotated[int | None, typer.Option(help="Short for --set engine.steps=…", show_default=False)] = None,
    seed: Seed = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for state, settings and summary.", show_default=False)
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Write into an output folder that exists.")] = False,
    checkpoints: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Where to save complete states.", show_default=False)
    ] = None,
    every: Annotated[int, typer.Option(min=1, help="Outer steps from one checkpoint to the next.")] = 100,
    keep: Annotated[int, typer.Option(min=1, help="How many checkpoints stay.")] = 3,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest good checkpoint, up to engine.steps in total.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Trains what a recipe builds."""
    with _reported(debug, recipe):
        if resume and checkpoints is None:
            raise ConfigError("--resume needs --checkpoints FOLDER, which says what to go on from")
        shortcuts = {"engine.steps": steps, "engine.seed": seed}
        made, settings = _settings(recipe, config, overrides, shortcuts)
        folder = None if output is None else _Folder(output, overwrite or resume)
        engine = _build(made, settings)
        if checkpoints is not None:
            engine.callbacks = (*engine.callbacks, Checkpoints(checkpoints, every=every, keep=keep))
            if resume and _resumed(engine, checkpoints) >= engine.config.steps:
                return
        if folder is not None:
            folder.write_settings(settings)
        started = time.perf_counter()
        try:
            with made.located():
                result = engine.run(engine.config.steps - engine.step_count if resume else None)
        except BaseException:
            if folder is not None and engine.step_count:
                folder.write_state(engine)
                _messages().print(Text(f"state after step {engine.step_count} saved in {folder.path}"), soft_wrap=True)
            raise
        seconds = time.perf_counter() - started
        if folder is not None:
            folder.write_state(engine)
        with made.located():
            metrics = engine.evaluate()
        if folder is not None:
            folder.write_summary(engine, result, metrics)
        _print_summary(engine, result, metrics, seconds, folder, checkpoints)


@app.command()
def check(
    recipe: RecipePath,
    config: ConfigPath = None,
    overrides: Overrides = None,
    seed: Seed = None,
    after: Annotated[int, typer.Option(min=0, help="Outer steps to take before the check.")] = 0,
    reference: Annotated[str, typer.Option("--reference", "-r", metavar="NAME", help=_REFERENCE_HELP)] = REFERENCES[0],
    rtol: Annotated[float, typer.Option(help="Largest relative error that passes.")] = 1e-3,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    debug: Debug = False,
) -> None:
    """Compares a recipe's hypergradient with a reference; exit code 1 unless it is within --rtol."""
    with _reported(debug, recipe):
        made, settings = _settings(recipe, config, overrides, {"engine.seed": seed})
        engine = _build(made, settings)
        with made.located():
            if after:
                engine.run(after)
            report = hypergradcheck(engine, reference=reference, rtol=rtol)
        text = json.dumps(report.describe(), indent=2, ensure_ascii=False) if as_json else str(report)
        Console(soft_wrap=True).print(text, markup=False, highlight=False)
        if not report.passed:
            raise typer.Exit(CHECK_FAILED)


@app.command()
def methods(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="[NAME]...", help="Show the fields of these methods.", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Lists the methods: what each is for, its cost in passes, its memory and its needs; with NAME, also its fields."""
    with _reported(False):
        found = available_methods()
        if names:
            found = {cls.name: cls for cls in (type(as_estimator(name)) for name in names)}
        if as_json:
            described = {name: _describe(cls) for name, cls in found.items()}
            print(json.dumps(described, indent=2, ensure_ascii=False, default=str))
            return
        console = Console()
        console.print(_method_table(found, fields=bool(names)))
        if names:
            console.print(
                "Choose with  --set hypergradient.method=NAME --set hypergradient.FIELD=VALUE", highlight=False
            )
        else:
            console.print("Fields and defaults:  bilevel methods NAME", highlight=False)


def _method_table(found: Mapping[str, type[Estimator]], *, fields: bool) -> Table:
    table = Table(show_lines=True, expand=False)
    table.add_column("method and fields" if fields else "method", no_wrap=True)
    table.add_column("what it computes, what for, and at which price")
    for name, cls in found.items():
        shown = "".join(f"\n  {key} = {value!r}" for key, value in _defaults(cls).items()) if fields else ""
        parts: list[tuple[str, str]] = [("for    ", cls.purpose), ("cost   ", cls.cost), ("memory ", cls.storage)]
        text = Text(cls.summary, overflow="fold")
        for label, value in (*parts, ("needs  ", cls.needs)):
            if value:
                text.append("\n").append(label, "dim").append(value)
        table.add_row(Text.assemble((name, "bold"), shown), text)
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line; leaves by ``SystemExit`` with 0, 2 for an error of the user's, or 130 when interrupted."""
    app(args=None if arguments is None else list(arguments), prog_name="bilevel")


def _settings(
    recipe: Path, config: Path | None, overrides: Sequence[str] | None, shortcuts: Mapping[str, int | None]
) -> tuple[Recipe, RunConfig[Any]]:
    made = load_recipe(recipe)
    short = [f"{key}={value}" for key, value in shortcuts.items() if value is not None]
    settings: RunConfig[Any] = load_config(config, [*(overrides or ()), *short], made.schema, defaults=made.defaults)
    return made, settings


def _build(made: Recipe, settings: RunConfig[Any]) -> Engine:
    # Models are initialised in build(), and what a recipe draws from any generator is drawn alike the next time.
    torch.manual_seed(settings.engine.seed)
    np.random.seed(settings.engine.seed % 2**32)
    random.seed(settings.engine.seed)
    engine = made.build(settings)
    used = dump_config(engine.config)
    unused = [f"engine.{key}" for key, value in dump_config(settings.engine).items() if used[key] != value]
    if settings.hypergradient not in (engine.hypergradient_method, *engine.estimators.values()):
        unused.append("hypergradient")
    if unused:
        warnings.warn(
            f"{made.path}: the engine that build() returned does not run with the settings {', '.join(unused)}; "
            "pass config.engine and config.hypergradient to Engine",
            stacklevel=2,
        )
    return engine


def _resumed(engine: Engine, folder: Path) -> int:
    """Loads the newest good checkpoint, says so, and returns how many steps have been taken."""
    found, total = resume_engine(engine, folder), engine.config.steps
    if found is None:
        text = f"no checkpoint in {folder}: starting at step 0"
    elif found < total:
        text = f"resumed after step {found} of {total} from {folder}"
    else:
        text = f"nothing left to do: {found} of {total} steps have been taken, as {folder} says"
    _messages().print(Text(text), soft_wrap=True)
    return found or 0


class _Folder:
    """Where a run's files go."""

    def __init__(self, path: Path, overwrite: bool) -> None:
        if path.exists() and not path.is_dir():
            raise ConfigError(f"--output {path} is a file: name a folder")
        if path.is_dir() and any(path.iterdir()) and not overwrite:
            raise ConfigError(f"--output {path} exists and is not empty: name another folder, or add --overwrite")
        self.path = path

    def write_settings(self, settings: RunConfig[Any]) -> None:
        """Written before the run, so that a folder that cannot be written to costs no time."""
        self._write("config.json", dump_config(settings))

    def write_state(self, engine: Engine) -> None:
        engine.save(self.path / "state.safetensors")

    def write_summary(self, engine: Engine, result: StepResult, metrics: Mapping[str, float]) -> None:
        solves = {name: info.explain() for name, info in result.solves.items()}
        last = {"losses": dict(result.losses), "gradient_norms": dict(result.gradient_norms), "solves": solves}
        passes = {"forward": engine.passes.forward, "backward": engine.passes.backward}
        self._write("summary.json", {"steps": engine.step_count, **last, "metrics": dict(metrics), "passes": passes})

    def _write(self, name: str, content: Mapping[str, Any]) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            (self.path / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"--output {self.path} cannot be written to: {error.strerror or error}") from error


def _print_summary(
    engine: Engine,
    result: StepResult,
    metrics: Mapping[str, float],
    seconds: float,
    folder: _Folder | None,
    checkpoints: Path | None,
) -> None:
    console = Console()
    table = Table(title=f"after step {engine.step_count}", title_justify="left")
    for heading in ("problem", "loss", "‖gradient‖", "method", "status", "residual"):
        table.add_column(heading, justify="right" if heading in ("loss", "‖gradient‖", "residual") else "left")
    for name in engine.problems:
        info = result.solves.get(name)
        solve = ("", "", "")
        if info is not None:
            residual = "" if math.isnan(info.residual) else f"{info.residual:.1e}"
            solve = (info.method, info.status.shown or "–", residual)
        loss, size = (values.get(name, math.nan) for values in (result.losses, result.gradient_norms))
        table.add_row(name, f"{loss:.4g}", f"{size:.2e}", *solve)
    console.print(table)
    lines = Table.grid(padding=(0, 2, 0, 0))
    for key, value in metrics.items():
        lines.add_row(Text(key), f"{value:.4g}")
    lines.add_row("passes", f"{engine.passes.forward} forward, {engine.passes.backward} backward")
    lines.add_row("seconds", f"{seconds:.1f}")
    if engine.skipped_steps:
        lines.add_row("skipped steps", str(engine.skipped_steps))
    places = [str(path) for path in (folder and folder.path, checkpoints) if path]
    lines.add_row("saved in", Text(", ".join(places)) if places else "nowhere: add --output FOLDER")
    console.print(lines)


def _defaults(cls: type[Estimator]) -> dict[str, Any]:
    return {name: "required" if default is dataclasses.MISSING else default for name, default in cls.defaults().items()}


def _describe(cls: type[Estimator]) -> dict[str, Any]:
    return {
        "fields": _defaults(cls),
        "summary": cls.summary,
        "purpose": cls.purpose,
        "cost": cls.cost,
        "memory": cls.storage,
        "needs": cls.needs,
        "needs_double_backward": cls.needs_double_backward,
        "needs_trajectory": cls.needs_trajectory,
    }


def _messages() -> Console:
    return Console(stderr=True)


@contextmanager
def _reported(debug: bool, recipe: Path | None = None) -> Iterator[None]:
    """Turns errors into one panel and an exit code, and warnings into a line."""
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            yield
        except BilevelError as error:
            if debug:
                traceback.print_exc()
            else:
                _print_error(error, recipe)
            raise typer.Exit(USER_ERROR) from error
        except KeyboardInterrupt:
            _messages().print("interrupted")
            raise typer.Exit(INTERRUPTED) from None


def _print_error(error: BilevelError, recipe: Path | None) -> None:
    lines = [Text(str(error))]
    place = "" if recipe is None or isinstance(error, RecipeError) else place_in(recipe, error)
    if place:
        lines.append(Text(f"raised from {place}", "dim"))
    if isinstance(error, RecipeError):
        lines.append(Text("--debug shows the traceback", "dim"))
    title = type(error).__name__.lstrip("_")
    _messages().print(Panel(Text("\n").join(lines), title=title, title_align="left", border_style="red"))


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    _messages().print(Text.assemble(("warning: ", "yellow"), str(message)), soft_wrap=True)


if __name__ == "__main__":
    main(sys.argv[1:])
