"""Betty's surface: what its users call or override is here, or refused by name; and a newcomer's errors."""

from __future__ import annotations

import copy
import inspect
import types
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bilevel
from bilevel.callbacks import Callback
from bilevel.errors import (
    BilevelError,
    BilevelWarning,
    CheckpointError,
    ConfigError,
    DataError,
    GraphError,
    LossError,
    ParameterError,
)
from bilevel.interop import betty
from bilevel.interop.betty import (
    Config,
    Engine,
    EngineConfig,
    Env,
    HigherIterativeProblem,
    ImplicitProblem,
    IterativeProblem,
    Problem,
)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


# A program: outer moves towards the point whose copy inner is


class Outer(ImplicitProblem):
    def training_step(self, batch: Any) -> Any:
        return (self.inner.module.weight - 1.0).square().sum()


class Inner(ImplicitProblem):
    def training_step(self, batch: Any) -> Any:
        return (self.module.weight - self.outer.module.weight).square().sum() / 2


LOADER = [(torch.full((1,), float(number)),) for number in range(3)]


def level(kind: type, name: str, config: Config | None = None, **parts: Any) -> Any:
    module = parts.pop("module", None) or nn.Linear(1, 1, bias=False)
    optimizer = parts.pop("optimizer", None) or torch.optim.SGD(module.parameters(), lr=0.5, momentum=0.5)
    return kind(name, config or Config(type="cg"), module, optimizer, train_data_loader=LOADER, **parts)


def inner_with(config: Config | None = None, base: type = Inner, **methods: Any) -> Any:
    """An inner problem whose class has further methods."""
    return level(type("Mine", (base,), {"__module__": __name__, **methods}), "inner", config)


def made(inner: Any = None, outer: Any = None, kind: type = Engine, config: Any = None, **arguments: Any) -> Any:
    inner = level(Inner, "inner") if inner is None else inner
    outer = level(Outer, "outer") if outer is None else outer
    edges = {"u2l": {outer: [inner]}, "l2u": {inner: [outer]}}
    config = EngineConfig(train_iters=4, valid_step=2, strategy="cpu") if config is None else config
    return kind([outer, inner], config, edges, **arguments)


def ran(inner: Any = None, **arguments: Any) -> Any:
    engine = made(inner, **arguments)
    engine.run()
    return engine


# Every name of Betty's

MACHINERY_OF_PROBLEM = {
    "add_child": "graph: dependencies.declared",
    "add_parent": "graph",
    "add_paths": "graph",
    "clear_dependencies": "graph",
    "check_ready": "order of steps: the clock",
    "step_normal": "order of steps",
    "step_after_roll_back": "order of steps",
    "one_step_descent": "order of steps",
    "training_step_exec": "autocast: our engine's",
    "get_loss": "loss scale and accumulation: our engine's",
    "backward": "gradients: our engine's",
    "set_grads": "gradients",
    "epoch_callback_exec": "calls epoch_callback, which is here",
    "add_logger": "what the engine hands out",
    "add_env": "what the engine hands out",
    "configure_device": "what the engine hands out",
    "configure_distributed_training": "distribution: our engine's",
    "configure_roll_back": "what the engine hands out",
    "synchronize_params": "distribution",
    "patch_everything": "set-up: initialize",
    "patch_module": "set-up",
    "patch_optimizer": "set-up",
    "patch_scheduler": "set-up",
    "patch_data_loader": "set-up",
}
"""Betty's methods that are not here, with what they belong to: its users neither call nor override them."""

MACHINERY_OF_ITERATIVE = {
    **MACHINERY_OF_PROBLEM,
    "initialize_optimizer_state": "set-up",
    "patch_modules": "set-up",
}

MACHINERY_OF_ENGINE = {
    "check_leaf": "graph",
    "dfs": "graph",
    "find_paths": "graph",
    "parse_dependency": "graph",
    "set_problem_attr": "set-up",
    "initialize": "set-up",
    "parse_config": "set-up",
    "configure_systems": "set-up",
}

MACHINERY_OF_ENV = {
    "accelerator": "strategy='accelerate', which is refused",
    "configure_distributed_training": "distribution",
}

ATTRIBUTES_OF_PROBLEM = {
    "accelerator": "strategy='accelerate', which is refused",
    "dtype": "autocast",
    "initial_dynamic_scale": "in config",
    "scale_factor": "in config",
    "scaler": "loss scale",
    "ready": "order of steps",
}
"""Attributes without an underscore that Betty's problems have once they are in an engine, and ours have not."""

REFUSED = {"meta_trainable_parameters", "step"}
"""Are here, and an override is refused."""

IMPLICIT_CACHES = {"module_state_dict_cache", "opitmizer_state_dict_cache"}


KINDS = ("Problem", "ImplicitProblem", "IterativeProblem", "HigherIterativeProblem")


def public(kind: Any) -> set[str]:
    return {name for name in dir(kind) if not name.startswith("_")}


@pytest.fixture(scope="module")
def theirs() -> Any:
    """The real Betty."""
    modules = {name: pytest.importorskip(f"betty.{name}") for name in ("configs", "engine", "envs", "problems")}
    logger = pytest.importorskip("betty.logging.logger_base").LoggerBase
    kinds = {name: getattr(modules["problems"], name) for name in KINDS}
    return types.SimpleNamespace(
        **kinds, Engine=modules["engine"].Engine, Env=modules["envs"].Env, Logger=logger, modules=modules
    )


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("Problem", MACHINERY_OF_PROBLEM),
        ("ImplicitProblem", MACHINERY_OF_PROBLEM),
        ("IterativeProblem", MACHINERY_OF_ITERATIVE),
        ("Engine", MACHINERY_OF_ENGINE),
        ("Env", MACHINERY_OF_ENV),
    ],
)
def test_every_method_of_bettys_is_here_or_known_to_be_machinery(theirs: Any, name: str, missing: Any) -> None:
    assert public(getattr(theirs, name)) - public(getattr(betty, name)) == set(missing)


@pytest.mark.parametrize("name", ["Problem", "ImplicitProblem", "IterativeProblem", "Engine", "Env", "Logger"])
def test_methods_take_bettys_arguments(theirs: Any, name: str) -> None:
    """By name, in its order and with its defaults; ours may have more, with defaults."""
    ours = type(ran().logger) if name == "Logger" else getattr(betty, name)
    for method in sorted(public(getattr(theirs, name)) & public(ours)) + ["__init__"] * (name != "Logger"):
        expected = getattr(getattr(theirs, name), method)
        if not inspect.isfunction(expected) or name == "Logger":
            continue
        asked = list(inspect.signature(expected).parameters.values())
        given = list(inspect.signature(getattr(ours, method)).parameters.values())
        assert [part.name for part in given[: len(asked)]] == [part.name for part in asked], method
        for part, other in zip(given, asked, strict=False):
            optional = other.default is not inspect.Parameter.empty
            assert not optional or part.default is not inspect.Parameter.empty, (method, part.name)
        assert all(part.default is not inspect.Parameter.empty for part in given[len(asked) :]), method


