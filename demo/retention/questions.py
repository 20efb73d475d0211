"""Questions of general knowledge, which no adapter of one task should forget."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from ..answer import Answer
from ..figure_table import figure_table

__all__ = ["QUESTIONS", "right", "table"]

QUESTIONS = (
    ("What is the capital of France?", "Paris"),
    ("What is the capital of Japan?", "Tokyo"),
    ("What is the capital of Italy?", "Rome"),
    ("What is the capital of Egypt?", "Cairo"),
    ("What is the capital of Germany?", "Berlin"),
    ("What is the capital of Canada?", "Ottawa"),
    ("What is the currency of Japan?", "yen"),
    ("What is the currency of India?", "rupee"),
    ("What is the largest planet of the solar system?", "Jupiter"),
    ("How many days has a week?", "seven|7"),
    ("At what temperature in degrees Celsius does water boil at sea level?", "100"),
    ("Who wrote Romeo and Juliet?", "Shakespeare"),
)


def right(answer: str, wanted: str) -> bool:
    """Return whether an answer names what is wanted, or one of its spellings."""
    return any(each.lower() in answer.lower() for each in wanted.split("|"))


def table(base: Sequence[Answer], adapter: Sequence[Answer]) -> str:
    """Return question by question what both say, and how much is kept."""
    rows = "".join(
        f"<tr><th scope=row>{escape(question)}</th>{_cell(a, wanted)}{_cell(b, wanted)}"
        f"<td>{_same(a, b)}</td></tr>"
        for (question, wanted), a, b in zip(QUESTIONS, base, adapter, strict=True)
    )
    heads = "".join(
        f"<th scope=col>{escape(head)}</th>"
        for head in ("question", base[0].model, adapter[0].model, "same words")
    )
    failed = next((answer.error for answer in [*base, *adapter] if answer.error), None)
    alert = f'<p role="alert" class="error">{escape(failed)}</p>' if failed else ""
    caption = _summary(base, adapter)
    label = "Answers to general questions"
    return alert + figure_table(label, heads, rows, caption=caption, kind="wide")


def _cell(answer: Answer, wanted: str) -> str:
    mark = (" ✓" if right(answer.text, wanted) else " ✗") if answer.state == "done" else ""
    return f"<td>{escape(answer.text) or '…'}{mark}</td>"


def _same(base: Answer, adapter: Answer) -> str:
    if not (base.state == adapter.state == "done"):
        return ""
    return "yes" if base.text.split() == adapter.text.split() else "no"


def _summary(base: Sequence[Answer], adapter: Sequence[Answer]) -> str:
    pairs = [
        (a, b, wanted)
        for (_, wanted), a, b in zip(QUESTIONS, base, adapter, strict=True)
        if a.state == b.state == "done"
    ]
    same = sum(a.text.split() == b.text.split() for a, b, _ in pairs)
    known = [(b, wanted) for a, b, wanted in pairs if right(a.text, wanted)]
    still = sum(right(b.text, wanted) for b, wanted in known)
    return (
        f"{len(pairs)} of {len(QUESTIONS)} answered: {same} in the base's words; of the "
        f"{len(known)} that the base gets right, {still} still right"
    )
