"""Example prompts: those that the page is started with."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from secura_serve.system.os_errors import reason

from .endpoint import encodable

__all__ = ["ANY", "Examples", "read_examples"]

ANY = ""
"""The name under which an example belongs to no adapter and leaves the models alone."""
Examples = Mapping[str, Sequence[Mapping[str, str]]]
USUAL: Examples = {
    ANY: [
        {"prompt": "What is the capital of France?"},
        {"prompt": "Explain in two sentences why the sky is blue."},
        {"prompt": "Write a Python function that reverses a string."},
    ]
}


def read_examples(path: str | None) -> Examples:
    """Return `{adapter: [{"prompt": ..., "system": optional}]}`. Raises ValueError if malformed."""
    if path is None:
        return USUAL
    try:
        text = Path(path).read_text(encoding="utf-8")
        whole = encodable(json.dumps(json.loads(text), ensure_ascii=False))
        examples_by_adapter = json.loads(whole)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"cannot read {path} as JSON: {reason(error)}") from error
    shape = f'{path} should be {{"adapter": [{{"prompt": "...", "system": "optional"}}]}}'
    if not isinstance(examples_by_adapter, dict):
        raise ValueError(shape)
    for name, examples in examples_by_adapter.items():
        for example in examples if isinstance(examples, list) else [None]:
            known = isinstance(example, dict) and "prompt" in example
            if not known or not all(isinstance(text, str) for text in example.values()):
                raise ValueError(f"{shape}; see adapter {name!r}")
    return {str(name): examples for name, examples in examples_by_adapter.items()}
