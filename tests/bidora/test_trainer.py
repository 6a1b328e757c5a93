"""Search, then retrain: what moves in which phase, what is saved, and the baselines on the same batches."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from bidora import BiDoRAConfig, BiDoRATrainer, BiDoRATrainingArguments, get_bidora_model, parameter_roles
from bilevel.errors import BilevelError, ConfigError, DataError, NonFiniteError, UnknownNameError

pytestmark = pytest.mark.filterwarnings("ignore::bilevel.errors.BilevelWarning")  # a transformer is not convex


def rows(count: int = 40) -> list[dict]:
    """Class 0 has many 1s, class 1 many 2s, class 2 many 3s."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for index in range(count):
        label = index % 3
        ids = torch.randint(1, 40, (6,), generator=generator)
        ids[:3] = label + 1
        made.append({"input_ids": ids, "labels": label})
    return made


def arguments(folder, **settings) -> BiDoRATrainingArguments:
    defaults = {
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "search_steps": 4,
        "max_steps": 4,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_steps": 1,
    }
    return BiDoRATrainingArguments(str(folder), **{**defaults, **settings})


def bidora_model(make_bert, **settings):
    torch.manual_seed(3)
    return get_bidora_model(make_bert(**settings), BiDoRAConfig(task_type="SEQ_CLS", r=2, lora_alpha=4))


def make(make_bert, folder, data=None, **settings) -> BiDoRATrainer:
    return BiDoRATrainer(bidora_model(make_bert), arguments(folder, **settings), train_dataset=data or rows())


def named(model, names) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if name in set(names)}


def equal(left, right) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_the_search_moves_the_magnitude_and_puts_everything_else_back(make_bert, tmp_path):
    trainer = make(make_bert, tmp_path)
    roles = parameter_roles(trainer.model)
    others = [n for n, _ in trainer.model.named_parameters() if n not in roles.magnitude]
    before, magnitude = named(trainer.model, others), named(trainer.model, roles.magnitude)
    engine = trainer.search()
    assert equal(named(trainer.model, others), before)
    assert not any(torch.equal(value, magnitude[n]) for n, value in named(trainer.model, roles.magnitude).items())
    assert engine.step_count == 4
    assert [result.step for result in trainer.search_history] == [1, 2, 3, 4]
    # each step: inner 1, outer 1, differences 2
    assert trainer.passes["search"] == (16, 16)


def test_the_search_puts_running_statistics_back_too(make_bert, tmp_path):
    """Retraining begins where the search began, but for m."""

    class Normed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.up = torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 3)

        def forward(self, x, labels):
            logits = self.up(self.norm(x))
            return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}

    torch.manual_seed(0)
    model = get_bidora_model(Normed(), BiDoRAConfig(r=2, target_modules=["up"]))
    data = [{"x": 5 + torch.randn(4), "labels": index % 3} for index in range(40)]
    settings = arguments(tmp_path, remove_unused_columns=False)
    before = {name: value.clone() for name, value in model.named_buffers()}
    assert "base_model.model.norm.running_mean" in before
    BiDoRATrainer(model, settings, train_dataset=data).search()
    assert equal(dict(model.named_buffers()), before)


def test_retraining_fixes_the_magnitude_at_what_the_search_found(make_bert, tmp_path):
    searched = make(make_bert, tmp_path / "a")
    searched.search()
    trainer = make(make_bert, tmp_path / "b")
    roles = parameter_roles(trainer.model)
    initial = named(trainer.model, [*roles.direction, *roles.head])
    output = trainer.train()
    assert equal(named(trainer.model, roles.magnitude), named(searched.model, roles.magnitude))
    final = named(trainer.model, [*roles.direction, *roles.head])
    assert not any(torch.equal(final[name], initial[name]) for name in initial)
    assert output.global_step == 4
    assert trainer.passes["train"] == (4, 4)
    assert all(p.requires_grad for n, p in trainer.model.named_parameters() if n in roles.magnitude)
    logged = set().union(*map(set, searched.state.log_history))
    assert {"search_direction_loss", "search_magnitude_loss", "search_hypergradient_norm"} <= logged


