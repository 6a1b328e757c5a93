"""State on disk: one safetensors file with JSON in its header, written whole or not at all, never a pickle."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bilevel.errors import CheckpointError

__all__ = ["describe_differences", "read_state", "write_state"]

FORMAT = "bilevel-state"
VERSION = 1


def write_state(path: str | os.PathLike[str], state: Mapping[str, Any]) -> None:
    """Writes a nested state of tensors, numbers, strings, lists, tuples and dictionaries to a file, atomically.

    The file appears under its name only once it is complete and on disk; an existing file is replaced at that moment.

    Raises:
        CheckpointError: Something in the state is none of these, or the file cannot be written.
    """
    target = Path(path)
    tensors: dict[str, Tensor] = {}
    structure = json.dumps(_encode(state, tensors, "state"))
    metadata = {"format": FORMAT, "version": str(VERSION), "state": structure}
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"cannot write checkpoint {target}: {error}") from error
    # not by tempfile, which would keep everybody else from reading the checkpoint
    temporary = target.parent / f".{target.name}.{os.getpid()}.{secrets.token_hex(4)}.partial"
    try:
        save_file(tensors, temporary, metadata)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
        _sync_directory(target.parent)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot write checkpoint {target}: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def read_state(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads what :func:`write_state` wrote; tensors arrive on the CPU.

    Raises:
        CheckpointError: No such file, a damaged or truncated one, or one of another kind or version.
    """
    source = Path(path)
    if not source.is_file():
        raise CheckpointError(f"no checkpoint at {source}")
    try:
        with safe_open(source, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{source} is no readable checkpoint: {error}") from error
    if metadata.get("format") != FORMAT or metadata.get("version") != str(VERSION):
        raise CheckpointError(
            f"{source} is no engine checkpoint of version {VERSION}: its header says "
            f"{metadata.get('format', 'nothing')!r} {metadata.get('version', '')!r}"
        )
    try:
        state = _decode(json.loads(metadata["state"]), tensors)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{source} is damaged: {error!r}") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{source} is damaged: it holds no mapping")
    return state


def _encode(value: Any, tensors: dict[str, Tensor], where: str) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor):
        key = str(len(tensors))
        tensors[key] = value.detach().to("cpu", copy=True).contiguous()
        return {"tensor": key}
    if isinstance(value, Mapping):
        return {"items": [[_encode(k, tensors, where), _encode(v, tensors, f"{where}.{k}")] for k, v in value.items()]}
    if isinstance(value, (list, tuple)):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [_encode(item, tensors, f"{where}[{place}]") for place, item in enumerate(value)]}
    raise CheckpointError(
        f"{where} is a {type(value).__name__}, which a checkpoint cannot hold (tensors, numbers, strings, containers)"
    )


def _decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "items":
        return {_decode(k, tensors): _decode(v, tensors) for k, v in content}
    if kind in ("list", "tuple"):
        items = [_decode(item, tensors) for item in content]
        return tuple(items) if kind == "tuple" else items
    raise ValueError(f"unknown entry {kind!r}")


def _sync_directory(folder: Path) -> None:
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:  # not every system opens folders
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def describe_differences(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> list[str]:
    """Returns what differs in names and shapes between two collections of tensors."""
    lines = [f"missing: {name}" for name in expected if name not in found]
    lines += [f"not expected: {name}" for name in found if name not in expected]
    for name in expected:
        if name in found and expected[name].shape != found[name].shape:
            lines.append(f"{name}: shape {tuple(found[name].shape)}, expected {tuple(expected[name].shape)}")
    return lines
