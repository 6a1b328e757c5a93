"""Signals: the first ends a loop after its step, the second at once; no handler raises while state changes hands."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time

import pytest

from bilevel import EngineConfig
from bilevel.errors import UnknownNameError
from bilevel.interrupt import Shield, StopSignals, signals_kept_from_children
from tests.bilevel.test_engine import make

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals of Unix")
HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGQUIT)


class BoomError(Exception):
    """What a program's own signal handler raises."""


def boom(number: int, _: object) -> None:
    raise BoomError(signal.Signals(number).name)


@pytest.fixture(autouse=True)
def handlers():
    """Python's defaults before, and the handlers as they were after."""
    before = {number: signal.getsignal(number) for number in HANDLED}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    for number, handler in before.items():
        if handler is signal.SIG_IGN:  # as in what a shell has put into the background
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_noted_and_the_second_raises(number):
    default = signal.getsignal(number)
    with StopSignals() as stop:
        assert stop.received == ""
        signal.raise_signal(number)
        assert stop.received == number.name
        with pytest.raises(KeyboardInterrupt, match=f"SIGINT, after {number.name}"):
            signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):  # and so does a third
            signal.raise_signal(number)
    assert signal.getsignal(number) == default


def test_handlers_are_put_back_after_an_exception():
    with pytest.raises(BoomError), StopSignals(), Shield():
        raise BoomError
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_a_program_s_own_handler_and_an_ignored_signal_stay():
    signal.signal(signal.SIGTERM, boom)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # nohup, or a job in the background
    with StopSignals() as stop:
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(BoomError):
            signal.raise_signal(signal.SIGTERM)
        assert stop.received == ""
    assert signal.getsignal(signal.SIGTERM) is boom
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN


def test_the_set_of_signals_is_the_caller_s():
    with StopSignals(["SIGUSR1"]) as stop:
        signal.raise_signal(signal.SIGUSR1)
        assert stop.received == "SIGUSR1"
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with StopSignals(()):
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize(("name", "match"), [("SIGTREM", "did you mean 'SIGTERM'"), ("SIGKILL", "unknown signal")])
def test_a_signal_that_does_not_exist_or_cannot_be_handled_is_refused(name, match):
    with pytest.raises(UnknownNameError, match=match):
        StopSignals([name])


def test_outside_the_main_thread_nothing_is_installed():
    seen = []

    def work():
        with StopSignals() as stop, Shield() as shield, shield.opened():
            seen.append((signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM), stop.received))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(signal.default_int_handler, signal.SIG_DFL, "")]


def test_a_loop_within_a_loop_ends_both():
    with StopSignals() as outer:
        with StopSignals() as inner:
            signal.raise_signal(signal.SIGTERM)
        assert (inner.received, outer.received) == ("SIGTERM", "SIGTERM")
        with StopSignals() as later:
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)  # the second that the outer loop hears
            assert later.received == "SIGINT"


@pytest.mark.parametrize("guard", [StopSignals, Shield])
def test_a_handler_that_was_put_in_front_meanwhile_stays_and_passes_on(guard):
    """Torch does so for SIGCHLD when the first loader with workers starts, and keeps what was there for good."""
    heard = []
    if guard is Shield:
        signal.signal(signal.SIGINT, lambda *_: heard.append("program"))
    with guard():
        behind = signal.getsignal(signal.SIGINT)
        signal.signal(signal.SIGINT, lambda *arguments: (heard.append("front"), behind(*arguments)))
    if guard is Shield:
        signal.raise_signal(signal.SIGINT)
        assert heard == ["front", "program"]
    else:
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert heard == ["front"]


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.parametrize("guard", [StopSignals, Shield])
def test_a_forked_child_dies_of_sigterm_as_it_would_have(guard):
    """Otherwise ``multiprocessing.Pool.terminate`` within a run would wait for its workers for ever."""
    if guard is Shield:
        signal.signal(signal.SIGTERM, boom)
    with guard():
        child = os.fork()
        if child == 0:
            try:
                signal.raise_signal(signal.SIGTERM)
            except BoomError:
                os._exit(7)
            os._exit(0)
        _, status = os.waitpid(child, 0)
    if guard is Shield:
        assert os.WEXITSTATUS(status) == 7
    else:
        assert os.WIFSIGNALED(status)
        assert os.WTERMSIG(status) == signal.SIGTERM


