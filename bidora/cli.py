"""``bidora train | evaluate | analyze | merge``."""

from __future__ import annotations

import shutil
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from bidora.settings import TrainSettings, resolve_device
from bilevel import BilevelError, dump_config, load_config
from bilevel.errors import ConfigError, DataError

__all__ = ["app", "main"]

app = typer.Typer(
    help="BiDoRA fine-tuning: search the magnitude, retrain the direction, save a plain DoRA adapter.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console()
ADAPTERS = "adapter"
PICTURES = (".svg", ".png", ".pdf")
KNOWN_OUTPUT = (ADAPTERS, "lora", "dora", "training.png", "results.json")

Data = Annotated[str | None, typer.Option(help="drug-reviews, a hub id, or a CSV/TSV/JSONL/Parquet file or folder.")]
Model = Annotated[str | None, typer.Option(help="minilm, a Hugging Face hub id, or a folder.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


@app.command()
def train(
    model: Model = None,
    data: Data = None,
    output: Annotated[Path, typer.Option(help="Folder for adapter, plot and results.")] = Path("runs/bidora"),
    method: Annotated[str | None, typer.Option(help="bidora, dora, lora or full.")] = None,
    hypergradient: Annotated[str | None, typer.Option(help="A method of `bilevel methods`.")] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Also train LoRA and DoRA with as many passes.")] = False,
    search_steps: Annotated[int | None, typer.Option(help="Outer steps of the search.")] = None,
    steps: Annotated[int | None, typer.Option(help="Updates of the retraining.")] = None,
    rank: Annotated[int | None, typer.Option(help="Rank of the adapter.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Examples in a batch.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens that a text is cut to.")] = None,
    max_rows: Annotated[int | None, typer.Option(help="Use so many rows of each split at most.")] = None,
    label_column: Annotated[str | None, typer.Option(help="Column of classes.")] = None,
    text_column: Annotated[list[str] | None, typer.Option(help="Column of text; twice for pairs.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seeds everything.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.")] = None,
    config: Annotated[Path | None, typer.Option(help="TOML, YAML or JSON file of settings.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="One setting: hypergradient.terms=5")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the results in an existing folder.")] = False,
    debug: Debug = False,
) -> None:
    """Fine-tunes a classifier and saves its adapter; without options, a demo on packaged model and data."""
    flags: dict[str, Any] = {
        "model": model,
        "data": data,
        "method": method,
        "search_steps": search_steps,
        "steps": steps,
        "rank": rank,
        "learning_rate": learning_rate,
        "batch_size": batch_size,
        "max_length": max_length,
        "max_rows": max_rows,
        "label_column": label_column,
        "text_columns": tuple(text_column) if text_column else None,
        "seed": seed,
        "device": device,
    }
    overrides = [*(set_ or ())]
    if hypergradient is not None:
        overrides.insert(0, f"hypergradient.method={hypergradient}")
    settings = load_config(config, overrides, TrainSettings)
    settings = replace(settings, **{key: value for key, value in flags.items() if value is not None})
    resolve_device(settings.device)
    _claim(output, overwrite)
    _train(settings, output, compare)


@app.command()
def evaluate(
    adapter: Annotated[Path, typer.Argument(help="The adapter's folder.")],
    data: Data = None,
    model: Model = None,
    max_rows: Annotated[int | None, typer.Option(help="Use so many rows at most.")] = None,
    debug: Debug = False,
) -> None:
    """Evaluates a saved adapter on a test split; by default that of its own training data."""
    from bidora.data import load_text_data, majority_baseline, tokenize
    from bidora.pipeline import evaluate as evaluate_model
    from bidora.pipeline import load_adapter

    loaded = load_adapter(adapter, model)
    card = loaded.card
    own = data is None or data == card["data"]
    try:
        text = load_text_data(
            str(data or card["data"]),
            text_columns=card["text_columns"] if own else None,
            label_column=card["label_column"] if own else None,
            label_names=card["label_names"],
            subset=card.get("subset") if own else None,
            max_rows=max_rows,
            drop_missing=card["settings"].get("drop_missing", False),
            seed=card["settings"]["seed"],
        )
    except DataError as error:
        if data is None:
            raise DataError(f"{error} These are the data that {adapter} was trained on; --data names others") from error
        raise
    metrics = evaluate_model(loaded.model, loaded.tokenizer, tokenize(text.test, loaded.tokenizer, card["max_length"]))
    baseline = majority_baseline(text.train["labels"], text.test["labels"])
    console.print(f"{len(text.test)} test rows ({text.test_origin})")
    for name, value in metrics.items():
        console.print(f"{name:>10} {value:.3f}   (majority class {baseline[name]:.3f})")


@app.command()
def merge(
    adapter: Annotated[Path, typer.Argument(help="The adapter's folder.")],
    output: Annotated[Path, typer.Option(help="Folder for the merged model.")],
    model: Model = None,
    debug: Debug = False,
) -> None:
    """Folds an adapter into its base model: an ordinary transformers model that any server loads."""
    import torch
    from peft import PeftModel

    from bidora.pipeline import CARD, load_adapter

    if output.exists():
        raise ConfigError(f"output folder {output} exists: choose another, or remove it first")
    loaded = load_adapter(adapter, model)
    if not isinstance(loaded.model, PeftModel):
        raise ConfigError(f"{adapter} holds a full model: there is no adapter to merge")
    sample = loaded.tokenizer(["a merged model computes the same"], return_tensors="pt")
    with torch.no_grad():
        before = loaded.model.eval()(**sample).logits
        merged = loaded.model.merge_and_unload()
        difference = float((merged(**sample).logits - before).abs().max() / before.abs().max().clamp_min(1e-30))
    if not difference < 1e-3:
        raise ConfigError(f"merging changed the model's output by {difference:.1e} (relative): nothing was written")
    merged.save_pretrained(str(output))
    loaded.tokenizer.save_pretrained(str(output))
    shutil.copy(adapter / CARD, output / CARD)
    console.print(f"Merged model: [bold]{output}[/bold] (outputs agree to {difference:.0e})")


@app.command()
def analyze(
    adapter: Annotated[list[Path], typer.Argument(metavar="ADAPTER...", help="Folders of adapters.")],
    plot: Annotated[Path | None, typer.Option(help="File for a picture of ΔM over ΔD: .svg, .png or .pdf.")] = None,
    model: Model = None,
    debug: Debug = False,
) -> None:
    """Shows how far adapters moved magnitude (ΔM) and direction (ΔD) of each layer."""
    from rich.table import Table

    from bidora.analysis import weight_decomposition
    from bidora.pipeline import load_adapter, load_base
    from bidora.report import adapter_label, save_decomposition

    if plot is not None and plot.suffix not in PICTURES:
        raise ConfigError(f"--plot {plot} must end in {' or '.join(PICTURES)}")
    changes = {}
    for folder in adapter:
        loaded = load_adapter(folder, model)
        change = weight_decomposition(load_base(folder, model), loaded.model)
        label = adapter_label(loaded.card)
        changes[label if label and label not in changes else str(folder)] = change
        table = Table(title=f"Change of magnitude and direction, {folder}")
        for name in ("layer", "ΔM", "ΔD"):
            table.add_column(name, justify="left" if name == "layer" else "right")
        for layer in change.layers:
            table.add_row(layer.name, f"{layer.magnitude:.3g}", f"{layer.direction:.3g}")
        console.print(table)
        console.print(f"slope of ΔM on ΔD {change.slope:.3f}, correlation {change.correlation:.3f}")
    if plot is not None:
        save_decomposition(changes, plot)
        console.print(f"Plot: {plot}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line; errors that are the user's to mend print as one panel, with exit code 2."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    errors = Console(stderr=True)
    try:
        with warnings.catch_warnings():
            # other libraries' announcements of changes to come are not for the user of this program
            warnings.simplefilter("ignore", FutureWarning)
            warnings.showwarning = lambda message, *_, **__: errors.print(f"[yellow]note:[/yellow] {message}")
            app(words)
    except BilevelError as error:
        if "--debug" in words:
            raise
        errors.print(Panel(Text(str(error)), title=type(error).__name__, border_style="red"))
        raise SystemExit(2) from None


def _claim(output: Path, overwrite: bool) -> None:
    """Makes sure that nothing of the user's is lost."""
    if not output.exists():
        return
    if not output.is_dir() or (any(output.iterdir()) and not overwrite):
        raise ConfigError(
            f"output {output} exists: choose another folder, or pass --overwrite to replace the results in it"
        )
    for name in KNOWN_OUTPUT:
        path = output / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _train(settings: TrainSettings, output: Path, compare: bool) -> None:
    # Heavy imports wait until the settings are known to be right.
    from transformers.utils import logging as transformers_logging

    from bidora.pipeline import majority, prepare, train_method
    from bidora.report import results_table, save_plot, save_results

    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    prepared = prepare(settings)
    _introduce(settings, prepared)
    results = [train_method(prepared, settings.method, output / ADAPTERS)]
    if compare:
        # one forward and one backward pass for an update of a baseline: the same budget is as many passes
        budget = max(1, sum(results[0].passes) // 2)
        for method in ("lora", "dora"):
            if method != settings.method:
                results.append(train_method(prepared, method, output / method, updates=budget))
    baseline = majority(prepared)
    save_plot(results, output / "training.png")
    save_results(results, baseline, dump_config(settings), output / "results.json")
    title = f"{settings.model} on {settings.data}, {len(prepared.test)} test texts"
    console.print(results_table(results, baseline, title))
    console.print(f"Plot:    {output / 'training.png'}\nResults: {output / 'results.json'}")
    adapter = output / ADAPTERS
    console.print(f"Adapter: [bold]{adapter}[/bold]  (peft.PeftModel.from_pretrained(model, {str(adapter)!r}))")


def _introduce(settings: TrainSettings, prepared: Any) -> None:
    text = prepared.text
    console.print(
        f"[bold]{settings.method}[/bold]: {settings.model} on {settings.data} "
        f"({len(text.train)} training texts, {len(text.test)} test texts, classes {', '.join(text.label_names)})"
    )
    if settings.method == "bidora":
        method = settings.hypergradient.describe()
        name = method.pop("method")
        fields = ", ".join(f"{key} {value}" for key, value in method.items())
        console.print(
            f"Search: {settings.search_steps} steps, hypergradient by {name}{f' ({fields})' if fields else ''}; "
            f"then {settings.steps} updates of retraining."
        )


if __name__ == "__main__":
    main()
