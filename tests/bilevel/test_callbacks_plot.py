"""The picture of a run: what is drawn is what happened, legibly, in one whole file."""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import nn

from bilevel import Callback, Engine, EngineConfig, Problem, SolveInfo, Status, StepResult
from bilevel.callbacks import RunPlot
from bilevel.callbacks.run_drawing import draw_run
from bilevel.errors import BilevelWarning, ConfigError
from tests.bilevel.test_callbacks import engine, sgd
from tests.bilevel.test_callbacks_logs import Saves

STEPS = np.arange(1, 301)
LONG = [f"‖architecture.layers.{place}.self_attention.query.weight‖" for place in range(8)]


def run_of(steps: np.ndarray) -> dict[str, np.ndarray]:
    """A run of three levels with long names, failures, signs and scales of every kind."""
    some = np.random.default_rng(0).random(len(steps))
    return {
        "loss/architecture": np.exp(-steps / 60),
        "loss/_hyper": 1e-3 * (some - 0.5),
        "loss/a_problem_with_quite_a_long_name_indeed": 1.0 + some,
        **{f"outer/{name}": (1 + steps / 300) * place for place, name in enumerate(LONG)},
        "residual/_hyper": 10 ** (-3 - some),
        "failed/_hyper": (some < 0.3).astype(float),
        "residual/a_problem_with_quite_a_long_name_indeed": 10 ** (-1 - some),
    }


NOTHING = {name: np.full(300, math.nan) for name in run_of(STEPS)}
CONSTANT = {name: np.full(300, 0.1234567) for name in run_of(STEPS)}
GAPS = {
    name: np.where(STEPS % 7 == 0, math.nan, np.where(STEPS == 4, math.inf, v)) for name, v in run_of(STEPS).items()
}


@pytest.mark.parametrize(
    ("steps", "values"),
    [
        pytest.param(STEPS, run_of(STEPS), id="three levels"),
        pytest.param(STEPS[:1], run_of(STEPS[:1]), id="one step"),
        pytest.param(STEPS, GAPS, id="gaps", marks=pytest.mark.slow),
        pytest.param(STEPS, NOTHING, id="nothing finite"),
        pytest.param(STEPS, CONSTANT, id="constant", marks=pytest.mark.slow),
        pytest.param(STEPS * 333, run_of(STEPS), id="100,000 steps", marks=pytest.mark.slow),
    ],
)
def test_no_text_leaves_the_picture_or_touches_another(steps: np.ndarray, values: dict[str, np.ndarray]) -> None:
    figure = draw_run(steps, values, "step 300, 2 skipped, stopped: $a_1$ has not improved for 10 looks")
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    texts = [figure._suptitle]
    for axes in figure.axes:
        texts += [
            axes.title,
            axes.xaxis.label,
            *axes.texts,
            *(axes.get_legend().get_texts() if axes.get_legend() else []),
        ]
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            ticks = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
            texts += [tick.label1 for tick in ticks if low <= tick.get_loc() <= high]
    shown = [text for text in texts if text.get_visible() and text.get_text().strip()]
    boxes = [(text.get_text(), text.get_window_extent(renderer)) for text in shown]
    assert len(boxes) > 10
    for text, box in boxes:
        inside = figure.bbox.count_contains([(box.x0, box.y0), (box.x1, box.y1)])
        assert inside == 2, f"{text!r} is cut"
    for (one, first), (two, second) in itertools.combinations(boxes, 2):
        assert not first.padded(-0.5).overlaps(second.padded(-0.5)), f"{one!r} touches {two!r}"
    for axes in figure.axes:
        assert axes.get_window_extent().width > 350


def lines(figure: Figure) -> dict[str, list[tuple[list[float], list[float]]]]:
    """What is drawn: lines by panel."""
    return {
        axes.get_title(): [(list(line.get_xdata()), list(line.get_ydata())) for line in axes.get_lines()]
        for axes in figure.axes
    }


