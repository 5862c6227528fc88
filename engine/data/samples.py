"""One image-caption sample, wherever it lies: its image file, its captions, what else is known about it."""

from __future__ import annotations

import ast
import errno
import json
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from stat import S_ISREG
from typing import Any, Protocol

from ..errors import DataError
from .images import Rejected

IMAGES = ("jpg", "jpeg", "png", "webp", "gif")
WANTED = frozenset((*IMAGES, "txt", "json", "cls"))
"""Extensions of the files that matter; `.cls` holds a class number in tars made for classification."""
MAX_FILE = 128 << 20
"""Bytes of the largest image or text file that is read."""
TOO_LARGE = f"file larger than {MAX_FILE >> 20} MiB"
MAX_CAPTIONS = 64
"""Captions of one image that are kept at most."""
SHARD_DAMAGED = "shard cut short or damaged"
"""The reason that is counted, or listed, for what a `ShardDamaged` leaves out."""


class ShardDamaged(Exception):
    """A shard that broke off or became unreadable; all samples before that point were yielded."""


class Sample(Protocol):
    """What `prepare` needs of a sample."""

    key: str

    def image(self) -> bytes:
        """The image file. Raises Rejected."""

    def captions(self, lines: bool) -> list[str]:
        """At least one caption. lines: each line of a plain text is a caption of its own. Raises Rejected."""

    def labels(self) -> dict[str, Any]:
        """Metadata by name; empty where there is none. Raises Rejected."""


@dataclass
class FileSample:
    """A sample of several files: `a/0001.jpg`, `a/0001.txt` and `a/0001.json` are sample `a/0001`."""

    key: str
    files: dict[str, bytes] = field(default_factory=dict)
    """Lower-case extension -> content, in the source's order."""
    failure: Rejected | None = None
    """Why it gives no image: a file of it could not be read."""
    beside: dict[str, Any] = field(default_factory=dict)
    """Metadata from a table beside the tar; the sample's own `.json` goes before it."""

    def image(self) -> bytes:
        """The first image file. Raises Rejected."""
        if self.failure:
            raise self.failure
        for extension, data in self.files.items():
            if extension in IMAGES:
                return data
        raise Rejected("no image")

    def captions(self, lines: bool = False) -> list[str]:
        """A list of captions in the `.json`, or else the `.txt`, or else `caption` of the `.json`. Raises Rejected."""
        text = self._text()
        try:
            value = self._caption_of_json()
        except Rejected:
            if text is None:
                raise
            value = None
        if text is not None and not isinstance(value, list):
            value = _spelled_list(text) or (text.splitlines() if lines else text)
        return usable_captions(value if isinstance(value, list) else [value])

    def _text(self) -> str | None:
        try:
            return self.files["txt"].decode("utf-8-sig") if "txt" in self.files else None
        except UnicodeError:
            raise Rejected("caption not UTF-8") from None

    def _caption_of_json(self) -> Any:
        content = self._json()
        if isinstance(content, dict):
            listed = content.get("captions")
            return listed if isinstance(listed, list) else content.get("caption")
        return content

    def labels(self) -> dict[str, Any]:
        """The object in the `.json`, over the `.cls`, over what is known from beside. Raises Rejected."""
        content = self._json()
        number = {"cls": self.files["cls"].decode("utf-8", "replace").strip()} if "cls" in self.files else {}
        return {**self.beside, **number, **(content if isinstance(content, dict) else {})}

    def _json(self) -> Any:
        try:
            return json.loads(self.files.get("json", b"{}"))
        except (ValueError, RecursionError):
            raise Rejected("json not readable") from None


@dataclass
class RowSample:
    """One or more rows of a table that name the same image."""

    key: str
    picture: bytes | Path | None
    """The image file itself, or where it lies."""
    texts: list[Any]
    """The caption columns of all its rows."""
    row: dict[str, Any]
    """The first row, by column."""

    def image(self) -> bytes:
        """Raises Rejected where there is no such file."""
        if isinstance(self.picture, Path):
            return read_small(self.picture)
        if not self.picture:
            raise Rejected("no image")
        return self.picture

    def captions(self, lines: bool) -> list[str]:
        """What the caption columns hold: texts, or lists of texts. Raises Rejected."""
        found: list[Any] = []
        for text in self.texts:
            value = (_spelled_list(text) or (text.splitlines() if lines else text)) if isinstance(text, str) else text
            found.extend(value if isinstance(value, list) else [value])
        return usable_captions(found)

    def labels(self) -> dict[str, Any]:
        """The columns of the first row, but for files that lie in it."""
        return {column: value for column, value in self.row.items() if not _is_file(value)}


def _is_file(value: Any) -> bool:
    """Whether a table's cell holds the content of a file: bytes, or as Hugging Face's datasets store images."""
    return isinstance(value, bytes) or (isinstance(value, dict) and "bytes" in value)


def extension_of(name: str) -> str:
    """What follows the last dot of a file's name, in small letters: what the keys of `FileSample.files` are."""
    return name.rpartition(".")[2].lower()


def read_small(path: Path) -> bytes:
    """The content of an image or text file. Raises Rejected where there is none or it is too large."""
    try:
        state = path.stat()
        if not S_ISREG(state.st_mode):  # a pipe would be waited for, a device may never end
            raise Rejected("file not readable")
        if state.st_size > MAX_FILE:
            raise Rejected(TOO_LARGE)
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise Rejected("file not found") from None
    except (PermissionError, ValueError):  # the second: a name with a zero byte
        raise Rejected("file not readable") from None
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise Rejected("file not found") from None
        raise DataError(f"{path}: reading failed: {error.strerror}; run again when it is readable") from error


def usable_captions(values: Iterable[Any]) -> list[str]:
    """The texts among `values` that say something. Raises Rejected where there is none, with the reason."""
    texts = [value for value in values if isinstance(value, str)]
    if not texts:
        raise Rejected("caption missing")
    said = [text for text in texts if _says_something(text)]
    if not said:
        raise Rejected("caption empty")
    whole = [text for text in said if _is_unicode(text)]
    if not whole:
        raise Rejected("caption not UTF-8")
    return whole[:MAX_CAPTIONS]


def _says_something(text: str) -> bool:
    """Letters, marks, numbers, punctuation and symbols do; separators and control characters do not."""
    return any(
        unicodedata.category(character)[0] not in "ZC" or "\ud800" <= character <= "\udfff" for character in text
    )


def _is_unicode(text: str) -> bool:
    """JSON can spell half a surrogate pair, which is no character."""
    try:
        text.encode()
    except UnicodeError:
        return False
    return True


def _spelled_list(text: str) -> list[Any] | None:
    """A list of captions written as text, as JSON or as Python's `str` of a list (img2dataset's); None if none."""
    if not text.lstrip().startswith("["):
        return None
    for parse in (json.loads, ast.literal_eval):
        try:
            value = parse(text.strip())
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):  # the second: `[{[]}]`
            continue
        if isinstance(value, list) and value and all(isinstance(entry, str) for entry in value):
            return value
    return None