def test_every_attribute_of_a_running_problem_is_here_or_known_to_be_machinery(theirs: Any) -> None:
    """In an engine, after some steps: ``gas``, ``device``, ``cur_batch`` and so on."""
    methods = {name: vars(Inner)[name] for name in ("training_step",)}
    inner = level(type("Inner", (theirs.ImplicitProblem,), methods), "inner", theirs.modules["configs"].Config())
    outer = level(
        type("Outer", (theirs.ImplicitProblem,), dict(vars(Outer))),
        "outer",
        theirs.modules["configs"].Config(),
    )
    engine = made(inner, outer, theirs.Engine, theirs.modules["configs"].EngineConfig(train_iters=3, strategy="cpu"))
    engine.run()
    ours = ran()
    missing = set(ATTRIBUTES_OF_PROBLEM) | IMPLICIT_CACHES | set(MACHINERY_OF_PROBLEM)
    assert public(engine.inner) - public(ours.inner) - missing == set()
    assert public(engine) - public(ours) == set(MACHINERY_OF_ENGINE)
    for name in public(ours.inner) & public(engine.inner):
        mine, other = getattr(ours.inner, name), getattr(engine.inner, name)
        if isinstance(other, (int, float, str, list, tuple)) and name != "train_data_iterator":  # the engine draws
            assert type(mine) is type(other), name


def test_names_are_where_betty_has_them(theirs: Any) -> None:
    from bilevel.interop.betty import configs, engine, envs, problems

    for name, ours in (("problems", problems), ("configs", configs), ("envs", envs)):
        other = theirs.modules[name]
        assert {name for name in public(other) if isinstance(getattr(other, name), type)} <= public(ours)
    assert engine.Engine is Engine
    assert set(betty.__all__) == public(betty) & {*betty.__all__}
    assert issubclass(HigherIterativeProblem, IterativeProblem)
    for kind in (ImplicitProblem, IterativeProblem):
        assert issubclass(kind, Problem)


# What is refused by name


@pytest.mark.parametrize("name", [*MACHINERY_OF_ITERATIVE, *sorted(REFUSED)])
def test_overriding_bettys_machinery_in_a_problem_is_refused(name: str) -> None:
    """It would be skipped in silence."""
    with pytest.raises(ConfigError, match=rf"(problem 'inner' overrides {name}|{name}\(\) of problem 'inner' is not)"):
        made(inner_with(**{name: lambda self, *_, **__: None}))


@pytest.mark.parametrize("name", MACHINERY_OF_ENGINE)
def test_overriding_bettys_machinery_in_an_engine_is_refused(name: str) -> None:
    kind = type("Mine", (Engine,), {"__module__": __name__, name: lambda self, *_, **__: None})
    with pytest.raises(ConfigError, match=rf"Mine overrides {name}\(\)"):
        made(kind=kind)


@pytest.mark.parametrize("name", ["cache_states", "recover_states"])
def test_rolling_back_oneself_is_refused(name: str) -> None:
    inner = inner_with(**{name: lambda self, *_, **__: None})
    ran(inner)  # without roll_back they are the user's own
    again = inner_with(**{name: lambda self, *_, **__: None})
    with pytest.raises(
        ConfigError, match=rf"'inner' overrides {name}\(\), which EngineConfig\.roll_back=True does not"
    ):
        made(again, config=EngineConfig(roll_back=True, strategy="cpu"))


def test_a_base_class_of_the_users_counts_too() -> None:
    class Base(ImplicitProblem):
        def backward(self, *arguments: Any) -> None:
            raise AssertionError

    class Mine(Base):
        def training_step(self, batch: Any) -> Any:
            return (self.module.weight - self.outer.module.weight).square().sum()

    with pytest.raises(ConfigError, match="'inner' overrides backward"):
        made(level(Mine, "inner"))


@pytest.mark.parametrize(
    ("part", "other"),
    [
        ("module", lambda problem: nn.Linear(1, 1)),
        ("optimizer", lambda problem: torch.optim.SGD(problem.module.parameters(), lr=0.1)),
        ("scheduler", lambda problem: torch.optim.lr_scheduler.StepLR(problem.optimizer, 1)),
        ("train_data_loader", lambda problem: [(torch.ones(1),)]),
    ],
)
def test_parts_are_fixed_when_the_engine_is_made(part: str, other: Callable[[Any], Any]) -> None:
    engine = made()
    setter = getattr(engine.inner, f"set_{part}")
    for call in (lambda: setter(other(engine.inner)), lambda: setattr(engine.inner, part, other(engine.inner))):
        with pytest.raises(ConfigError, match=f"{part} of problem 'inner' cannot be replaced.*when the engine is made"):
            call()
    engine.run()


def test_parts_may_be_set_before() -> None:
    inner = level(Inner, "inner")
    module = nn.Linear(1, 1, bias=False)
    inner.set_module(module)
    inner.set_optimizer(torch.optim.SGD(module.parameters(), lr=0.25))
    inner.set_scheduler(torch.optim.lr_scheduler.StepLR(inner.optimizer, 2))
    inner.set_train_data_loader([(torch.full((1,), 7.0),)])
    ran(inner)
    assert inner.module is module
    assert inner.optimizer.param_groups[0]["lr"] == 0.25 * 0.1**2
    assert inner.cur_batch[0].item() == 7.0


def test_settings_of_ours_that_betty_decides_are_refused() -> None:
    for field, value, instead in (
        ("steps", 7, "EngineConfig.train_iters"),
        ("precision", "bfloat16", "Config.precision"),
        ("evaluate_every", 3, "EngineConfig.valid_step"),
    ):
        with pytest.raises(ConfigError, match=rf"settings\.{field} has no meaning here: .*{instead}"):
            made(settings=bilevel.EngineConfig(**{field: value}))
    assert ran(settings=bilevel.EngineConfig(seed=3)).global_step == 4


