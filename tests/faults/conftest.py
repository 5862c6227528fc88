"""Counting the faults that tests inject, and what was lost by them."""

from collections import Counter
from collections.abc import Callable

import pytest
from counting import Faults


@pytest.fixture
def faults(record_property: Callable[[str, object], None]) -> Faults:
    """faults.injected("SIGKILL"): count a fault."""
    return Faults(record_property)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
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
