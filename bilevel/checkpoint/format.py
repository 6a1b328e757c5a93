"""One file: a safetensors header that holds the structure as JSON and a checksum of the whole, then the tensors.

The header starts with the checksum, at a place that is the same in every file: the SHA-256 of all of the file's bytes,
with zeros in its own place. So every bit is covered, the header's own included, while any safetensors reader can open
the file.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from bilevel.checkpoint.encoding import decode, encode
from bilevel.checkpoint.errors import DamagedError, MissingError
from bilevel.errors import CheckpointError

__all__ = ["PARTIAL", "partial_path", "read_state", "sync_directory", "write_state"]

FORMAT = "bilevel-state"
VERSION = 2
PARTIAL = ".partial"

_PIECE = 1 << 20
_HEADER_LIMIT = 100_000_000  # safetensors' own
_BEFORE_CHECKSUM = b'{"__metadata__":{"checksum":"'
_NO_CHECKSUM = b"0" * 64
_CHECKSUM = slice(len(_BEFORE_CHECKSUM), len(_BEFORE_CHECKSUM) + len(_NO_CHECKSUM))
_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
_ENTRY = {"dtype", "shape", "data_offsets"}
_MOST_DIMENSIONS = 64
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}


def write_state(path: str | os.PathLike[str], state: Mapping[str, Any]) -> None:
    """Writes a nested state of tensors, numbers, text, bytes, lists, tuples and mappings to a file, atomically.

    The file appears under its name only once it is complete and on disk; an existing file is replaced at that moment.
    Nothing is copied but the tensors that are on other devices or not dense, one at a time.

    Raises:
        CheckpointError: Something in the state is none of these, or the file cannot be written; what was there before
            stays.

    Cost: one pass over the state: hashing (about 0.6 s per GB where the processor has SHA instructions, 2 to 3 s
    elsewhere) and the disk.
    """
    target = Path(path)
    structure, tensors = encode(state)
    order = sorted(range(len(tensors)), key=lambda place: -tensors[place].element_size())
    header = _header(structure, tensors, order)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = partial_path(target)
        try:
            with temporary.open("xb") as file:
                _write(file, header, (tensors[place] for place in order))
            os.replace(temporary, target)
            sync_directory(target.parent)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise CheckpointError(f"cannot write checkpoint {target}: {error}") from error


def read_state(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads what :func:`write_state` wrote; tensors arrive on the CPU.

    Nothing in the file is executed, and no more memory is taken than the file is long.

    Raises:
        CheckpointError: No such file (``MissingError``), or one that is damaged, truncated, no regular file, or of
            another kind or version (``DamagedError``).

    Cost: one pass over the file, with hashing as in :func:`write_state`.
    """
    source = Path(path)
    try:
        with _opened(source) as file:
            return _read(file, os.fstat(file.fileno()).st_size)
    except FileNotFoundError:
        raise MissingError(f"no checkpoint at {source}") from None
    except OSError as error:
        raise DamagedError(f"{source} is no readable checkpoint: {error.strerror or error}") from error
    except RecursionError:
        raise DamagedError(f"{source} is damaged: its structure is nested too deeply") from None
    except ValueError as error:
        raise DamagedError(f"{source} is no readable checkpoint: {error}") from error
    except (AttributeError, KeyError, TypeError, OverflowError, RuntimeError, MemoryError) as error:
        raise DamagedError(f"{source} is no readable checkpoint: {error!r}") from error


def partial_path(target: Path) -> Path:
    """Returns the name under which a file is written; nobody else uses it."""
    # not by tempfile, which would keep everybody else from reading the checkpoint
    return target.with_name(f".{target.name}.{os.getpid()}.{secrets.token_hex(4)}{PARTIAL}")