def test_roll_back_is_for_two_levels() -> None:
    class Middle(ImplicitProblem):
        def training_step(self, batch: Any) -> Any:
            return (self.module.weight - self.inner.module.weight).square().sum() + self.module.weight.square().sum()

    class Top(ImplicitProblem):
        def training_step(self, batch: Any) -> Any:
            return (self.outer.module.weight - 1).square().sum()

    class Bottom(ImplicitProblem):
        def training_step(self, batch: Any) -> Any:
            weight = self.module.weight
            return (weight - self.outer.module.weight - self.top.module.weight).square().sum() + weight.square().sum()

    top, middle, bottom = level(Top, "top"), level(Middle, "outer"), level(Bottom, "inner")
    edges = {"u2l": {top: [bottom], middle: [bottom]}, "l2u": {bottom: [middle], middle: [top]}}
    with pytest.raises(ConfigError, match=r"EngineConfig\.roll_back=True is for two levels.*'outer'.*Choices: False"):
        Engine([top, middle, bottom], EngineConfig(roll_back=True), edges)


def test_first_order_false_is_refused_over_an_implicit_problem() -> None:
    """Betty drops the hypergradient there; over a problem that is differentiated by its updates it means nothing."""
    with pytest.raises(ConfigError, match=r"Config\.first_order=False of problem 'outer' is not .* 'inner'.*True"):
        made(outer=level(Outer, "outer", Config(first_order=False)))
    followed = level(type("Followed", (IterativeProblem,), {"training_step": vars(Inner)["training_step"]}), "inner")
    assert ran(followed, outer=level(Outer, "outer", Config(first_order=False))).global_step == 4
    assert ran(level(Inner, "inner", Config(first_order=False))).global_step == 4  # below: nobody reads it


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_updates_are_followed_in_float32_only(precision: str) -> None:
    kind = type("Followed", (IterativeProblem,), {"training_step": vars(Inner)["training_step"]})
    with pytest.raises(ConfigError, match=rf"Config\.precision='{precision}' is not supported for 'inner'.*'fp32'"):
        made(level(kind, "inner", Config(precision=precision)))


@pytest.mark.parametrize("kind", ["sama", "unrolled"])
def test_a_step_of_the_users_own_is_refused_where_the_step_is_differentiated(kind: str) -> None:
    mine = {"custom_optimizer_step": lambda self: self.optimizer.step()}
    with pytest.raises(ConfigError, match="'inner' is differentiated by its updates .*custom_optimizer_step"):
        made(inner_with(Config(type=kind), **mine))
    ran(inner_with(Config(type="cg"), **mine))


def test_configurations_are_checked_again_and_fixed_with_the_engine() -> None:
    inner, outer, config = level(Inner, "inner"), level(Outer, "outer"), EngineConfig(strategy="cpu", train_iters=2)
    inner.config.unroll_steps = 0
    with pytest.raises(ConfigError, match="Config.unroll_steps"):
        made(inner, outer, config=config)
    inner.config.unroll_steps = 2
    config.valid_step = 0
    with pytest.raises(ConfigError, match="EngineConfig.valid_step"):
        made(inner, outer, config=config)
    config.valid_step = 1
    engine = made(inner, outer, config=config)
    with pytest.raises(ConfigError, match="Config.unroll_steps is fixed: the engine that goes by it is made"):
        engine.inner.config.unroll_steps = 1
    with pytest.raises(ConfigError, match="EngineConfig.train_iters is fixed"):
        engine.config.train_iters = 1
    with pytest.raises(ConfigError, match="unknown field of Config: 'unrol_steps'.*did you mean 'unroll_steps'"):
        Config().unrol_steps = 2  # type: ignore[attr-defined]


# What users call


def test_attributes_of_a_problem() -> None:
    config, extra, env = Config(type="cg", unroll_steps=2, gradient_accumulation=2, warmup_steps=1), object(), Env()
    inner = level(Inner, "inner", config, extra_config=extra)
    assert (inner.name, inner.config, inner.cfg) == ("inner", config, extra)
    assert (inner.count, inner.children, inner.parents, inner.paths) == (0, [], [], [])
    assert (inner.env, inner.logger, inner.cur_batch, inner.scheduler) == (None, None, None, None)
    assert inner.is_rank_zero()
    engine = made(inner, env=env)
    outer = engine.outer
    assert (inner.outer, outer.inner, engine.inner, env.inner, env.outer) == (outer, inner, inner, inner, outer)
    assert (inner.leaf, outer.leaf, engine.leaves) == (True, False, [inner])
    assert (inner.parents, outer.children, outer.paths) == ([outer], [inner], [[outer, inner, outer]])
    assert inner.env is env
    assert inner.logger is engine.logger
    assert torch.device(inner.device) == torch.device(env.device) == torch.device("cpu")
    assert (inner.gas, inner.warmup_steps, inner.precision, inner.log_step) == (2, 1, "fp32", -1)
    assert (inner.gradient_clipping, inner.log_local_step) == (0.0, False)
    boundaries = []
    for _ in range(6):
        engine.train_step()
        boundaries.append(inner.gradient_accumulation_boundary())
    assert boundaries == [False, True] * 3
    assert (inner.count, outer.count, engine.global_step) == (6, 1, 6)
    assert inner.cur_batch[0].item() in (0.0, 1.0, 2.0)
    assert inner.cfg is extra


def test_attributes_of_an_engine() -> None:
    config = EngineConfig(train_iters=3, valid_step=5, strategy="cpu")
    engine = made(config=config)
    assert engine.config == config
    assert [problem.name for problem in engine.problems] == ["outer", "inner"]
    assert set(engine.dependencies) == {"u2l", "l2u"}
    assert (engine.train_iters, engine.valid_step, engine.logger_type, engine.global_step) == (3, 5, "none", 0)
    assert torch.device(engine.device) == torch.device("cpu")
    assert engine.is_rank_zero()
    assert engine.env is None
    assert engine.is_implemented("run")
    assert not engine.is_implemented("validation")
    assert not engine.is_implemented("config")
    assert not engine.do_validation()
    assert "outer" in repr(engine)
    assert engine.train_step().step == 1


def test_is_implemented() -> None:
    inner = inner_with(param_callback=lambda self: None)
    assert inner.is_implemented("param_callback")
    assert inner.is_implemented("training_step")
    assert not inner.is_implemented("grad_callback")
    assert not inner.is_implemented("name")


def test_calling_a_problem_is_forward() -> None:
    inner = inner_with(forward=lambda self, x, scale=1.0: scale * self.module(x))
    x = torch.ones(2, 1)
    assert torch.equal(inner(x, scale=3.0), 3.0 * inner.module(x))
    plain = level(Inner, "plain")
    assert torch.equal(plain(x), plain.module(x))
    assert torch.equal(plain.forward(x), plain.module(x))


