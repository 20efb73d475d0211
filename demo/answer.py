"""What one model has said so far, how fast, and how that reads in a terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest


@dataclass
class Answer:
    """What one model has said so far. `state`: waiting, streaming, done, stopped or failed."""

    model: str
    text: str = ""
    tokens: int = 0
    first_token_s: float | None = None
    tokens_per_s: float | None = None
    error: str | None = None
    state: str = "waiting"
    limited: bool = False
    """It ended because it may not be longer."""

    @property
    def finished(self) -> bool:
        return self.state in ("done", "stopped", "failed")


def summary(answer: Answer) -> str:
    """Return `42 tokens | 31.5 tokens/s | first token 120 ms`, as far as they are known."""
    parts = [f"{answer.tokens} token{'' if answer.tokens == 1 else 's'}"]
    if answer.tokens_per_s is not None:
        parts.append(f"{answer.tokens_per_s:.1f} tokens/s")
    if answer.first_token_s is not None:
        parts.append(f"first token {answer.first_token_s * 1000:.0f} ms")
    if answer.limited:
        parts.append("ends at the limit")
    return " | ".join(parts)


def render(answers: Sequence[Answer], width: int) -> str:
    """Return the answers side by side, or one after another where columns would be under 36."""
    column = (width - 3 * (len(answers) - 1)) // len(answers)
    if column < 36:
        return "\n\n\n".join("\n".join(_lines(answer, width)) for answer in answers)
    rows = zip_longest(*(_lines(answer, column) for answer in answers), fillvalue="")
    return "\n".join(" | ".join(cell.ljust(column) for cell in row).rstrip() for row in rows)


def _lines(answer: Answer, width: int) -> list[str]:
    text = "\n".join(filter(None, [answer.text, answer.error and f"[{answer.error}]"]))
    # A model's words must not steer the terminal.
    safe = "".join(c if c.isprintable() or c == "\n" else " " for c in text)
    body = [part for line in safe.split("\n") for part in textwrap.wrap(line, width) or [""]]
    return [answer.model, "-" * width, *body, "", *textwrap.wrap(summary(answer), width)]
