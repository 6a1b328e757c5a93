"""After every fault the state is a whole step's: the scenarios of docs/reliability.md, and the parts they rest on."""

from __future__ import annotations

import gc
import re
import sys
import time
import weakref

import pytest
import torch
from torch import nn

from benchmarks.reliability import memory_end
from benchmarks.reliability.faults import Scenario, differences, observe
from benchmarks.reliability.nest import Fuse, build
from benchmarks.reliability.scenarios import SCENARIOS
from bilevel import Engine, EngineConfig, Problem
from bilevel.errors import BilevelError, LossError, OutOfMemoryError, SolveError, SolveTimeoutError
from bilevel.faults import Activity, Deadline, ModesKept, Work, explained, is_out_of_memory

REFERENCES: dict[str, dict[int, dict[str, object]]] = {}
"""States of runs without faults, which scenarios share."""


def parameters() -> list[object]:
    """Three levels take their time, and so does torch to end a worker that has raised."""
    names = [scenario.name for scenario in SCENARIOS]
    assert len(set(names)) == len(names)
    slow = [pytest.mark.slow]
    return [
        pytest.param(scenario, id=scenario.name, marks=slow if _is_slow(scenario) else []) for scenario in SCENARIOS
    ]


def _is_slow(scenario: Scenario) -> bool:
    long = scenario.settings.get("levels") != 2 and "exception in a loss" not in scenario.fault
    return long or "exception in a data-loader worker" in scenario.fault or "infinite" in scenario.fault


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.parametrize("scenario", parameters())
def test_a_fault_leaves_a_whole_state_that_can_be_saved_and_goes_on_bit_for_bit(scenario, tmp_path):
    seen = observe(scenario, tmp_path, REFERENCES)
    notes = sys.version_info >= (3, 11)  # part of what is said is in them
    broken = [line for line in seen.broken(scenario) if notes or "is not in" not in line]
    assert not broken, "\n".join(broken)


@pytest.mark.slow  # a process of its own
def test_a_batch_for_which_memory_really_ends_leaves_the_step_undone():
    found = memory_end.run()
    assert (found["raised"], found["unchanged"], found["next_step"]) == ("OutOfMemoryError", True, 2)
    assert "the forward pass of problem 'inner'" in found["text"]
    assert "allocate memory" in found["text"]


@pytest.mark.parametrize("change", [None, "parameter", "momentum", "buffer", "generator"])
def test_the_comparison_of_states_sees_a_single_number(change):
    from bilevel.engine_state import engine_state

    states = []
    for place in range(2):
        engine = build(Fuse(), levels=2)
        engine.run(1)
        classifier = engine.problems["classifier"]
        if place and change == "parameter":
            classifier.module[2].weight.data[0, 0] += 1e-7
        elif place and change == "momentum":
            classifier.optimizer.state[classifier.module[2].bias]["exp_avg"][0] *= 1.0001
        elif place and change == "buffer":
            classifier.module[0].running_var[1] += 1e-6
        elif place and change == "generator":
            torch.rand(())
        states.append(engine_state(engine))
    assert bool(differences(*states)) == (change is not None)


class Quadratic(Problem):
    """Inner: w towards λ, in a module that runs out of memory when told to."""

    def loss(self, batch):
        return (self.module() - self.outer.module.weight).square().sum() / 2


class Outer(Problem):
    def loss(self, batch):
        return (self.quadratic.module.weight - 1.0).square().sum()