def test_parameters() -> None:
    inner = level(
        Inner, "inner", module=(module := nn.Linear(2, 1)), optimizer=torch.optim.SGD([module.weight], lr=1.0)
    )
    assert [id(p) for p in inner.parameters()] == [id(module.weight), id(module.bias)]
    assert [id(p) for p in inner.trainable_parameters()] == [id(module.weight), id(module.bias)]
    module.weight.data.fill_(0.5)
    outer = level(Outer, "outer", module=nn.Linear(2, 1, bias=False))
    made(inner, outer)
    # Betty trains the bias, which nobody gave to the optimiser.
    assert [id(p) for p in inner.trainable_parameters()] == [id(module.weight)]
    assert [id(p) for p in inner.meta_trainable_parameters()] == [id(module.weight)]
    assert [id(p) for p in inner.parameters()] == [id(module.weight), id(module.bias)]


def test_gradients_are_emptied_and_clipped_by_hand() -> None:
    inner = level(Inner, "inner", Config(gradient_clipping=0.5))
    inner.module.weight.grad = torch.full((1, 1), 4.0)
    inner.clip_grad()
    assert inner.module.weight.grad.item() == pytest.approx(0.5, rel=1e-5)
    before = inner.module.weight.item()
    inner.optimizer_step()
    assert inner.module.weight.item() == pytest.approx(before - 0.25, abs=1e-5)
    inner.zero_grad()
    assert inner.module.weight.grad is None


def test_train_and_eval() -> None:
    engine = made()
    for problem in engine.problems:
        problem.eval()
        assert not problem.module.training
        problem.train()
        assert problem.module.training
    engine.eval()
    assert not any(problem.module.training or problem.training for problem in engine.problems)
    engine.train()
    assert all(problem.module.training and problem.training for problem in engine.problems)


def test_state_of_the_optimizer_by_parameter() -> None:
    engine = ran()
    weight = engine.inner.module.weight
    assert engine.inner.get_opt_param_group_for_param(weight) is engine.inner.optimizer.param_groups[0]
    assert engine.inner.get_opt_param_group_for_param(torch.ones(1)) is None
    assert engine.inner.get_opt_state_for_param(weight)["momentum_buffer"].shape == weight.shape


def test_state_round_trip() -> None:
    """Module, optimizer and scheduler; the run goes on from there as from the first."""

    def inner() -> Any:
        problem = level(Inner, "inner")
        problem.set_scheduler(torch.optim.lr_scheduler.StepLR(problem.optimizer, 2))
        return problem

    first, second = ran(inner()), made(inner())
    state = first.inner.state_dict()
    assert list(state) == ["module", "optimizer", "scheduler"]
    for name in ("inner", "outer"):  # a copy, since torch's optimisers keep the tensors that they are given
        getattr(second, name).load_state_dict(copy.deepcopy(getattr(first, name).state_dict()))
    for engine in (first, second):
        for _ in range(3):
            engine.train_step()
    assert torch.equal(first.inner.module.weight, second.inner.module.weight)
    assert torch.equal(first.outer.module.weight, second.outer.module.weight)
    assert second.inner.scheduler.last_epoch == 7
    for missing in ("module", "optimizer", "scheduler"):
        with pytest.raises(CheckpointError, match=f"the state of problem 'inner' has no '{missing}'"):
            second.inner.load_state_dict({name: part for name, part in state.items() if name != missing})


def test_cached_states() -> None:
    engine = ran()
    with pytest.raises(ConfigError, match=r"'inner' has no states to recover: call cache_states\(\) first"):
        engine.inner.recover_states()
    engine.inner.cache_states()
    kept = engine.inner.module.weight.clone()
    momentum = engine.inner.optimizer.state[engine.inner.module.weight]["momentum_buffer"].clone()
    for clean in (False, True):
        engine.train_step()
        assert not torch.equal(engine.inner.module.weight, kept)
        engine.inner.recover_states(clean=clean)
        assert torch.equal(engine.inner.module.weight, kept)
        assert torch.equal(engine.inner.optimizer.state[engine.inner.module.weight]["momentum_buffer"], momentum)
    with pytest.raises(ConfigError, match="no states to recover"):
        engine.inner.recover_states()
    engine.train_step()


def test_logging(capsys: pytest.CaptureFixture[str]) -> None:
    engine = ran()
    capsys.readouterr()
    engine.inner.log({"loss": torch.tensor(0.5), "acc": 2}, 7)
    engine.outer.log({"loss": 1.0}, None)
    engine.inner.logger.info("by %s", "hand")
    engine.logger.warning("careful")
    engine.logger.error("wrong")
    engine.logger.debug("not shown")
    engine.logger.log({"loss": 1.0}, tag="here", step=3)
    lines = capsys.readouterr().out.splitlines()
    for shown, text in zip(
        lines,
        [
            '[INFO] [Problem "inner"] [Global Step 7] [Local Step 4] loss: 0.5 || acc: 2',
            '[INFO] [Problem "outer"] [Local Step 4] loss: 1.0',
            "[INFO] by hand",
            "[WARNING] careful",
            "[ERROR] wrong",
        ],
        strict=True,
    ):
        assert shown.endswith(text)
    with pytest.raises(ConfigError, match="'inner' has no logger: it is in no engine yet"):
        level(Inner, "inner").log({"loss": 1.0}, 1)


@pytest.mark.parametrize(
    ("own", "given", "step"), [(False, 9, 9), (True, 9, 4), (False, None, 4)], ids=["global", "local", "none given"]
)
def test_numbers_are_logged_by_the_engines_steps_or_the_problems_own(own: bool, given: Any, step: int) -> None:
    seen: list[Any] = []
    engine = ran(level(Inner, "inner", Config(log_local_step=own)))
    engine.logger.log = lambda stats, tag=None, step=None: seen.append((stats, tag, step))
    engine.inner.log({"loss": 1.0}, given)
    assert seen == [({"loss": 1.0}, "inner", step)]


