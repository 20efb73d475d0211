"""Write docs/reference/secura-*.md from the commands' own `--help`; `--check` only compares.

The commands are those of `[project.scripts]` in pyproject.toml. Needs no vLLM.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
REFERENCE = ROOT / "docs" / "reference"
_GUIDES = {
    "secura-basis": "retention.md",
    "secura-demo": "chat-page.md",
    "secura-serve": "serving.md",
    "secura-train": "training.md",
    "secura-merge": "merging.md",
    "secura-eval": "evaluation.md",
}


def commands() -> dict[str, str]:
    """Each console script and the ``module:function`` behind it."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        return dict(tomllib.load(file)["project"]["scripts"])


def help_text(name: str) -> str:
    """What ``name --help`` prints in a terminal of 80 columns."""
    module, _, function = commands()[name].partition(":")
    before, argv = dict(os.environ), sys.argv
    os.environ.update(COLUMNS="80", NO_COLOR="1")
    sys.argv = [name, "--help"]
    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
            getattr(importlib.import_module(module), function)()
    finally:
        os.environ.clear()
        os.environ.update(before)
        sys.argv = argv
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def page(name: str) -> str:
    """The reference page of one command."""
    return (
        f"# {name}\n\n"
        f"<!-- Written by docs/generate_cli.py: change the help texts in the code instead. -->\n\n"
        f"This is what `{name} --help` prints. The [guide](../{_GUIDES[name]}) explains it.\n\n"
        f"```text\n{help_text(name)}\n```\n"
    )


def stale() -> list[str]:
    """Pages that differ from what the commands print, line breaks aside."""
    return [
        name
        for name in commands()
        if not (file := REFERENCE / f"{name}.md").is_file()
        or file.read_text("utf-8").split() != page(name).split()
    ]


def main() -> int:
    """Write the pages, or compare them; returns the exit status."""
    sys.path.insert(0, str(ROOT))
    if "--check" in sys.argv:
        if names := stale():
            print(f"out of date: {', '.join(names)}; run docs/generate_cli.py", file=sys.stderr)
        return 1 if names else 0
    for name in commands():
        (REFERENCE / f"{name}.md").write_text(page(name), "utf-8")
        print(REFERENCE / f"{name}.md")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
