"""The file of a checkpoint: what goes in comes out, bit for bit, and nothing else is taken for it."""

from __future__ import annotations

import math
import os
import resource
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from bilevel.checkpoint import read_state, write_state
from bilevel.errors import CheckpointError

STATE = {"weights": torch.arange(6.0).reshape(2, 3), "flags": torch.tensor([True, False]), "steps": [1, (2.5, None)]}


def equal(left: Any, right: Any) -> bool:
    """Equality to the last bit, kinds of containers and memory layout included."""
    if isinstance(left, torch.Tensor):
        if left.dtype != right.dtype or left.shape != right.shape:
            return False
        dense = any(left.permute(order).is_contiguous() for order in ([*range(left.dim())], _by_stride(left)))
        if dense and left.numel() and left.stride() != right.stride() and 1 not in left.shape:
            return False
        parts = [torch.view_as_real(t) if t.is_complex() else t for t in (left.resolve_conj(), right)]
        parts = [t.contiguous().reshape(-1).view(torch.uint8) for t in parts]
        return torch.equal(*parts)
    if type(left) is not type(right):
        return False
    if isinstance(left, dict):
        return list(left) == list(right) and all(equal(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(equal, left, right))
    if isinstance(left, float):
        return left.hex() == right.hex()
    return bool(left == right)


def _by_stride(tensor: torch.Tensor) -> list[int]:
    return sorted(range(tensor.dim()), key=tensor.stride, reverse=True)


# --- what goes in comes out -------------------------------------------------------------------------------------------

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
tensors = st.builds(
    lambda dtype, shape, seed: torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype),
    st.sampled_from(
        [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]
    ),
    st.lists(st.integers(0, 3), max_size=3),
    st.integers(0, 99),
)
keys = st.text(max_size=5) | st.integers(-9, 9).filter(lambda n: n not in (0, 1))
states = st.dictionaries(
    st.text(max_size=5),
    st.recursive(
        scalars | tensors,
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.lists(inner, max_size=3).map(tuple)
            | st.dictionaries(keys, inner, max_size=3)
        ),
        max_leaves=8,
    ),
    max_size=4,
)


@settings(max_examples=40)
@given(states)
def test_any_state_comes_back_bit_for_bit(tmp_path_factory: pytest.TempPathFactory, state: dict[str, Any]) -> None:
    path = tmp_path_factory.getbasetemp() / "state"
    write_state(path, state)
    assert equal(state, read_state(path))


SPECIAL = {
    "nan": math.nan,
    "inf": [math.inf, -math.inf, -0.0, 5e-324],
    "counter": Counter({30: 1, 80: 2}),
    "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "transposed": torch.randn(3, 4).T,
    "expanded": torch.randn(3, 1).expand(3, 4),
    "strided": torch.arange(10.0)[::2],
    "complex": torch.randn(3, 2, dtype=torch.complex128).T,
    "conjugate": torch.randn(3, dtype=torch.complex64).conj(),
    "negative": torch.randn(3, dtype=torch.complex64).conj().imag,
    "scalar": torch.tensor(3.0, dtype=torch.float64),
    "empty": torch.empty(0, 4),
    "nan tensor": torch.tensor([math.nan, -math.nan, math.inf]),
    "eight bits": torch.tensor([0.5, 448.0]).to(torch.float8_e4m3fn),
    "unsigned": torch.tensor([2**63 + 1], dtype=torch.uint64),
    "large": 2**200,
    "parameter": torch.nn.Parameter(torch.ones(2)).detach(),
}


@pytest.mark.parametrize("key", SPECIAL)
def test_special_values_and_layouts_come_back(key: str, tmp_path: Path) -> None:
    write_state(tmp_path / "state", {key: SPECIAL[key], "after": torch.arange(3)})
    assert equal({key: SPECIAL[key], "after": torch.arange(3)}, read_state(tmp_path / "state"))