def test_a_problem_logs_its_own_way(capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[Any] = []
    ran(
        inner_with(
            Config(type="cg", log_step=2), log=lambda self, stats, global_step: seen.append((stats, global_step))
        )
    )
    assert [step for _, step in seen] == [2, 4]
    assert set(seen[0][0]) == {"loss"}
    assert '[Problem "inner"]' not in capsys.readouterr().out


# What users override


OVERRIDES = {
    "optimizer_step": 4,
    "clip_grad": 4,
    "zero_grad": 4,
    "train": 1,
    "get_batch": 4,
    "get_batch_single_loader": 4,
    "initialize": 1,
    "log": 4,
}
"""Methods that Betty calls, and how often in 4 iterations of the inner problem; each calls the one above it."""


@pytest.mark.parametrize("name", OVERRIDES)
def test_an_override_that_calls_super_changes_nothing(name: str) -> None:
    calls: list[str] = []

    def method(self: Any, *arguments: Any, **named: Any) -> Any:
        calls.append(name)
        return getattr(Inner, name)(self, *arguments, **named)

    def weights(inner: Any) -> list[Tensor]:
        engine = made(inner)
        if name == "initialize":
            assert len(calls) == (inner.__class__ is not Inner)
        engine.run()
        return [inner.module.weight, engine.outer.module.weight]

    def config() -> Config:
        return Config(type="cg", gradient_clipping=0.1, log_step=1)

    torch.manual_seed(0)
    plain = weights(level(Inner, "inner", config()))
    torch.manual_seed(0)
    overridden = weights(inner_with(config(), **{name: method}))
    assert all(map(torch.equal, plain, overridden))
    assert len(calls) == OVERRIDES[name]


def test_optimizer_step_overridden_is_the_update() -> None:
    def step(self: Any, *arguments: Any, **named: Any) -> None:
        with torch.no_grad():
            self.module.weight.copy_(torch.full((1, 1), float(self.count)))

    assert ran(inner_with(optimizer_step=step)).inner.module.weight.item() == 4.0


def test_clip_grad_overridden_is_the_clipping() -> None:
    def clip(self: Any) -> None:
        self.module.weight.grad.zero_()

    inner = inner_with(Config(gradient_clipping=1.0), clip_grad=clip)
    before = inner.module.weight.item()
    assert ran(inner).inner.module.weight.item() == before


def test_trainable_parameters_overridden_trains_those() -> None:
    module = nn.Linear(1, 1)
    kind = type("Mine", (Inner,), {"trainable_parameters": lambda self: [self.module.bias]})

    def loss(self: Any, batch: Any) -> Tensor:
        return (self.module.weight + self.module.bias - self.outer.module.weight).square().sum()

    kind.training_step = loss  # type: ignore[attr-defined]
    above = type(
        "Above", (Outer,), {"training_step": lambda self, batch: (self.inner.module.bias - 1.0).square().sum()}
    )
    before = module.weight.item(), module.bias.item()
    ran(level(kind, "inner", module=module), outer=level(above, "outer"))
    assert module.weight.item() == before[0]
    assert module.bias.item() != before[1]


def test_get_batch_by_hand_from_the_loaders_iterators() -> None:
    """As Betty's programs write it: ``train_data_iterator`` and ``train_data_loader`` are lists."""
    seen: list[float] = []

    def get_batch(self: Any) -> Any:
        try:
            batch = next(self.train_data_iterator[0])
        except StopIteration:
            self.epoch_counter[0] += 1
            self.train_data_iterator[0] = iter(self.train_data_loader[0])
            batch = next(self.train_data_iterator[0])
        seen.append(batch[0].item())
        return batch

    engine = ran(inner_with(get_batch=get_batch))
    assert seen[-4:] == [0.0, 1.0, 2.0, 0.0]
    assert engine.inner.epoch_counter == [1]


def test_get_batch_that_calls_super() -> None:
    def get_batch(self: Any) -> Any:
        (x,) = ImplicitProblem.get_batch(self)
        return x + 10.0

    seen: list[float] = []

    def loss(self: Any, batch: Any) -> Any:
        seen.append(batch.item())
        return Inner.training_step(self, batch)

    assert ran(inner_with(get_batch=get_batch, training_step=loss)).inner.cur_batch.item() in (10.0, 11.0, 12.0)
    assert set(seen) == {10.0, 11.0, 12.0}


def test_get_batch_without_a_loader() -> None:
    kind = type("Mine", (Inner,), {"get_batch": lambda self: {"x": self.count}})
    module = nn.Linear(1, 1, bias=False)
    inner = kind("inner", Config(type="cg"), module, torch.optim.SGD(module.parameters(), lr=0.1))
    assert ran(inner).inner.cur_batch == {"x": 4}


def test_epoch_callback() -> None:
    seen: list[int] = []
    inner = inner_with(epoch_callback=lambda self: seen.append(self.count))
    engine = made(inner)
    for _ in range(8):
        engine.train_step()
    assert seen == [4, 7]


def test_parts_from_methods_in_bettys_order() -> None:
    calls: list[str] = []

    class Configured(Inner):
        def configure_train_data_loader(self) -> Any:
            calls.append("train_data_loader")
            assert self.outer.name == "outer"
            assert self.env.value == 3
            assert self.device is not None
            return LOADER

        def configure_module(self) -> nn.Module:
            calls.append("module")
            return nn.Linear(1, 1, bias=False)

        def configure_optimizer(self) -> torch.optim.Optimizer:
            calls.append("optimizer")
            return torch.optim.SGD(self.module.parameters(), lr=0.1)

        def configure_scheduler(self) -> Any:
            calls.append("scheduler")
            return torch.optim.lr_scheduler.StepLR(self.optimizer, 1)

    env = type("Mine", (Env,), {"initialize": lambda self: setattr(self, "value", 3)})()
    ran(Configured("inner", Config()), env=env)
    assert calls == ["train_data_loader", "module", "optimizer", "scheduler"]


def test_env() -> None:
    assert (Env.env, Env.train_data_loader, Env.device) == (None, None, None)
    seen: list[Any] = []

    class Mine(Env):
        def configure_device(self, device: Any) -> None:
            super().configure_device(device)
            seen.append("device")

        def initialize(self) -> None:
            super().initialize()
            seen.append(("initialize", self.inner.name, str(self.device)))
            self.module = self.patch_module(nn.Linear(1, 1))
            self.train_data_loader = self.patch_data_loader(LOADER)

    engine = ran(env=Mine())
    assert seen == ["device", ("initialize", "inner", "cpu")]
    assert engine.env.train_data_loader is LOADER
    assert not hasattr(Env, "inner")


def test_validation() -> None:
    modes: list[Any] = []

    def validation(self: Any) -> Mapping[str, Any]:
        modes.append((self.global_step, self.inner.training, self.inner.module.training, self.outer.module.training))
        return {"loss": self.inner.module.weight.square().sum(), "parts": [1, 2]}

    engine = ran(kind=type("Mine", (Engine,), {"validation": validation}))
    assert modes == [(2, False, False, False), (4, False, False, False)]
    assert engine.inner.module.training
    assert engine.do_validation()


@pytest.mark.parametrize("way", ["super", "leaves"])
def test_an_iteration_of_the_users_own(way: str) -> None:
    """Betty's learning-to-learn programs draw a task there."""
    seen: list[Any] = []

    class Mine(Engine):
        def train_step(self) -> Any:
            seen.append(self.global_step)
            if way == "super":
                return super().train_step()
            for leaf in self.leaves:
                leaf.step(global_step=self.global_step)
            return None

    torch.manual_seed(0)
    plain = ran()
    torch.manual_seed(0)
    engine = ran(kind=Mine)
    assert seen == [1, 2, 3, 4]
    assert (engine.global_step, engine.inner.count, engine.outer.count) == (4, 4, 4)
    assert torch.equal(engine.inner.module.weight, plain.inner.module.weight)
    assert torch.equal(engine.outer.module.weight, plain.outer.module.weight)


def test_steps_of_problems_whose_turn_it_is_not() -> None:
    engine = made()
    with pytest.raises(ConfigError, match=r"step\(\) of problem 'outer': .* of the lowest problems only \('inner'\)"):
        engine.outer.step()
    with pytest.raises(ConfigError, match=r"step\(\) of problem 'inner': make an engine with it first"):
        level(Inner, "inner").step()
    engine.inner.step()
    assert (engine.global_step, engine.outer.count) == (1, 1)


def test_an_iteration_that_steps_nothing() -> None:
    with pytest.raises(ConfigError, match="train_step"):
        ran(kind=type("Mine", (Engine,), {"train_step": lambda self: None}))


def test_an_iteration_that_steps_twice() -> None:
    def train_step(self: Any) -> None:
        self.inner.step()
        self.inner.step()

    with pytest.raises(ConfigError, match="train_step|once an iteration"):
        ran(kind=type("Mine", (Engine,), {"train_step": train_step}))


def test_a_problem_alone(theirs: Any) -> None:
    """One level: Betty trains it, and so does this."""
    kind = type("Alone", (ImplicitProblem,), {"training_step": lambda self, batch: self.module.weight.square().sum()})
    alone = level(kind, "alone")
    before = alone.module.weight.item()
    engine = Engine([alone], EngineConfig(train_iters=1, strategy="cpu"), {"u2l": {}, "l2u": {}})
    engine.run()
    assert alone.module.weight.item() == before - 0.5 * 2 * before


def test_a_second_run_goes_on(theirs: Any) -> None:
    """The iterations go on, and the validations are counted anew, as in Betty."""

    def steps(kind: type, base: type, config: type, engine_config: type) -> list[int]:
        seen: list[int] = []
        mine = type("Mine", (kind,), {"validation": lambda self: seen.append(self.global_step)})
        outer, inner = (
            level(type(each.__name__, (base,), {"training_step": vars(each)["training_step"]}), name, config(type="cg"))
            for each, name in ((Outer, "outer"), (Inner, "inner"))
        )
        engine = made(inner, outer, mine, engine_config(train_iters=3, valid_step=2, strategy="cpu"))
        engine.run()
        engine.run()
        return [*seen, engine.global_step, inner.count]

    configs = theirs.modules["configs"]
    expected = steps(theirs.Engine, theirs.ImplicitProblem, configs.Config, configs.EngineConfig)
    assert steps(Engine, ImplicitProblem, Config, EngineConfig) == expected == [2, 5, 6, 6]


def test_do_validation_may_say_no() -> None:
    mine = {"validation": lambda self: 1 / 0, "do_validation": lambda self: False}
    assert ran(kind=type("Mine", (Engine,), mine)).global_step == 4


# A newcomer's errors


def loss_of(step: Callable[..., Any]) -> Any:
    return inner_with(training_step=step)


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (lambda self, batch: self.module.weight.expand(2, 1) - self.outer.module.weight, r"must be a scalar.*\(2, 1\)"),
        (lambda self, batch: (Inner.training_step(self, batch), 1.0), "must be a scalar tensor; it is a tuple"),
        (lambda self, batch: None, "must be a scalar tensor; it is a NoneType"),
        (lambda self, batch: 1.0, "must be a scalar tensor; it is a float"),
        (lambda self, batch: {"accuracy": 1.0}, "returned a mapping without 'loss'; it has: accuracy"),
    ],
    ids=["no scalar", "tuple", "None", "float", "no loss"],
)
def test_a_loss_of_the_wrong_kind(step: Any, message: str) -> None:
    with pytest.raises(LossError, match=f"the loss of problem 'inner' {message}"):
        made(loss_of(step)).run()


