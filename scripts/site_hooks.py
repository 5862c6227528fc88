"""mkdocs hooks: files outside docs/ that the pages link to become part of the site, CONTRIBUTING.md among them."""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
OUTSIDE = re.compile(r"\]\(\.\./([^)#]+)")
MARK = re.compile(r"^(<!-- /?bench.*-->)$", re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what lies outside, at its place in the repository."""
    texts = [Path(page.abs_src_path).read_text(encoding="utf-8") for page in files.documentation_pages()]
    for name in sorted({"CONTRIBUTING.md", *(name for text in texts for name in OUTSIDE.findall(text))}):
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links as they are where docs/ is the root; and tables stand apart from the marks around them, which GitHub does
    not need."""
    here = "](docs/" if page.file.src_uri == "CONTRIBUTING.md" else "](../"
    return MARK.sub(r"\n\1\n", markdown.replace(here, "]("))
