"""What the guide to BiDoRA says of messages, files, costs and the ΔM/ΔD plot is what happens."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from benchmarks.pages.decomposition import FOLDER, kept, tabulated
from benchmarks.tutorials.study import with_results
from bidora import BiDoRAConfig, BiDoRATrainer, BiDoRATrainingArguments, get_bidora_model, weight_decomposition
from bidora.analysis import LayerChange, WeightDecomposition
from bidora.data import load_text_data
from bidora.report import draw_decomposition
from bidora.settings import TrainSettings
from bilevel.errors import BilevelError, ConfigError
from tests.bidora.commands import TINY
from tests.bidora.commands import run as command

pytestmark = pytest.mark.filterwarnings("ignore::bilevel.errors.BilevelWarning")  # a transformer is not convex

PAGE = Path(__file__).resolve().parents[2] / "docs" / "bidora.md"
GUIDE = PAGE.read_text(encoding="utf-8")


def section(title: str) -> str:
    return re.split(r"^## ", GUIDE.split(f"\n## {title}\n")[1], flags=re.M)[0]


def table(text: str) -> list[list[str]]:
    return [line.strip("| ").split(" | ") for line in text.splitlines() if re.match(r"\| (?!---)", line)][1:]


def rows(**changes: Any) -> list[dict[str, Any]]:
    return [{"input_ids": [1 + k % 2, 5, 6], "labels": k % 2, **changes} for k in range(20)]


def trainer(model: Any, folder: Path, data: list[dict[str, Any]] | None = None, **settings: Any) -> BiDoRATrainer:
    small = {"search_steps": 2, "max_steps": 3, "per_device_train_batch_size": 4, "save_strategy": "no", "seed": 1}
    quiet = {"report_to": [], "disable_tqdm": True, "use_cpu": True}
    return BiDoRATrainer(
        model, BiDoRATrainingArguments(str(folder), **{**small, **quiet, **settings}), train_dataset=data or rows()
    )


def adapted(make_bert: Callable[..., Any]) -> Any:
    return get_bidora_model(make_bert(num_labels=2), BiDoRAConfig(task_type="SEQ_CLS", r=2, lora_alpha=4))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "demo"
    assert command("train", "--output", folder, *TINY, "--compare") == 0
    return folder


# Troubleshooting


def text_file(folder: Path, text: str) -> None:
    (folder / "texts.csv").write_text(text, encoding="utf-8")
    load_text_data(folder / "texts.csv")


def targets(make_bert: Callable[..., Any], folder: Path) -> None:
    get_bidora_model(make_bert(), BiDoRAConfig(task_type="SEQ_CLS", target_modules=["querry"]))


def labels(make_bert: Callable[..., Any], folder: Path) -> None:
    trainer(adapted(make_bert), folder, rows(labels=2)).train()


def plain_peft(make_bert: Callable[..., Any], folder: Path) -> None:
    config = LoraConfig(task_type="SEQ_CLS", use_dora=True, target_modules=["query"])
    trainer(get_peft_model(make_bert(num_labels=2), config), folder).train()


def nan(make_bert: Callable[..., Any], folder: Path) -> None:
    made = trainer(get_peft_model(make_bert(num_labels=2), LoraConfig(task_type="SEQ_CLS")), folder, method="lora")
    made.compute_loss = lambda model, inputs, **_: model(**inputs).loss * float("nan")  # type: ignore[method-assign]
    made.train()


def numbers(make_bert: Callable[..., Any], folder: Path) -> None:
    text_file(folder, "text,label\n" + "".join(f"a{k},{0.37 + k}\n" for k in range(6)))


def gaps(make_bert: Callable[..., Any], folder: Path) -> None:
    text_file(folder, "text,label\na,1\nb,0\n,1\n")


def header(make_bert: Callable[..., Any], folder: Path) -> None:
    text_file(folder, "words,kind\na,1\nb,0\n")


def float16(make_bert: Callable[..., Any], folder: Path) -> None:
    BiDoRATrainingArguments(str(folder), use_cpu=True, gradient_accumulation_steps=2)


def merging(make_bert: Callable[..., Any], folder: Path) -> None:
    raise NotImplementedError  # see below: it takes an adapter


PROVOKED: dict[str, Callable[[Callable[..., Any], Path], None]] = {
    "target_modules": targets,
    "none of the columns": header,
    "holds the number": numbers,
    "cells are empty": gaps,
    "expected labels": labels,
    "method 'bidora' does not support": float16,
    "has no active layer": plain_peft,
    "the loss is nan": nan,
    "merging changed": merging,
}
MESSAGES = [row[0].strip("`") for row in table(section("Troubleshooting")) if row[0].startswith("`")]


def test_every_message_of_the_guide_is_provoked() -> None:
    assert [message for message in MESSAGES if not message.startswith(tuple(PROVOKED))] == []
    assert len(MESSAGES) == len(PROVOKED)


@pytest.mark.parametrize("message", [message for message in MESSAGES if not message.startswith("merging")])
def test_messages_are_those_of_the_guide(message: str, make_bert: Callable[..., Any], tmp_path: Path) -> None:
    provoke = next(function for start, function in PROVOKED.items() if message.startswith(start))
    with pytest.raises(BilevelError, match=".*".join(map(re.escape, message.split("…")))):
        provoke(make_bert, tmp_path)


def test_a_merge_that_would_change_outputs_writes_nothing(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft import PeftModel

    def spoilt(model: PeftModel) -> Any:
        base = model.unload()
        with torch.no_grad():
            base.classifier.bias += 1.0
        return base

    monkeypatch.setattr(PeftModel, "merge_and_unload", spoilt, raising=False)
    message = next(message for message in MESSAGES if message.startswith("merging"))
    with pytest.raises(ConfigError, match=re.escape(message)):
        command("merge", run / "adapter", "--output", run / "spoilt", "--debug")
    assert not (run / "spoilt").exists()


def test_rows_with_gaps_are_left_out_where_the_guide_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = "".join(f"{('good', 'bad')[k % 2]} text,{k % 2}\n" for k in range(30))
    (tmp_path / "texts.csv").write_text(f"text,label\n{lines},1\n", encoding="utf-8")
    words = ["train", "--data", tmp_path / "texts.csv", "--output", tmp_path / "run", "--method", "lora", *TINY]
    assert command(*words) == 2
    assert "drop_missing" in capsys.readouterr().err
    assert command(*words, "--set", "drop_missing=true") == 0
    assert command("evaluate", tmp_path / "run" / "adapter") == 0  # which reads the same rows
    assert "6 test rows" in capsys.readouterr().out


@pytest.mark.parametrize("setting", ["validation_fraction=1.0", "orthogonality=-1", "magnitude_learning_rate=-0.1"])
def test_settings_are_refused_before_anything_is_loaded(setting: str) -> None:
    name, _, value = setting.partition("=")
    with pytest.raises(ConfigError, match=f"{name} must be"):
        TrainSettings(model="none", **{name: float(value)})  # type: ignore[arg-type]


# Files and costs


def test_the_adapter_s_folder_holds_the_files_of_the_guide(run: Path) -> None:
    listed = {name for row in table(section("Adapter out")) for name in re.findall(r"`([\w.]+\.\w+)`", row[0])}
    assert listed == {path.name for path in (run / "adapter").iterdir()}
    assert {"training.png", "results.json", "adapter"} <= {path.name for path in run.iterdir()}


@pytest.mark.parametrize("method", ["finite_difference", "identity"])
def test_passes_are_those_of_the_guide(method: str, make_bert: Callable[..., Any], tmp_path: Path) -> None:
    costs = {row[0]: tuple(map(int, row[1].split(", "))) for row in table(section("What it costs"))}
    made = trainer(adapted(make_bert), tmp_path, hypergradient=method)
    made.train()
    forward, backward = costs[f"one search step, `{method}`"]
    assert made.passes == {"search": (2 * forward, 2 * backward), "train": (3, 3)}
    assert costs["one retraining step"] == costs["one step of LoRA or DoRA"] == (1, 1)


def test_the_search_takes_a_fifth_for_the_magnitude(make_bert: Callable[..., Any], tmp_path: Path) -> None:
    inner, outer = trainer(adapted(make_bert), tmp_path)._split()
    assert (len(inner), len(outer)) == (16, 4)
    assert sum(outer[k]["labels"] for k in range(4)) == 2


# The plot


def line(slope: float) -> WeightDecomposition:
    layers = [LayerChange(str(k), 0.5 + slope * 0.1 * k, 0.1 * k) for k in range(4)]
    return WeightDecomposition(tuple(layers))


def test_the_picture_has_a_mark_a_layer_and_the_reported_line() -> None:
    from matplotlib.figure import Figure

    figure = Figure()
    draw_decomposition({"LoRA": line(2.0), "DoRA": line(-1.5)}, figure)
    (axes,) = figure.axes
    assert [len(marks.get_offsets()) for marks in axes.collections] == [4, 4]
    drawn = [(fit.get_xdata(), fit.get_ydata()) for fit in axes.lines]
    slopes = [(y[1] - y[0]) / (x[1] - x[0]) for x, y in drawn]
    assert slopes == pytest.approx([2.0, -1.5])
    assert [y[0] for _, y in drawn] == pytest.approx([0.5, 0.5])
    assert axes.get_legend().get_texts()[1].get_text() == "DoRA: slope -1.5, correlation -1.00"


def test_layers_that_do_not_vary_have_marks_and_no_line() -> None:
    from matplotlib.figure import Figure

    figure = Figure()
    same = WeightDecomposition((LayerChange("a", 0.1, 0.2), LayerChange("b", 0.3, 0.2)))
    draw_decomposition({"LoRA": same}, figure)
    assert not figure.axes[0].lines


def test_analyze_draws_several_adapters(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [run / name for name in ("adapter", "dora", "lora", "lora")]
    assert command("analyze", *folders, "--plot", run / "pictures" / "change.svg") == 0
    shown = capsys.readouterr().out
    assert shown.count("slope of ΔM on ΔD") == 4
    picture = (run / "pictures" / "change.svg").read_text(encoding="utf-8")
    for name in ("BiDoRA", "DoRA", "LoRA"):
        assert f"<!-- {name}: slope" in picture
    assert str(run / "lora") in picture  # a second one of a name stands under its folder's


def test_a_picture_of_another_kind_is_refused_before_anything_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("analyze", tmp_path / "none", "--plot", "change.jpg") == 2
    assert "must end in .svg or .png or .pdf" in " ".join(capsys.readouterr().err.split())


def test_the_page_s_tables_and_pictures_are_of_what_was_measured() -> None:
    pictures = kept()
    assert pictures
    assert with_results(GUIDE, tabulated(pictures)) == GUIDE
    for name, changes in pictures.items():
        for theme in ("light", "dark"):
            picture = (FOLDER / f"{name}-{theme}.svg").read_text(encoding="utf-8")
            assert f"{name}-{theme}.svg#only-{theme}" in GUIDE
            for label, change in changes.items():
                assert f"<!-- {label}: slope {change.slope:.3g}" in picture


def test_the_pooler_makes_the_slope_as_the_guide_says() -> None:
    lowest, highest = map(float, re.search(r"turns (\d+) to (\d+) times as far", GUIDE).groups())  # type: ignore[union-attr]
    ratios = []
    for change in kept()["all-linear"].values():
        last, *others = sorted(change.layers, key=lambda layer: -layer.direction)
        assert last.name == "bert.pooler.dense"
        ratios.append(last.direction / others[0].direction)
    assert (round(min(ratios)), round(max(ratios))) == (lowest, highest)


def test_slopes_have_the_intervals_of_the_guide() -> None:
    from scipy import stats

    said = [(float(a), float(b)) for a, b in re.findall(r"(-?\d\.\d+) ± (\d\.\d+)", GUIDE.replace("−", "-"))]
    found = []
    for name in ("LoRA", "DoRA", "BiDoRA"):
        layers = kept()["query-value"][name].layers
        fit = stats.linregress([layer.direction for layer in layers], [layer.magnitude for layer in layers])
        width = stats.t.ppf(0.975, len(layers) - 2) * fit.stderr
        found.append((round(float(fit.slope), 2), round(float(width), 2)))
    assert said == found


def test_changes_are_those_of_the_formulas(make_bert: Callable[..., Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    w, change = (torch.randn(5, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    after = w + 0.3 * change
    (layer,) = weight_decomposition({"w": w}, {"w": after}).layers
    norms = w.norm(dim=1), after.norm(dim=1)
    assert layer.magnitude == pytest.approx(float((norms[1] - norms[0]).abs().mean()))
    assert layer.direction == pytest.approx(float((1 - (w * after).sum(1) / (norms[0] * norms[1])).mean()))
