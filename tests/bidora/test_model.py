"""Adapted models: equality with the base and with plain PEFT, saving, merging, roles, and errors."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from bidora.arguments import BiDoRATrainingArguments
from bidora.config import BiDoRAConfig
from bidora.model import get_bidora_model, parameter_roles, use_exact_dora
from bidora.variants import dora_layers
from bilevel.errors import ConfigError, ParameterError, UnknownNameError

Make = Callable[..., nn.Module]

TARGETS = {
    "bert": ["query", "value", "output.dense"],
    "llama": ["q_proj", "v_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj"],
}
KINDS = sorted(TARGETS)


def make_config(kind: str, **settings: object) -> BiDoRAConfig:
    fields = {"r": 3, "lora_alpha": 6, "task_type": "SEQ_CLS", "fan_in_fan_out": kind == "gpt2", **settings}
    return BiDoRAConfig(target_modules=TARGETS[kind], **fields)


def perturb(model: PeftModel, seed: int = 1, size: float = 0.2) -> PeftModel:
    """Moves all trainable parameters, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(size * torch.randn(p.shape, generator=generator).to(p.dtype))
    return model


@torch.no_grad()
def logits(model: nn.Module, tokens: Tensor) -> Tensor:
    return model.eval()(tokens).logits


# Configuration


