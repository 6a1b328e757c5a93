"""The two problems of few-shot learning: where adaptation starts, and adaptation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from bilevel.data.episodes import TaskBatch, TaskSource
from bilevel.errors import ConfigError, DataError, ParameterError
from bilevel.functional import dense_gradient, derivatives
from bilevel.problems.base import ParameterSelection, Problem, select_parameters
from bilevel.problems.few_shot.assessment import Assessment
from bilevel.problems.few_shot.budget import Chunking
from bilevel.problems.few_shot.checks import (
    batch_of,
    check_settings,
    refuse_data,
    refuse_running_statistics,
    refuse_settings,
    warn_of_shared_classes,
)
from bilevel.problems.few_shot.chunks import Chunk, ResponseInChunks, Standing, Sum, chunks_of, seeded, summed
from bilevel.problems.few_shot.measurement import measured_chunking
from bilevel.problems.few_shot.stacked import (
    Displacements,
    RatedNetwork,
    accuracies,
    stacked_losses,
    stacked_outputs,
)
from bilevel.problems.supervised import Criterion, counterpart
from bilevel.randomness import preserved
from bilevel.result import StepResult
from bilevel.slots import buffers_protected
from bilevel.validation import check_integer
from bilevel.vector import Tensors

if TYPE_CHECKING:
    from bilevel.hypergrad import Estimator, InnerProblem, Response

__all__ = ["Adaptation", "MetaLearner"]


class MetaLearner(Problem):
    """Outer problem of few-shot learning: parameters λ of a network, from which tasks are learned in a few steps.

    The problem is ::

        min over λ of  1/M Σ_i F_i(w_i),    w_i = λ + s ⊙ d_i,    d_i from a few steps on f_i(λ + s ⊙ d), from d = 0

    F_i is the loss on the query set of task i, f_i that on its support set. The steps are those of
    :class:`Adaptation`, which owns the displacements d and draws the tasks. Since λ is in the inner loss, a step on d
    is one on w, and the engine's method decides what is learned:

    - ``"unrolled"``: MAML (Finn et al., ICML 2017, arXiv 1703.03400), through whatever optimiser makes the steps.
    - ``"conjugate_gradient"``, ``"neumann"``, … with ``Adaptation(proximal=β)``: implicit MAML (Rajeswaran et al.,
      NeurIPS 2019, arXiv 1909.04630).
    - ``OneStep(learning_rate=0, difference="central")``: first-order MAML, the derivative at fixed d.
    - ``Adaptation(params="head.*")``: ANIL (Raghu et al., ICLR 2020, arXiv 1909.09157).
    - ``MetaLearner(learned_rates="*")``: Meta-SGD (Li et al., 2017, arXiv 1707.09835).

    Args:
        network: The network; its forward pass takes inputs alone. The same object goes to :class:`Adaptation`.
        criterion: ``(outputs, targets) -> scalar`` of one task's query set; that of :class:`Adaptation` by default.
        learned_rates: Which of the adapted parameters have learned rates: patterns over the network's parameter names,
            as for ``params``. Each element then has a factor s, 1 at first, that is learned with λ: a gradient step of
            rate η on d is one of rate ``η s²`` on w. (Meta-SGD learns the rate itself, whose sign it lets change.)
        adaptation: The name of the inner problem; None where the engine has one only.
        settings: Those of :class:`~bilevel.Problem` but ``data`` and ``accumulate``. Patterns of ``params`` are over
            the names in ``module``: the network's, or with learned rates ``network.*`` and ``factors.*``.

    Raises:
        ConfigError: Data, or later learned rates of parameters that do not adapt.

    Cost: 1 forward pass of the query sets a loss.

    Example:
        >>> import torch
        >>> from bilevel import Engine, EngineConfig
        >>> from bilevel.problems import Episodes
        >>> images, labels = torch.randn(40, 8), torch.arange(40) % 8
        >>> episodes = Episodes((images, labels), ways=3, shots=1, queries=4, tasks=2)
        >>> network = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
        >>> adam, sgd = (lambda p: torch.optim.Adam(p, lr=1e-3)), (lambda p: torch.optim.SGD(p, lr=0.1))
        >>> problems = [MetaLearner(network, optimizer=adam), Adaptation(network, episodes, optimizer=sgd, steps=5)]
        >>> engine = Engine(problems, EngineConfig(progress=False), hypergradient="unrolled")      # MAML
        >>> sorted(engine.step().metrics)
        ['meta_learner/accuracy']
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        criterion: Criterion | None = None,
        learned_rates: ParameterSelection | None = None,
        adaptation: str | None = None,
        **settings: Any,
    ) -> None:
        module = network
        if learned_rates is not None and isinstance(network, nn.Module):
            chosen = select_parameters(settings.get("name") or "meta_learner", network, learned_rates)
            module = RatedNetwork(network, chosen)
        super().__init__(module, **settings)
        refuse_settings(self, "accumulate")
        self.network = network
        self.criterion = criterion
        self.adaptation_name = adaptation

    def adaptation(self) -> Adaptation:
        """Returns the inner problem."""
        return counterpart(self, Adaptation, self.adaptation_name)

    def factors(self) -> dict[str, Tensor]:
        """Returns s by parameter name, where rates are learned: a gradient step on d has the rate ``η s²`` on w."""
        return self.module.factors.values() if isinstance(self.module, RatedNetwork) else {}

    def initial_values(self, tasks: TaskBatch) -> Mapping[str, Tensor]:
        """Returns where adaptation starts from; λ for every task unless overridden.

        Args:
            tasks: The batch.

        Returns:
            By the network's parameter names: tensors of the parameter's shape, or ``(M, *shape)`` where tasks differ.
        """
        return dict(self.network.named_parameters())

    def adapted(
        self, tasks: TaskBatch, displacements: Mapping[str, Tensor], *, constant: bool = False
    ) -> dict[str, Tensor]:
        """Returns the network's parameters after adaptation, ``w = λ + s ⊙ d``.

        Args:
            tasks: The batch.
            displacements: d by parameter name, ``(M, *shape)``.
            constant: Whether λ and s are taken for constants.

        Raises:
            ConfigError: Learned rates of parameters that do not adapt.
        """
        values, factors = dict(self.initial_values(tasks)), self.factors()
        idle = sorted(set(factors) - set(displacements))
        if idle:
            raise ConfigError(
                f"problem {self.name!r} learns rates of {', '.join(idle[:5])}, which do not adapt; those that do: "
                f"{', '.join(displacements)}. Restrict learned_rates=, or take them into Adaptation(params=…)"
            )
        if constant:
            values = {name: value.detach() for name, value in values.items()}
            factors = {name: value.detach() for name, value in factors.items()}
        for name, step in displacements.items():
            values[name] = values[name] + (factors[name] * step if name in factors else step)
        return values

    def loss(self, batch: Any) -> Mapping[str, Any]:
        """Returns the mean loss on the query sets, with the outputs and, for classes, the accuracy.

        Of tasks in chunks there are no outputs.
        """
        refuse_data(self, batch)
        adaptation = self.adaptation()
        tasks = adaptation.tasks()
        if len(adaptation.chunks()) == 1:
            outputs, losses, right = self._judged(tasks)
            found = {"loss": losses.mean(), "outputs": outputs}
            return found if right is None else {**found, "accuracy": right.mean()}
        total, shares = self._in_chunks(tasks)
        found = {"loss": summed(total, shared_too=True)}
        return {**found, "accuracy": sum(shares) / len(tasks.query_targets)} if shares else found

    def _judged(self, tasks: TaskBatch) -> tuple[Tensor, Tensor, Tensor | None]:
        """Returns outputs, losses and shares of right answers on the query sets, at what the displacements are now."""
        adaptation = self.adaptation()
        outputs = adaptation.outputs(self.adapted(tasks, adaptation.displacements()), tasks.query_inputs)
        losses = adaptation.losses(outputs, tasks.query_targets, self.criterion)
        return outputs, losses, accuracies(outputs, tasks.query_targets)

    def _in_chunks(self, tasks: TaskBatch) -> tuple[Sum, list[Tensor]]:
        """Returns the loss as a sum over chunks, and a list to which each evaluation adds its sum of right answers."""
        shares: list[Tensor] = []

        def loss(chunk: Chunk) -> Tensor:
            _, losses, right = self._judged(TaskBatch(*chunk.of(tasks)))
            shares.extend([] if right is None else [right.sum()])
            return losses.sum() / len(tasks.query_targets)

        return self.adaptation().sum_of(loss), shares


