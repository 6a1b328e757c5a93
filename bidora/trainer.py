"""Search, then retrain: transformers' Trainer with BiDoRA's first phase in front."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence, Sized
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset, Subset
from transformers import Trainer, get_scheduler
from transformers.trainer_utils import TrainOutput

from bidora.arguments import BiDoRATrainingArguments
from bidora.data import check_labels, stratified_split
from bidora.model import parameter_roles
from bidora.problems import Direction, Magnitude
from bilevel import Callback, Engine, EngineConfig, StepResult
from bilevel.errors import ConfigError, DataError, NonFiniteError

__all__ = ["BiDoRATrainer"]


class BiDoRATrainer(Trainer):
    """``transformers.Trainer`` that trains by BiDoRA: ``train()`` searches magnitudes, then retrains the direction.

    1. Search. The training data are split 80/20 (seeded, stratified where labels are classes). A
       :class:`bilevel.Engine` trains the direction (A, B, head) on the larger part as the inner problem and the
       magnitude on the smaller part as the outer one.
    2. Retraining. A, B and head go back to their initial values, the magnitude stays fixed at what the search found,
       and Trainer's own loop trains on all training data, with its evaluation, logging, checkpoints and resuming.

    With ``args.method`` other than ``"bidora"`` the first phase is left out and nothing is fixed: the baselines run
    through the same loop on the same batches. What :meth:`save_model` writes is a plain PEFT adapter.

    The signature is Trainer's; ``args`` must be :class:`BiDoRATrainingArguments`, and for BiDoRA ``model`` what
    :func:`bidora.get_bidora_model` returned.

    Attributes:
        search_history: The results of all search steps.
        passes: Forward and backward passes of the search, and of retraining (one each per update).
    """

    args: BiDoRATrainingArguments

    @property
    def adapted(self) -> PeftModel:
        """The model, for BiDoRA always PEFT's."""
        assert isinstance(self.model, PeftModel)
        return self.model

    def __init__(
        self,
        model: nn.Module,
        args: BiDoRATrainingArguments,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        model_init: Callable[[], Any] | None = None,
        compute_loss_func: Callable[..., Any] | None = None,
        compute_metrics: Callable[[Any], dict[str, float]] | None = None,
        callbacks: list[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        optimizer_cls_and_kwargs: tuple[Any, dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[[Any, Any], Any] | None = None,
    ) -> None:
        if not isinstance(args, BiDoRATrainingArguments):
            raise ConfigError(f"args must be BiDoRATrainingArguments, not {type(args).__name__}")
        if args.method == "bidora" and not isinstance(model, PeftModel):
            raise ConfigError(
                "method 'bidora' needs the model that get_bidora_model(model, BiDoRAConfig(...)) returns, not a "
                f"{type(model).__name__}"
            )
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            model_init=model_init,
            compute_loss_func=compute_loss_func,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )
        self.search_history: list[StepResult] = []
        self.passes: dict[str, tuple[int, int]] = {}

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Runs both phases, or the baseline's only one.

        Args:
            resume_from_checkpoint: As Trainer's, a checkpoint of the retraining phase: the search is then not run
                again, and the magnitudes come from the checkpoint.
            trial: As Trainer's.
            ignore_keys_for_eval: As Trainer's.

        Returns:
            Trainer's output of the retraining phase.
        """
        self._check_labels()
        if self.args.method != "bidora":
            return self._train_all(resume_from_checkpoint, trial, ignore_keys_for_eval)
        if not resume_from_checkpoint:
            self.search()
        chosen = {*parameter_roles(self.adapted).magnitude}
        magnitudes = [p for name, p in self.adapted.named_parameters() if name in chosen]
        for parameter in magnitudes:
            parameter.requires_grad_(False)
        try:
            return self._train_all(resume_from_checkpoint, trial, ignore_keys_for_eval)
        finally:
            for parameter in magnitudes:
                parameter.requires_grad_(True)

    def search(self) -> Engine:
        """Searches magnitudes, and puts the direction, the head and all buffers back to where they were.

        Returns:
            The engine that ran, for its problems, reports and hypergradient.

        Raises:
            DataError: Too little training data to split.
        """
        roles = parameter_roles(self.adapted)
        kept = {*roles.direction, *roles.head}
        places = [p for name, p in self.adapted.named_parameters() if name in kept] + [*self.adapted.buffers()]
        initial = [place.detach().clone() for place in places]
        engine = self.make_engine()
        self.adapted.train()
        engine.run()
        with torch.no_grad():
            for place, value in zip(places, initial, strict=True):
                if not torch.equal(place, value):  # a constant buffer may be an expanded one, which takes no copy
                    place.copy_(value)
        self.passes["search"] = (engine.passes.forward, engine.passes.backward)
        return engine

    def make_engine(self) -> Engine:
        """Returns the engine of the search.

        Direction and magnitude stand on their splits, with their optimisers and schedules.
        """
        args = self.args
        inner, outer = self._split()
        inner_loader, outer_loader = self._loader(inner), self._loader(outer)
        steps = args.search_steps or max(1, math.ceil(args.search_epochs * len(inner_loader) / args.inner_steps))
        estimator = args.estimator
        if estimator.needs_double_backward:
            self._use_twice_differentiable_attention()
        # transformers had the second name before 5.23, and gives it up in 6
        if any(getattr(args, name, False) for name in ("activation_checkpointing", "gradient_checkpointing")):
            self._checkpoint_activations()
        followed = estimator.needs_trajectory and estimator.needs_update
        clip = args.max_grad_norm if args.max_grad_norm > 0 and not followed else None
        direction = Direction(
            self.adapted,
            optimizer=self._optimizer_factory(args.learning_rate, args.weight_decay),
            data=inner_loader,
            scheduler=self._scheduler_factory(steps * args.inner_steps),
            steps=args.inner_steps,
            max_grad_norm=clip,
            orthogonality=args.orthogonality,
            compute_loss=self._loss,
        )
        rate = args.learning_rate if args.magnitude_learning_rate is None else args.magnitude_learning_rate
        magnitude = Magnitude(
            self.adapted,
            optimizer=self._optimizer_factory(rate, args.magnitude_weight_decay),
            data=outer_loader,
            scheduler=self._scheduler_factory(steps),
            max_grad_norm=clip,
            compute_loss=self._loss,
        )
        config = EngineConfig(
            steps=steps,
            seed=args.data_seed if args.data_seed is not None else args.seed,
            precision="bfloat16" if args.bf16 else "float32",
            progress=not args.disable_tqdm,
        )
        return Engine([magnitude, direction], config, hypergradient=estimator, callbacks=[_SearchLog(self)])

    def record_search_step(self, result: StepResult) -> None:
        """Keeps a search step's result, and logs it through Trainer's callbacks every ``logging_steps``."""
        self.search_history.append(result)
        every = self.args.logging_steps
        if every >= 1 and result.step % int(every) == 0 and self.args.logging_strategy != "no":
            logs = {f"search_{name}_loss": value for name, value in result.losses.items()}
            logs["search_hypergradient_norm"] = result.gradient_norms.get("magnitude", math.nan)
            logs["search_step"] = float(result.step)
            self.log(logs)

    def training_step(self, *positional: Any, **keywords: Any) -> Tensor:
        """Trainer's, refusing a loss that is NaN or infinite before it reaches a parameter."""
        loss: Tensor = super().training_step(*positional, **keywords)
        if not bool(torch.isfinite(loss)):
            raise NonFiniteError(
                f"update {self.state.global_step + 1}: the loss is {float(loss)}, where a finite number was expected. "
                "No parameter was changed. Lower the learning rate, or look at the batch."
            )
        return loss

    def _train_all(
        self, resume_from_checkpoint: str | bool | None, trial: Any, ignore_keys_for_eval: list[str] | None
    ) -> TrainOutput:
        output = super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
        updates = output.global_step * self.args.gradient_accumulation_steps
        self.passes["train"] = (updates, updates)
        return output

    def _check_labels(self) -> None:
        """Refuses labels that the model has no class for, before a kernel fails on them."""
        config = getattr(self.model, "config", None)
        classes = getattr(config, "num_labels", None)
        classifies = getattr(config, "problem_type", None) in (None, "single_label_classification")
        if isinstance(self.train_dataset, Sized) and classes and classes > 1 and classifies:
            check_labels(_class_labels(self.train_dataset), classes, "train_dataset")

    def _split(self) -> tuple[Dataset[Any], Dataset[Any]]:
        """Splits the training data into the direction's and the magnitude's part."""
        data = self.train_dataset
        if data is None or not isinstance(data, Sized):
            raise DataError("method 'bidora' splits its training data: pass a train_dataset with a length")
        labels = _class_labels(data)
        seed = self.args.data_seed if self.args.data_seed is not None else self.args.seed
        inner, outer = stratified_split(labels, self.args.validation_fraction, seed)
        if not len(inner) or not len(outer):
            raise DataError(
                f"{len(data)} training examples cannot be split for validation_fraction={self.args.validation_fraction}"
            )
        if hasattr(data, "select"):
            return data.select(inner), data.select(outer)
        return Subset(data, list(inner)), Subset(data, list(outer))  # type: ignore[arg-type]

    def _loader(self, data: Dataset[Any]) -> DataLoader[Any]:
        if hasattr(data, "column_names"):
            data = self._remove_unused_columns(data, description="search")
        return DataLoader(
            data,
            batch_size=min(self.args.train_batch_size, len(data)),  # type: ignore[arg-type]
            shuffle=True,
            drop_last=True,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory and torch.cuda.is_available(),
        )

    def _loss(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        loss = self.compute_loss(model, self._prepare_inputs(dict(batch)))
        assert isinstance(loss, Tensor)
        return loss

    def _optimizer_factory(self, learning_rate: float, weight_decay: float) -> Callable[[Any], Optimizer]:
        cls, settings = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(self.args)
        return lambda params: cls(params, **{**settings, "lr": learning_rate, "weight_decay": weight_decay})

    def _scheduler_factory(self, steps: int) -> Callable[[Any], Any]:
        settings = self.args.lr_scheduler_kwargs
        assert not isinstance(settings, str)  # TrainingArguments has parsed it
        return lambda optimizer: get_scheduler(
            self.args.lr_scheduler_type,
            optimizer=optimizer,
            num_warmup_steps=self.args.get_warmup_steps(steps),
            num_training_steps=steps,
            scheduler_specific_kwargs=settings,
        )

    def _use_twice_differentiable_attention(self) -> None:
        """Fused attention has no second derivative; eager attention computes the same with one."""
        base: Any = self.adapted.get_base_model()
        if getattr(base.config, "_attn_implementation", "eager") != "eager":
            base.set_attn_implementation("eager")

    def _checkpoint_activations(self) -> None:
        """Does for the search what Trainer does for retraining; reentrant checkpoints refuse ``autograd.grad``."""
        base: Any = self.adapted.get_base_model()
        enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
        enable({"use_reentrant": False})


class _SearchLog(Callback):
    """Hands the search's steps to the trainer."""

    def __init__(self, trainer: BiDoRATrainer) -> None:
        self._trainer = trainer

    def on_step_end(self, engine: Engine, result: StepResult) -> None:
        """Records one step."""
        self._trainer.record_search_step(result)


def _class_labels(data: Any) -> Sequence[int]:
    """Returns integer class labels to stratify by, or one class for all where there are none."""
    names = getattr(data, "column_names", None)
    column = next((name for name in ("labels", "label") if names and name in names), None)
    if column is None:
        first = data[0]
        column = next((name for name in ("labels", "label") if isinstance(first, Mapping) and name in first), None)
        values = None if column is None else [data[index][column] for index in range(len(data))]
    else:
        values = list(data[column])
    if values is None or not all(isinstance(value, int) or getattr(value, "ndim", 1) == 0 for value in values):
        return [0] * len(data)
    return [int(value) for value in values]