def test_config_file_is_that_of_plain_lora(tmp_path: Path) -> None:
    settings = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "target_modules": ["query"], "task_type": "SEQ_CLS"}
    BiDoRAConfig(**settings).save_pretrained(str(tmp_path / "ours"))
    LoraConfig(use_dora=True, **settings).save_pretrained(str(tmp_path / "theirs"))
    ours, theirs = (json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("ours", "theirs"))
    assert ours == theirs
    assert type(PeftConfig.from_pretrained(str(tmp_path / "ours"))) is LoraConfig
    again = BiDoRAConfig.from_pretrained(str(tmp_path / "theirs"))
    assert type(again) is BiDoRAConfig
    assert again.to_dict() == BiDoRAConfig(**settings).to_dict()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": False}, "use_dora must be True.*peft.LoraConfig"),
        ({"bias": "all"}, "bias must be 'none', not 'all'.*modules_to_save"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices cannot be combined"),
        ({"target_parameters": ["weight"]}, "target_parameters cannot be combined"),
        ({"init_lora_weights": "mica"}, "mica"),
    ],
)
def test_config_refuses_what_is_no_plain_dora(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BiDoRAConfig(target_modules=["query"], **settings)


def test_a_plain_config_without_dora_is_refused(make_bert: Make) -> None:
    with pytest.raises(ConfigError, match="use_dora"):
        get_bidora_model(make_bert(), LoraConfig(target_modules=["query"]))


def test_the_callers_config_is_left_alone(make_bert: Make) -> None:
    config = make_config("bert")
    before = copy.deepcopy(config)
    get_bidora_model(make_bert(), config)
    get_bidora_model(make_bert(), config)
    assert config == before


# Equality


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_the_adapted_model_starts_as_the_base_model_bit_for_bit(
    kind: str, dtype: torch.dtype, make_model: Make, tokens: Tensor
) -> None:
    model = make_model(kind).to(dtype)
    hidden = []
    head = "classifier" if kind == "bert" else "score"
    getattr(model, head).register_forward_pre_hook(lambda _, args: hidden.append(args[0]))
    expected = logits(model, tokens)
    adapted = get_bidora_model(model, make_config(kind))
    value = logits(adapted, tokens)
    assert torch.equal(hidden[0].float(), hidden[1].float())
    if dtype != torch.bfloat16:  # then the head is in float32
        assert torch.equal(value, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-5), (torch.bfloat16, 5e-2)]
)
def test_the_trained_model_equals_pefts(
    kind: str, dtype: torch.dtype, tolerance: float, make_model: Make, tokens: Tensor
) -> None:
    adapted = perturb(get_bidora_model(make_model(kind).to(dtype), make_config(kind)))
    plain = get_peft_model(make_model(kind).to(dtype), make_config(kind))
    plain.load_state_dict(adapted.state_dict())
    expected = logits(plain, tokens)
    torch.testing.assert_close(logits(adapted, tokens).to(dtype), expected, rtol=tolerance, atol=tolerance)
    use_exact_dora(plain)
    torch.testing.assert_close(logits(plain, tokens), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("init", [True, "gaussian", "olora", "pissa"])
def test_other_initialisations_start_as_the_base_model_too(init: bool | str, make_bert: Make, tokens: Tensor) -> None:
    expected = logits(make_bert(), tokens)
    adapted = get_bidora_model(make_bert(), make_config("bert", r=2, init_lora_weights=init))
    torch.testing.assert_close(logits(adapted, tokens), expected, rtol=1e-5, atol=1e-5)


def test_a_zero_row_is_no_nan(make_bert: Make, tokens: Tensor) -> None:
    model = make_bert()
    row = model.bert.encoder.layer[0].attention.self.query.weight
    with torch.no_grad():
        row[2] = 0
    expected = logits(model, tokens)
    adapted = get_bidora_model(model, make_config("bert"))
    assert torch.equal(logits(adapted, tokens), expected)
    perturb(adapted, size=0.01)
    adapted.train()
    adapted(tokens, labels=torch.tensor([0, 1, 2])).loss.backward()
    assert all(bool(p.grad.isfinite().all()) for p in adapted.parameters() if p.requires_grad)


def test_second_derivatives_through_a_whole_model_are_symmetric(make_bert: Make, tokens: Tensor) -> None:
    model = perturb(get_bidora_model(make_bert().double(), make_config("bert")))
    parameters = [p for p in model.parameters() if p.requires_grad]
    loss = model(tokens, labels=torch.tensor([0, 1, 1])).loss
    gradient = torch.autograd.grad(loss, parameters, create_graph=True)
    generator = torch.Generator().manual_seed(0)
    u, v = ([torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters] for _ in range(2))

    def product(a: list[Tensor], b: list[Tensor]) -> float:
        products = torch.autograd.grad(gradient, parameters, b, retain_graph=True)
        return float(sum((s * t).sum() for s, t in zip(a, products, strict=True)))

    exact = product(u, v)
    assert exact == pytest.approx(product(v, u), rel=1e-9)
    step, difference = 1e-5, []
    for sign in (1, -1):
        with torch.no_grad():
            for p, d in zip(parameters, v, strict=True):
                p.add_(d, alpha=sign * step)
        moved = torch.autograd.grad(model(tokens, labels=torch.tensor([0, 1, 1])).loss, parameters)
        difference.append(float(sum((s * t).sum() for s, t in zip(u, moved, strict=True))))
        with torch.no_grad():
            for p, d in zip(parameters, v, strict=True):
                p.sub_(d, alpha=sign * step)
    assert exact == pytest.approx((difference[0] - difference[1]) / (2 * step), rel=1e-5)


# Precision and what is trained


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_three_roles_are_trained_and_in_float32(kind: str, make_model: Make, tokens: Tensor) -> None:
    adapted = get_bidora_model(make_model(kind).bfloat16(), make_config(kind))
    roles = parameter_roles(adapted)
    trainable = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    assert {*roles.direction, *roles.magnitude, *roles.head} == set(trainable)
    assert all(p.dtype == torch.float32 for p in trainable.values())
    assert len(roles.direction) == 2 * len(roles.magnitude)
    assert all(".lora_A." in name or ".lora_B." in name for name in roles.direction)
    assert all(".lora_magnitude_vector." in name for name in roles.magnitude)
    assert all(".modules_to_save." in name for name in roles.head)
    assert len(roles.head) == (2 if kind == "bert" else 1)
    assert all(p.dtype == torch.bfloat16 for p in adapted.parameters() if not p.requires_grad)
    assert logits(adapted, tokens).dtype == torch.float32
    adapted(tokens, labels=torch.tensor([0, 1, 1])).loss.backward()
    assert all(p.grad is not None for p in trainable.values())


def test_roles_do_not_change_when_a_role_is_frozen(make_bert: Make) -> None:
    adapted = get_bidora_model(make_bert(), make_config("bert"))
    roles = parameter_roles(adapted)
    for name, p in adapted.named_parameters():
        if name in roles.magnitude:
            p.requires_grad_(False)
    assert parameter_roles(adapted) == roles


def test_a_stray_trainable_parameter_is_named(make_bert: Make) -> None:
    adapted = get_bidora_model(make_bert(), make_config("bert"))
    adapted.base_model.model.bert.pooler.dense.weight.requires_grad_(True)
    with pytest.raises(ParameterError, match="1 more do: .*pooler.dense.weight.*modules_to_save"):
        parameter_roles(adapted)


def test_a_model_without_dora_has_no_roles(make_bert: Make) -> None:
    for model in (make_bert(), get_peft_model(make_bert(), LoraConfig(target_modules=["query"]))):
        with pytest.raises(ParameterError, match="get_bidora_model"):
            parameter_roles(model)
        with pytest.raises(ParameterError, match="no DoRA layer"):
            use_exact_dora(model)


# Saving and merging

PLAIN_PEFT = """
import sys, torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification
folder = sys.argv[1]
base = AutoModelForSequenceClassification.from_pretrained(f"{folder}/base", attn_implementation="eager")
model = PeftModel.from_pretrained(base, f"{folder}/adapter").eval()
with torch.no_grad():
    logits = model(load_file(f"{folder}/tokens.safetensors")["tokens"]).logits
assert not any(name.split(".")[0] in ("bidora", "bilevel") for name in sys.modules)
save_file({"logits": logits}, f"{folder}/logits.safetensors")
"""


def test_what_is_saved_loads_in_plain_peft_with_equal_logits_and_no_warning(
    make_bert: Make, tokens: Tensor, tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    model = make_bert()
    model.save_pretrained(tmp_path / "base")
    adapted = perturb(get_bidora_model(model, make_config("bert", lora_dropout=0.1)))
    adapted.save_pretrained(tmp_path / "adapter")
    save_file({"tokens": tokens}, tmp_path / "tokens.safetensors")
    # a UserWarning is what PEFT gives for unknown keys; transformers' own FutureWarnings are not ours
    command = [sys.executable, "-W", "error::UserWarning", "-c", PLAIN_PEFT, str(tmp_path)]
    process = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=240, check=False)
    assert process.returncode == 0, process.stderr
    assert "Unexpected keyword" not in process.stderr
    loaded = load_file(tmp_path / "logits.safetensors")["logits"]
    torch.testing.assert_close(loaded, logits(adapted, tokens), rtol=1e-5, atol=1e-6)

    reloaded = use_exact_dora(PeftModel.from_pretrained(make_bert(), str(tmp_path / "adapter"), is_trainable=True))
    assert torch.equal(logits(reloaded, tokens), logits(adapted, tokens))
    assert parameter_roles(reloaded) == parameter_roles(adapted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_zero_row_is_no_nan_in_plain_peft_either(
    dtype: torch.dtype, make_bert: Make, tokens: Tensor, tmp_path: Path
) -> None:
    def base() -> nn.Module:
        model = make_bert()
        with torch.no_grad():
            model.bert.encoder.layer[0].attention.self.query.weight[2] = 0
            model.bert.encoder.layer[1].attention.self.value.weight.zero_()
        return model.to(dtype)

    adapted = get_bidora_model(base(), make_config("bert"))
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    for _ in range(5):
        adapted(tokens, labels=torch.tensor([0, 1, 2])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    adapted.save_pretrained(tmp_path)
    plain = PeftModel.from_pretrained(base(), str(tmp_path))
    tolerance = 1e-5 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(logits(plain, tokens).float(), logits(adapted, tokens), rtol=tolerance, atol=tolerance)


def test_an_adapter_that_plain_peft_merged_can_be_unmerged(make_bert: Make, tokens: Tensor) -> None:
    plain = perturb(get_peft_model(make_bert(), make_config("bert")))
    expected = logits(plain, tokens)
    plain.merge_adapter()
    use_exact_dora(plain).unmerge_adapter()
    torch.testing.assert_close(logits(plain, tokens), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_merging_keeps_the_logits_and_unmerging_restores(
    kind: str, safe: bool, make_model: Make, tokens: Tensor
) -> None:
    adapted = perturb(get_bidora_model(make_model(kind), make_config(kind)))
    expected = logits(adapted, tokens)
    weights = {name: layer.base_layer.weight.detach().clone() for name, layer, _ in dora_layers(adapted)}
    adapted.merge_adapter(safe_merge=safe)
    torch.testing.assert_close(logits(adapted, tokens), expected, rtol=1e-4, atol=1e-5)
    adapted.unmerge_adapter()
    torch.testing.assert_close(logits(adapted, tokens), expected, rtol=1e-4, atol=1e-5)
    for name, layer, _ in dora_layers(adapted):
        torch.testing.assert_close(layer.base_layer.weight.detach(), weights[name], rtol=1e-4, atol=1e-5)
        assert not layer.base_layer.weight.requires_grad
    merged = adapted.merge_and_unload(safe_merge=safe)
    torch.testing.assert_close(logits(merged, tokens), expected, rtol=1e-4, atol=1e-5)
    assert not any("lora" in name for name, _ in merged.named_parameters())


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_rows_that_merging_makes_zero_come_back(kind: str, safe: bool, make_model: Make, tokens: Tensor) -> None:
    """A zero row of W₀, and a magnitude that became 0: W' says nothing about V there."""
    model = make_model(kind)
    target = next(m for n, m in model.named_modules() if n.endswith(TARGETS[kind][0]))
    with torch.no_grad():
        (target.weight.T if isinstance(target, Conv1D) else target.weight)[1] = 0
    adapted = get_bidora_model(model, make_config(kind))
    perturb(adapted, size=0.05)
    _, layer, _ = next(iter(dora_layers(adapted)))
    with torch.no_grad():
        layer.lora_B["default"].weight[1] = 0
        layer.lora_magnitude_vector["default"].weight[3] = 0
    weight = layer.base_layer.weight.detach().clone()
    expected = logits(adapted, tokens)
    assert bool(expected.isfinite().all())
    adapted.merge_adapter(safe_merge=safe)
    torch.testing.assert_close(logits(adapted, tokens), expected, rtol=1e-4, atol=1e-5)
    adapted.unmerge_adapter()
    torch.testing.assert_close(layer.base_layer.weight.detach(), weight, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits(adapted, tokens), expected, rtol=1e-4, atol=1e-5)


def test_two_adapters_merge_in_turn_as_in_peft(make_bert: Make, tokens: Tensor) -> None:
    def two(model: nn.Module) -> PeftModel:
        torch.manual_seed(0)
        config = LoraConfig(r=2, target_modules=TARGETS["bert"], use_dora=True)
        adapted = get_peft_model(model, config, "first")
        adapted.add_adapter("second", LoraConfig(r=3, target_modules=TARGETS["bert"], use_dora=True))
        with torch.no_grad():
            for name, p in adapted.named_parameters():
                if "lora_" in name:
                    p.add_(0.2 * torch.randn_like(p))
        return adapted

    plain, exact = two(make_bert()), use_exact_dora(two(make_bert()))
    for adapted in (plain, exact):
        adapted.merge_adapter(["first", "second"])
    torch.testing.assert_close(logits(exact, tokens), logits(plain, tokens), rtol=1e-4, atol=1e-5)
    exact.unmerge_adapter()
    with exact.disable_adapter():
        torch.testing.assert_close(logits(exact, tokens), logits(make_bert(), tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings.*:UserWarning")
@pytest.mark.parametrize("safe", [False, True])
def test_a_tied_weight_is_adapted_and_merged_without_touching_the_embedding(safe: bool, tokens: Tensor) -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=40, n_embd=12, n_layer=1, n_head=2, n_positions=16, attn_implementation="eager")
    model = GPT2LMHeadModel(config).eval()
    assert model.lm_head.weight is model.transformer.wte.weight
    start = logits(model, tokens)
    adapted = get_bidora_model(model, BiDoRAConfig(r=2, target_modules=["lm_head"]))
    assert torch.equal(logits(adapted, tokens), start)
    perturb(adapted)
    embedding = model.transformer.wte.weight.detach().clone()
    expected = logits(adapted, tokens)
    adapted.merge_adapter(safe_merge=safe)
    assert torch.equal(model.transformer.wte.weight, embedding)
    torch.testing.assert_close(logits(adapted, tokens), expected, rtol=1e-4, atol=1e-5)
    adapted.unmerge_adapter()
    assert model.lm_head.base_layer.weight is model.transformer.wte.weight
    assert torch.equal(logits(adapted, tokens), expected)
    merged = adapted.merge_and_unload(safe_merge=safe)
    assert torch.equal(merged.transformer.wte.weight, embedding)
    torch.testing.assert_close(logits(merged, tokens), expected, rtol=1e-4, atol=1e-5)
    assert not merged.config.tie_word_embeddings


def test_layers_that_share_a_weight_are_merged_each_by_its_own_adapter() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
            self.second.weight = self.first.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x).tanh())

    x = torch.randn(4, 6)
    adapted = perturb(get_bidora_model(Shared(), BiDoRAConfig(r=2, target_modules=["first", "second"])))
    with torch.no_grad():
        expected = adapted(x)
        torch.testing.assert_close(adapted.merge_and_unload()(x), expected, rtol=1e-4, atol=1e-5)


# Errors


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.state_dict().items()}


def assert_unchanged(model: nn.Module, before: dict[str, Tensor]) -> None:
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["querry"], "'querry' match no module of the BertFor.*did you mean 'query'.*'query', 'key', 'value', 'dense'"),
        (r".*\.q_proj", "match no module.*end in: 'query'"),
        (["embeddings.LayerNorm"], "LayerNorm cannot be adapted: it is a LayerNorm; this version adapts nn.Linear"),
        (["query", "word_embeddings", "LayerNorm"], "LayerNorm cannot be adapted: .*'classifier', 'word_emb"),
        (["classifier"], "'classifier'.*match no module.*modules_to_save"),
    ],
)
def test_targets_that_cannot_be_adapted_are_refused_and_nothing_is_changed(
    targets: list[str] | str, message: str, make_bert: Make
) -> None:
    model = make_bert()
    before = state(model)
    settings = {"modules_to_save": ["classifier"]} if targets == ["classifier"] else {}
    with pytest.raises(ConfigError, match=message):
        get_bidora_model(model, BiDoRAConfig(target_modules=targets, task_type="SEQ_CLS", **settings))
    assert_unchanged(model, before)


