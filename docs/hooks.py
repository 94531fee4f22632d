"""Shows files of the repository in the site, and points links that leave docs/pages to them.

A link in a page is a path in the repository, so that it also works where the pages are read
without the site.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PAGES = ROOT / "docs" / "pages"
SHOWN = (
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "benchmarks/results/*/*.md",
    "benchmarks/results/*/*.svg",
)
FOLDER = "repository"
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s#:]+)(#[^)\s]*)?\)")


def shown() -> list[Path]:
    return sorted(path for pattern in SHOWN for path in ROOT.glob(pattern))


def on_files(files: Files, config: Any) -> Files:
    for path in shown():
        files.append(File.generated(config, _uri(path), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    source = Path(page.file.abs_src_path)
    known = set(shown())

    def in_site(link: re.Match) -> str:
        image, text, target, anchor = link.groups()
        path = (source.parent / target).resolve()
        if not path.is_relative_to(PAGES) and path not in known:
            return f"`{path.relative_to(ROOT)}`" if text.startswith("`") else text
        relative = posixpath.relpath(_uri(path), posixpath.dirname(_uri(source)) or ".")
        return f"{image}[{text}]({relative}{anchor or ''})"

    return LINK.sub(in_site, markdown)


def _uri(path: Path) -> str:
    """Where the site has it, among its sources."""
    if path.is_relative_to(PAGES):
        return path.relative_to(PAGES).as_posix()
    return f"{FOLDER}/{path.relative_to(ROOT).as_posix()}"