def test_losses_parameters_and_residuals_are_drawn_as_they_were(tmp_path: Path) -> None:
    class Notes(Callback):
        def __init__(self) -> None:
            self.results: list[StepResult] = []
            self.weights: list[list[float]] = []

        def on_step_end(self, engine: Engine, result: StepResult) -> None:
            self.results.append(result)
            self.weights.append(engine.problems["outer"].parameters[0].flatten().tolist())

    notes, plot = Notes(), RunPlot(tmp_path / "run.svg", every=0)
    run = engine(notes, plot)
    run.run(5)
    drawn = lines(plot.draw(run))
    steps = [1, 2, 3, 4, 5]
    assert drawn["loss of outer"] == [(steps, [result.losses["outer"] for result in notes.results])]
    assert drawn["loss of inner"] == [(steps, [result.losses["inner"] for result in notes.results])]
    assert drawn["outer parameters"] == [(steps, list(column)) for column in zip(*notes.weights, strict=True)]
    residuals = [result.solves["inner"].residual for result in notes.results]
    assert drawn["relative residual of the solves"] == [(steps, residuals)]


@pytest.mark.parametrize(
    ("module", "labels"),
    [
        (nn.ParameterList([torch.tensor(0.5), torch.ones(2)]), ["outer.0", "outer.1[0]", "outer.1[1]"]),
        (nn.Linear(3, 3), ["‖outer.weight‖", "‖outer.bias‖"]),
        (nn.ParameterList([torch.ones(2) for _ in range(9)]), ["‖outer‖"]),
    ],
)
def test_outer_parameters_are_drawn_one_by_one_where_few(module: nn.Module, labels: list[str], tmp_path: Path) -> None:
    class Outer(Problem):
        def loss(self, batch: Any) -> torch.Tensor:
            return (self.inner.module.weight - 1.0).square().sum()

    class Inner(Problem):
        def loss(self, batch: Any) -> torch.Tensor:
            target = sum(p.sum() for p in self.outer.module.parameters())
            return (self.module.weight - target).square().sum() / 2

    plot = RunPlot(tmp_path / "run.svg", every=0)
    problems = [Outer(module, optimizer=sgd), Inner(nn.Linear(1, 1), optimizer=sgd)]
    run = Engine(problems, EngineConfig(progress=False), "identity", callbacks=[plot])
    run.run(1)
    values = [p.detach() for p in module.parameters()]
    expected = {
        3: [value for p in values for value in p.flatten().tolist()],
        2: [p.norm().item() for p in values],
        1: [torch.cat([p.flatten() for p in values]).norm().item()],
    }[len(labels)]
    assert [name.removeprefix("outer/") for name in plot.history if name.startswith("outer/")] == labels
    assert [plot.history[f"outer/{label}"][0] for label in labels] == pytest.approx(expected)
    # Nothing is solved: no such panel.
    assert [axes.get_title() for axes in plot.draw(run).axes] == ["loss of outer", "loss of inner", "outer parameters"]


def test_axes_are_logarithmic_where_that_makes_sense() -> None:
    figure = draw_run(STEPS, run_of(STEPS), "")
    scales = [(axes.get_title(), axes.get_yscale()) for axes in figure.axes]
    assert [scale for _, scale in scales] == ["log", "linear", "linear", "linear", "log"], scales


def test_what_is_not_finite_is_a_gap_and_counted() -> None:
    axes = draw_run(STEPS, GAPS, "").axes[0]
    assert axes.get_title() == "loss of architecture (43 skipped or not finite)"
    gaps = np.isnan(np.asarray(axes.get_lines()[0].get_ydata(), dtype=float))
    np.testing.assert_array_equal(STEPS[gaps], [step for step in STEPS if step % 7 == 0 or step == 4])


def test_failed_solves_are_crossed() -> None:
    axes = draw_run(STEPS, run_of(STEPS), "").axes[-1]
    crosses = [line for line in axes.get_lines() if line.get_marker() == "x"]
    failed = STEPS[run_of(STEPS)["failed/_hyper"] == 1]
    assert [list(line.get_xdata()) for line in crosses] == [list(failed)]
    assert [text.get_text() for text in axes.get_legend().get_texts()][:2] == [" _hyper", "failed"]


