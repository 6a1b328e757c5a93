"""Says how many examples the property tests generated."""

from __future__ import annotations

from typing import Any

from tests.bilevel.strategies import EXAMPLES


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if EXAMPLES:
        terminalreporter.write_line(
            f"property tests: {sum(EXAMPLES.values())} generated examples in {len(EXAMPLES)} properties"
        )
