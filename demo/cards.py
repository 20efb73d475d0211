"""Answers as HTML cards, and the page's style: no script, no font or file from elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from .answer import Answer

LABELS = {"waiting": "waiting", "streaming": "writing", "done": "done", "stopped": "stopped"}

CSS = """
:root { --quiet: var(--neutral-500); }
.dark { --quiet: var(--neutral-400); }
.gradio-container { width: 100%; max-width: 1680px !important; margin: 0 auto !important; }
#title h1 { font-size: 1.35rem; margin: 0; letter-spacing: -.01em; }
#title p { margin: .15rem 0 0; color: var(--quiet); }
#head { align-items: center; }
#status p { margin: 0; font-size: .9rem; text-align: right; color: var(--quiet); }
#status p::before { content: ""; display: inline-block; width: .6em; height: .6em;
  margin-right: .5em; border-radius: 50%; background: #16a34a; }
#status p.down { color: var(--error-text-color); }
#status p.down::before { background: currentColor; }
#models .wrap { max-height: 9.5rem; overflow-y: auto; }
#ask { align-items: end; }
#answers .html-container { padding: 0; }
#answers .grid { --gap: .9rem; display: grid; gap: var(--gap); grid-template-columns: repeat(
  auto-fit, minmax(max(15rem, (100% - (var(--columns) - 1) * var(--gap)) / var(--columns)), 1fr)); }
#answers article { display: flex; flex-direction: column; min-width: 0; min-height: 11rem;
  background: var(--block-background-fill); border: 1px solid var(--border-color-primary);
  border-radius: 8px; box-shadow: inset 0 3px var(--neutral-400); }
#answers article.adapter { box-shadow: inset 0 3px var(--primary-500); }
#answers article[data-state=failed] { box-shadow: inset 0 3px #dc2626; }
#answers header { display: flex; gap: .5rem; align-items: baseline; padding: .75rem .9rem .4rem; }
#answers h2 { margin: 0; font-size: 1rem; font-weight: 600; overflow-wrap: anywhere; flex: 1; }
#answers .kind, #answers .state { font-size: .75rem; color: var(--quiet); }
#answers .text { flex: 1; padding: 0 .9rem .6rem; white-space: pre-wrap; overflow-wrap: anywhere;
  line-height: 1.55; font-size: .95rem; }
#answers article[data-state=streaming] .text::after { content: "\\258d"; opacity: .55; }
#answers .text:empty { flex: 0; padding: 0; }
#answers .text:empty + .error { flex: 1; }
#answers .error { margin: 0 .9rem .8rem; font-size: .9rem; color: #b91c1c; }
.dark #answers .error { color: #fca5a5; }
#answers dl { display: flex; flex-wrap: wrap; gap: .15rem 1.1rem; margin: 0; padding: .5rem .9rem;
  border-top: 1px solid var(--border-color-primary); font-size: .8rem;
  font-variant-numeric: tabular-nums; }
#answers dl div { display: flex; gap: .35em; align-items: baseline; }
#answers dt { order: 1; color: var(--quiet); }
#answers dd { margin: 0; font-weight: 600; }
#answers .hint { padding: 2.2rem; text-align: center; color: var(--quiet);
  border: 1px dashed var(--border-color-primary); border-radius: 8px; }
"""


def status(text: str, up: bool) -> str:
    return f'<p class="{"up" if up else "down"}" role="status">{escape(text)}</p>'


def hint(text: str) -> str:
    return f'<div class="hint">{escape(text)}</div>'


def cards(answers: Sequence[Answer], adapters: Sequence[str]) -> str:
    """Return one card per answer, escaped: HTML that a model writes is shown as text."""
    # Five or six in one row are too narrow to read: two rows of three.
    columns = len(answers) if len(answers) <= 4 else 3
    inside = "".join(_card(answer, answer.model in adapters) for answer in answers)
    return f'<div class="grid" style="--columns: {columns}">{inside}</div>'


def _card(answer: Answer, adapter: bool) -> str:
    name, kind = escape(answer.model), "adapter" if adapter else "base"
    rate, first = answer.tokens_per_s, answer.first_token_s
    figures = [
        ("tokens/s", "–" if rate is None else f"{rate:.1f}"),
        ("ms to first token", "–" if first is None else f"{first * 1000:.0f}"),
        ("token" if answer.tokens == 1 else "tokens", str(answer.tokens)),
    ]
    return (
        f'<article class="{kind}" data-model="{name}" data-state="{answer.state}"'
        f' aria-label="Answer of {name}" aria-busy="{str(not answer.finished).lower()}">'
        f'<header><h2>{name}</h2><span class="kind">{kind}</span>'
        f'<span class="state">{LABELS.get(answer.state, "failed")}</span></header>'
        f'<div class="text">{escape(answer.text)}</div>'
        + (f'<p class="error" role="alert">{escape(answer.error)}</p>' if answer.error else "")
        + "<dl>"
        + "".join(f"<div><dt>{what}</dt><dd>{value}</dd></div>" for what, value in figures)
        + "</dl></article>"
    )