def test_a_failed_solve_of_a_run_is_crossed(tmp_path: Path) -> None:
    plot = RunPlot(tmp_path / "run.svg", every=0)
    run = engine(plot)
    result = run.step()
    failed = dataclasses.replace(result, step=2, solves={"inner": SolveInfo(Status.DIVERGED, residual=2.0)})
    plot.on_step_end(run, failed)
    panel = plot.draw(run).axes[-1]
    crosses = [line for line in panel.get_lines() if line.get_marker() == "x"]
    assert [(list(line.get_xdata()), list(line.get_ydata())) for line in crosses] == [([2], [2.0])]


def test_long_labels_stay_different() -> None:
    legend = draw_run(STEPS, run_of(STEPS), "").axes[-2].get_legend()
    texts = [text.get_text() for text in legend.get_texts()]
    assert len(set(texts)) == 8
    assert all(f".{place}." in text and len(text) <= 32 for place, text in enumerate(texts))


@pytest.mark.parametrize("suffix", ["svg", "png", pytest.param("pdf", marks=pytest.mark.slow)])
def test_a_resumed_run_leaves_the_same_file(suffix: str, tmp_path: Path) -> None:
    def run(name: str) -> Engine:
        return engine(RunPlot(tmp_path / f"{name}.{suffix}", every=0), Saves(tmp_path / "state", 3))

    run("whole").run(6)
    run("parts").run(5)
    resumed = run("parts")
    resumed.load(tmp_path / "state")
    resumed.run(3)
    assert (tmp_path / f"parts.{suffix}").read_bytes() == (tmp_path / f"whole.{suffix}").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"parts.{suffix}", "state", f"whole.{suffix}"]


def test_it_is_drawn_during_the_run_but_takes_no_more_than_its_share(tmp_path: Path, monkeypatch: Any) -> None:
    times = {"now": 0.0, "drawing": 0.0}
    monkeypatch.setattr("bilevel.callbacks.run_plot.time.monotonic", lambda: times["now"])
    drawn: list[int] = []

    class Slow(RunPlot):
        def draw(self, engine: Engine) -> Figure:
            drawn.append(engine.step_count)
            times["now"] += times["drawing"]
            return Figure()

    run = engine(Slow(tmp_path / "run.svg", every=10))
    for times["drawing"], expected in ((0.0, [10, 20, 30, 40, 50]), (1.0, [60, 80, 100])):
        drawn.clear()
        for _ in range(50):
            times["now"] += 1.0
            run.step()
        assert drawn == expected  # 20 times its own duration passes from one to the next


def test_ranks_above_zero_draw_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bilevel.distributed.rank", lambda: 1)
    engine(RunPlot(tmp_path / "run.svg", every=1)).run(2)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_written_ends_no_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    run = engine(RunPlot(tmp_path / "file" / "run.svg", every=1))
    with pytest.warns(BilevelWarning, match="RunPlot cannot write") as said:
        run.run(3)
    assert (run.step_count, len(said)) == (3, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "RunPlot needs a path, or display=True"),
        ({"path": "run.gif"}, r"RunPlot.path must end in .svg, .png, .pdf, not 'run.gif'"),
        ({"path": "run.svg", "every": -1}, "RunPlot.every must be an integer of at least 0"),
    ],
)
def test_settings_are_checked_when_made(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RunPlot(**arguments)


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_notebook_shows_one_picture_that_is_updated(tmp_path: Path) -> None:
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    code = (
        "import bilevel.callbacks.run_plot\n"
        "bilevel.callbacks.run_plot.SHARE_OF_TIME = 1e9\n"
        "from tests.bilevel.test_callbacks import engine\n"
        "engine(bilevel.callbacks.RunPlot(every=1, display=True)).run(3)\n"
    )
    cells = [nbformat.v4.new_code_cell(code)]
    notebook = nbformat.v4.new_notebook(cells=cells)
    resources = {"metadata": {"path": str(Path(__file__).parents[2])}}
    nbclient.NotebookClient(notebook, timeout=100, kernel_name="python3", resources=resources).execute()
    pictures = [output for output in notebook.cells[0].outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 1
