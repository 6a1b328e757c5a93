"""An environment for each library, made by pip, that shares the caller's torch.

A copy of torch takes a gigabyte, and libraries that differ in their torch cannot be compared. So every environment is
an ordinary virtual environment, without the caller's packages, but for a folder of links: to torch and what torch
itself requires, NumPy among them, with their metadata, so that pip sees them as installed. A ``.pth`` file adds that
folder *behind* the environment's own packages; whatever a library asks for in another version is installed beside, and
wins.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["LIBRARIES", "Library", "create", "find", "interpreters"]

SHARED = ("torch", "numpy", "setuptools")


@dataclass(frozen=True)
class Library:
    """What a library's environment holds.

    Attributes:
        name: As the tables write it.
        module: What is imported.
        distributions: Whose versions are reported.
        commands: Arguments of ``pip install``, one call each; none where the caller's environment is used.
    """

    name: str
    module: str
    distributions: tuple[str, ...]
    commands: tuple[tuple[str, ...], ...] = ()


BETTY = ("--no-deps", "--ignore-requires-python", "betty-ml==0.2.1")
BOAT = ("--no-deps", "boat-torch==1.1.1")
# Its C files were made by a Cython that Python 3.11 has outlived: build_ext makes them again. Importing all of it needs
# gym and torchvision besides, so its sides import the parts that they use.
LEARN2LEARN = (
    ("cython", "wheel"),
    (
        *("--no-deps", "--no-build-isolation", "--use-pep517", "--config-settings=--build-option=build_ext"),
        "learn2learn==0.2.0",
    ),
)
LIBRARIES = {
    "hand": Library("by hand", "torch", ("torch",)),
    "vmap": Library("by hand, vmap", "torch", ("torch",)),
    "bilevel": Library("bilevel", "bilevel", ("bilevel",)),
    "bilevel_compiled": Library("bilevel, compile=True", "bilevel", ("bilevel",)),
    "peft": Library("PEFT", "peft", ("peft",)),
    "betty": Library("Betty", "betty", ("betty-ml",), (BETTY, ("tqdm", "packaging"))),
    "torchopt": Library("TorchOpt", "torchopt", ("torchopt",), (("torchopt==0.7.3",),)),
    "higher": Library("higher", "higher", ("higher",), (("higher==0.2.1",),)),
    "boat": Library(
        "BOAT", "boat_torch", ("boat-torch",), (("--no-deps", "boat-torch==1.1.1"), ("higher==0.2.1", "matplotlib"))
    ),
    "learn2learn": Library("learn2learn", "torch", ("learn2learn",), LEARN2LEARN),
    "jaxopt": Library("JAXopt", "jaxopt", ("jax", "jaxopt"), (("jax==0.10.2", "jaxlib==0.10.2", "jaxopt==0.8.5"),)),
}


def find(library: str, folder: Path | None, *, here: bool, make: bool) -> tuple[Path | None, str]:
    """Returns the interpreter that has a library, or None and why there is none.

    Args:
        library: A key of :data:`LIBRARIES`.
        folder: Where the environments are.
        here: Take the calling interpreter for all libraries.
        make: Create what is missing.
    """
    known = LIBRARIES[library]
    python = Path(sys.executable)
    if not here and known.commands:
        if folder is None:
            return None, "no environment: give --environments DIR, and --create to make them"
        python = folder / library / "bin" / "python"
        if not python.exists() and make:
            reason = create(library, folder / library)
            if reason:
                return None, reason
        if not python.exists():
            return None, f"no environment {folder / library}: --create makes it"
    test = subprocess.run([str(python), "-c", f"import {known.module}"], capture_output=True, text=True)
    if test.returncode:
        return None, f"does not import: {last_line(test.stderr)}"
    return python, ""


def interpreters(options: argparse.Namespace) -> tuple[dict[str, Path], dict[str, str]]:
    """Returns the interpreter of each of ``--libraries``, and why there is none for the others, which it also tells."""
    pythons, absent = {}, {}
    for library in options.libraries:
        python, why = find(library, options.environments, here=options.here, make=options.create)
        if python is None:
            absent[library] = why
            print(f"{LIBRARIES[library].name}: {why}", file=sys.stderr, flush=True)
        else:
            pythons[library] = python
    return pythons, absent


def create(library: str, folder: Path) -> str:
    """Makes the environment of a library; returns pip's reason where it cannot be made, and leaves none then."""
    building = folder.with_name(f".{folder.name}-unfinished")
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(building)], check=True)
    share(building)
    for arguments in LIBRARIES[library].commands:
        command = [str(building / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
        done = subprocess.run([*command, *arguments], capture_output=True, text=True)
        if done.returncode:
            (folder.with_name(f"{folder.name}.log")).write_text(done.stdout + done.stderr, encoding="utf-8")
            return f"does not install: {reason_of(done.stderr)}"
    # An environment knows where it is: it is made under its own name once all of it can be made.
    building.rename(folder)
    return ""


def share(environment: Path) -> None:
    """Adds the folder of links to torch, NumPy and what they require."""
    folder = environment / "shared"
    folder.mkdir()
    for name in sorted(closure(SHARED)):
        distribution = importlib.metadata.distribution(name)
        for top in tops(distribution):
            target = Path(str(distribution.locate_file(top)))
            link = folder / top
            if target.exists() and not link.exists():
                os.symlink(target, link)
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    packages = environment / "lib" / version / "site-packages"
    # Relative to the interpreter's prefix, so that the environment may be renamed.
    line = "import sys, os; sys.path.append(os.path.join(sys.prefix, 'shared'))\n"
    (packages / "zz_shared_torch.pth").write_text(line, encoding="utf-8")


def closure(names: Sequence[str]) -> set[str]:
    """Returns the installed distributions that these need, without extras, and they themselves."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in found:
            continue
        try:
            requires = importlib.metadata.distribution(name).requires or []
        except importlib.metadata.PackageNotFoundError:
            continue  # a requirement under a marker that does not hold here
        found.add(name)
        waiting += [match[0] for r in requires if "extra ==" not in r and (match := re.match(r"[\w.-]+", r))]
    return found


def tops(distribution: importlib.metadata.Distribution) -> Iterator[str]:
    """Yields the entries of site-packages that a distribution brought, its metadata included."""
    seen = {file.parts[0] for file in distribution.files or [] if file.parts[0] not in ("..", "__pycache__")}
    yield from sorted(seen)


def reason_of(text: str) -> str:
    """Returns the line of pip's output that says why."""
    for pattern in ("fatal error", "No matching distribution", "ModuleNotFoundError", "error:", "ERROR"):
        for line in text.splitlines():
            if pattern in line and "subprocess" not in line:
                return line.strip().removeprefix("ERROR: ")[:200]
    return last_line(text)


def last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:200] if lines else "no output"
