"""The page in a real browser: no message, no request, nothing wider than a phone, two colour schemes."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from browser import Tab, browser, find_browser
from harmony_fast.engine.report import write_report
from PIL import Image
from report_runs import ALL, HOSTILE, configuration, write_run, write_tar

pytestmark = pytest.mark.skipif(find_browser() is None, reason="no Chromium here")
PHONE, DESKTOP = 390, 1280


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The page of one run, and of two of which one has reconstructions only."""
    folder = tmp_path_factory.mktemp("runs")
    evaluate = {"data": [write_tar(folder / "q.tar", 0, HOSTILE)], "bank": [write_tar(folder / "b.tar", 1, "plain")]}
    objectives = {"all": ALL, "a-run-with-quite-a-long-name-of-its-own": {"reconstruction": ALL["reconstruction"]}}
    runs = [write_run(configuration(folder / name, chosen, evaluate=evaluate)) for name, chosen in objectives.items()]
    return {"one": write_report(runs[0]), "two": write_report(*runs)}


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    with browser(tmp_path_factory.mktemp("profile")) as tab:
        yield tab


@pytest.mark.parametrize("name", ["one", "two"])
def test_a_browser_shows_it(name: str, pages: dict[str, Path], tab: Tab, tmp_path: Path) -> None:
    tab.open(pages[name])
    shots = {}
    for width in (PHONE, DESKTOP):
        for scheme in ("light", "dark"):
            tab.show(width, scheme=scheme)
            assert tab.ask("document.documentElement.scrollWidth") <= width
            shots[width, scheme] = pixels(tab.screenshot(tmp_path / f"{width}-{scheme}.png"))
    assert tab.ask("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    requests = [e["params"]["request"]["url"] for e in tab.events if e.get("method") == "Network.requestWillBeSent"]
    assert [url for url in requests if not url.startswith("data:")] == [pages[name].resolve().as_uri()]
    said = {"Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown"}
    assert [event for event in tab.events if event.get("method") in said] == []
    for width in (PHONE, DESKTOP):
        assert shots[width, "light"].mean() > 180
        assert shots[width, "dark"].mean() < 80
        assert shots[width, "light"].std() > 10  # something is drawn


def test_the_reader_chooses_whose_pictures_are_shown(pages: dict[str, Path], tab: Tab) -> None:
    tab.open(pages["two"])
    shown = "[...document.querySelectorAll('#reconstructions .of')].map(e => getComputedStyle(e).display)"
    assert tab.ask(shown) == ["block", "none"]
    tab.ask("document.getElementById('show-1').click()")
    assert tab.ask(shown) == ["none", "block"]
    assert "Nothing to show" in tab.ask("document.getElementById('pairs').innerText")


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("L"), np.float32)
