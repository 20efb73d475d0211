"""What `mkdocs build` does beyond its plugins, so that the pages stay plain Markdown on GitHub.

A page may link to any file of the repository by a relative path. In the built site a link that
leaves `docs/` goes to the repository's web page, and an image outside `docs/` is copied.
"""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
_LINK = re.compile(
    r"(?P<image>!?)\[(?P<text>[^\]]*)\]\((?P<target>\.\./[^)\s#]+)(?P<anchor>#[^)\s]*)?\)"
)
_ROLE = re.compile(r":(?:func|class|mod|data|meth|attr|exc):(?=<code>)")


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    """Turn links that leave `docs/` into links that work in the built site."""

    def rewritten(match: re.Match[str]) -> str:
        here = PurePosixPath("docs", page.file.src_uri).parent
        target = os.path.normpath(here / match["target"])
        if target.startswith("docs/"):
            return match[0]
        if not (ROOT / target).exists():
            raise PluginError(f"{page.file.src_uri}: no file {target}")
        if match["image"]:
            copy = f"assets/{target.replace('/', '-')}"
            if files.get_file_from_path(copy) is None:
                files.append(File.generated(config, copy, abs_src_path=str(ROOT / target)))
            depth = "../" * page.file.src_uri.count("/")
            return f"![{match['text']}]({depth}{copy})"
        kind = "tree" if (ROOT / target).is_dir() else "blob"
        url = f"{config.repo_url.rstrip('/')}/{kind}/main/{target}"
        return f"[{match['text']}]({url}{match['anchor'] or ''})"

    return _LINK.sub(rewritten, markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Drop the reStructuredText roles of docstrings: ``:func:`x``` is shown as ``x``."""
    return _ROLE.sub("", html)
