"""Says how many examples the property tests generated, in all processes of the run."""

from __future__ import annotations

from typing import Any

import pytest

from tests.bilevel.strategies import EXAMPLES


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    EXAMPLES.update(getattr(node, "workeroutput", {}).get("examples", {}))


def pytest_sessionfinish(session: Any) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["examples"] = dict(EXAMPLES)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if EXAMPLES:
        terminalreporter.write_line(
            f"property tests: {sum(EXAMPLES.values())} generated examples in {len(EXAMPLES)} properties"
        )
