"""Counting the faults that tests inject, and what was lost by them."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from counting import Faults


@pytest.fixture
def faults(record_property: Callable[[str, object], None]) -> Faults:
    """faults.injected("SIGKILL"): count a fault."""
    return Faults(record_property)


def pytest_addoption(parser: pytest.Parser) -> None:
    """--faults-json bench/results/faults.json: what the documentation quotes."""
    parser.addoption("--faults-json", type=Path, help="write the counts of faults and losses there, too")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """The table of faults."""
    count, lost = Counter(), Counter()
    for report in (r for reports in terminalreporter.stats.values() for r in reports):
        if getattr(report, "when", None) == "call":
            for kind, loss in report.user_properties:
                count[kind] += 1
                lost[kind] += loss + (report.outcome == "failed")
    if count:
        terminalreporter.section("faults")
        for kind, number in sorted(count.items()):
            terminalreporter.line(f"{kind:40} {number:6} injected {lost[kind]:6} lost")
        terminalreporter.line(f"{'all':40} {count.total():6} injected {lost.total():6} lost")
        if path := config.getoption("--faults-json", None):
            counts = {kind: {"injected": number, "lost": lost[kind]} for kind, number in sorted(count.items())}
            path.write_text(json.dumps({"faults": counts}, indent=1) + "\n")
