"""What README.md, CONTRIBUTING.md and docs/ speak of is there: commands, options, keys, files, functions, links. The
configuration page is what the models say."""

import re
import runpy
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
import yaml
from harmony_fast.bench import names as benchmarks
from harmony_fast.engine.cli import app
from harmony_fast.engine.config import load_config, with_overrides

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
COMMANDS = typer.main.get_command(app).commands
SHELL = re.compile(r"^```(?:sh|bash)\n(.*?)^```", re.MULTILINE | re.DOTALL)
FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`([^`]+)`")
LINK = re.compile(r"\]\(([^)\s]+)\)")
OURS = re.compile(r"(?<![\w/.-])(?:bench|configs|demo|docs|engine|harmony|kernels|scripts|tests)/[\w./-]*")

each_document = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)


def shell_lines(text: str) -> list[str]:
    blocks = "\n".join(SHELL.findall(text))
    return blocks.replace("\\\n", " ").splitlines()


def spans(text: str) -> list[str]:
    return [" ".join(span.split()) for span in SPAN.findall(FENCED.sub("", text))]


def commands(text: str) -> Iterator[tuple[str, list[str]]]:
    """Subcommand and words of each call of harmony-fast, in shell blocks and in the running text."""
    called = [span.translate(str.maketrans("[]", "  ")) for span in spans(text) if span.startswith("harmony-fast ")]
    for line in [*shell_lines(text), *called]:
        words = shlex.split(line, comments=True)
        for place, word in enumerate(words[:-1]):
            if word.endswith(("harmony-fast", "harmony_fast.engine.cli")) and re.fullmatch("[a-z]+", words[place + 1]):
                rest = words[place + 2 :]
                end = next((i for i, w in enumerate(rest) if w in ("&&", "||", ";", "|")), len(rest))
                yield words[place + 1], rest[:end]


def settings(words: list[str]) -> list[str]:
    return [word for word in words if re.match(r"[a-z][\w.]*=", word) and word != "key=value"]


@each_document
def test_commands_and_options_exist(path: Path) -> None:
    for name, words in commands(path.read_text()):
        assert name in COMMANDS, name
        known = {option for parameter in COMMANDS[name].params for option in parameter.opts} | {"--help"}
        if name == "bench" and words and words[0].islower():
            assert words[0] in benchmarks(), words
            known = set(re.findall(r"\"(--[a-z-]+)\"", (ROOT / "bench" / f"{words[0]}.py").read_text())) | {"--help"}
        given = {word.partition("=")[0] for word in words if word.startswith("--")}
        assert given <= known, f"{name} {given - known}"


@each_document
def test_configurations_and_their_keys_are_valid(path: Path) -> None:
    for name, words in commands(path.read_text()):
        files = [word for word in words if re.fullmatch(r"configs/[\w./-]+\.yaml", word)]
        for file in files:
            load_config(ROOT / file, settings(words) if name in ("train", "plan") else [])
        if name in ("evaluate", "sweep"):
            with_overrides(load_config(ROOT / "configs" / "demo.yaml"), settings(words))


@each_document
def test_files_and_make_targets_exist(path: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    text = path.read_text()
    for code in [*shell_lines(text), *spans(text)]:
        for file in OURS.findall(code):
            assert "NAME" in file or (ROOT / file).exists(), file
        assert set(re.findall(r"^make ([a-z-]+)", code)) <= targets, code


@each_document
def test_links_lead_somewhere(path: Path) -> None:
    for link in LINK.findall(FENCED.sub("", path.read_text())):
        place, _, anchor = link.partition("#")
        if not re.match(r"[a-z]+:", link):
            target = path.parent / place if place else path
            assert target.exists(), link
            assert not anchor or anchor in anchors(target.read_text()), link


def anchors(text: str) -> set[str]:
    """The headings as GitHub and the site name them."""
    headings = re.findall(r"^#+ (.*)$", FENCED.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_functions_are_where_the_tour_says() -> None:
    """Each part of CONTRIBUTING.md names the files of the functions and classes that it names."""
    text = FENCED.sub("", (ROOT / "CONTRIBUTING.md").read_text())
    for part in re.split(r"\n\s*\n|\n\d\. |\n[-|] ?", text):
        source = "\n".join((ROOT / file).read_text() for file in re.findall(r"`(\w+/[\w/]+\.py)`", part)
                           if "NAME" not in file)  # fmt: skip
        for name in re.findall(r"`(\w[\w.]*)\(\)`|`([A-Z][A-Za-z]+)`", part):
            for word in "".join(name).split("."):
                assert re.search(rf"^\s*(?:def|class) {word}\b|^{word}\b.* = ", source, re.MULTILINE), (word, part)


def test_every_page_is_in_the_navigation_once() -> None:
    def pages(entry: object) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        return [page for below in (entry.values() if isinstance(entry, dict) else entry) for page in pages(below)]

    listed = pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    assert sorted(listed) == sorted(["CONTRIBUTING.md", *(path.name for path in (ROOT / "docs").glob("*.md"))])


def test_the_configuration_page_is_what_the_models_say() -> None:
    reference = runpy.run_path(str(ROOT / "scripts" / "config_reference.py"))
    assert (ROOT / "docs" / "configuration.md").read_text() == reference["page"](), "run make docs"


def test_every_key_has_a_docstring() -> None:
    assert runpy.run_path(str(ROOT / "scripts" / "config_reference.py"))["undocumented"]() == []