def test_a_loss_without_the_problem_above() -> None:
    with pytest.raises(BilevelWarning, match="'inner' is declared to use the parameters of 'outer', and does not"):
        made(loss_of(lambda self, batch: self.module.weight.square().sum())).run()


def test_no_training_step() -> None:
    with pytest.raises(NotImplementedError, match=r"problem 'inner' needs a training_step\(self, batch\)"):
        made(level(ImplicitProblem, "inner")).run()


@pytest.mark.parametrize("part", ["module", "optimizer", "train_data_loader"])
def test_a_part_that_is_missing(part: str) -> None:
    parts = {"module": nn.Linear(1, 1, bias=False), "train_data_loader": LOADER}
    parts["optimizer"] = torch.optim.SGD(parts["module"].parameters(), lr=0.1)
    for configured in ({}, {f"configure_{part}": lambda self: None}):
        kind = type("Mine", (Inner,), configured)
        inner = kind("inner", Config(), **{**parts, part: None})
        with pytest.raises(
            ConfigError, match=rf"problem 'inner' has no {part}: pass {part}= or define configure_{part}"
        ):
            made(inner)


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("module", nn.Linear, r"module of problem 'inner' must be an nn\.Module, not <class"),
        ("module", torch.ones(1), r"module of problem 'inner' must be an nn\.Module, not tensor"),
        ("module", [nn.Linear(1, 1)], r"module of problem 'inner' must be an nn\.Module, not \[Linear"),
        ("optimizer", torch.optim.SGD, "optimizer of problem 'inner' must be a torch optimizer, not <class"),
        ("optimizer", "sgd", "optimizer of problem 'inner' must be a torch optimizer, not 'sgd'"),
        (
            "optimizer",
            torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1),
            "the optimizer of problem 'inner' holds 2 parameters that its module does not have",
        ),
        ("scheduler", "step", "scheduler of problem 'inner' must be a learning-rate scheduler"),
        (
            "train_data_loader",
            3,
            "data of problem 'inner' must be a DataLoader or another iterable of batches, not int",
        ),
        ("train_data_loader", [], "data of problem 'inner' yields no batch"),
        ("train_data_loader", [3], "a batch of problem 'inner' must be a mapping or a tuple or list of parts, not 3"),
        ("train_data_loader", [None], "a batch of problem 'inner' must be a mapping .*, not None"),
        ("train_data_loader", [torch.ones(())], "a batch of problem 'inner' must be a mapping .*, not tensor"),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value else "",
)
def test_a_part_of_the_wrong_kind(part: str, value: Any, message: str) -> None:
    module = nn.Linear(1, 1, bias=False)
    parts = {"module": module, "optimizer": torch.optim.SGD(module.parameters(), lr=0.1), "train_data_loader": LOADER}
    with pytest.raises((ConfigError, ParameterError, DataError), match=message):
        made(Inner("inner", Config(), **{**parts, part: value})).run()