def test_a_target_that_the_task_saves_whole_is_refused(make_bert: Make) -> None:
    """PEFT adds the classifier to modules_to_save by the task, and would find nothing to adapt."""
    with pytest.raises(ConfigError, match="'classifier' match no module"):
        get_bidora_model(make_bert(), BiDoRAConfig(target_modules=["classifier"], task_type="SEQ_CLS"))


def test_other_convolutions_are_refused_by_name() -> None:
    model = nn.Sequential(nn.ConvTranspose1d(3, 4, 2), nn.Flatten(), nn.Linear(4, 2))
    with pytest.raises(ConfigError, match="0 cannot be adapted: it is a ConvTranspose1d"):
        get_bidora_model(model, BiDoRAConfig(target_modules=["0", "2"]))


def test_quantised_weights_are_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 2))
    model[0].weight = nn.Parameter(torch.zeros(2, 4, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ConfigError, match="0 cannot be adapted: its weight is a Parameter of torch.uint8"):
        get_bidora_model(model, BiDoRAConfig(target_modules=["0"]))


@pytest.mark.parametrize("targets", [["0"], "all-linear"])
def test_quantised_weights_are_refused_before_anything_is_changed(targets: list[str] | str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    model[0].weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.float8_e4m3fn), requires_grad=False)
    before = state(model)
    with pytest.raises(ConfigError, match="0 cannot be adapted: its weight is a Parameter of torch.float8"):
        get_bidora_model(model, BiDoRAConfig(target_modules=targets))
    assert_unchanged(model, before)
    rest = get_bidora_model(model, BiDoRAConfig(target_modules="all-linear", exclude_modules=["0"]))
    assert [name for name, _, _ in dora_layers(rest)] == ["base_model.model.1"]