def test_a_shield_lets_handlers_raise_once_in_the_work_and_never_in_what_follows():
    events = []

    def step():
        with Shield() as shield:
            try:
                with shield.opened():
                    signal.raise_signal(signal.SIGINT)
                    events.append("work")
            except KeyboardInterrupt:
                signal.raise_signal(signal.SIGINT)  # Ctrl-C again, while the work is undone
                events.append("undone")

    with pytest.raises(KeyboardInterrupt):
        step()
    assert events == ["undone"]


def test_a_shield_is_closed_again_after_work_that_went_well():
    events = []

    def step():
        with Shield() as shield:
            with shield.opened():
                events.append("work")
            signal.raise_signal(signal.SIGINT)
            events.append("completed")

    with pytest.raises(KeyboardInterrupt):
        step()
    assert events == ["work", "completed"]


def test_two_signals_at_one_instant_do_not_leave_the_shield_open():
    """Python runs the handler of the second right after that of the first has raised, wherever that leads."""
    signal.signal(signal.SIGUSR1, boom)
    both, events = {signal.SIGINT, signal.SIGUSR1}, []

    def step():
        with Shield() as shield:
            try:
                with shield.opened():
                    signal.pthread_sigmask(signal.SIG_BLOCK, both)
                    for number in both:
                        signal.pthread_kill(threading.get_ident(), number)  # not to a thread that does not block it
                    signal.pthread_sigmask(signal.SIG_UNBLOCK, both)
            except BaseException:
                events.append("undoing")
                signal.raise_signal(signal.SIGUSR1)
                events.append("undone")

    with pytest.raises(BoomError):
        step()
    assert events == ["undoing", "undone"]


def test_what_a_shield_held_back_arrives_when_it_is_left_and_none_hides_another():
    signal.signal(signal.SIGUSR1, boom)

    def step():
        with Shield():
            signal.raise_signal(signal.SIGUSR1)
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt) as caught:
        step()
    assert isinstance(caught.value.__context__, BoomError)
    with Shield() as shield, shield.opened():
        pass
    assert signal.getsignal(signal.SIGUSR1) is boom


def test_a_shield_is_open_again_after_a_handler_that_only_notes():
    with StopSignals() as stop, Shield() as shield:
        with shield.opened():
            signal.raise_signal(signal.SIGINT)
            assert stop.received == "SIGINT"
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt, match="SIGTERM"):
            shield.__exit__()


@pytest.mark.parametrize("name", ["SIGINT", "SIGUSR1", "SIGQUIT", "SIGXCPU", "SIGVTALRM", "SIGPROF", "SIGURG"])
def test_whatever_stops_a_run_comes_before_a_step_or_after_it(name, monkeypatch):
    """The second of two signals raises: here they come when parameters have changed and the step is not counted yet."""
    engine = make(config=EngineConfig(progress=False, stop_signals=(name,)))
    number, drop = signal.Signals[name], engine._snapshot.drop

    def interrupted():
        signal.raise_signal(number)
        signal.raise_signal(number)
        drop()

    monkeypatch.setattr(engine._snapshot, "drop", interrupted)
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt, match=f"{number.name}, after {number.name}"):
        engine.run(3)
    assert engine.step_count == 1
    assert engine.problems["classifier"].num_updates == 2
    assert signal.getsignal(number) == before


