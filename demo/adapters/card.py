"""One adapter as a card: what ``/v1/adapters`` says of it, for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any
from urllib.parse import urlencode

from .words import kept, number, recipe

__all__ = ["card", "gallery", "kind", "main_score", "size"]

SHOWN = 60
KINDS = {"cur": "CUR", "lora": "LoRA", "full": "fine-tune"}
Card = Mapping[str, Any]


def gallery(cards: Sequence[Card], bases: Sequence[str], total: int) -> str:
    """Return the cards, and how many there are; the first ones if there are many."""
    count = f"{len(cards)} of {total} adapters" if len(cards) != total else f"{total} adapters"
    if len(cards) > SHOWN:
        count += f"; the first {SHOWN} are shown: search to see others"
    inside = "".join(card(each, bases) for each in cards[:SHOWN])
    return f'<p class="count" role="status">{count}</p><div class="cards">{inside}</div>'


def card(of: Card, bases: Sequence[str]) -> str:
    """Return one card; every text of it is escaped, since adapters are made by others."""
    name, state = escape(str(of["id"])), str(of.get("state"))
    badges = [state, *(["pinned"] if of.get("pinned") else [])]
    badges += ["rolled back"] if of.get("rolled_back") else []
    marks = "".join(f'<span class="badge {escape(each)}">{escape(each)}</span>' for each in badges)
    rows = [(label, value) for label, value in _rows(of) if value]
    facts = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in rows)
    reason = f'<p class="error">{escape(str(of["reason"]))}</p>' if of.get("reason") else ""
    task = escape(_task(of))
    more = _recipe(of) + _versions(of) + _link(of, bases)
    return (
        f'<article aria-label="{name}"><header><h3>{name}</h3>{marks}</header>'
        f"<p>{task}</p>{reason}<dl>{facts}</dl>{more}</article>"
    )


def kind(of: Card) -> str:
    """Return what sort of adapter it is, with its norm."""
    norm = of.get("magnorm")
    plain = KINDS.get(str(of.get("type")), str(of.get("type") or ""))
    return f"{plain}, S-MagNorm {norm}" if norm not in (None, "none") else plain


def size(number_of_bytes: object) -> str:
    """Return `990 kB` or `39.0 MB`; empty if it is no number."""
    if not isinstance(number_of_bytes, (int, float)):
        return ""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number_of_bytes >= scale:
            return f"{number_of_bytes / scale:.3g} {unit}"
    return f"{number_of_bytes} bytes"


def main_score(of: Card) -> tuple[str, float, float | None] | None:
    """Return name, value and the base's value of the score that stands for the task."""
    scores = of.get("scores") or {}
    for name in ("accuracy", "exact_match", "score", "held_out_token_accuracy"):
        if name in scores:
            return name, scores[name], scores.get(f"base_{name}")
    return None


def _rows(of: Card) -> list[tuple[str, str]]:
    rank, best = of.get("rank"), main_score(of)
    score = ""
    if best is not None:
        score = f"{number(best[1])} {best[0].replace('_', ' ')}"
        score += f", the base {number(best[2])}" if best[2] is not None else ""
    return [
        ("score", score),
        ("the base is", kept(of.get("retention") or {})),
        ("size", _sizes(of.get("size"), of.get("lora_size"))),
        ("kind", kind(of)),
        ("rank", f"{rank} on {of.get('modules')} linears" if rank else ""),
        ("trained with", recipe(of.get("recipe") or {})),
        ("digest", str(of.get("digest") or "")[:12]),
        ("aliases", ", ".join(map(str, of.get("aliases") or []))),
        ("asked", "once it is folded" if of.get("mode") == "fold" else "per request"),
    ]


def _sizes(own: object, lora: object) -> str:
    if not (isinstance(own, (int, float)) and isinstance(lora, (int, float)) and own > 0):
        return size(own)
    return f"{size(own)}; a LoRA of this rank {size(lora)} ({number(lora / own)} times)"


def _task(of: Card) -> str:
    """Return the task without the words that lead over to an example."""
    said = str(of.get("task") or "Its card names no task.")
    return said.rpartition(". ")[0] + "." if said.endswith(":") and ". " in said else said


def _recipe(of: Card) -> str:
    rows = "".join(
        f"<div><dt>{escape(str(key).replace('_', ' '))}</dt><dd>{escape(number(value))}</dd></div>"
        for key, value in (of.get("recipe") or {}).items()
    )
    return f"<details><summary>Recipe</summary><dl>{rows}</dl></details>" if rows else ""


def _versions(of: Card) -> str:
    versions = of.get("versions") or []
    if len(versions) < 2:
        return ""
    items = "".join(
        f"<li><code>{escape(str(v.get('digest'))[:12])}</code> {escape(str(v.get('origin')))}"
        f"{' (served)' if v.get('digest') == of.get('digest') else ''}</li>"
        for v in versions
    )
    return f"<details><summary>{len(versions)} versions</summary><ul>{items}</ul></details>"


def _link(of: Card, bases: Sequence[str]) -> str:
    # While an adapter is folded no base is offered: nothing could be compared.
    if of.get("state") == "refused" or of.get("mode") == "fold" or not bases:
        return ""
    query = {"models": f"{bases[0]},{of['id']}"}
    if examples := of.get("examples"):
        query["prompt"] = str(examples[0])
    # In a tab of its own: the page that is open keeps its conversation.
    where = escape(f"?{urlencode(query)}")
    return f'<a href="{where}" target="_blank" rel="noopener">Compare with the base (new tab)</a>'
