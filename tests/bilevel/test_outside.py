"""An engine within somebody else's loop (Trainer, Lightning, a notebook): the same numbers and the same promises."""

from __future__ import annotations

import asyncio
import math
import tempfile
import threading
import time
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from bilevel import Engine, EngineConfig, Problem
from bilevel.engine_state import engine_state
from bilevel.errors import NonFiniteError

ROWS = 24
BATCH = 4


class Decay(Problem):
    """Outer: the logarithm of the model's weight decay, on data of its own."""

    def loss(self, batch):
        return self.model.cross_entropy(batch)


class Model(Problem):
    """Inner: the model that the other library trains."""

    def cross_entropy(self, batch):
        output = self.module(input_ids=batch["input_ids"], labels=batch["labels"])
        return output.loss * batch["weight"].mean()

    def loss(self, batch):
        penalty = sum(p.square().sum() for p in self.module.parameters())
        return self.cross_entropy(batch) + self.decay.module[0].exp() * penalty


class Tiny(nn.Module):
    """What a model of transformers looks like from outside."""

    def __init__(self, dropout):
        super().__init__()
        self.embedding, self.dropout, self.head = nn.Embedding(20, 6), nn.Dropout(dropout), nn.Linear(6, 2)

    def forward(self, input_ids, labels):
        logits = self.head(self.dropout(self.embedding(input_ids).mean(1)).tanh())
        return type("Output", (), {"loss": F.cross_entropy(logits, labels), "logits": logits})()


def rows(start: int = 0) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(start)
    tokens = torch.randint(1, 20, (ROWS, 5), generator=generator)
    return [
        {"input_ids": line, "labels": torch.tensor(int(line[0]) % 2), "weight": torch.tensor(1.0)} for line in tokens
    ]


def bert(dropout: float) -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = BertConfig(vocab_size=20, max_position_embeddings=8, attn_implementation="eager", **sizes)
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = dropout
    return BertForSequenceClassification(config)


def make(model=Tiny, *, dropout=0.2, data=None, **settings) -> Engine:
    torch.manual_seed(0)
    adam = lambda params: torch.optim.Adam(params, lr=0.01)  # noqa: E731
    schedule = lambda optimizer: torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 20)  # noqa: E731
    decay = Decay(nn.ParameterList([torch.tensor(-3.0)]), optimizer=adam, data=DataLoader(rows(1), batch_size=8))
    inner = Model(model(dropout), optimizer=adam, scheduler=schedule, data=data)
    return Engine([decay, inner], EngineConfig(progress=False, **settings), hypergradient="finite_difference")


def numbers(engine: Engine) -> list[torch.Tensor]:
    state = engine_state(engine)
    parts = [*state["parameters"].values(), *state["buffers"].values()]
    moments = [problem.optimizer.state[p] for problem in engine.problems.values() for p in problem.parameters]
    tensors = [tensor.detach().clone() for part in parts for tensor in part.values()]
    return tensors + [moment[key].clone() for moment in moments for key in ("exp_avg", "exp_avg_sq")]


def same(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def poisoned() -> list[dict[str, torch.Tensor]]:
    data = rows()
    data[9] = {**data[9], "weight": torch.tensor(float("nan"))}
    return data


# --- a transformers Trainer --------------------------------------------------------------------------------------


def trainer_class():
    """The recipe of docs/outside.md."""
    from transformers import Trainer, TrainerCallback

    class SaveEngine(TrainerCallback):
        def __init__(self, engine):
            self.engine = engine

        def on_save(self, args, state, control, **kwargs):
            self.engine.save(f"{args.output_dir}/checkpoint-{state.global_step}/engine")

    class BilevelTrainer(Trainer):
        def __init__(self, engine, **settings):
            idle = torch.optim.SGD(engine.problems["model"].module.parameters(), lr=0.0)  # the engine has its own
            super().__init__(engine.problems["model"].module, optimizers=(idle, None), **settings)
            self.engine = engine
            self.add_callback(SaveEngine(engine))
            self.batches = []

        def training_step(self, model, inputs, num_items_in_batch=None):
            inputs = self._prepare_inputs(inputs)
            self.batches.append(inputs)
            result = self.engine.step({"model": inputs})
            return torch.tensor(result.losses.get("model", math.nan))  # a skipped step has no loss

    return BilevelTrainer


def train(engine: Engine, folder: Path, data=None, *, resume=None, steps=10, **settings):
    from transformers import TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=BATCH,
        max_steps=steps,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        logging_strategy="no",
        dataloader_pin_memory=False,
        use_cpu=True,
        **{"save_strategy": "no", **settings},
    )
    trainer = trainer_class()(engine, args=arguments, train_dataset=data or rows())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_trainer_makes_the_very_steps_of_engine_run(tmp_path):
    engine = make(bert, dropout=0.0)
    trainer = train(engine, tmp_path)
    assert engine.step_count == len(trainer.batches) == 10
    alone = make(bert, dropout=0.0, data=[dict(batch) for batch in trainer.batches])
    alone.problems["model"].module.train()
    alone.run(10)
    assert same(numbers(engine), numbers(alone))
    decay = engine.problems["decay"].module[0]
    assert abs(float(decay.detach()) + 3.0) > 0.05, "the outer problem was trained too"