@pytest.mark.parametrize("targets", [["out_proj", "linear1"], "all-linear"])
def test_a_layer_whose_weight_is_read_past_it_is_refused(targets: list[str] | str) -> None:
    """PEFT adapts it, and attention then computes with the base weight: A, B and m would get no gradient."""
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    with pytest.raises(ConfigError, match=r"self_attn.out_proj cannot be adapted: nn.MultiheadAttention reads"):
        get_bidora_model(model, BiDoRAConfig(target_modules=targets))


def test_targets_default_to_those_of_the_model_type(make_bert: Make) -> None:
    adapted = get_bidora_model(make_bert(), BiDoRAConfig(task_type="SEQ_CLS"))
    assert {name.rpartition(".")[2] for name, _, _ in dora_layers(adapted)} == {"query", "value"}
    with pytest.raises(ConfigError, match="no default for model type None.*end in: '0'"):
        get_bidora_model(nn.Sequential(nn.Linear(3, 3)), BiDoRAConfig())


def test_all_linear_adapts_every_linear_layer_but_the_head(make_bert: Make) -> None:
    adapted = get_bidora_model(make_bert(), BiDoRAConfig(target_modules="all-linear", task_type="SEQ_CLS"))
    assert len(list(dora_layers(adapted))) == 2 * 6 + 1


