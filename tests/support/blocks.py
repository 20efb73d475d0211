"""The code blocks of README.md, CONTRIBUTING.md and docs/, and the folder in which they run.

A comment on the line above a block says what the test does with it; readers do not see it:

* ``<!-- skip: reason -->``: not run, because it needs a GPU, a download, minutes.
* ``<!-- file: name -->``: not run, but written to a file that later blocks of the page read.

Everything else in ``bash`` and ``python`` is run, in the order of the page, in one folder per
page. A server at ``http://127.0.0.1:8000`` is the session's own.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt

from tests.support import ROOT, warm

PAGES = (
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").rglob("*.md")),
)
RUNNABLE = ("bash", "python")
_COMMENT = re.compile(r"<!--\s*(skip|file):\s*(.+?)\s*-->\s*$", re.DOTALL)
_SERVER = re.compile(r"(?:http://)?(?:127\.0\.0\.1|localhost):8000")
# curl ends well whatever the server answers. A page's server is not started a second time: its
# flags and adapters are checked, and its questions go to the session's.
_PRELUDE = """\
set -euo pipefail
curl() { command curl --fail-with-body --silent --show-error "$@"; }
secura-serve() { command secura-serve "$@" --check; }
"""


@dataclass(frozen=True)
class Block:
    """One fenced block of a page."""

    page: Path
    line: int
    language: str
    code: str
    skip: str | None = None
    """Why it cannot run here."""
    file: str | None = None
    """The file that it is the content of."""

    @property
    def id(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def runs(self) -> bool:
        return self.language in RUNNABLE and self.skip is None and self.file is None

    @property
    def needs_server(self) -> bool:
        return _SERVER.search(self.code) is not None

    @property
    def folds(self) -> bool:
        return "/admin/fold" in self.code


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page in their order; an unknown comment above one is an error."""
    found, comment = [], ""
    for token in MarkdownIt().parse(page.read_text("utf-8")):
        if token.type == "html_block":
            comment = token.content
        elif token.type == "fence":
            match = _COMMENT.search(comment)
            says = {match[1]: " ".join(match[2].split())} if match else {}
            line = token.map[0] + 1 if token.map else 0
            language = token.info.split()[0] if token.info.strip() else ""
            found.append(
                Block(page, line, language, token.content, says.get("skip"), says.get("file"))
            )
            comment = ""
        elif token.type not in ("paragraph_open",):
            comment = ""
    return found


def workspace(folder: Path) -> Path:
    """A folder like a checkout, in which a page may write: the adapters are there as links."""
    (folder / "adapters").mkdir(parents=True)
    for item in (ROOT / "adapters").iterdir():
        (folder / "adapters" / item.name).symlink_to(item)
    (folder / "benchmarks").symlink_to(ROOT / "benchmarks")
    return folder


def run(block: Block, folder: Path, server: str | None) -> None:
    """Run one block in ``folder``.

    Args:
        server: ``host:port`` of what answers in place of ``127.0.0.1:8000``.

    Raises:
        AssertionError: it failed; the message holds what it printed.
    """
    code = block.code
    if server is not None:
        code = _SERVER.sub(lambda m: f"http://{server}" if "http" in m[0] else server, code)
    scripts = (warm.commands(), str(Path(sys.executable).parent), os.environ["PATH"])
    environment = os.environ | {
        "PATH": os.pathsep.join(scripts),
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
    }
    if block.language == "bash":
        command = ["bash", "-c", _PRELUDE + code]
    else:
        command = [warm.python(), "-c", code]
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, f"{block.id} ended with {done.returncode}:\n{done.stdout[-4000:]}"