def test_a_loader_of_tensors_yields_tuples_of_rows() -> None:
    """As in Betty: ``(x, y)`` and a tensor of two rows are told apart by nothing."""
    inner = level(Inner, "inner")
    inner.set_train_data_loader([torch.tensor([[1.0], [2.0]])])
    batch = ran(inner).inner.cur_batch
    assert isinstance(batch, tuple)
    assert [row.item() for row in batch] == [1.0, 2.0]


@pytest.mark.parametrize("name", ["", "in-ner", "1st", "lambda", "a b", None, True, 5, b"inner"], ids=repr)
def test_a_name_that_is_none(name: Any) -> None:
    with pytest.raises(ConfigError, match=r"name of a problem must be an identifier, not .*self\.<name>"):
        level(Inner, name)


@pytest.mark.parametrize("name", ["run", "config", "module", "count", "leaf", "driver", "training_step", "_engine"])
def test_a_name_that_is_taken(name: str) -> None:
    with pytest.raises(ConfigError, match=f"a problem cannot be named '{name}': this is an attribute of"):
        made(level(Inner, name))


def test_problems_that_clash() -> None:
    with pytest.raises(GraphError, match="two problems are named 'outer'"):
        made(level(Inner, "outer"))
    outer, inner = level(Outer, "outer"), level(Inner, "inner")
    edges = {"u2l": {outer: [inner]}, "l2u": {inner: [outer]}}
    with pytest.raises(GraphError, match="'inner'.*twice"):
        Engine([outer, inner, inner], EngineConfig(strategy="cpu"), edges)
    Engine([outer, inner], EngineConfig(strategy="cpu"), edges)
    with pytest.raises(GraphError, match="problem 'outer' belongs to another engine already: make problems anew"):
        Engine([outer, inner], EngineConfig(strategy="cpu"), edges)


@pytest.mark.parametrize("broken", ["optimizer", "loss", "name"])
def test_after_an_engine_that_could_not_be_made_the_problems_are_free(broken: str) -> None:
    """In a notebook one corrects a problem, and makes the engine again."""
    outer, inner = level(Outer, "outer"), level(Inner, "inner")
    optimizer, inner.optimizer = inner.optimizer, None if broken == "optimizer" else inner.optimizer
    if broken == "loss":
        inner.training_step = lambda batch: inner.module.weight.expand(2, 1)
    other = level(Inner, "count" if broken == "name" else "inner")
    with pytest.raises(BilevelError):
        made(other if broken == "name" else inner, outer).run()
    if broken == "loss":
        del inner.training_step
        inner, outer = (inner, outer) if inner._engine is None else (level(Inner, "inner"), level(Outer, "outer"))
    inner.optimizer = optimizer if broken == "optimizer" else inner.optimizer
    assert ran(inner, outer=outer).global_step == 4


@pytest.mark.parametrize("problems", [None, 3, "inner", {"inner": 1}, [], ["inner"], [nn.Linear(1, 1)]], ids=repr)
def test_problems_of_the_wrong_kind(problems: Any) -> None:
    with pytest.raises(GraphError, match="problem"):
        Engine(problems, EngineConfig(strategy="cpu"), {"u2l": {}, "l2u": {}})


