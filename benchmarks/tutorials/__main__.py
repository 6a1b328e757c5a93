"""Runs studies and writes what they found.

python -m benchmarks.tutorials                                     # all of them, small, into runs/tutorials
python -m benchmarks.tutorials hyper_cleaning --budget full --page  # the page's numbers and picture
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.tutorials.study import BUDGETS, PAGES, RESULTS, ROOT, names, perform, save, with_results
from bilevel.errors import ConfigError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", nargs="*", metavar="STUDY", help=f"of {', '.join(names())}; all by default")
    parser.add_argument("--budget", choices=BUDGETS, default="small")
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "tutorials", help="folder")
    parser.add_argument("--page", action="store_true", help="write into the documentation instead")
    arguments = parser.parse_args()
    for name in arguments.studies:
        if name not in names():
            parser.error(f"no study {name!r}: there are {', '.join(names())}")
    missing: list[str] = []
    for name in arguments.studies or names():
        try:
            study = perform(name, arguments.budget)
        except ConfigError as error:  # data that do not come with a package
            missing.append(f"{name}: {error}")
            continue
        for title, table in study.tables.items():
            print(f"\n{name}: {title}", *table.lines(), sep="\n")
        print(f"\n{study.about}", flush=True)
        if arguments.page:
            page = PAGES / f"{name}.md"
            page.write_text(with_results(page.read_text(encoding="utf-8"), study), encoding="utf-8")
        save(name, study, RESULTS if arguments.page else arguments.output)
    if missing:
        parser.exit(1, "not run:\n" + "\n".join(missing) + "\n")


if __name__ == "__main__":
    main()