def test_same_seed_same_result_and_another_seed_another(make_bert, tmp_path):
    results = []
    for place, seed in enumerate((0, 0, 1)):
        trainer = make(make_bert, tmp_path / str(place), seed=seed)
        trainer.train()
        results.append({n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad})
    assert equal(results[0], results[1])
    assert not equal(results[0], results[2])


def test_what_is_saved_is_a_plain_adapter(make_bert, tmp_path, tokens):
    trainer = make(make_bert, tmp_path)
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    loaded = PeftModel.from_pretrained(make_bert(), str(tmp_path / "adapter")).eval()
    trainer.model.eval()
    torch.testing.assert_close(loaded(tokens).logits, trainer.model(tokens).logits, rtol=1e-5, atol=1e-6)
    assert {path.suffix for path in (tmp_path / "adapter").iterdir()} <= {".json", ".safetensors", ".md", ".bin"}


def test_a_retraining_checkpoint_resumes_with_its_magnitudes(make_bert, tmp_path):
    whole = make(make_bert, tmp_path / "a", max_steps=6, save_strategy="steps", save_steps=3)
    whole.train()
    resumed = make(make_bert, tmp_path / "b", max_steps=6)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    assert resumed.search_history == []
    expected = {n: p for n, p in whole.model.named_parameters() if p.requires_grad}
    for name, parameter in resumed.model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter, expected[name], rtol=0, atol=0)


@pytest.mark.parametrize("method", ["dora", "lora", "full"])
def test_baselines_run_through_the_same_loop_on_the_same_batches(method, make_bert, tmp_path):
    def batches(trainer) -> list[torch.Tensor]:
        seen = []
        original = trainer.compute_loss

        def compute_loss(model, inputs, **settings):
            seen.append(inputs["input_ids"].clone())
            return original(model, inputs, **settings)

        trainer.compute_loss = compute_loss
        trainer.train()
        return seen[-4:]

    expected = batches(make(make_bert, tmp_path / "bidora"))
    model = make_bert()
    if method != "full":
        model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=2, use_dora=method == "dora"))
    before = copy.deepcopy(model.state_dict())
    trainer = BiDoRATrainer(model, arguments(tmp_path / method, method=method), train_dataset=rows())
    found = batches(trainer)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    moved = {n for n, value in model.state_dict().items() if n in trainable and not torch.equal(value, before[n])}
    assert moved
    assert trainer.search_history == []


@pytest.mark.parametrize(
    "method", ["identity", {"method": "neumann", "terms": 2}, {"method": "cg", "max_iterations": 2}, "unrolled"]
)
def test_the_hypergradient_method_is_a_setting(method, make_bert, tmp_path):
    trainer = make(make_bert, tmp_path, hypergradient=method, search_steps=2, max_steps=1, inner_steps=2)
    trainer.train()
    solves = [result.solves["direction"] for result in trainer.search_history]
    name = method if isinstance(method, str) else method["method"]
    assert {solve.method for solve in solves} == {{"cg": "conjugate_gradient"}.get(name, name)}


def test_fused_attention_is_replaced_where_second_derivatives_are_needed(make_bert, tmp_path):
    model = bidora_model(make_bert)
    model.get_base_model().set_attn_implementation("sdpa")
    trainer = BiDoRATrainer(model, arguments(tmp_path, hypergradient="identity"), train_dataset=rows())
    trainer.search()
    assert model.get_base_model().config._attn_implementation == "eager"


