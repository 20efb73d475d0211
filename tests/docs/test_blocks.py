"""Proves that the code in README.md and docs/ runs as it stands.

Every shell and Python block is run, in the order of its page, except those that say why not; of
these the syntax is checked. Blocks of other kinds (JSON, YAML, TOML) must parse. Needs vLLM for
the one server that all pages share, curl, and the packages of ``make setup``; no network.
`pytest tests/docs -k training` runs one page.
"""

from __future__ import annotations

import json
import subprocess
import tomllib
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.support import ROOT
from tests.support.blocks import PAGES, RUNNABLE, Block, blocks, run, workspace

ALL = [block for page in PAGES for block in blocks(page)]
# While an adapter is folded nothing else answers, so these come last.
RUN = sorted((block for block in ALL if block.runs), key=lambda block: block.folds)


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Path]:
    """One folder per page, with the page's own files in it."""
    made: dict[Path, Path] = {}

    def folder(page: Path) -> Path:
        if page not in made:
            made[page] = workspace(tmp_path_factory.mktemp(page.stem))
            for block in blocks(page):
                if block.file:
                    (made[page] / block.file).parent.mkdir(parents=True, exist_ok=True)
                    (made[page] / block.file).write_text(block.code, "utf-8")
        return made[page]

    return folder


# Also those that need no server: the blocks of a page run in its order.
@pytest.mark.engine
@pytest.mark.parametrize("block", RUN, ids=lambda block: block.id)
def test_block_runs(
    block: Block, folder_of: Callable[[Path], Path], request: pytest.FixtureRequest
) -> None:
    server = None
    if block.needs_server:
        server = request.getfixturevalue("served").url.split("/")[2]
    try:
        run(block, folder_of(block.page), server)
    finally:
        if block.folds:
            unfold = urllib.request.Request(f"http://{server}/admin/unfold", method="POST")
            urllib.request.urlopen(unfold, timeout=120).close()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_does_not_run_is_at_least_well_formed(page: Path) -> None:
    faults = []
    for block in blocks(page):
        try:
            if block.language == "python":
                compile(block.code, block.id, "exec")
            elif block.language == "bash":
                subprocess.run(
                    ["bash", "-n"], input=block.code, text=True, check=True, capture_output=True
                )
            elif block.language == "json":
                json.loads(block.code)
            elif block.language == "jsonl":
                [json.loads(line) for line in block.code.splitlines()]
            elif block.language == "yaml":
                yaml.safe_load(block.code)
            elif block.language == "toml":
                tomllib.loads(block.code)
            elif block.language not in ("text", ""):
                faults.append(f"{block.id}: unknown language {block.language!r}")
        except (SyntaxError, ValueError, yaml.YAMLError) as error:
            faults.append(f"{block.id}: {error}")
        except subprocess.CalledProcessError as error:
            faults.append(f"{block.id}: {error.stderr}")
        if block.skip is not None and (block.language not in RUNNABLE or len(block.skip) < 8):
            faults.append(f"{block.id}: a skipped block needs a language and a reason")
    assert not faults, "\n".join(faults)


def test_the_collector_reads_comments_languages_and_lines(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "Text.\n\n<!-- skip: needs a GPU -->\n```bash\nmake demo\n```\n\n"
        "<!-- file: a.jsonl -->\n```jsonl\n{}\n```\n\n- item\n\n  ```python\n  print(1)\n  ```\n"
        "\n<!-- skip: far away -->\n\nA paragraph between.\n\n```bash\necho hi\n```\n"
    )
    first, second, third, last = blocks(page)
    assert (first.skip, first.line, first.runs) == ("needs a GPU", 4, False)
    assert (second.file, second.code) == ("a.jsonl", "{}\n")
    assert third.code == "print(1)\n" and third.runs
    assert last.skip is None and last.runs
