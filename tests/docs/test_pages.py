"""Proves that what the pages name exists: flags, modules, files, make targets, extras, variables.

Names move; a page that still has the old one fails here. Also that the pages of the commands are
what `--help` prints. Needs no vLLM, except for the flags of vLLM itself.
"""

from __future__ import annotations

import ast
import importlib
import re
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest

from tests.support import ROOT
from tests.support.blocks import PAGES, blocks

sys.path.insert(0, str(ROOT / "docs"))
import generate_cli

GENERATED = {ROOT / "docs" / "reference" / f"{name}.md" for name in generate_cli.commands()}
WRITTEN = [page for page in PAGES if page not in GENERATED]
EACH_PAGE = pytest.mark.parametrize("page", WRITTEN, ids=lambda page: str(page.relative_to(ROOT)))
# Flags of other programs that the pages mention.
FOREIGN = {
    "--no-deps", "--index-url", "--strict", "--check", "--multi_gpu", "--num_processes", "--cpu",
    "--lora-modules", "--sleep", "--no-merges", "--from-literal", "--for", "--timeout",
    # of python -m benchmarks.gpu
    "--parts", "--rehearse",
}  # fmt: skip
_FLAG = re.compile(r"(?<![\w-])--[a-z][\w-]+")
_MODULE = re.compile(r"\bsecura_serve(?:\.\w+)+")
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_FILE = re.compile(r"`((?:secura_serve|tests|docs|demo|benchmarks|\.ci)/[\w./-]+)`")


def test_the_pages_of_the_commands_are_what_help_prints() -> None:
    names = generate_cli.stale()
    assert not names, f"{names}: run `python docs/generate_cli.py`"


@cache
def _our_flags() -> set[str]:
    return {flag for name in generate_cli.commands() for flag in _flags_of(name)}


@cache
def _flags_of(name: str) -> set[str]:
    return {*_FLAG.findall(generate_cli.help_text(name)), "--help"}


@cache
def _vllm_flags() -> set[str]:
    compat = pytest.importorskip("secura_serve.serve.compat")
    pytest.importorskip("vllm")
    parser, _ = compat.make_arg_parser()
    return {option for action in parser._actions for option in action.option_strings}


def _missing(flags: set[str], known: set[str]) -> set[str]:
    unknown = flags - known - FOREIGN
    # vLLM takes seconds to import: only where a flag is not ours.
    return {flag for flag in unknown if flag.replace("_", "-") not in _vllm_flags()}


@EACH_PAGE
def test_every_flag_that_a_page_names_exists(page: Path) -> None:
    flags = set(_FLAG.findall(re.sub(r"<!--.*?-->", "", page.read_text("utf-8"), flags=re.DOTALL)))
    assert not _missing(flags, _our_flags())


@EACH_PAGE
def test_every_command_has_the_flags_that_its_examples_give_it(page: Path) -> None:
    faults = []
    for block in blocks(page):
        lines = block.code.replace("\\\n", " ").splitlines()
        for line in lines if block.language == "bash" else ():
            for command in re.split(r"&&|\|\||[|;#]", line):
                words = command.split()
                name = next((w for w in words if w in generate_cli.commands()), None)
                if name is None:
                    continue
                flags = {word.partition("=")[0] for word in words if word.startswith("--")}
                missing = flags - _flags_of(name)
                if name == "secura-serve":
                    missing = _missing(missing, set())
                faults += [f"{block.id}: {name} has no {flag}" for flag in sorted(missing)]
    assert not faults, "\n".join(faults)


@EACH_PAGE
def test_every_module_and_name_that_a_page_mentions_exists(page: Path) -> None:
    faults = []
    for name in sorted(set(_MODULE.findall(page.read_text("utf-8")))):
        if not _resolves(name):
            faults.append(name)
    assert not faults, f"{page.relative_to(ROOT)}: no such module or name: {', '.join(faults)}"


def _resolves(name: str) -> bool:
    """Whether a dotted name is a module or a top-level name in one; nothing is imported but
    lazy packages, so that it works without vLLM."""
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        path = ROOT.joinpath(*parts[:cut])
        file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        if not file.is_file():
            continue
        rest = parts[cut:]
        return not rest or _defines(file, rest) or _exports(".".join(parts[:cut]), rest[0])
    return False


def _defines(file: Path, names: list[str]) -> bool:
    body: list[ast.stmt] = ast.parse(file.read_text("utf-8")).body
    for name in names:
        for node in body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                if node.name == name:
                    body = node.body
                    break
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                if any(isinstance(t, ast.Name) and t.id == name for t in targets):
                    body = []
                    break
        else:
            return False
    return True


def _exports(module: str, name: str) -> bool:
    try:
        return name in getattr(importlib.import_module(module), "__all__", ())
    except ImportError:
        return False


