"""Makes `noto.tar` and `twemoji.tar`: the same concepts drawn by two artists, as webdataset tars.

    npm pack emoji-datasource-google@16.0.0
    npm pack emoji-datasource-twitter@16.0.0
    python demo/make_demo.py emoji-datasource-google-16.0.0.tgz emoji-datasource-twitter-16.0.0.tgz

Each package may be the .tgz or the folder it unpacks to. The same packages give the same bytes. A sample is
`<code points>.png` (64 px, on white), `.txt` (the caption) and `.json` (name, short names, category, subcategory).
The tars are gzip-compressed, as half a tar of small files is padding; every tar reader notices that by itself.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

Read = Callable[[str], bytes]
"""Reads one file of an npm package, by its path inside it."""
OUTPUTS = {"google": "noto.tar", "twitter": "twemoji.tar"}


def main() -> None:
    """Write both tars into the folder given, by default the one this script is in."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("google", type=Path, help="emoji-datasource-google: .tgz or folder")
    parser.add_argument("twitter", type=Path, help="emoji-datasource-twitter: .tgz or folder")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, help="folder to write to")
    arguments = parser.parse_args()
    packages = {vendor: open_package(getattr(arguments, vendor)) for vendor in OUTPUTS}
    concepts = read_concepts(packages["google"])
    for vendor, read in packages.items():
        path = arguments.output / OUTPUTS[vendor]
        write_tar(path, [drawing for concept in concepts for drawing in sample_files(concept, vendor, read)])
        print(f"{path}: {len(concepts)} samples, {path.stat().st_size / 2**20:.1f} MiB")


def open_package(path: Path) -> Read:
    """How to read the files of an npm package, given as .tgz or folder."""
    if path.is_dir():
        root = path / "package" if (path / "package").is_dir() else path
        return lambda name: (root / name).read_bytes()
    with tarfile.open(path) as tar:
        files = {m.name: tar.extractfile(m).read() for m in tar if m.name.endswith("emoji.json") or "/64/" in m.name}
    return lambda name: files[f"package/{name}"]


def read_concepts(read: Read) -> list[dict[str, Any]]:
    """The concepts that both artists drew, sorted by code points, each with a name of its own.

    Only base drawings: the variations in skin colour share their concept's name and nearly its drawing.
    """
    entries = [e for e in json.loads(read("emoji.json")) if e["has_img_google"] and e["has_img_twitter"]]
    uses = Counter(entry["name"].lower() for entry in entries)
    concepts = [concept(entry, uses) for entry in sorted(entries, key=lambda entry: entry["unified"])]
    assert len({concept["labels"]["name"] for concept in concepts}) == len(concepts), "two concepts share a name"
    return concepts


def concept(entry: dict[str, Any], uses: Counter[str]) -> dict[str, Any]:
    """Key, image file, caption and labels of an entry of `emoji.json`; a name used twice gives way to a short name."""
    short_names = [words(name) for name in entry["short_names"]]
    name = entry["name"].lower()
    name = name if uses[name] == 1 else short_names[0]
    labels = {key: entry[key] for key in ("category", "subcategory")}
    return {
        "key": entry["unified"].lower(),
        "image": entry["image"],
        "caption": ", ".join(dict.fromkeys([words(name), *short_names])),
        "labels": {"name": name, "short_names": entry["short_names"], **labels},
    }


def words(name: str) -> str:
    """`man-in_tuxedo` as one would say it."""
    return " ".join(name.lower().replace("_", " ").replace("-", " ").split())


def sample_files(concept: dict[str, Any], vendor: str, read: Read) -> list[tuple[str, bytes]]:
    """Name and content of the three files of a concept as one vendor drew it."""
    drawing = Image.open(io.BytesIO(read(f"img/{vendor}/64/{concept['image']}"))).convert("RGBA")
    white = Image.new("RGBA", drawing.size, "white")
    png = io.BytesIO()
    Image.alpha_composite(white, drawing).convert("RGB").save(png, "PNG", optimize=True)
    labels = json.dumps(concept["labels"], ensure_ascii=False)
    contents = {"json": labels.encode(), "png": png.getvalue(), "txt": concept["caption"].encode()}
    return [(f"{concept['key']}.{extension}", content) for extension, content in contents.items()]


def write_tar(path: Path, files: list[tuple[str, bytes]]) -> None:
    """A compressed tar without times, owners or anything else that varies from run to run."""
    with (
        open(path, "wb") as file,
        gzip.GzipFile("", "wb", 9, file, mtime=0) as compressed,
        tarfile.open(fileobj=compressed, mode="w", format=tarfile.USTAR_FORMAT) as tar,
    ):
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


if __name__ == "__main__":
    main()
