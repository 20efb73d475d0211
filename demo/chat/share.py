"""A comparison in a link, and as commands that ask the same without the page."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any
from urllib.parse import urlencode

from ..compare import Settings

__all__ = ["Shared", "as_curl", "as_python", "from_query", "to_query"]

_LONGEST = 20_000


@dataclass(frozen=True)
class Shared:
    """What a link carries; no key and no answers."""

    models: tuple[str, ...]
    prompt: str = ""
    system: str = ""
    settings: Settings = Settings()


def to_query(shared: Shared) -> str:
    """Return the query of a link; what is as usual is left out."""
    usual = asdict(Settings())
    changed = {k: v for k, v in asdict(shared.settings).items() if v != usual[k]}
    texts = {"prompt": shared.prompt, "system": shared.system}
    pairs = {"models": ",".join(shared.models), **{k: v for k, v in texts.items() if v}, **changed}
    return urlencode({k: "none" if v is None else v for k, v in pairs.items()})


def from_query(query: Mapping[str, str], columns: int) -> Shared | None:
    """Return what a link carries, or None if it carries nothing; bad numbers are as usual."""
    models = [name for name in query.get("models", "").split(",") if name.strip()][:columns]
    prompt, system = (query.get(key, "")[:_LONGEST] for key in ("prompt", "system"))
    if not models and not prompt:
        return None
    values: dict[str, Any] = {}
    for field in fields(Settings):
        try:
            kind = float if isinstance(field.default, float) else int
            value = query[field.name]
            no_seed = field.name == "seed" and value == "none"
            values[field.name] = None if no_seed else kind(value)
        except (KeyError, ValueError):
            continue
    return Shared(tuple(models), prompt, system, Settings(**values).within_limits())


def as_curl(
    endpoint: str, asks: Sequence[tuple[str, Sequence[Mapping[str, str]]]], settings: Settings
) -> str:
    """Return one command for each model."""
    commands = [
        f"curl {shlex.quote(f'{endpoint}/chat/completions')} \\\n"
        "  -H 'Content-Type: application/json' -H \"Authorization: Bearer $VLLM_API_KEY\" \\\n"
        f"  -d {shlex.quote(json.dumps(_body(model, messages, settings), ensure_ascii=False))}"
        for model, messages in asks
    ]
    return "\n\n".join(commands)


def as_python(
    endpoint: str, asks: Sequence[tuple[str, Sequence[Mapping[str, str]]]], settings: Settings
) -> str:
    """Return a program for the openai package."""
    lines = [
        "import os",
        "",
        "from openai import OpenAI",
        "",
        f"client = OpenAI(base_url={endpoint!r}, api_key=os.environ.get('VLLM_API_KEY', 'none'))",
    ]
    for model, messages in asks:
        body = _body(model, messages, settings)
        arguments = ",\n".join(f"    {key}={value!r}" for key, value in body.items())
        lines += [
            f"answer = client.chat.completions.create(\n{arguments},\n)",
            "print(answer.model, answer.choices[0].message.content, sep='\\n', end='\\n\\n')",
        ]
    return "\n".join(lines)


def _body(model: str, messages: Sequence[Mapping[str, str]], settings: Settings) -> dict[str, Any]:
    sampling = {key: value for key, value in asdict(settings).items() if value is not None}
    return {"model": model, "messages": list(messages), **sampling}
