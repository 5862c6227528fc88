"""Fixtures for the tests of data."""

import pytest
from harmony_fast.engine.data import remote


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards from afar are asked for again at once, and count as silent after a second."""
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(remote, "SILENCE", 1.0)
