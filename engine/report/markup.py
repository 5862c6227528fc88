"""HTML by construction: every text is escaped unless it is `Markup`, every image is inlined, nothing is fetched."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ..errors import UserError

VOID = frozenset({"img", "meta", "input"})
STYLE = Path(__file__).with_name("style.css")
# The browser itself holds the page to what it promises: no request leaves it, and no script runs in it.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
LOSSLESS_SIDE = 96
"""Images up to this side, pixels, are small and looked at pixel by pixel: no compression artefacts in them."""
SHOWN_SIDE = 96
"""Side at which a global crop is shown, CSS pixels."""
CHARACTERS = 160
"""Longer texts from data sets are cut."""
RUN_COLOURS = 8
"""Colours of runs in the style sheet."""
DASHES = (None, "6 3", "2 3", "8 3 2 3")


class Markup(str):
    """HTML that may go into a page as it is."""

    __slots__ = ()


Child = str | Iterable["Child"] | None


def tag(name: str, /, *children: Child, **attributes: str | float | bool | None) -> Markup:
    """An element. Attributes: `class_` means class, `stroke_width` stroke-width; None and False are left out."""
    opening = name
    for key, value in attributes.items():
        if value is not None and value is not False:
            opening += f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
    return Markup(f"<{opening}>" if name in VOID else f"<{opening}>{_joined(children)}</{name}>")


def _joined(children: Iterable[Child]) -> str:
    parts: list[str] = []
    for child in children:
        if isinstance(child, Markup):
            parts.append(child)
        elif isinstance(child, str):
            parts.append(html.escape(child))
        elif child is not None:
            parts.append(_joined(child))
    return "".join(parts)


def foreign(text: object) -> Markup:
    """A text from a data set: cut, escaped, and unable to turn the direction of the text around it."""
    words = " ".join(str(text).split())
    return tag("bdi", words if len(words) <= CHARACTERS else words[: CHARACTERS - 1] + "…")


def picture(
    pixels: np.ndarray, alt: str, scale: float | None = None, class_: str | None = None, exact: bool = False
) -> Markup:
    """An image element. pixels: uint8 [h, w, 3 or 4]; scale: CSS pixels per pixel (None: the style sheet decides).

    exact: without compression artefacts, as small images always are.
    """
    height, width = pixels.shape[:2]
    file = io.BytesIO()
    exact = exact or max(height, width) <= LOSSLESS_SIDE
    Image.fromarray(pixels).save(file, "WEBP", lossless=exact, quality=85, method=4)
    source = "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()
    sharp = "image-rendering:pixelated;" if scale is not None and scale >= 2 and scale == int(scale) else ""
    size = f"width:{width * scale:g}px;height:{height * scale:g}px" if scale is not None else ""
    return tag("img", src=source, alt=alt[:CHARACTERS], class_=class_, style=sharp + size or None)


def reduced(pixels: np.ndarray, side: int) -> np.ndarray:
    """A square image of at most this side. pixels: uint8 [h, w, 3]."""
    return pixels if len(pixels) <= side else np.asarray(Image.fromarray(pixels).resize((side, side)))


def shown_scale(side: int, shown: int = SHOWN_SIDE) -> float:
    """CSS pixels per pixel to show `side` pixels in about `shown`: a whole number where they are enlarged."""
    return shown // side if side <= shown else shown / side


def labelled(label: Child, *content: Child) -> Markup:
    """Content with a small label above it."""
    return tag("div", tag("div", label, class_="label"), tag("div", *content, class_="strip"))


def lead(text: str) -> Markup:
    """The paragraph that a part of the page opens with."""
    return tag("p", text, class_="lead")


def absent(error: UserError) -> Markup:
    """A line in place of what cannot be made: why not, and with what command it could."""
    words = [tag("code", part) if i % 2 else part for i, part in enumerate(str(error).split("`"))]
    return tag("p", "Not shown: ", words, ".", class_="absent")


def attempt(build: Callable[[], Child]) -> Child:
    """What `build` makes, or the line that says why it cannot."""
    try:
        return build()
    except UserError as error:
        return absent(error)


@dataclass(frozen=True)
class Section:
    """A part of the page."""

    anchor: str
    short: str
    """Title for the navigation."""
    title: str
    content: Child


def page(title: str, header: Child, sections: list[Section], footer: Child, names: list[str]) -> Markup:
    """The whole document. names: of the runs; with several, a choice of whose pictures are shown follows the reader."""
    style = STYLE.read_text(encoding="utf-8")
    # Without scripts: the style sheet looks at which name is chosen. Old browsers show the pictures of all runs.
    rules = [f"body:has(#show-{i}:checked) .of:not(.of-{i}) {{ display: none; }}" for i in range(len(names))]
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", title),
        tag("style", Markup("\n".join([style, *rules]))),
    )
    links = tag("nav", [tag("a", part.short, href=f"#{part.anchor}") for part in sections], aria_label="Sections")
    bar = tag("div", links, _choice(names) if len(names) > 1 else None, class_="bar-top")
    parts = [tag("section", tag("h2", part.title), part.content, id=part.anchor) for part in sections]
    body = tag("body", header, bar, tag("main", parts), tag("footer", footer))
    return Markup("<!doctype html>\n" + tag("html", head, body, lang="en") + "\n")


def _choice(names: list[str]) -> Markup:
    """Whose pictures are shown; the legend of all curves as well."""
    inputs = [tag("input", type="radio", name="run", id=f"show-{i}", checked=not i and "") for i in range(len(names))]
    labels = [tag("label", run_name(name, i), for_=f"show-{i}") for i, name in enumerate(names)]
    pairs = [tag("span", *pair, class_="choice") for pair in zip(inputs, labels, strict=True)]
    legend = tag("legend", "Pictures of", class_="unseen")
    return tag("fieldset", legend, pairs, class_="runs")


def run_colour(place: int) -> str:
    """The colour of a run by its place among the runs of the page."""
    return f"var(--run-{place % RUN_COLOURS})"


def run_dash(place: int) -> str | None:
    """Lines of runs beyond the first colours are dashed, so that no two look alike."""
    return DASHES[place // RUN_COLOURS % len(DASHES)]


def run_name(name: str, place: int) -> Markup:
    """A run with a piece of its line."""
    line = tag("line", x1=0, x2=20, y1=5, y2=5, stroke=run_colour(place), stroke_dasharray=run_dash(place))
    swatch = tag("svg", line, viewBox="0 0 20 10", class_="swatch", aria_hidden="true")
    return tag("span", swatch, tag("bdi", name), class_="run-name")
