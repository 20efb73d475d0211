"""Proves that imports follow the arrows of the design: a room only knows the rooms before it, a
sub-room only what its line says.

Needs nothing but the sources: they are parsed, not imported.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from pathlib import Path

from tests.support import ROOT

FOUNDATION = {"addresses", "command", "config", "errors", "lazy", "system.os_errors", "suggest"}
# A room is a file or folder of the package, a sub-room one within another ("merge.io"). A line
# lists what a room may import: a name allows that room with its sub-rooms. Of a room that one
# stands in oneself it allows only the files that are in no sub-room, so that sub-rooms of one
# room (two processes, for instance) are strangers unless a line says otherwise. A sub-room
# without a line belongs to the room around it.
ALLOWED: dict[str, set[str]] = {
    "addresses": set(),
    "errors": set(),
    "lazy": set(),
    "system": set(),
    "system.garbage_collection": set(),
    "system.host_memory": set(),
    "system.os_errors": set(),
    "page_module": set(),
    "suggest": set(),
    "registry": {"errors", "suggest"},
    "config": {"errors", "suggest"},
    "command": {"system.compiled", "errors", "system.os_errors", "suggest"},
    "system.atomic": {"errors", "system.os_errors"},
    "system.compiled": {"errors"},
    "bases": FOUNDATION | {"system.atomic"},
    "checkpoint": FOUNDATION,
    "method.fold_stats": set(),
    "method.native": {"system.compiled", "method.fold_stats"},
    "method.modes": {"errors", "registry", "method.native"},
}
ALLOWED["method"] = FOUNDATION | {
    "registry",
    *(f"method.{r}" for r in ("fold_stats", "modes", "native")),
}
ALLOWED["adapter"] = FOUNDATION | {
    "system.atomic",
    "bases",
    "checkpoint",
    "system.compiled",
    "method",
}
ALLOWED["merge.io"] = {"system.atomic", "errors", "system.os_errors"}
ALLOWED["merge.fold"] = ALLOWED["adapter"] | {"adapter", "merge.io"}
ALLOWED["merge"] = ALLOWED["merge.fold"] | {"merge.fold"}
ALLOWED["train.data"] = {"errors", "system.os_errors"}
ALLOWED["train.tuner"] = {"errors", "system.os_errors", "method", "adapter"}
ALLOWED["client"] = FOUNDATION | {"adapter", "train.tuner"}
ALLOWED["train"] = ALLOWED["adapter"] | {
    *("adapter", "client", "system.host_memory", "registry", "train.data", "train.tuner"),
}
ALLOWED["evaluate"] = ALLOWED["train"] | {"train", "merge"}
ALLOWED["serve"] = ALLOWED["adapter"] | {
    *(
        "adapter",
        "system.garbage_collection",
        "system.host_memory",
        "merge",
        "page_module",
        "registry",
    ),
}
ALLOWED["cli"] = ALLOWED["evaluate"] | {
    "evaluate",
    "system.garbage_collection",
    "page_module",
    "serve",
}
# It names everything public; only type checkers follow that.
ALLOWED["__init__"] = ALLOWED["cli"] | {"train", "merge", "adapter", "method", "serve", "lazy"}
# Two processes of one server: neither may import the other's room.
APART = {"serve.app": "serve.engine", "serve.engine": "serve.app"}
# Third parties that only some rooms import.
OWNERS = {
    "vllm": {"serve"},
    "fastapi": {"serve"},
    "peft": {"train", "evaluate", "merge"},
    "gradio": {"demo"},
}


def _imports(source: str, package: tuple[str, ...]) -> set[str]:
    """Absolute dotted names that a source imports, at any depth of nesting."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            stem = ".".join([*above, *([node.module] if node.module else [])])
            found |= {f"{stem}.{alias.name}" for alias in node.names}
    return found


def _faults(room: str, file: Path) -> list[str]:
    return [
        f"{file.relative_to(ROOT)} ({room}) imports {name}"
        for name in sorted(_imports(file.read_text("utf-8"), file.relative_to(ROOT).parts[:-1]))
        if _forbidden(room, name)
    ]


def _forbidden(room: str, name: str) -> bool:
    top, *rest = name.split(".")
    if top != "secura_serve":
        outer = room.split(".")[0]
        return outer not in OWNERS.get(top, {outer})
    target = _room(rest)
    if room == "demo":
        # The page talks HTTP; it shares how a command line is read and a failure told.
        return target not in FOUNDATION
    return target not in (None, room) and not any(
        target == entry
        or (str(target).startswith(f"{entry}.") and not room.startswith(f"{entry}."))
        for entry in ALLOWED[room]
    )


