"""The one frame of all tables of the page: it scrolls by itself, and the keyboard reaches it."""

from __future__ import annotations

from html import escape

__all__ = ["figure_table"]


def figure_table(label: str, heads: str, rows: str, *, caption: str = "", kind: str = "") -> str:
    """Return a table as HTML.

    Args:
        label: what screen readers call it, as text.
        heads: the cells of its first row, as HTML.
        rows: the other rows, as HTML.
        caption: as HTML.
        kind: a class more.
    """
    names = f"figure-table {kind}".strip()
    told = f"<caption>{caption}</caption>" if caption else ""
    return (
        f'<div class="{names}" tabindex="0" role="region" aria-label="{escape(label)}"><table>'
        f"{told}<thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>"
    )