def test_signals_at_any_instant_leave_a_shielded_state_whole(monkeypatch):
    """Two numbers that must be equal between steps, under a hail of signals whose handler raises within a step."""
    state, counts = [0, 0], {"done": 0, "undone": 0}

    def handler(_, frame):
        while frame is not None:
            if frame.f_code is step.__code__:
                raise BoomError
            frame = frame.f_back

    def change(values):
        state[:] = [-1, -1]
        for _ in range(8000):
            pass
        state[:] = values

    def step():
        with Shield() as shield:
            before = list(state)
            try:
                with shield.opened():
                    change([number + 1 for number in before])
            except BoomError:
                counts["undone"] += 1
                change(before)
            else:
                counts["done"] += 1

    # What a handler raises within a finaliser goes to nobody.
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: None)
    over = threading.Event()

    def hail():
        while not over.wait(random.choice((0.00002, 0.0001, 0.001))):
            os.kill(os.getpid(), signal.SIGUSR1)

    signal.signal(signal.SIGUSR1, handler)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # or signals would come every 5 ms
    thread = threading.Thread(target=hail)
    thread.start()
    try:
        until = time.monotonic() + 1.0
        while time.monotonic() < until:
            with contextlib.suppress(BoomError):
                step()
            assert state == [counts["done"]] * 2
    finally:
        over.set()
        thread.join()
        sys.setswitchinterval(interval)
    assert min(counts.values()) > 10


def test_children_started_meanwhile_do_not_hear_ctrl_c_and_the_parent_does():
    script = "import time; print(1, flush=True); time.sleep(60)"
    children = []

    def start():
        with signals_kept_from_children():
            children.append(subprocess.Popen([sys.executable, "-S", "-c", script], stdout=subprocess.PIPE))
            signal.raise_signal(signal.SIGINT)
            children.append(None)

    with pytest.raises(KeyboardInterrupt):
        start()
    child, after = children
    assert after is None, "the signal came before the body was over"
    child.stdout.readline()
    child.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        child.wait(0.2)
    child.terminate()
    assert child.wait(10) == -signal.SIGTERM
    child.stdout.close()


@pytest.mark.skipif(sys.platform == "win32", reason="process groups")
def test_ctrl_c_reaches_no_worker_and_the_step_is_finished(tmp_path):
    """Ctrl-C in a terminal is sent to every process of its group, the loaders' workers among them."""
    program = tmp_path / "program.py"
    program.write_text(
        "import os, signal, torch\n"
        "from torch.utils.data import DataLoader, TensorDataset\n"
        "from bilevel import Engine, EngineConfig, Problem\n"
        "class Outer(Problem):\n"
        "    def loss(self, batch):\n"
        "        if self.inner.num_updates == 9:\n"
        "            os.killpg(os.getpgrp(), signal.SIGINT)\n"
        "        return (self.inner.module.weight - 1.0).square().sum()\n"
        "class Inner(Problem):\n"
        "    def loss(self, batch):\n"
        "        return (self(batch[0]) - self.outer(batch[0])).square().mean()\n"
        "sgd = lambda params: torch.optim.SGD(params, lr=0.1)\n"
        "data = DataLoader(TensorDataset(torch.ones(40, 2)), batch_size=1, num_workers=1)\n"
        "outer, inner = (torch.nn.Linear(2, 1, bias=False) for _ in range(2))\n"
        "problems = [Outer(outer, optimizer=sgd), Inner(inner, optimizer=sgd, data=data, steps=3)]\n"
        "engine = Engine(problems, EngineConfig(progress=False), 'identity')\n"
        "engine.run(20)\n"
        "print(engine.step_count, engine.stop_reason)\n"
        "engine.run(2)\n"
        "print(engine.step_count)\n"
    )
    command = [sys.executable, str(program)]
    done = subprocess.run(command, capture_output=True, text=True, start_new_session=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:2] == ["3 interrupted by SIGINT", "5"]


def test_a_python_without_the_module_below_signal_shields_alike(monkeypatch):
    monkeypatch.setattr("bilevel.interrupt._get_handler", signal.getsignal)
    monkeypatch.setattr("bilevel.interrupt._set_handler", signal.signal)
    before = {number: signal.getsignal(number) for number in HANDLED}
    done = []

    def shielded():
        with Shield():
            signal.raise_signal(signal.SIGINT)
            done.append(True)

    with pytest.raises(KeyboardInterrupt):
        shielded()
    assert done == [True]
    with StopSignals() as stop:
        signal.raise_signal(signal.SIGTERM)
    assert stop.received == "SIGTERM"
    assert {number: signal.getsignal(number) for number in HANDLED} == before