def sync_directory(folder: Path) -> None:
    """Makes new names in a folder outlast a loss of power, where the system can."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:  # not every system opens folders
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _header(structure: Any, tensors: Sequence[Tensor], order: Sequence[int]) -> bytes:
    try:
        text = json.dumps(structure, allow_nan=False, separators=(",", ":"))
    except ValueError as error:  # integers of more digits than Python converts
        raise CheckpointError(f"the state cannot be written as JSON: {error}") from error
    metadata = {"checksum": _NO_CHECKSUM.decode(), "format": FORMAT, "version": str(VERSION), "state": text}
    content: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for place in order:
        tensor, start = tensors[place], end
        if tensor.dtype not in _NAMES:
            raise CheckpointError(f"the state has a tensor of dtype {tensor.dtype}, which a checkpoint cannot hold")
        end += tensor.numel() * tensor.element_size()
        content[str(place)] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    raw = json.dumps(content, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    if len(raw) > _HEADER_LIMIT:
        raise CheckpointError(
            f"the state's structure takes {len(raw)} bytes as JSON, above the {_HEADER_LIMIT} that the format allows: "
            "keep long histories in tensors or in files of their own"
        )
    return raw


def _write(file: IO[bytes], header: bytes, tensors: Iterator[Tensor]) -> None:
    length = len(header).to_bytes(8, "little")
    digest = hashlib.sha256(length + header)
    file.write(length + header)
    for tensor in tensors:
        content = _bytes_of(tensor.to("cpu").contiguous())
        for start in range(0, len(content), _PIECE):
            piece = content[start : start + _PIECE]
            digest.update(piece)
            file.write(piece)
    file.seek(len(length) + _CHECKSUM.start)
    file.write(digest.hexdigest().encode())
    file.flush()
    os.fsync(file.fileno())


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    # Without O_NONBLOCK, opening a pipe waits for its other end.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with os.fdopen(descriptor, "rb", buffering=0) as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ValueError("it is no regular file")
        yield file


@dataclass(frozen=True)
class _Slot:
    """Where a tensor lies."""

    place: int
    dtype: torch.dtype
    shape: list[int]


def _read(file: IO[bytes], size: int) -> dict[str, Any]:
    length = _exactly(file, 8)
    count = int.from_bytes(length, "little")
    if count > min(_HEADER_LIMIT, size - 8):
        raise ValueError("its header is longer than the file, or than any header may be: truncated, or another kind")
    header = _exactly(file, count)
    metadata, slots = _parse(header, size - 8 - count)
    digest = hashlib.sha256(length + header[: _CHECKSUM.start] + _NO_CHECKSUM + header[_CHECKSUM.stop :])
    tensors: dict[int, Tensor] = {}
    for slot in slots:
        tensors[slot.place] = torch.empty(slot.shape, dtype=slot.dtype)
        content = _bytes_of(tensors[slot.place])
        for start in range(0, len(content), _PIECE):
            piece = content[start : start + _PIECE]
            _fill(file, piece)
            digest.update(piece)
    if digest.hexdigest().encode() != header[_CHECKSUM]:
        raise ValueError("its checksum is not that of its content: something in it has changed since it was written")
    state = decode(_loads(metadata["state"]), [tensors[place] for place in range(len(tensors))])
    if not isinstance(state, dict):
        raise ValueError("it holds no mapping")
    return state


def _parse(header: bytes, size: int) -> tuple[dict[str, Any], list[_Slot]]:
    """Returns the metadata and where the tensors are, which must fill the rest of the file without gap or overlap."""
    content = _loads(header.decode("utf-8"))
    metadata = content.pop("__metadata__")
    found = (metadata.get("format"), metadata.get("version"))
    if found == (FORMAT, "1"):
        raise ValueError(
            "it is of format version 1, which had no checksum and is not read any more: finish that run with the "
            "version of this library that wrote it, or start again"
        )
    if found != (FORMAT, str(VERSION)):
        raise ValueError(f"it is no engine checkpoint of version {VERSION}: its header says {found!r:.80}")
    if not header.startswith(_BEFORE_CHECKSUM) or set(metadata) != {"checksum", "format", "version", "state"}:
        raise ValueError("its header is not as it was written")
    slots, expected = [], 0
    for name, entry in content.items():
        start, end = entry["data_offsets"]
        slot = _Slot(int(name), _DTYPES[entry["dtype"]], entry["shape"])
        numbers = [start, end, *slot.shape]
        whole = all(type(number) is int and number >= 0 for number in numbers)
        if not whole or len(slot.shape) > _MOST_DIMENSIONS or set(entry) != _ENTRY:
            raise ValueError(f"tensor {name!r:.40} is described by something else than sizes")
        if start != expected or end - start != math.prod(slot.shape) * slot.dtype.itemsize:
            raise ValueError(f"tensor {name!r:.40} is not where, or not as large as, its description says")
        slots.append(slot)
        expected = end
    if expected != size:
        raise ValueError(f"it holds {size} bytes of tensors where its header says {expected}: truncated or extended")
    if sorted(slot.place for slot in slots) != list(range(len(slots))):
        raise ValueError("its tensors are not numbered as they were written")
    return metadata, slots


def _loads(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse)


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key occurs twice in its header")
    return found


def _refuse(constant: str) -> Any:
    raise ValueError(f"its header holds {constant}, which is no JSON")


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _exactly(file: IO[bytes], count: int) -> bytes:
    content = bytearray(count)
    _fill(file, memoryview(content))
    return bytes(content)


def _fill(file: IO[bytes], view: memoryview) -> None:
    while view:
        count = file.readinto(view)  # type: ignore[attr-defined]
        if not count:
            raise ValueError("it is truncated")
        view = view[count:]
