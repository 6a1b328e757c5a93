"""Files that are damaged, of another kind, or made to deceive: refused, without running, waiting or filling memory."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import random
import resource
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from bilevel.checkpoint import read_state, write_state
from bilevel.checkpoint.format import _BEFORE_CHECKSUM, _CHECKSUM, _NO_CHECKSUM
from bilevel.errors import CheckpointError
from tests.bilevel.test_checkpoint_format import STATE, equal, in_child

# --- damage -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("whole") / "state"
    write_state(path, STATE)
    return path.read_bytes()


def test_a_flipped_bit_anywhere_is_found(whole: bytes, tmp_path: Path) -> None:
    path, generator = tmp_path / "state", random.Random(0)
    for place in range(len(whole)):
        changed = bytearray(whole)
        changed[place] ^= 1 << generator.randrange(8)
        path.write_bytes(changed)
        with pytest.raises(CheckpointError, match=str(path)):
            read_state(path)


@pytest.mark.slow
def test_every_single_flipped_bit_is_found(whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "state"
    for place in range(8 * len(whole)):
        changed = bytearray(whole)
        changed[place // 8] ^= 1 << place % 8
        path.write_bytes(changed)
        with pytest.raises(CheckpointError):
            read_state(path)


def test_a_file_of_any_other_length_is_refused(whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "state"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            read_state(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(CheckpointError, match="truncated or extended"):
        read_state(path)


@pytest.mark.parametrize("size", [0, 1, 4096])
def test_blocks_of_zeros_where_data_was_are_found(size: int, whole: bytes, tmp_path: Path) -> None:
    """What a file system leaves of a file that was never synchronised."""
    (tmp_path / "state").write_bytes(whole[:size] + bytes(len(whole) - size) if size < len(whole) else bytes(size))
    with pytest.raises(CheckpointError):
        read_state(tmp_path / "state")


# --- files made to deceive, with a right checksum ---------------------------------------------------------------------


def forge(
    path: Path, state: Any = None, entries: Any = "", data: bytes = b"", text: Any = None, **metadata: Any
) -> Path:
    """Writes a file as ours, whatever it holds, with the checksum that belongs to it."""
    structure = json.dumps(state) if text is None else text
    content = {"checksum": "0" * 64, "format": "bilevel-state", "version": "2", "state": structure, **metadata}
    described = entries if isinstance(entries, str) else json.dumps(entries)[1:-1]
    header = ('{"__metadata__":' + json.dumps(content, separators=(",", ":")) + (", " if described else "")).encode()
    return seal(path, header + described.encode() + b"}", data)


def seal(path: Path, header: bytes, data: bytes = b"") -> Path:
    """Puts the checksum into a header that has a place for it."""
    length = len(header).to_bytes(8, "little")
    assert header.startswith(_BEFORE_CHECKSUM + _NO_CHECKSUM)
    checksum = hashlib.sha256(length + header + data).hexdigest().encode()
    path.write_bytes(length + header[: _CHECKSUM.start] + checksum + header[_CHECKSUM.stop :] + data)
    return path


ONE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
T0 = {"items": [["a", {"tensor": 0}]]}


def test_a_forged_file_that_is_right_is_read(tmp_path: Path) -> None:
    """So that the ones below are refused for what is wrong with them."""
    assert torch.equal(read_state(forge(tmp_path / "f", T0, {"0": ONE}, bytes(8)))["a"], torch.zeros(2))
    assert read_state(forge(tmp_path / "f", {"items": [["a", 1]]})) == {"a": 1}


FORGED: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "a huge tensor": (
        "truncated or extended",
        lambda p: forge(p, T0, {"0": {**ONE, "shape": [2**40], "data_offsets": [0, 2**42]}}),
    ),
    "a huge tensor of few bytes": (
        "not as large as",
        lambda p: forge(p, T0, {"0": {**ONE, "shape": [2**40]}}, bytes(8)),
    ),
    "a huge empty tensor": (
        "overflow",
        lambda p: forge(p, T0, {"0": {**ONE, "shape": [0, 2**62, 2**62], "data_offsets": [0, 0]}}),
    ),
    "an overflowing product": (
        "not as large as",
        lambda p: forge(p, T0, {"0": {**ONE, "shape": [2**32, 2**32 + 1]}}, bytes(8)),
    ),
    "ten thousand dimensions": (
        "something else than sizes",
        lambda p: forge(p, T0, {"0": {**ONE, "shape": [1] * 10_000 + [2]}}, bytes(8)),
    ),
    "negative sizes": (
        "something else than sizes",
        lambda p: forge(p, T0, {"0": {**ONE, "shape": [-1, -2]}}, bytes(8)),
    ),
    "a fraction of a size": (
        "something else than sizes",
        lambda p: forge(p, T0, {"0": {**ONE, "shape": [2.0]}}, bytes(8)),
    ),
    "true for a size": (
        "something else than sizes",
        lambda p: forge(p, T0, {"0": {**ONE, "shape": [2, True]}}, bytes(8)),
    ),
    "offsets past the end": ("is not where", lambda p: forge(p, T0, {"0": {**ONE, "data_offsets": [8, 16]}}, bytes(8))),
    "overlapping tensors": ("is not where", lambda p: forge(p, T0, {"0": ONE, "1": ONE}, bytes(8))),
    "a gap between tensors": (
        "is not where",
        lambda p: forge(p, T0, {"0": ONE, "1": {**ONE, "data_offsets": [12, 20]}}, bytes(20)),
    ),
    "an unknown dtype": ("F31", lambda p: forge(p, T0, {"0": {**ONE, "dtype": "F31"}}, bytes(8))),
    "a list for a dtype": ("unhashable", lambda p: forge(p, T0, {"0": {**ONE, "dtype": ["F32"]}}, bytes(8))),
    "three offsets": ("too many values", lambda p: forge(p, T0, {"0": {**ONE, "data_offsets": [0, 8, 8]}}, bytes(8))),
    "a further field": (
        "something else than sizes",
        lambda p: forge(p, T0, {"0": {**ONE, "hook": "os.system"}}, bytes(8)),
    ),
    "a tensor's name that is none": ("__class__", lambda p: forge(p, T0, {"__class__": ONE}, bytes(8))),
    "another tensor than is named": ("not numbered", lambda p: forge(p, T0, {"1": ONE}, bytes(8))),
    "a tensor that belongs to nothing": ("belong to nothing", lambda p: forge(p, {"items": []}, {"0": ONE}, bytes(8))),
    "a tensor used twice": (
        "names no tensor",
        lambda p: forge(p, {"list": [{"tensor": 0}, {"tensor": 0}]}, {"0": ONE}, bytes(8)),
    ),
    "a tensor that is not there": ("names no tensor", lambda p: forge(p, T0)),
    "an order that is none": (
        "no order",
        lambda p: forge(p, {"items": [["a", {"tensor": 0, "order": [1]}]]}, {"0": ONE}, bytes(8)),
    ),
    "a complex tensor of no pairs": (
        "size 2",
        lambda p: forge(p, {"items": [["a", {"complex": 0}]]}, {"0": {**ONE, "shape": [1, 2, 1]}}, bytes(8)),
    ),
    "a text for an entry": ("TypeError", lambda p: forge(p, T0, '"0": "F32"')),
    "a header's key twice": (
        "twice in its header",
        lambda p: forge(p, T0, f'"0": {json.dumps(ONE)}, "0": {json.dumps(ONE)}', bytes(8)),
    ),
    "a structure's key twice": ("'a' occurs twice", lambda p: forge(p, {"items": [["a", 1], ["a", 2]]})),
    "keys that are one to Python": ("True occurs twice", lambda p: forge(p, {"items": [[1, "a"], [True, "b"]]})),
    "a list for a key": ("or is none", lambda p: forge(p, {"items": [[["a"], 1]]})),
    "a key without value": ("not enough values", lambda p: forge(p, {"items": [["a"]]})),
    "a mapping of no pairs": ("unknown entry", lambda p: forge(p, {"items": {"a": 1}})),
    "an unknown kind": ("unknown entry 'pickle'", lambda p: forge(p, {"pickle": "gASVBgAAAAAAAABLAS4="})),
    "two kinds": ("too many values", lambda p: forge(p, {"items": [], "list": []})),
    "no kind": ("not enough values", lambda p: forge(p, {})),
    "a bare list": ("bare list", lambda p: forge(p, [1, 2])),
    "no mapping": ("holds no mapping", lambda p: forge(p, {"list": [1]})),
    "an unknown float": ("1e400", lambda p: forge(p, {"items": [["a", {"float": "1e400"}]]})),
    "no base64": ("base64", lambda p: forge(p, {"items": [["a", {"bytes": "!!"}]]})),
    "NaN in JSON": ("holds NaN", lambda p: forge(p, text='{"items": [["a", NaN]]}')),
    "no JSON": ("Expecting property name", lambda p: forge(p, text="{'items': []}")),
    "no text": ("must be str", lambda p: forge(p, text=7)),
    "deep nesting": ("nested too deeply", lambda p: forge(p, text="[" * 100_000 + "]" * 100_000)),
    "deep entries": ("nested too deeply", lambda p: forge(p, text='{"list":[' * 50_000 + "1" + "]}" * 50_000)),
    "a deep header": ("nested too deeply", lambda p: forge(p, T0, '"0":' + "[" * 100_000 + "]" * 100_000)),
    "a number of many digits": (
        "Exceeds the limit",
        lambda p: forge(p, text='{"items": [["a", ' + "9" * 10_000 + "]]}"),
    ),
    "a further field of the header": (
        "not as it was written",
        lambda p: forge(p, T0, {"0": ONE}, bytes(8), loader="os.system"),
    ),
    "another version": ("'3'", lambda p: forge(p, T0, {"0": ONE}, bytes(8), version="3")),
    "another format": ("'pickle'", lambda p: forge(p, T0, {"0": ONE}, bytes(8), format="pickle")),
    "no UTF-8": ("utf-8", lambda p: seal(p, _BEFORE_CHECKSUM + _NO_CHECKSUM + b'","a":"\xff"}}')),
    "an unfinished header": ("Unterminated", lambda p: seal(p, _BEFORE_CHECKSUM + _NO_CHECKSUM + b'","a":"')),
}


@pytest.mark.parametrize("kind", FORGED)
def test_a_forged_file_is_refused(kind: str, tmp_path: Path) -> None:
    reason, make = FORGED[kind]
    path = make(tmp_path / "forged")
    with pytest.raises(CheckpointError, match=f"forged is .*{reason}"):
        read_state(path)


def test_a_header_longer_than_memory_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "state"
    with path.open("wb") as file:  # holes: a file of 8 TB that takes no room
        file.write((2**42).to_bytes(8, "little") + _BEFORE_CHECKSUM)
        file.truncate(2**43)
    with pytest.raises(CheckpointError, match="header is longer"):
        read_state(path)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_hostile_files_take_no_more_memory_than_they_are_long(tmp_path: Path) -> None:
    """In a process that may have 64 MB more than it has."""
    paths = [
        FORGED[kind][1](tmp_path / kind.replace(" ", "_")) for kind in FORGED if "huge" in kind or "overflow" in kind
    ]

    def read_all() -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + 2**26
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        for path in paths:
            with pytest.raises(CheckpointError) as caught:
                read_state(path)
            assert "memory" not in str(caught.value).lower()
        with pytest.raises(RuntimeError):
            torch.empty(2**32, dtype=torch.uint8)  # the limit works

    assert len(paths) == 4
    in_child(read_all)


# --- files of other kinds ---------------------------------------------------------------------------------------------


class Trap:
    """Unpickling this makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (open, (str(self.path), "w"))