def test_one_problem_that_is_in_no_list() -> None:
    with pytest.raises(GraphError, match="problems must be a list of problems"):
        Engine(level(Inner, "inner"), EngineConfig(strategy="cpu"), {"u2l": {}, "l2u": {}})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("config", {"train_iters": 3}, r"config must be a bilevel\.interop\.betty\.EngineConfig, not builtins\.dict"),
        ("config", bilevel.EngineConfig(), r"config must be a .*, not bilevel\.settings\.EngineConfig.*settings="),
        ("config", Config(), r"config must be a .*, not bilevel\.interop\.betty\.configs\.Config"),
        ("settings", {"seed": 1}, r"settings must be a bilevel\.EngineConfig, not builtins\.dict"),
        ("settings", EngineConfig(), r"settings must be a bilevel\.EngineConfig, not bilevel\.interop\.betty"),
        ("env", "env", r"env must be an instance of bilevel\.interop\.betty\.Env"),
        ("env", Env, r"env must be an instance of bilevel\.interop\.betty\.Env"),
        ("callbacks", Callback(), "callbacks must be a list"),
        ("callbacks", ["log"], "callbacks must be a list"),
    ],
)
def test_arguments_of_the_wrong_kind(argument: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        made(**{argument: value})
    assert not hasattr(Env, "inner")


def test_bettys_own_classes_are_not_these(theirs: Any) -> None:
    """As after changing one of two imports."""
    with pytest.raises(ConfigError, match=r"config must be a bilevel\.interop\.betty\.EngineConfig, not betty\."):
        made(config=theirs.modules["configs"].EngineConfig())
    with pytest.raises(ConfigError, match=r"env must be .*, not betty\."):
        made(env=theirs.modules["envs"].Env())
    module = nn.Linear(1, 1)
    problem = theirs.ImplicitProblem("inner", theirs.modules["configs"].Config(), module)
    with pytest.raises(GraphError, match=r"problem classes; got a betty\."):
        Engine([level(Outer, "outer"), problem], EngineConfig(strategy="cpu"), {"u2l": {}, "l2u": {}})


@pytest.mark.parametrize("iterations", [0, -1, 2.5, "4", True])
def test_iterations_of_the_wrong_kind(iterations: Any) -> None:
    with pytest.raises(ConfigError, match="iterations must be an integer of at least 1"):
        made().run(iterations)


@pytest.mark.parametrize("value", [torch.tensor(0.5), 0.5, [1.0], (0.5, 0.9), "loss"], ids=repr)
def test_validation_that_returns_no_mapping(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"validation\(\) must return a mapping of numbers, such as {'loss': 0.5}"):
        ran(kind=type("Mine", (Engine,), {"validation": lambda self: value}))


@pytest.mark.parametrize("value", [None, {}])
def test_validation_may_return_nothing(value: Any) -> None:
    assert ran(kind=type("Mine", (Engine,), {"validation": lambda self: value})).global_step == 4


def stopping(stats: Any, **fields: Any) -> Any:
    kind = type("Mine", (Engine,), {"validation": lambda self: stats})
    fields = {"train_iters": 9, "valid_step": 1, "early_stopping": True, "strategy": "cpu", **fields}
    return ran(kind=kind, config=EngineConfig(**fields))


@pytest.mark.parametrize(
    ("stats", "message"),
    [
        ({"accuracy": 0.5}, r"early_stopping_metric.*'loss'.*Choices: 'accuracy'"),
        (None, r"early_stopping_metric.*'loss'"),
        ({"loss": "low"}, r"EngineConfig\.early_stopping_metric='loss' must be a number .*, not 'low'"),
        ({"loss": torch.ones(2)}, r"EngineConfig\.early_stopping_metric='loss' must be a number"),
    ],
    ids=str,
)
def test_a_metric_that_validation_does_not_return(stats: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        stopping(stats)


def test_early_stopping_needs_a_validation() -> None:
    with pytest.raises(ConfigError, match=r"EngineConfig\.early_stopping=True needs a validation\(\) method"):
        made(config=EngineConfig(early_stopping=True, strategy="cpu"))


def test_early_stopping_counts_validations() -> None:
    """Betty's crashes at its first validation."""
    assert stopping({"loss": torch.tensor(1.0)}, early_stopping_tolerance=3).global_step == 4
    assert stopping({"accuracy": 1}, early_stopping_metric="accuracy", early_stopping_tolerance=1).global_step == 2


@pytest.mark.parametrize("hook", ["grad_callback", "param_callback", "on_inner_loop_start", "configure_scheduler"])
def test_a_hook_that_is_no_method(hook: str) -> None:
    with pytest.raises(ConfigError, match=f"{hook} of problem 'inner' must be a method, not 3"):
        made(inner_with(**{hook: 3}))


@pytest.mark.parametrize(
    ("misspelt", "hook"),
    [
        ("param_calback", "param_callback"),
        ("grad_callbacks", "grad_callback"),
        ("on_inner_loop_started", "on_inner_loop_start"),
        ("configure_optimizers", "configure_optimizer"),
        ("param_group", "param_groups"),
        ("training_steps", "training_step"),
    ],
)
def test_a_misspelt_hook(misspelt: str, hook: str) -> None:
    """Betty never calls it, and says nothing."""
    kind = type("Mine", (ImplicitProblem,), {misspelt: lambda self, *_: None})
    with pytest.raises(ConfigError, match=rf"method of Mine .*would never be called.* '{misspelt}'.*'{hook}'"):
        made(level(kind, "inner"))


def test_a_misspelt_validation() -> None:
    with pytest.raises(ConfigError, match="method of Mine .*'validaton': did you mean 'validation'"):
        made(kind=type("Mine", (Engine,), {"validaton": lambda self: None}))


@pytest.mark.parametrize(
    "name",
    ["configure_test_data_loader", "on_outer_loop_start", "loss", "accuracy", "get_loader", "get_param_groups"],
)
def test_helpers_of_the_users_own(name: str) -> None:
    assert ran(inner_with(**{name: lambda self: None})).global_step == 4


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (lambda self: self.module.weight, "must return a list of the optimizer's groups"),
        (lambda self: {"params": [self.module.weight]}, "must return a list of the optimizer's groups"),
        (lambda self: None, "must return a list of the optimizer's groups"),
        (lambda self: [], "holds no parameter"),
        (lambda self: [{"params": nn.Linear(1, 1).parameters()}], "parameters that its module does not have"),
        (lambda self: [{"params": []}, self.module.weight], r"param_groups\(\) of problem 'inner'"),
    ],
)
def test_parameter_groups_of_the_wrong_kind(groups: Any, message: str) -> None:
    with pytest.raises((ConfigError, ParameterError), match=message):
        made(inner_with(param_groups=groups)).run()


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda self: None, r"trainable_parameters\(\) of problem 'inner' must return a list of parameters, not None"),
        (lambda self: "weight", r"trainable_parameters\(\) of problem 'inner' must return a list of parameters"),
        (lambda self: [torch.ones(1)], r"returns 1 tensors that its optimizer does not hold"),
        (lambda self: [], "holds no parameter"),
    ],
)
def test_trainable_parameters_of_the_wrong_kind(returned: Any, message: str) -> None:
    with pytest.raises((ConfigError, ParameterError), match=message):
        made(inner_with(trainable_parameters=returned)).run()


@pytest.mark.parametrize(
    "call",
    [
        lambda problem: problem.parameters(),
        lambda problem: problem.trainable_parameters(),
        lambda problem: problem.state_dict(),
        lambda problem: problem.zero_grad(),
        lambda problem: problem(torch.ones(1)),
        lambda problem: problem.cache_states(),
    ],
)
def test_before_there_is_a_module(call: Callable[[Any], Any]) -> None:
    with pytest.raises(
        ConfigError, match=r"module of problem 'inner' must be an nn\.Module, not None.*configure_module"
    ):
        call(ImplicitProblem("inner", Config()))


def test_before_there_is_an_engine_there_are_no_batches() -> None:
    with pytest.raises(ConfigError, match="'inner' has no loader to draw from, or is in no engine yet"):
        level(Inner, "inner").get_batch()


def test_another_loader_than_there_is() -> None:
    inner = level(Inner, "inner")
    with pytest.raises(ConfigError, match="problem 'inner' has 1 loaders: there is no number 5"):
        inner.set_train_data_loader(LOADER, 5)
    with pytest.raises(ConfigError, match="idx must be an integer of at least 0, not -1"):
        inner.set_train_data_loader(LOADER, idx=-1)
    several = Inner("inner", Config(), train_data_loader=(LOADER, LOADER))
    other = [(torch.ones(1),)]
    several.set_train_data_loader(other, idx=1)
    assert several.train_data_loader == (LOADER, other)
