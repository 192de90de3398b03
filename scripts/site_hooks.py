"""MkDocs hooks: add the pages of `benchmarks/` to the site, and make links out of `docs/` work on the site.

Links in the Markdown files are relative to the file, as a repository browser needs them. On the site, a link to a page
of the site remains a link; a link to another file of the repository becomes plain text.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
_LINK = re.compile(r"(?<!!)\[([^\[\]]+)\]\((?!\w+:|#)([^()#\s]+)(#[^()\s]*)?\)")


def on_files(files: Any, config: Any) -> Any:
    """Add `benchmarks/*.md` and `benchmarks/results/*.md` under their own paths."""
    for path in sorted((ROOT / "benchmarks").rglob("*.md")):
        source = path.relative_to(ROOT).as_posix()
        files.append(File.generated(config, source, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Resolve each relative link from the file's place in the repository."""
    folder = Path(page.file.abs_src_path).parent

    def resolved(match: re.Match[str]) -> str:
        text, target, anchor = match[1], match[2], match[3] or ""
        path = Path(os.path.normpath(folder / target))
        for base in (ROOT / "docs", ROOT):
            if path.is_relative_to(base) and files.get_file_from_path(path.relative_to(base).as_posix()):
                source = path.relative_to(base).as_posix()
                return f"[{text}]({os.path.relpath(source, Path(page.file.src_uri).parent)}{anchor})"
        return text if path.exists() else match[0]  # MkDocs reports missing files

    return _LINK.sub(resolved, markdown)