def _room(parts: Sequence[str]) -> str | None:
    """The innermost room with a line that holds a dotted path below the package."""
    stems = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
    return next((stem for stem in stems if stem in ALLOWED), None)


def test_every_import_follows_the_arrows() -> None:
    faults: list[str] = []
    for file in sorted((ROOT / "secura_serve").rglob("*.py")):
        parts = file.relative_to(ROOT / "secura_serve").with_suffix("").parts
        if (room := _room(parts)) is None:
            faults.append(f"{file.relative_to(ROOT)}: give the room {parts[0]!r} a line in ALLOWED")
            continue
        faults += _faults(room, file)
    for file in sorted((ROOT / "demo").rglob("*.py")):
        faults += _faults("demo", file)
    assert not faults, "\n".join(faults)


def test_the_lines_are_rooms_and_form_no_circle() -> None:
    for room, allowed in ALLOWED.items():
        path = ROOT / "secura_serve" / room.replace(".", "/")
        assert path.is_dir() or path.with_suffix(".py").is_file(), f"there is no room {room!r}"
        assert allowed <= ALLOWED.keys(), f"{room}: {sorted(allowed - ALLOWED.keys())}"
    # A room is done when all that it may import is: what is never done is in a circle.
    done: set[str] = set()
    while ready := {r for r in ALLOWED.keys() - done if ALLOWED[r] <= done}:
        done |= ready
    assert not (circle := sorted(ALLOWED.keys() - done)), circle


def _without_type_checking(source: str) -> str:
    """A source without what only type checkers import: such a name can be in a circle, as the
    settings of a run and the list of methods that take them are."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = [ast.Pass()]
    return ast.unparse(tree)


def test_no_files_import_each_other_in_a_circle() -> None:
    # An __init__ gathers the names of its room, so that a file's way to it says nothing.
    files = {
        ".".join(file.relative_to(ROOT).with_suffix("").parts): file
        for file in (ROOT / "secura_serve").rglob("*.py")
        if file.name != "__init__.py"
    }
    left = {
        name: {
            stem
            for found in _imports(
                _without_type_checking(file.read_text("utf-8")), tuple(name.split(".")[:-1])
            )
            if (stem := found if found in files else found.rpartition(".")[0]) in files
        }
        for name, file in files.items()
    }
    # What knows none of the others, or what none of them knows, is in no circle.
    while done := {
        name
        for name, known in left.items()
        if not known & left.keys() or not any(name in others for others in left.values())
    }:
        left = {name: known for name, known in left.items() if name not in done}
    assert not left, {name: sorted(known & left.keys()) for name, known in left.items()}


def test_sub_rooms_know_what_their_lines_say() -> None:
    assert not _forbidden("merge", "secura_serve.merge.io.layout.Shard")
    assert _forbidden("merge.io", "secura_serve.merge.plan")
    assert _forbidden("merge.io", "secura_serve.method.MagNorm")
    assert _forbidden("method.native", "secura_serve.method.modes.none")
    assert not _forbidden("merge", "secura_serve.method.modes.none")
    assert not _forbidden("method.modes", "secura_serve.method.native.FORMS")
    assert _forbidden("method.modes", "secura_serve.method.magnorm")


def test_the_servers_process_and_vllms_workers_stay_apart() -> None:
    faults = [
        f"{file.relative_to(ROOT)} imports {name}"
        for room, other in APART.items()
        for file in sorted((ROOT / "secura_serve" / room.replace(".", "/")).rglob("*.py"))
        for name in _imports(file.read_text("utf-8"), file.relative_to(ROOT).parts[:-1])
        if f"{name}.".startswith(f"secura_serve.{other}.")
    ]
    assert not faults, "\n".join(faults)


def test_the_walk_sees_nested_and_relative_imports() -> None:
    source = "def f():\n  from ..serve import swap\n  from .. import train\n  import vllm.lora"
    found = _imports(source, ("secura_serve", "merge"))
    assert found == {"secura_serve.serve.swap", "secura_serve.train", "vllm.lora"}
    assert all(_forbidden("merge", name) for name in found)
    assert _forbidden("demo", "secura_serve.adapter.load") and _forbidden("cli", "gradio")
    assert not _forbidden("demo", "secura_serve.command.run_command")
    assert not _forbidden("serve", "secura_serve.merge.plan")