def test_a_pickle_is_refused_and_not_run(tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    torch.save({"a": Trap(tmp_path / "sprung")}, tmp_path / "torch")
    for name in ("plain", "torch"):
        with pytest.raises(CheckpointError, match=name):
            read_state(tmp_path / name)
    assert not (tmp_path / "sprung").exists()


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "foreign")
    with pytest.raises(CheckpointError, match="foreign is no readable checkpoint"):
        read_state(tmp_path / "foreign")
    (tmp_path / "text").write_text("not a checkpoint")
    with pytest.raises(CheckpointError, match="text is no readable checkpoint"):
        read_state(tmp_path / "text")


def test_a_file_of_the_first_version_is_refused_with_what_to_do(tmp_path: Path) -> None:
    state = json.dumps({"items": [["a", {"tensor": "0"}]]})
    save_file({"0": torch.ones(1)}, tmp_path / "old", {"format": "bilevel-state", "version": "1", "state": state})
    with pytest.raises(CheckpointError, match="format version 1, which had no checksum.*finish that run with"):
        read_state(tmp_path / "old")


def test_what_is_no_regular_file_is_refused_without_waiting(tmp_path: Path) -> None:
    """A pipe without writer would block for ever; zeros would never end."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "zeros").symlink_to("/dev/zero")
    (tmp_path / "nowhere").symlink_to(tmp_path / "missing")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "empty").touch()
    for name in ("pipe", "folder", "zeros", "nowhere", "loop", "empty", "missing", "x" * 300, "a\0b"):
        outcome: list[BaseException] = []

        def attempt(name: str = name, outcome: list[BaseException] = outcome) -> None:
            try:
                read_state(tmp_path / name)
            except BaseException as error:
                outcome.append(error)

        reader = threading.Thread(target=attempt, daemon=True)
        reader.start()
        reader.join(20)
        assert not reader.is_alive(), f"reading {name} does not end"
        assert isinstance(outcome[0], CheckpointError), (name, outcome)


def test_a_link_to_a_checkpoint_is_followed(tmp_path: Path) -> None:
    write_state(tmp_path / "state", STATE)
    (tmp_path / "link").symlink_to("state")
    assert equal(read_state(tmp_path / "link"), read_state(tmp_path / "state"))