def test_a_model_with_adapters_is_refused(make_bert: Make) -> None:
    adapted = get_bidora_model(make_bert(), make_config("bert"))
    with pytest.raises(ConfigError, match="has PEFT adapters already.*unload"):
        get_bidora_model(adapted.get_base_model(), make_config("bert"))


def test_loaded_dora_on_another_kind_of_layer_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Conv2d(4, 4, 1, groups=2))
    with pytest.warns(UserWarning, match="groups"):
        plain = get_peft_model(model, LoraConfig(r=2, use_dora=True, target_modules=["0", "1"]))
    with pytest.raises(ConfigError, match=r"1 cannot have the exact DoRA forward: it has groups=2.*Take it out"):
        use_exact_dora(plain)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BiDoRAConfig(lora_alfa=8), "BiDoRAConfig 'lora_alfa': did you mean 'lora_alpha'"),  # type: ignore[call-arg]
        (
            lambda: BiDoRATrainingArguments("out", serach_steps=3),  # type: ignore[call-arg]
            "BiDoRATrainingArguments 'serach_steps': did you mean 'search_steps'",
        ),
    ],
)
def test_a_misspelt_argument_is_named_with_those_that_exist(make: Callable[[], object], message: str) -> None:
    with pytest.raises(UnknownNameError, match=f"unknown argument of {message}.*Choices: "):
        make()
