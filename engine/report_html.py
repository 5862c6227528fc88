"""HTML by construction: every text is escaped unless it is `Markup`, every image is inlined, nothing is fetched."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from .errors import UserError

VOID = frozenset({"img", "meta"})
STYLE = Path(__file__).with_name("report.css")
# The browser itself holds the page to what it promises: no request leaves it, and no script runs in it.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
LOSSLESS_SIDE = 96
"""Images up to this side, pixels, are small and looked at pixel by pixel: no compression artefacts in them."""
SHOWN_SIDE = 96
"""Side at which a global crop is shown, CSS pixels."""
CHARACTERS = 160
"""Longer texts from data sets are cut."""


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
    parts = []
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


def picture(pixels: np.ndarray, alt: str = "", scale: float | None = None, class_: str | None = None) -> Markup:
    """An image element. pixels: uint8 [h, w, 3 or 4]; scale: CSS pixels per pixel (None: the style sheet decides)."""
    height, width = pixels.shape[:2]
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "WEBP", lossless=max(height, width) <= LOSSLESS_SIDE, quality=85, method=4)
    source = "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()
    sharp = "image-rendering:pixelated;" if scale is not None and scale >= 2 and scale == int(scale) else ""
    size = f"width:{width * scale:g}px;height:{height * scale:g}px" if scale is not None else ""
    return tag("img", src=source, alt=alt[:CHARACTERS], class_=class_, style=sharp + size or None)


def shown_scale(side: int, shown: int = SHOWN_SIDE) -> float:
    """CSS pixels per pixel to show `side` pixels in about `shown`: a whole number where they are enlarged."""
    return shown // side if side <= shown else shown / side


def labelled(label: Child, *content: Child, class_: str = "labelled") -> Markup:
    """Content with a small label above it."""
    return tag("div", tag("div", label, class_="label"), tag("div", *content, class_="strip"), class_=class_)


def lead(text: str) -> Markup:
    """The paragraph that a part of the page opens with."""
    return tag("p", text, class_="lead")


def section(anchor: str, title: str, build: Callable[[], Child]) -> Markup:
    """A part of the page; where its content cannot be made, one line says why."""
    try:
        content = build()
    except UserError as error:
        words = [tag("code", part) if i % 2 else part for i, part in enumerate(str(error).split("`"))]
        content = tag("p", "Not shown: ", words, ".", class_="absent")
    return tag("section", tag("h2", title), content, id=anchor)


def page(title: str, header: Child, sections: list[tuple[str, str, Markup]], footer: Child) -> Markup:
    """The whole document. sections: anchor, short title for the navigation, content."""
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", title),
        tag("style", Markup(STYLE.read_text(encoding="utf-8"))),
    )
    links = tag("nav", [tag("a", short, href=f"#{anchor}") for anchor, short, _ in sections])
    body = tag("body", header, links, tag("main", [content for _, _, content in sections]), tag("footer", footer))
    return Markup("<!doctype html>\n" + tag("html", head, body, lang="en") + "\n")
