"""Proves that imports follow the arrows of the design: a room only knows the rooms before it.

Needs nothing but the sources: they are parsed, not imported.
"""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOUNDATION = {"errors", "config", "lazy"}
ALLOWED: dict[str, set[str]] = {
    "__init__": {"lazy"},
    "errors": set(),
    "lazy": set(),
    "config": {"errors"},
    "bases": FOUNDATION,
    "checkpoint": FOUNDATION,
    "accuracy_matrix": FOUNDATION,
    "compiled": set(),
    "method": FOUNDATION | {"compiled"},
    "adapter": FOUNDATION | {"bases", "checkpoint", "compiled", "method"},
}
ALLOWED["merge"] = ALLOWED["adapter"] | {"adapter"}
ALLOWED["train"] = ALLOWED["merge"] | {"accuracy_matrix"}
ALLOWED["evaluate"] = ALLOWED["train"] | {"train", "merge"}
ALLOWED["serve"] = ALLOWED["merge"] | {"merge"}
ALLOWED["cli"] = ALLOWED["evaluate"] | {"evaluate", "serve"}
# Two processes of one server: neither may import the other's room.
APART = {"serve.app": "serve.engine", "serve.engine": "serve.app"}
# Third parties that one room keeps to itself.
OWNERS = {"vllm": "serve", "fastapi": "serve", "peft": "train", "gradio": "demo"}


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
        return OWNERS.get(top, room) != room
    if room == "demo":
        return True
    return bool(rest) and rest[0] in ALLOWED and rest[0] not in ALLOWED[room] | {room}


def test_every_import_follows_the_arrows() -> None:
    faults: list[str] = []
    for file in sorted((ROOT / "secura_serve").rglob("*.py")):
        room = file.relative_to(ROOT / "secura_serve").with_suffix("").parts[0]
        if room not in ALLOWED:
            faults.append(f"{file.relative_to(ROOT)}: give the room {room!r} a line in ALLOWED")
            continue
        faults += _faults(room, file)
    for file in sorted((ROOT / "demo").rglob("*.py")):
        faults += _faults("demo", file)
    assert not faults, "\n".join(faults)


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
    assert _forbidden("demo", "secura_serve.errors") and _forbidden("cli", "gradio")
    assert not _forbidden("serve", "secura_serve.merge.plan")
