"""One run a folder: a lock that ends with the process that holds it, however it ends."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import secrets
import sys
import warnings
import weakref
from pathlib import Path

from bilevel.errors import BilevelWarning, CheckpointError

__all__ = ["FolderLock"]

_LOCK, _OWNER = ".lock", ".owner"
_THIS_PROCESS = secrets.token_hex(8)
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}


class FolderLock:
    """Keeps a folder for one run, until :meth:`release`, the end of this object or the end of the process.

    The operating system holds the lock (a record lock, which children made by fork, such as data-loader workers, do not
    inherit): one that a killed process held is free at once. Such locks do not tell objects of one process from each
    other; for that, a second file names the owner.

    Args:
        folder: The folder; made if needed.

    Raises:
        CheckpointError: Another run holds it.
        OSError: The folder cannot be written to.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        owner = folder / _OWNER
        if _own(owner):
            gc.collect()  # an engine that nobody has any more still holds it: problems and engine refer to each other
            if _own(owner):
                raise CheckpointError(
                    f"another engine of this process writes its checkpoints to {folder}: give each run a folder of its "
                    "own, or end that run first"
                )
        descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
        try:
            _lock(descriptor, folder, owner)
            owner.write_text(_signature(), encoding="ascii")
        except BaseException:
            os.close(descriptor)
            raise
        self._release = weakref.finalize(self, _free, descriptor, owner, os.getpid())

    def release(self) -> None:
        """Gives the folder free."""
        self._release()


def _signature() -> str:
    return f"{os.getpid()} {_THIS_PROCESS}"


def _own(owner: Path) -> bool:
    try:
        return owner.read_text(encoding="ascii", errors="replace") == _signature()
    except OSError:
        return False


def _lock(descriptor: int, folder: Path, owner: Path) -> None:
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            text = f"the file system of {folder} has no locks: nothing keeps two runs from writing there together"
            warnings.warn(text, BilevelWarning, stacklevel=3)
            return
        if error.errno not in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
            raise
        with contextlib.suppress(OSError):
            number = owner.read_text(encoding="ascii", errors="replace").partition(" ")[0]
            raise CheckpointError(
                f"process {number:.20} writes its checkpoints to {folder}: give each run a folder of its own, or end "
                "that run first"
            ) from None
        raise CheckpointError(f"another process writes its checkpoints to {folder}") from None


def _free(descriptor: int, owner: Path, process: int) -> None:
    if os.getpid() != process:  # a forked child ends: the lock is its parent's
        return
    with contextlib.suppress(OSError):
        owner.unlink(missing_ok=True)
    os.close(descriptor)
