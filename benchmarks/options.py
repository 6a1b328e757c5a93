"""The options that benchmark commands share."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.pages.results import RESULTS, load, save, write_page

__all__ = [
    "add_append",
    "add_clock",
    "add_comparison",
    "add_data",
    "add_environments",
    "add_results",
    "carry_out",
    "command",
    "earlier",
    "keep",
    "measures",
    "named",
    "new_parser",
    "show_and_keep",
]


def new_parser(text: str | None) -> argparse.ArgumentParser:
    """Returns a parser that shows a module's docstring as it is."""
    return argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)


def add_clock(parser: argparse.ArgumentParser, rounds: int | None = None, device: str = "cpu") -> None:
    """Adds ``--rounds`` (unless None), ``--threads``, ``--device`` and ``--cpu-time``."""
    if rounds is not None:
        parser.add_argument("--rounds", type=int, default=rounds, help="turns of each contender")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=("cpu", "cuda"), default=device)
    parser.add_argument("--cpu-time", action="store_true", help="processor time, where others use the machine too")


def add_environments(parser: argparse.ArgumentParser) -> None:
    """Adds ``--environments``, ``--create`` and ``--here``."""
    parser.add_argument("--environments", type=Path, help="folder of the libraries' environments")
    parser.add_argument("--create", action="store_true", help="make with pip what is missing there")
    parser.add_argument("--here", action="store_true", help="take the libraries that this interpreter can import")


def add_data(parser: argparse.ArgumentParser) -> None:
    """Adds ``--data``."""
    told = "folder with mnist10k/ and omniglot/; packaged or seeded data without"
    parser.add_argument("--data", type=Path, help=told)


def add_results(parser: argparse.ArgumentParser) -> None:
    """Adds ``--save``, ``--json`` and ``--page``."""
    where = "/".join(RESULTS.parts[-3:])
    parser.add_argument("--save", action="store_true", help=f"keep the results in {where}/, for the page")
    parser.add_argument("--json", type=_folder, metavar="FOLDER", help="write the results there, too")
    parser.add_argument(
        "--page", type=Path, help="put the kept results into this page; without --save or --json nothing is measured"
    )


def add_append(parser: argparse.ArgumentParser) -> None:
    """Adds ``--append``."""
    parser.add_argument("--append", action="store_true", help="to the results that are kept")


def add_comparison(parser: argparse.ArgumentParser, rounds: int) -> None:
    """Adds what commands share that compare libraries on data."""
    add_clock(parser, rounds)
    add_environments(parser)
    add_data(parser)
    add_results(parser)


def command(
    parser: argparse.ArgumentParser,
    given: Sequence[str] | None,
    measure: Callable[[argparse.Namespace, Sequence[str]], object],
    lines_of: Callable[[Mapping[str, Any]], Sequence[str]],
) -> None:
    """Parses arguments, the process's own where none are given, and carries them out; ``measure(options, given)``."""
    given = list(sys.argv[1:] if given is None else given)
    options = parser.parse_args(given)
    carry_out(options, lambda: measure(options, given), lines_of)


def carry_out(
    options: argparse.Namespace,
    measure: Callable[[], object],
    lines_of: Callable[[Mapping[str, Any]], Sequence[str]],
) -> None:
    """Measures, if that is asked for, and writes the page that ``--page`` names."""
    if measures(options):
        measure()
    if options.page is not None:
        write_page(options.page, lines_of)


def measures(options: argparse.Namespace) -> bool:
    """Whether a command measures, or only writes a page of what is kept."""
    return options.page is None or options.save or options.json is not None


def keep(name: str, result: Mapping[str, Any], options: argparse.Namespace) -> None:
    """Writes a result where ``--save`` and ``--json`` want it."""
    if options.save:
        save(name, result)
    if options.json is not None:
        save(name, result, options.json)


def show_and_keep(
    name: str, title: str, result: Mapping[str, Any], lines: Sequence[str], options: argparse.Namespace
) -> None:
    """Prints a result's lines below a title, and writes it where ``--save`` and ``--json`` want it."""
    print(f"## {title}", "", *lines, "", sep="\n", flush=True)
    keep(name, result, options)


def earlier(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Reads the kept result to which ``--append`` appends: nothing where it is not asked for, or nothing is kept."""
    return load(name) if options.append and (RESULTS / f"{name}.json").exists() else {}


def named(name: str, device: str) -> str:
    """Returns what results of a device are called: ``NAME``, or ``NAME-DEVICE`` on another one than the CPU."""
    return name if device == "cpu" else f"{name}-{device}"


def _folder(text: str) -> Path:
    if text.endswith(".json") or Path(text).is_file():
        raise argparse.ArgumentTypeError(f"{text} is a file: give a folder, for NAME.json")
    return Path(text)