class Adaptation(Problem):
    """Inner problem of few-shot learning: displacements d of a network's parameters, M of each, one a task.

    The problem is ::

        min over d of  Σ_i f_i(λ + s ⊙ d_i) + β/2 ‖d_i‖²

    The sum lets every task have its own gradient, and so learning rates mean what they do for a single task; norms of
    gradients (``max_grad_norm``, line searches) are over all tasks. Tasks are evaluated together. d starts from 0 with
    new tasks before every update of the problem above: batch 0 of ``tasks`` first, then 1, 2, ….

    Layers with batch normalisation take their statistics from the batch they are given, task by task and support and
    query sets apart (``track_running_stats=False``): predictions on the query set are then made together, which is
    known as transductive.

    Args:
        network: The network, the same object as that of :class:`MetaLearner`.
        tasks: Where tasks come from: :class:`~bilevel.problems.Episodes`, a list of
            :class:`~bilevel.problems.TaskBatch` that is gone through again and again, or whatever else returns a
            batch for ``tasks[number]``. All batches have as many tasks.
        params: Which of the network's parameters adapt: patterns over their names, or a predicate ``(name, parameter)
            -> bool``. All trainable ones by default.
        optimizer: A callable that makes the optimiser of d. Its weight decay pulls w towards λ.
        criterion: ``(outputs, targets) -> scalar`` of one task's support set; the cross-entropy by default.
        proximal: β, which makes the solution unique where it is above the loss's negative curvature. Implicit methods
            then take ``(I + H/β)⁻¹ v`` for ``v = ∂F/∂w``; with a damping δ, ``(I + H/(β + δ))⁻¹ v``.
        chunk_size: How many tasks to evaluate together; None for all. Passes, products and solves go chunk by chunk,
            each of which has its graph freed before the next one is evaluated. ``"auto"``: the smallest size that takes
            about the least time among those that stay in the memory budget, see :attr:`chunking`; on several ranks,
            the smallest that one of them finds. It is measured before the first update, kept from then on and saved
            with the engine's state. A state loads whatever the size was when it was saved: a number or None given here
            stays, and ``"auto"`` takes the size that was chosen, or chooses.
        memory_budget: What a chunk may take beside parameters and displacements, in bytes, where the size is chosen;
            half of the memory that is free by default.
        vectorized: Whether to evaluate tasks together, by ``torch.func.vmap``. False is for networks that cannot be:
            control flow that depends on values, operations without a batching rule.
        held_out: Tasks of other classes, on which :meth:`evaluate` reports (warned about where they are not).
        held_out_batches: How many batches of them.
        held_out_steps: The steps taken there; ``steps`` by default. More are allowed.
        meta_learner: The name of the outer problem; None where the engine has one only.
        settings: Those of :class:`~bilevel.Problem` but ``data``, ``reset``, ``accumulate``, ``start`` and ``stop``:
            steps, hypergradient, ….

    Raises:
        ConfigError: A setting that makes no sense.
        ParameterError: A layer that keeps running statistics in training mode, which tasks would mix.
        UnknownNameError: A pattern that matches no trainable parameter.
        DataError: No tasks, or later, another number of them, or a class for which the network has no output.

    Of tasks in chunks there are no outputs of the whole, and implicit methods solve a system for each chunk. Methods
    that keep graphs (``Unrolled(memory="graph")``) keep those of all chunks, and of all steps: chunks then save
    memory in the outer loss only.

    In data-parallel runs gradients of d are averaged too: every process must draw the same tasks.

    Cost: 1 forward pass of the support sets a loss, over M copies of the parameters; memory for M displacements.
    """

    def __init__(
        self,
        network: nn.Module,
        tasks: TaskSource | Sequence[TaskBatch],
        *,
        optimizer: Callable[[Any], Optimizer],
        params: ParameterSelection | None = None,
        criterion: Criterion = F.cross_entropy,
        proximal: float = 0.0,
        chunk_size: int | str | None = None,
        memory_budget: int | None = None,
        vectorized: bool = True,
        held_out: TaskSource | Sequence[TaskBatch] | None = None,
        held_out_batches: int = 25,
        held_out_steps: int | None = None,
        meta_learner: str | None = None,
        **settings: Any,
    ) -> None:
        name = settings.get("name") or "adaptation"
        if not isinstance(network, nn.Module):
            raise ParameterError(f"problem {name!r} needs a network, an nn.Module, not {type(network).__name__}")
        check_settings(name, optimizer, proximal, chunk_size, memory_budget, held_out_batches, held_out_steps)
        adapting = select_parameters(name, network, params)
        refuse_running_statistics(name, network)
        self.network = network
        self.source, self.held_out = tasks, held_out
        warn_of_shared_classes(name, tasks, held_out)
        self.num_tasks = len(batch_of(tasks, 0, name).support_targets)
        zeros = {key: _zeros(self.num_tasks, value) for key, value in adapting.items()}
        super().__init__(Displacements(zeros), optimizer=optimizer, reset="initial", **settings)
        refuse_settings(self, "accumulate", "start", "stop")
        self.criterion, self.proximal = criterion, proximal
        self.chunk_size, self.memory_budget, self.vectorized = chunk_size, memory_budget, vectorized
        self._chunking: Chunking | None = None
        self._alone: Chunk | None = None
        self._measuring = False
        self.held_out_batches, self.held_out_steps = held_out_batches, held_out_steps
        self.meta_learner_name = meta_learner
        self._make_optimizer = optimizer

    def learner(self) -> MetaLearner:
        """Returns the outer problem.

        Raises:
            GraphError: There is none, or several and no name says which.
            ParameterError: It has another network.
        """
        found = counterpart(self, MetaLearner, self.meta_learner_name)
        if found.network is not self.network:
            raise ParameterError(
                f"problems {self.name!r} and {found.name!r} have different networks: give both the same object"
            )
        return found

    def displacements(self) -> dict[str, Tensor]:
        """Returns d by the network's parameter names, ``(M, *shape)``."""
        return self._held.values()

    def tasks(self) -> TaskBatch:
        """Returns the present tasks: those that d is, or will be, adapted to.

        Raises:
            DataError: They are not as many as the first ones.
        """
        batch = batch_of(self.source, max(0, int(self._held.number)), self.name)
        if len(batch.support_targets) != self.num_tasks:
            raise DataError(
                f"problem {self.name!r} was made for batches of {self.num_tasks} tasks, as the first one was; this one "
                f"has {len(batch.support_targets)}: let all batches have as many"
            )
        return batch.to(self.parameters[0].device)

    def restart(self) -> None:
        """Sets d to 0 and goes on to the next tasks; chooses the chunk size at the first ones, if that is asked for.

        Raises:
            ConfigError: A single task takes more memory than the budget.
        """
        super().restart()
        self._go_on()
        if self.chunk_size == "auto" and not int(self._held.chunk):
            self._chunking = self._measured()
            with torch.no_grad():
                self._held.chunk.fill_(self._chunking.size)

    @property
    def chunking(self) -> Chunking | None:
        """The chunk size that was chosen and what was measured, where ``chunk_size="auto"``; None before the choice.

        Of a choice that was read from a file, the size alone is known. ``print(adaptation.chunking)`` lists it all.
        """
        size = int(self._held.chunk) if self.chunk_size == "auto" else 0
        if size and (self._chunking is None or self._chunking.size != size):
            return Chunking(size, self.memory_budget or 0)
        return self._chunking if size else None

    def chunks(self) -> list[Chunk]:
        """Returns the chunks in which tasks are evaluated; of one task each, as long as the size is not chosen."""
        return chunks_of(self.num_tasks, self._size())

    def on_step_end(self, result: StepResult) -> None:
        """Leaves the tasks of a step that was skipped: the same ones would lead to the same end."""
        if result.skipped:
            self._go_on()

    def outputs(self, values: Mapping[str, Tensor], inputs: Tensor) -> Tensor:
        """Returns the network's outputs ``(M, n, …)``.

        Args:
            values: The network's parameters by name, of their own shapes or ``(M, *shape)``.
            inputs: ``(M, n, …)``.
        """
        size = self._size()
        size = None if size is None or size >= len(inputs) else size
        return stacked_outputs(self.network, values, inputs, vectorized=self.vectorized, chunk_size=size)

    def losses(self, outputs: Tensor, targets: Tensor, criterion: Criterion | None = None) -> Tensor:
        """Returns the loss of every task, ``(M,)``."""
        return stacked_losses(criterion or self.criterion, outputs, targets, vectorized=self.vectorized)

    def loss(self, batch: Any) -> Mapping[str, Any]:
        """Returns the sum of the tasks' losses on their support sets, with the outputs unless tasks are in chunks."""
        refuse_data(self, batch)
        tasks, chunking = self.tasks(), self.chunking
        if len(self.chunks()) == 1 or self._keeps_graphs:
            found = self._support_loss(tasks, self.displacements())
        elif self._alone is None:
            found = {"loss": summed(self._in_chunks(tasks), shared_too=False)}
        else:
            with seeded(_drawn_seed(), self._alone, self.parameters[0].device):
                found = self._support_loss(TaskBatch(*self._alone.of(tasks)), self.displacements())
        return found if chunking is None else {**found, "chunk_size": chunking.size}

    def respond(self, estimator: Estimator, lower: InnerProblem) -> Response:
        """See :meth:`Problem.respond`: chunk by chunk, but where an update is one of all tasks together."""
        chunks = self.chunks()
        together = estimator.needs_trajectory and (self.max_grad_norm is not None or self.projects)
        if len(chunks) == 1 or together or self._keeps_graphs:
            return super().respond(estimator, lower)
        return ResponseInChunks(estimator, lower, chunks, self._taking)

    def sum_of(self, loss: Callable[[Chunk], Tensor]) -> Sum:
        """Returns the sum over chunks of a loss, which is called with the chunk's displacements in place."""
        stacked, shared = Standing([self.module]), Standing([self.learner().module])
        return Sum(self.chunks(), loss, stacked, shared, _drawn_seed(), self.parameters[0].device)

    def adapt(self, tasks: TaskBatch, steps: int | None = None) -> dict[str, Tensor]:
        """Returns the network's parameters after adaptation to tasks, and changes nothing.

        Args:
            tasks: Any number of them.
            steps: ``self.steps`` by default.

        Returns:
            By the network's parameter names; ``(M, *shape)`` for those that adapt.

        Cost: ``steps`` forward and backward passes of the support sets, over as many copies as there are tasks.
        """
        check_integer(self.name, "steps", self.steps if steps is None else steps, minimum=0)
        tasks = tasks.to(self.parameters[0].device)
        size = self._size() if self.max_grad_norm is None else None
        chunks = chunks_of(len(tasks.support_targets), size)
        found = [self._adapted(TaskBatch(*chunk.of(tasks)), steps) for chunk in chunks]
        own = {name: parameter.dim() for name, parameter in self.network.named_parameters()}
        return {
            name: value if value.dim() == own[name] else torch.cat([part[name] for part in found])
            for name, value in found[0].items()
        }

    def _adapted(self, tasks: TaskBatch, steps: int | None) -> dict[str, Tensor]:
        count = len(tasks.support_targets)
        displacements = {name: _zeros(count, value[0]).requires_grad_() for name, value in self.displacements().items()}
        moving = tuple(displacements.values())
        optimizer = self._optimizer_of(moving)
        with torch.enable_grad():
            for _ in range(self.steps if steps is None else steps):
                loss = self._support_loss(tasks, displacements, constant=True)["loss"]
                for part, gradient in zip(moving, dense_gradient(derivatives(loss, moving), moving), strict=True):
                    part.grad = gradient
                if self.max_grad_norm is not None:
                    nn.utils.clip_grad_norm_(moving, self.max_grad_norm)
                optimizer.step()
        with torch.no_grad():
            return self.learner().adapted(tasks, {name: part.detach() for name, part in displacements.items()})

    def assess(self, tasks: TaskSource | Sequence[TaskBatch], batches: int = 1, steps: int | None = None) -> Assessment:
        """Judges how well tasks are learned: adapts to their support sets and takes the losses on their query sets.

        The network is in evaluation mode for the query sets.

        Args:
            tasks: Where they come from; the batches 0, 1, … are taken, and may have any number of tasks.
            batches: How many batches.
            steps: ``self.steps`` by default; more are allowed.

        Cost: a batch, that of :meth:`adapt` and 1 forward pass of the query sets.
        """
        check_integer(self.name, "batches", batches, minimum=1)
        criterion = self.learner().criterion
        losses, right = [], []
        for number in range(batches):
            batch = batch_of(tasks, number, self.name).to(self.parameters[0].device)
            values = self.adapt(batch, steps)
            modes = {part: part.training for part in self.network.modules()}
            self.network.eval()
            try:
                with torch.no_grad():
                    outputs = self.outputs(values, batch.query_inputs)
                    losses.append(self.losses(outputs, batch.query_targets, criterion))
            finally:
                for part, training in modes.items():
                    part.training = training
            accuracy = accuracies(outputs, batch.query_targets)
            right += [] if accuracy is None else [accuracy]
        return Assessment(torch.cat(losses), torch.cat(right) if right else None)

    def evaluate(self) -> Mapping[str, float]:
        """Returns loss and accuracy on the held-out tasks with their 95 % intervals over tasks, if there are any."""
        if self.held_out is None:
            return {}
        return self.assess(self.held_out, self.held_out_batches, self.held_out_steps).metrics()

    def _support_loss(
        self, tasks: TaskBatch, displacements: Mapping[str, Tensor], *, constant: bool = False
    ) -> dict[str, Any]:
        values = self.learner().adapted(tasks, displacements, constant=constant)
        outputs = self.outputs(values, tasks.support_inputs)
        loss = self.losses(outputs, tasks.support_targets).sum()
        if self.proximal:
            loss = loss + self.proximal / 2 * sum(part.square().sum() for part in displacements.values())
        return {"loss": loss, "outputs": outputs}

    def _in_chunks(self, tasks: TaskBatch) -> Sum:
        return self.sum_of(lambda chunk: self._support_loss(TaskBatch(*chunk.of(tasks)), self.displacements())["loss"])

    @property
    def _keeps_graphs(self) -> bool:
        """Whether the method keeps graphs: those of all chunks then, whose gradients are taken together."""
        return self.method is not None and self.method.keeps_graph

    def _size(self) -> int | None:
        if self._measuring:
            return None
        if isinstance(self.chunk_size, str):
            return int(self._held.chunk) or 1
        return self.chunk_size

    def _measured(self) -> Chunking:
        """Chooses the chunk size at the present tasks."""
        device, tasks = self.parameters[0].device, self.tasks()
        roots = [root for root in (self.network, self.criterion) if isinstance(root, nn.Module)]
        self._measuring = True
        try:
            with preserved({"cpu", str(device)}), buffers_protected([part for r in roots for part in r.modules()]):
                inner, (outer, _) = self._in_chunks(tasks), self.learner()._in_chunks(tasks)
                budget, name = self.memory_budget, f"problem {self.name!r}"
                return measured_chunking(inner, outer, self.steps, self.method, self.num_tasks, budget, name)
        finally:
            self._measuring = False

    @contextmanager
    def _taking(self, chunk: Chunk) -> Iterator[None]:
        """Lets the loss be that of one chunk alone, at the chunk's displacements."""
        before, self._alone = self._alone, chunk
        try:
            yield
        finally:
            self._alone = before

    def _optimizer_of(self, params: Tensors) -> Optimizer:
        """Makes an optimiser like the problem's own, with its present settings and nothing remembered."""
        assert self.optimizer is not None
        made = self._make_optimizer(list(params))
        for group, own in zip(made.param_groups, self.optimizer.param_groups, strict=True):
            group.update({key: value for key, value in own.items() if key != "params"})
        return made

    @property
    def _held(self) -> Displacements:
        assert isinstance(self.module, Displacements)
        return self.module

    def _go_on(self) -> None:
        with torch.no_grad():
            self._held.number += 1


def _drawn_seed() -> int:
    """Draws what the random numbers of all chunks follow from."""
    return int(torch.randint(2**62, ()))


def _zeros(count: int, like: Tensor) -> Tensor:
    return like.detach().new_zeros(count, *like.shape)