def test_trainer_goes_on_from_its_checkpoint_as_if_it_had_not_stopped(tmp_path):
    """Dropout is on: the generators are part of what is saved."""
    whole = make(bert)
    train(whole, tmp_path / "whole", save_strategy="steps", save_steps=4)
    torch.manual_seed(99)
    second = make(bert)
    train(second, tmp_path / "first", save_strategy="steps", save_steps=4, steps=10)
    third = make(bert)
    third.load(tmp_path / "first" / "checkpoint-4" / "engine")
    assert third.step_count == 4
    torch.manual_seed(123)
    train(third, tmp_path / "first", resume=str(tmp_path / "first" / "checkpoint-4"))
    assert third.step_count == 10
    assert same(numbers(second), numbers(third))
    assert same(numbers(whole), numbers(third))


@pytest.mark.parametrize("policy", ["raise", "skip"])
def test_trainer_meets_a_batch_that_is_not_finite(policy, tmp_path):
    engine = make(bert, on_non_finite=policy)
    if policy == "skip":
        train(engine, tmp_path, poisoned(), steps=6)
        assert (engine.step_count, engine.skipped_steps) == (6, 1)
        assert all(torch.isfinite(tensor).all() for tensor in numbers(engine))
        return
    kept = {}
    original = engine.step

    def step(batches):
        kept["before"] = numbers(engine) if engine.step_count else None
        return original(batches)

    engine.step = step
    with pytest.raises(NonFiniteError, match="the loss of problem 'model' is nan"):
        train(engine, tmp_path, poisoned(), steps=6)
    assert kept["before"] is not None
    assert same(kept["before"], numbers(engine))
    assert original({"model": collate(rows()[:BATCH])}).skipped is None


def collate(batch):
    return {key: torch.stack([row[key] for row in batch]) for key in batch[0]}


# --- Lightning ---------------------------------------------------------------------------------------------------


def lightning():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("lightning")


def lightning_module(engine: Engine):
    """The recipe of docs/outside.md."""
    library = lightning()

    class Bilevel(library.LightningModule):
        def __init__(self, engine):
            super().__init__()
            self.automatic_optimization = False
            self.engine = engine
            self.modules_of_problems = nn.ModuleDict({name: p.module for name, p in engine.problems.items()})
            self.batches = []

        def training_step(self, batch, place):
            self.batches.append(batch)
            result = self.engine.step({"model": batch})
            self.log_dict({f"loss/{name}": loss for name, loss in result.losses.items()})

        def configure_optimizers(self):
            return None  # the engine has them

        def on_save_checkpoint(self, checkpoint):
            with tempfile.TemporaryDirectory() as folder:
                self.engine.save(Path(folder, "engine"))
                content = bytearray(Path(folder, "engine").read_bytes())
            checkpoint["engine"] = torch.frombuffer(content, dtype=torch.uint8)

        def on_load_checkpoint(self, checkpoint):
            with tempfile.TemporaryDirectory() as folder:
                Path(folder, "engine").write_bytes(checkpoint["engine"].numpy().tobytes())
                self.engine.load(Path(folder, "engine"))

    return Bilevel(engine)


def fit(engine: Engine, folder: Path, data=None, *, epochs=2, resume=None):
    library = lightning()
    module = lightning_module(engine)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = library.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
        )
        loader = DataLoader(data or rows(), batch_size=BATCH, shuffle=data is None)
        trainer.fit(module, loader, ckpt_path=resume)
    return trainer, module


