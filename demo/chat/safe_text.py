"""Text of a model or a stranger as Markdown that holds no HTML.

Gradio's Chatbot sanitises what it shows: no script runs, whatever a model writes. Markup that
survives it could still lay something over the page or rename its parts, and the reader would not
see what the model said. So ``<`` opens no tag here: a word joiner stands behind it, which is
invisible and which HTML takes for text. An image becomes a link alike: the browser would ask for
it at the address that the model wrote. Gradio draws code in ``mermaid``, and puts it into the page
as markup for that: it stays code.

Fenced code is left as it is, so that it can be copied, but only where no reading of Markdown can
take it for anything else: the fence stands at the margin, behind no definition of a link.
"""

from __future__ import annotations

import re

__all__ = ["JOINER", "safe_text", "without_joiners"]

JOINER = "\u2060"
_TAG = re.compile(r"<(?=[A-Za-z/!?])")
_IMAGE = re.compile(r"!(?=\[)")
_DRAWN = re.compile(r"```(?=mermaid)")
_LINE_END = re.compile(r"\r\n?")
_FENCE = re.compile(r"(`{3,})[^`]*|(~{3,}).*")


def safe_text(text: str) -> str:
    """Return Markdown in which nothing is HTML and nothing is fetched from elsewhere."""
    shown, fence, defining = [], "", False
    for line in _LINE_END.sub("\n", text).split("\n"):
        if fence:
            end = line.strip()
            shown.append(line)
            # marked lets any of both marks follow.
            if end.startswith(fence) and set(end) <= {"`", "~"}:
                fence = ""
            continue
        defining = bool(line.strip()) and (defining or "]:" in line)
        if not defining and (match := _FENCE.fullmatch(line)):
            fence = match[1] or match[2]
        plain = _IMAGE.sub(f"!{JOINER}", _TAG.sub(f"<{JOINER}", line))
        shown.append(_DRAWN.sub(f"```{JOINER}", plain))
    return "\n".join(shown)


def without_joiners(text: str) -> str:
    """Return a text that was shown and edited as it was before it was made safe."""
    for mark, behind in (("<", ""), ("!", "["), ("```", "mermaid")):
        text = text.replace(f"{mark}{JOINER}{behind}", mark + behind)
    return text