def test_equal_states_give_equal_files(tmp_path: Path) -> None:
    for name in "ab":
        write_state(tmp_path / name, STATE)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_any_reader_of_safetensors_can_open_it(tmp_path: Path) -> None:
    write_state(tmp_path / "state", {**STATE, "half": torch.ones(3, dtype=torch.bfloat16)})
    found = load_file(tmp_path / "state")
    assert torch.equal(found["0"], STATE["weights"])
    assert sorted(str(tensor.dtype) for tensor in found.values()) == ["torch.bfloat16", "torch.bool", "torch.float32"]


def test_nothing_is_shared_with_the_live_state(tmp_path: Path) -> None:
    live = torch.ones(3)
    write_state(tmp_path / "state", {"live": live})
    live.zero_()
    assert read_state(tmp_path / "state")["live"].tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (object(), r"state\.part is a object"),
        ({1, 2}, r"state\.part is a set"),
        ([1, {"x": lambda: 1}], r"state\.part\[1\]\.x is a function"),
        ({(1, 2): 3}, r"state\.part has the key \(1, 2\)"),
        (torch.eye(2).to_sparse(), "layout torch.sparse_coo"),
        (torch.empty(2, device="meta"), "on meta"),
        (10**5000, "cannot be written as JSON"),
    ],
    ids=["object", "set", "function", "key", "sparse", "meta", "digits"],
)
def test_what_a_checkpoint_cannot_hold_is_said_with_its_place(value: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        write_state(tmp_path / "state", {"part": value})
    assert list(tmp_path.iterdir()) == []


def test_a_state_that_contains_itself_is_refused(tmp_path: Path) -> None:
    state: dict[str, Any] = {}
    state["self"] = state
    with pytest.raises(CheckpointError, match="contains itself"):
        write_state(tmp_path / "state", state)


# --- writing ----------------------------------------------------------------------------------------------------------


def fork() -> int:
    """Forks, whatever threads other tests may have left."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


def in_child(function: Callable[[], object]) -> None:
    """Calls a function in a process of its own, which may lose its rights or its memory."""
    pid = fork()
    if pid == 0:
        try:
            function()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_state(tmp_path / "state", {"a": torch.ones(2)})

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    for target in ("bilevel.checkpoint.format.os.fsync", "bilevel.checkpoint.format.os.replace"):
        with monkeypatch.context() as patch:
            patch.setattr(target, full)
            with pytest.raises(CheckpointError, match="cannot write checkpoint .*No space left"):
                write_state(tmp_path / "state", {"a": torch.zeros(2)})
        assert os.listdir(tmp_path) == ["state"]
    assert torch.equal(read_state(tmp_path / "state")["a"], torch.ones(2))


def test_a_file_that_may_not_grow_is_reported_and_the_old_one_stays(tmp_path: Path) -> None:
    """The kernel's own refusal, in the middle of the data."""
    write_state(tmp_path / "state", {"a": torch.ones(2)})

    def write() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        with pytest.raises(CheckpointError, match="File too large"):
            write_state(tmp_path / "state", {"a": torch.zeros(1_000_000)})

    in_child(write)
    assert os.listdir(tmp_path) == ["state"]
    assert torch.equal(read_state(tmp_path / "state")["a"], torch.ones(2))


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
def test_a_folder_that_may_not_be_written_to_is_reported(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)

    def write() -> None:
        os.setuid(65534)
        with pytest.raises(CheckpointError, match="Permission denied"):
            write_state(tmp_path / "state", STATE)

    in_child(write)


def test_unusual_places_are_reported(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    for place in (tmp_path / "file" / "state", tmp_path / "folder", Path("/proc/nowhere/state")):
        with pytest.raises(CheckpointError, match="cannot write checkpoint"):
            write_state(place, STATE)
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


def test_everybody_may_read_a_checkpoint_whom_the_umask_lets(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        write_state(tmp_path / "state", STATE)
    finally:
        os.umask(before)
    assert (tmp_path / "state").stat().st_mode & 0o777 == 0o644


def test_writing_holds_no_second_copy(tmp_path: Path) -> None:
    state = {"a": torch.zeros(50_000_000)}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    write_state(tmp_path / "state", state)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB; the state has 195,000