def test_lightning_makes_the_very_steps_of_engine_run(tmp_path):
    engine = make(dropout=0.0)
    _, module = fit(engine, tmp_path)
    assert engine.step_count == len(module.batches) == 2 * ROWS // BATCH
    alone = make(dropout=0.0, data=module.batches)
    alone.run(engine.step_count)
    assert same(numbers(engine), numbers(alone))


def test_lightning_goes_on_from_its_checkpoint_as_if_it_had_not_stopped(tmp_path):
    whole = make()
    torch.manual_seed(5)
    fit(whole, tmp_path, epochs=4)
    first = make()
    torch.manual_seed(5)
    trainer, _ = fit(first, tmp_path, epochs=2)
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    torch.manual_seed(99)
    second = make()
    fit(second, tmp_path, epochs=4, resume=tmp_path / "two.ckpt")
    assert second.step_count == 4 * ROWS // BATCH
    assert same(numbers(whole), numbers(second))
    assert not same(numbers(first), numbers(second))


@pytest.mark.parametrize("policy", ["raise", "skip"])
def test_lightning_meets_a_batch_that_is_not_finite(policy, tmp_path):
    engine = make(on_non_finite=policy)
    if policy == "skip":
        fit(engine, tmp_path, poisoned(), epochs=1)
        assert (engine.step_count, engine.skipped_steps) == (ROWS // BATCH, 1)
        return
    with pytest.raises(NonFiniteError, match="step 3: the loss of problem 'model' is nan"):
        fit(engine, tmp_path, poisoned(), epochs=1)
    clean = make()
    fit(clean, tmp_path, poisoned()[: 2 * BATCH], epochs=1)
    assert engine.step_count == 2
    assert same(numbers(engine), numbers(clean))


# --- a notebook --------------------------------------------------------------------------------------------------

CELLS = [
    """
import time, torch
from bilevel import Engine, EngineConfig, Problem
from bilevel.callbacks import Checkpoints

class Outer(Problem):
    def loss(self, batch):
        return (self.inner.module.weight - 1.0).square().sum()

class Inner(Problem):
    def loss(self, batch):
        time.sleep(0.01)
        return (self.module.weight - self.outer.module.weight).square().sum() / 2

sgd = lambda params: torch.optim.SGD(params, lr=0.1)

def make(**settings):
    torch.manual_seed(0)
    inner = Inner(torch.nn.Linear(2, 2, bias=False), optimizer=sgd, steps=3)
    outer = Outer(torch.nn.Linear(2, 2, bias=False), optimizer=sgd)
    return Engine([outer, inner], hypergradient="identity", **settings)

engine = make(callbacks=[Checkpoints(FOLDER, every=1000)])
""",
    "result = engine.run(2000)",
    "print(engine.stop_reason, '|', result.step == engine.step_count)",
    """
alone = make(config=EngineConfig(progress=False))
alone.run(engine.step_count)
saved = make(config=EngineConfig(progress=False))
saved.resume(FOLDER)
parts = [[p for problem in one.problems.values() for p in problem.parameters] for one in (engine, alone, saved)]
print(all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*parts)))
""",
]


@pytest.mark.slow  # a kernel takes its time to start
def test_a_notebook_s_stop_button_ends_a_run_after_the_step_that_is_going_on(tmp_path):
    pytest.importorskip("ipykernel")
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    cells = [nbformat.v4.new_code_cell(f"FOLDER = {str(tmp_path / 'run')!r}"), *map(nbformat.v4.new_code_cell, CELLS)]
    notebook = nbformat.v4.new_notebook(cells=cells)
    client = nbclient.NotebookClient(notebook, timeout=60, interrupt_on_timeout=False, kernel_name="python3")
    shown = []

    def stop_when_progress_shows():
        deadline = time.monotonic() + 50
        while time.monotonic() < deadline:
            time.sleep(0.1)
            texts = [str(output) for output in list(cells[2].get("outputs", ()))]
            if any("step 1" in text or "step 2" in text for text in texts):
                shown.extend(texts)
                asyncio.run(client.km.interrupt_kernel())
                return

    watcher = threading.Thread(target=stop_when_progress_shows)
    watcher.start()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        client.execute()
    watcher.join()
    assert shown, "no progress was shown"
    assert outputs(cells[3]) == "interrupted by SIGINT | True"
    assert outputs(cells[4]) == "True"


def outputs(cell) -> str:
    return "".join(output.get("text", "") for output in cell["outputs"]).strip()