@EACH_PAGE
def test_every_link_and_file_that_a_page_names_exists(page: Path) -> None:
    text = page.read_text("utf-8")
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    faults = []
    for target in _LINK.findall(prose):
        path, _, anchor = target.partition("#")
        if "://" in path or path.startswith("mailto:"):
            continue
        file = (page.parent / path).resolve() if path else page
        if not file.exists():
            faults.append(target)
        elif anchor and file.suffix == ".md" and anchor not in _anchors(file):
            faults.append(f"{target} (no such heading)")
    faults += [path for path in _FILE.findall(prose) if not (ROOT / path).exists()]
    assert not faults, f"{page.relative_to(ROOT)}: {', '.join(faults)}"


@cache
def _anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and mkdocs make them."""
    headings = re.findall(r"^#+ +(.+?) *$", page.read_text("utf-8"), re.MULTILINE)
    plain = [re.sub(r"[^\w\s-]", "", h.replace("`", "")).strip().lower() for h in headings]
    return {re.sub(r"[\s]+", "-", heading) for heading in plain}


def test_every_make_target_and_extra_that_a_page_names_exists() -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    with (ROOT / "pyproject.toml").open("rb") as file:
        extras = set(tomllib.load(file)["project"]["optional-dependencies"])
    faults = []
    for page in WRITTEN:
        text = page.read_text("utf-8")
        named = set(re.findall(r"`make ([a-z-]+)", text))
        named |= {
            target
            for block in blocks(page)
            for target in re.findall(r"^make ([a-z-]+)", block.code, re.MULTILINE)
        }
        faults += [f"{page.name}: make {name}" for name in named - targets]
        lists = re.findall(r"(?:secura-serve|'\.)\[([\w,-]+)\]", text)
        wanted = {extra for names in lists for extra in names.split(",")}
        faults += [f"{page.name}: extra {name}" for name in wanted - extras]
    assert not faults, ", ".join(faults)


def test_every_environment_variable_that_is_read_is_explained_and_the_other_way_round() -> None:
    explained = set(
        re.findall(r"^\| `\$?([A-Z][A-Z0-9_]+)`", _text("environment.md"), re.MULTILINE)
    )
    read = {
        name
        for room in ("secura_serve", "demo")
        for file in sorted((ROOT / room).rglob("*.py"))
        for name in _variables(file)
    }
    assert read - explained == set(), "read by the code, not on docs/environment.md"
    stated = set(re.findall(r"<!-- read by others: (.+?) -->", _text("environment.md")))
    others = {name for line in stated for name in line.split(", ")}
    assert explained - read - others == set(), "on docs/environment.md, read by nobody"


def _text(page: str) -> str:
    return (ROOT / "docs" / page).read_text("utf-8")


def _variables(file: Path) -> set[str]:
    """Names of environment variables: capitals with an underscore that stand as a string, or
    behind one name, in a file that looks at ``os.environ``."""
    source = file.read_text("utf-8")
    looks = "environ" in source or "getenv" in source
    # Names that several processes share stand apart from those who read them.
    if not looks and "Environment variable" not in source:
        return set()
    body = [n for n in ast.parse(source).body if "__all__" not in ast.unparse(n).split("=")[0]]
    return {
        node.value
        for top in body
        for node in ast.walk(top)
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and re.fullmatch(r"[A-Z]+(_[A-Z]+)+|RANK|CC|CXX", node.value)
    }


def test_every_public_name_is_on_the_page_of_the_api() -> None:
    import secura_serve

    page = _text("reference/api.md")
    missing = [n for n in secura_serve.__all__ if n != "__version__" and f"`{n}`" not in page]
    assert not missing


def test_every_name_that_a_page_imports_is_on_the_page_of_the_api() -> None:
    # A room exports names of the modules in it; the page names the module that defines each.
    text = _text("reference/api.md")
    stated = set(re.findall(r"^::: (\S+)$", text, re.MULTILINE))
    stated |= {f"secura_serve.{name}" for name in re.findall(r"`(\w+)`", text)}
    imported = {
        (node.module, alias.name)
        for page in WRITTEN
        for block in blocks(page)
        if block.language == "python"
        for node in ast.walk(ast.parse(block.code))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("secura_serve")
        for alias in node.names
    }
    assert len(imported) > 20
    assert sorted(f"{m}.{n}" for m, n in imported if not {f"{m}.{n}", _home(m, n)} & stated) == []


def _home(module: str, name: str) -> str:
    """The dotted name of what a module exports where it is defined."""
    value = getattr(importlib.import_module(module), name)
    return f"{value.__module__}.{value.__qualname__}"


def test_the_readme_stays_short() -> None:
    lines = (ROOT / "README.md").read_text("utf-8").splitlines()
    assert len(lines) <= 120
    assert [line for line in lines if len(line) > 300 and not line.startswith("|")] == []
