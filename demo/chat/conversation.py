"""What one column has been asked and has answered."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..answer import Answer
from .safe_text import safe_text

__all__ = ["Conversation", "Turn"]


@dataclass
class Turn:
    prompt: str
    answer: Answer


@dataclass
class Conversation:
    """The turns of one column; those to come are asked of `model`."""

    turns: list[Turn] = field(default_factory=list)

    def ask(self, model: str, prompt: str) -> Answer:
        """Add a turn and return its answer, which is empty so far."""
        self.turns.append(Turn(prompt, Answer(model)))
        return self.turns[-1].answer

    def messages(self, system: str) -> list[dict[str, str]]:
        """Return what is sent for the last turn; earlier ones without an answer are left out."""
        sent = [{"role": "system", "content": system}] if system else []
        for turn in self.turns[:-1]:
            if turn.answer.text:
                sent += [_message("user", turn.prompt), _message("assistant", turn.answer.text)]
        return [*sent, *(_message("user", turn.prompt) for turn in self.turns[-1:])]

    def shown(self) -> list[Mapping[str, str]]:
        """Return two messages for each turn, as Markdown without HTML."""
        messages: list[Mapping[str, str]] = []
        for turn in self.turns:
            messages.append(_message("user", safe_text(turn.prompt)))
            messages.append(_message("assistant", _shown(turn.answer)))
        return messages

    def cut(self, message: int) -> Turn | None:
        """Drop the turn of that message and all later ones, and return it."""
        turn = self.turns[message // 2] if message // 2 < len(self.turns) else None
        del self.turns[message // 2 :]
        return turn


def _shown(answer: Answer) -> str:
    """Return an answer with what became of it, where that is not plain."""
    text = safe_text(answer.text)
    if answer.error is not None:
        said = "This answer broke off." if text else "No answer."
        if text.count("```") % 2:
            text += "\n```"  # Else the reason would be part of the code.
        reason = safe_text(" ".join(answer.error.split()))
        return "\n\n".join(filter(None, [text, f"**{said}** {reason}"]))
    if text:
        return text
    return {"waiting": "…", "streaming": "…", "stopped": "*(stopped before its first word)*"}.get(
        answer.state, "*(an empty answer)*"
    )


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}