class Hungry(nn.Module):
    """Keeps nothing of what it computes; fails from the moment on that ``fails`` is set."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1000))
        self.fails = False
        self.made = []

    def forward(self):
        activation = self.weight.exp().log()
        self.made.append(weakref.ref(activation))
        if self.fails:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nsecond line")
        return activation


def hungry_engine(method="conjugate_gradient", **settings) -> Engine:
    outer = nn.Linear(1, 1000, bias=False)
    outer.weight = nn.Parameter(torch.ones(1000))
    sgd = lambda params: torch.optim.SGD(params, lr=0.1)  # noqa: E731
    problems = [Outer(outer, optimizer=sgd), Quadratic(Hungry(), optimizer=sgd, steps=3)]
    return Engine(problems, EngineConfig(progress=False, **settings), hypergradient=method)


def graphs() -> set[int]:
    gc.collect()
    tensors = [part for part in gc.get_objects() if issubclass(type(part), torch.Tensor)]
    return {id(part) for part in tensors if part.grad_fn is not None}


@pytest.mark.parametrize("method", ["conjugate_gradient", {"method": "unrolled", "memory": "graph"}])
def test_nothing_of_a_failed_pass_stays_in_memory_while_somebody_holds_the_exception(method):
    engine = hungry_engine(method)
    engine.step()
    module = engine.problems["quadratic"].module
    module.made.clear()
    before = graphs()
    handle = module.register_forward_hook(lambda *_: setattr(module, "fails", len(module.made) == 2))
    with pytest.raises(OutOfMemoryError) as caught:
        engine.step()
    handle.remove()
    error = caught.value
    assert len(module.made) == 3
    assert not (graphs() - before), "a graph is alive"
    assert [reference() for reference in module.made] == [None] * 3, "an activation is alive"
    assert re.search(r"\(.*test_faults.py, line \d+, in forward\)", str(error)), "the line is still told"
    assert isinstance(error.__cause__, torch.OutOfMemoryError)


def test_an_error_of_memory_says_in_which_pass_and_can_be_caught_under_all_its_names():
    engine = hungry_engine()
    engine.step()
    engine.problems["quadratic"].module.fails = True
    for kind in (OutOfMemoryError, BilevelError, torch.OutOfMemoryError, MemoryError, RuntimeError):
        with pytest.raises(kind) as caught:
            engine.step()
        text = str(caught.value)
        assert "step 2, in the forward pass of problem 'quadratic': CUDA out of memory" in text
        assert re.search(r"20.00 GiB \(.*\). The step is undone: nothing has changed. To need less memory: ", text)
        assert "smaller batches" in text
        assert "second line" not in text
    engine.problems["quadratic"].module.fails = False
    assert engine.step().step == 2


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you"), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 1.0 GB)"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_errors_of_memory_are_told_from_others(error, expected):
    assert is_out_of_memory(error) == expected


def test_activity_names_the_innermost_part_and_forgets_what_was_dealt_with():
    activity = Activity()
    with pytest.raises(ValueError, match="oh"), activity(Work.RESPONSE, "a", "x"), activity(Work.FORWARD, "b"):
        raise ValueError("oh")
    assert str(activity.failed) == "the forward pass of problem 'b'"
    with activity(Work.RESPONSE, "a", "neumann"):
        try:
            with activity(Work.BACKWARD, "b"):
                raise ValueError
        except ValueError:
            pass
        with pytest.raises(KeyError), activity(Work.RESPONSE, "a", "minres"):
            raise KeyError
    assert str(activity.failed) == "the best-response product of problem 'a' by method 'minres'"
    with activity(Work.UPDATE, "a"):
        pass
    assert activity.failed is None


@pytest.mark.parametrize("work", list(Work))
def test_every_part_of_a_step_has_a_remedy_for_memory(work):
    activity = Activity()
    with pytest.raises(MemoryError) as caught, activity(work, "a"):
        raise MemoryError
    found = explained(caught.value, activity.failed, 3, undone=False)
    assert isinstance(found, OutOfMemoryError)
    assert str(found).startswith(f"step 3, in {work.value} of problem 'a': MemoryError (")
    assert "). The step is not undone (EngineConfig.restore_on_error is off)" in str(found)
    assert str(found).endswith(f"To need less memory: {work.remedy}.")


@pytest.mark.skipif(sys.version_info < (3, 11), reason="exceptions have notes since Python 3.11")
@pytest.mark.parametrize("keeps", [True, False])
def test_any_other_exception_stays_itself_and_says_where_and_what_it_means(keeps):
    engine = hungry_engine(restore_on_error=keeps)
    error = ValueError("the user's own")
    engine.problems["quadratic"].module.register_forward_pre_hook(_raise(error))
    with pytest.raises(ValueError, match="the user's own") as caught:
        engine.step()
    assert caught.value is error
    state = (
        "The step is undone: nothing has changed."
        if keeps
        else "The step is not undone (EngineConfig.restore_on_error is off): load a checkpoint."
    )
    assert error.__notes__ == [f"Step 1, in the forward pass of problem 'quadratic'. {state}"]


def _raise(error):
    def hook(*_):
        raise error

    return hook


def test_a_deadline_lets_products_pass_until_its_time_is_over():
    now = 100.0
    deadline = Deadline(lambda tensors: tensors, 5.0, "the solve", clock=lambda: now)
    given = (torch.ones(2),)
    assert deadline(given) is given
    now = 105.0
    deadline(given)
    now = 105.1
    for kind in (SolveTimeoutError, SolveError, TimeoutError):
        with pytest.raises(
            kind, match=r"the solve took longer than EngineConfig.solve_timeout = 5 s.*on_solve_failure"
        ):
            deadline(given)


@pytest.mark.parametrize(("own", "other", "late"), [(0.5, 0, False), (2.0, 0, True), (0.5, 1, True), (2.0, 1, True)])
def test_ranks_end_a_solve_together_once_the_time_of_one_is_over(own, other, late):
    """The reduction is the mean over two ranks; what the other one gives of itself is whether it is late."""
    now = 0.0
    given = (torch.tensor([1.0, 3.0]), torch.tensor(2.0))

    def mean(tensors):
        assert len(tensors) == 3
        return (*tensors[:2], (tensors[2] + other) / 2)

    deadline = Deadline(mean, 1.0, "the solve", shared=True, clock=lambda: now)
    now = own
    if late:
        with pytest.raises(SolveTimeoutError):
            deadline(given)
    else:
        assert [part.tolist() for part in deadline(given)] == [[1.0, 3.0], 2.0]


def test_a_solve_that_is_late_ends_within_one_pass_of_its_limit():
    class Slow(Quadratic):
        def loss(self, batch):
            time.sleep(0.02)
            return super().loss(batch)

    outer = nn.Linear(1, 1000, bias=False)
    outer.weight = nn.Parameter(torch.ones(1000))
    sgd = lambda params: torch.optim.SGD(params, lr=0.1)  # noqa: E731
    inner = Slow(Hungry(), optimizer=sgd, name="quadratic")
    # 2,000 forward passes of differences: 40 s
    method = {"method": "neumann", "terms": 1000, "step_size": 0.1, "products": "finite_difference"}
    engine = Engine([Outer(outer, optimizer=sgd), inner], EngineConfig(progress=False, solve_timeout=0.2), method)
    started = time.monotonic()
    with pytest.raises(SolveTimeoutError, match="best-response product of problem 'quadratic' by method 'neumann'"):
        engine.step()
    assert time.monotonic() - started < 3


class TestModesKept:
    def test_leaves_what_was_kept_alone(self):
        before = (torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.get_default_dtype())
        weight = nn.Parameter(torch.ones(2))
        guard = ModesKept("x", ("cpu",), (weight,))
        with torch.autocast("cpu"), guard, torch.no_grad(), torch.autocast("cpu", enabled=False):
            weight * 2
        assert before == (torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.get_default_dtype())

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            (lambda: torch.set_grad_enabled(False), "gradients"),
            (lambda: torch.set_default_dtype(torch.float64), "default dtype"),
            (lambda: torch.set_autocast_enabled("cpu", True), "autocast on cpu"),
            (lambda: torch.autocast("cpu", enabled=False).__enter__(), "an autocast context that was not left"),
        ],
    )
    def test_refuses_a_changed_mode_and_puts_it_back(self, change, match):
        def modes():
            nesting = torch.autocast_increment_nesting()
            torch.autocast_decrement_nesting()
            return nesting, torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.get_default_dtype()

        before = modes()
        guard = ModesKept("problem 'x'")
        with pytest.raises(LossError, match=rf"loss of problem 'x' returned with another mode.*{match}"), guard:
            change()
        assert modes() == before
        with pytest.raises(KeyError), guard:  # an exception of the loss itself is not replaced
            _change_and_raise(change)
        assert modes() == before

    def test_no_stale_weights_are_left_in_the_cache_of_autocast(self):
        """Cast weights are kept until the outermost context is left; where it never is, updates would go unseen."""
        weight = nn.Parameter(torch.ones(4, 4))

        def loss():
            torch.autocast("cpu", dtype=torch.bfloat16).__enter__()
            return torch.ones(4, 4) @ weight

        with pytest.raises(LossError), ModesKept("x"):
            loss()
        with torch.no_grad():
            weight.mul_(3)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert float((torch.ones(4, 4) @ weight).detach()[0, 0]) == 12

    def test_refuses_a_loss_that_changes_its_parameters(self):
        weights = (nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2)))
        guard = ModesKept("x", ("cpu",), weights)
        with pytest.raises(LossError, match="changed 1 of its 2 parameters in place"), guard, torch.no_grad():
            weights[1].clamp_(max=0.5)


def _change_and_raise(change):
    change()
    raise KeyError