def test_the_search_checkpoints_activations_where_retraining_does(make_bert, tmp_path):
    names = {field.name for field in dataclasses.fields(BiDoRATrainingArguments)}
    setting = next(name for name in ("activation_checkpointing", "gradient_checkpointing") if name in names)
    magnitudes = []
    for settings in ({}, {setting: True}):
        trainer = make(make_bert, tmp_path, **settings)
        trainer.search()
        checkpointed = any(getattr(module, "gradient_checkpointing", False) for module in trainer.model.modules())
        assert checkpointed == bool(settings)
        magnitudes.append(named(trainer.model, parameter_roles(trainer.model).magnitude))
    assert equal(*magnitudes)


def test_the_search_takes_the_optimiser_that_was_given(make_bert, tmp_path):
    given = torch.optim.SGD, {"momentum": 0.5}
    trainer = BiDoRATrainer(
        bidora_model(make_bert), arguments(tmp_path), train_dataset=rows(), optimizer_cls_and_kwargs=given
    )
    for problem in trainer.make_engine().problems.values():
        assert type(problem.optimizer) is torch.optim.SGD
        (group,) = problem.optimizer.param_groups
        assert (group["momentum"], group["initial_lr"]) == (0.5, 1e-2)


def test_splits_are_stratified_and_disjoint(make_bert, tmp_path):
    trainer = make(make_bert, tmp_path, data=rows(60))
    engine = trainer.make_engine()
    inner, outer = (engine.problems[name].data.dataset for name in ("direction", "magnitude"))
    assert (len(inner), len(outer)) == (48, 12)
    assert not set(inner.indices) & set(outer.indices)
    assert [sum(outer[i]["labels"] == label for i in range(12)) for label in range(3)] == [4, 4, 4]


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        ({"method": "bidoraa"}, UnknownNameError, "did you mean 'bidora'"),
        ({"hypergradient": "neuman"}, UnknownNameError, "did you mean 'neumann'"),
        ({"hypergradient": {"method": "neumann", "trems": 3}}, UnknownNameError, "did you mean 'terms'"),
        ({"validation_fraction": 1.0}, ConfigError, "must be below 1"),
        ({"inner_steps": 0}, ConfigError, "inner_steps must be an integer of at least 1"),
        ({"gradient_accumulation_steps": 2}, ConfigError, "gradient_accumulation_steps > 1"),
    ],
)
def test_settings_that_make_no_sense(settings, error, match, tmp_path):
    with pytest.raises(error, match=match):
        arguments(tmp_path, **settings)


def test_models_and_data_that_do_not_fit(make_bert, tmp_path):
    with pytest.raises(ConfigError, match="needs the model that get_bidora_model"):
        BiDoRATrainer(make_bert(), arguments(tmp_path), train_dataset=rows())
    with pytest.raises(BilevelError, match=r"pass a train_dataset with a length"):
        BiDoRATrainer(bidora_model(make_bert), arguments(tmp_path)).search()
    with pytest.raises(DataError):
        make(make_bert, tmp_path, data=rows(2)).search()


@pytest.mark.parametrize("method", ["bidora", "full"])
def test_labels_that_the_model_has_no_class_for(method, make_bert, tmp_path):
    data = [*rows(), {"input_ids": torch.ones(6, dtype=torch.long), "labels": 3}]
    model = bidora_model(make_bert) if method == "bidora" else make_bert()
    with pytest.raises(DataError, match=r"3"):
        BiDoRATrainer(model, arguments(tmp_path, method=method), train_dataset=data).train()


@pytest.mark.parametrize("phase", ["search", "train"])
def test_a_non_finite_loss_stops_before_it_reaches_a_parameter(phase, make_bert, tmp_path):
    trainer = make(make_bert, tmp_path)
    if phase == "train":
        trainer.search = lambda: None
    names = [n for n, p in trainer.model.named_parameters() if p.requires_grad]
    before = named(trainer.model, names)
    trainer.compute_loss = lambda model, inputs, **_: model(**inputs).loss * float("nan")
    with pytest.raises(NonFiniteError, match="is nan"):
        trainer.train()
    assert equal(named(trainer.model, names), before)
