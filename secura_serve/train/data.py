"""Training data: JSONL files into token ids with labels on the answer alone.

One object per line, ``{"messages": [{"role", "content"}, ...]}`` that ends with the assistant,
or ``{"prompt": ..., "completion": ...}``. Both go through the model's own chat template; a model
without one gets prompt and completion joined as they are.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secura_serve.errors import DataError

__all__ = ["Collator", "Record", "Rows", "digest", "encode", "prompt_ids", "read_jsonl"]

IGNORE = -100
Rows = list[dict[str, list[int]]]
_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Record:
    """One example: the messages before the answer, the answer, and where it stood."""

    messages: tuple[dict[str, str], ...]
    answer: str
    where: str


def digest(path: str | Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def read_jsonl(path: str | Path) -> list[Record]:
    """Read and check a data file.

    Raises:
        DataError: naming file, line and field of every fault (the first 20 of them).
    """
    file = Path(path)
    try:
        content = file.read_bytes()
        lines = content.decode("utf-8").splitlines()
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        at = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{file.name}:{at}: not UTF-8 text: {error}") from error
    records, problems = [], []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{file.name}:{number}"
        try:
            records.append(_record(json.loads(line), where))
        except (ValueError, RecursionError) as error:
            problems.append(str(error) if isinstance(error, DataError) else f"{where}: {error}")
    if problems:
        raise DataError(f"{file} cannot be used:", problems)
    if not records:
        raise DataError(f"{file}: no examples; write one JSON object per line")
    return records


def _record(raw: Any, where: str) -> Record:
    if not isinstance(raw, dict):
        raise DataError(f"{where}: must be a JSON object, got {type(raw).__name__}")
    if "messages" not in raw:
        for field in ("prompt", "completion"):
            if not isinstance(raw.get(field), str) or not raw[field].strip():
                raise DataError(
                    f"{where}: field {field!r} must be a non-empty string, "
                    f"got {raw.get(field)!r:.60}"
                )
        return Record(({"role": "user", "content": raw["prompt"]},), raw["completion"], where)
    messages = raw["messages"]
    if not isinstance(messages, list) or len(messages) < 2:
        raise DataError(f"{where}: field 'messages' must be a list of at least two messages")
    for i, message in enumerate(messages):
        name = f"messages[{i}]"
        if not isinstance(message, dict) or message.get("role") not in _ROLES:
            raise DataError(f"{where}: field '{name}.role' must be one of {', '.join(_ROLES)}")
        if not isinstance(message.get("content"), str) or not message["content"].strip():
            raise DataError(f"{where}: field '{name}.content' must be a non-empty string")
    if messages[-1]["role"] != "assistant":
        raise DataError(f"{where}: field 'messages' must end with the assistant's answer")
    turns = tuple({"role": m["role"], "content": m["content"]} for m in messages)
    return Record(turns[:-1], turns[-1]["content"], where)


def _template(tokenizer: Any, messages: Sequence[dict[str, str]], prompt: bool) -> list[int]:
    ids: list[int] = tokenizer.apply_chat_template(
        list(messages), add_generation_prompt=prompt, tokenize=True, return_dict=False
    )
    return ids


def prompt_ids(tokenizer: Any, messages: Sequence[dict[str, str]]) -> list[int]:
    """Token ids of a prompt, up to where the assistant begins to answer."""
    if tokenizer.chat_template:
        return _template(tokenizer, messages, prompt=True)
    ids: list[int] = tokenizer("\n".join(m["content"] for m in messages))["input_ids"]
    return ids


def encode(records: Sequence[Record], tokenizer: Any, max_length: int) -> Rows:
    """``input_ids`` and ``labels`` (−100 outside the answer) for each record.

    The labels end with the end-of-sequence token: what a template puts after it is never
    generated, so it is cut off.

    Raises:
        DataError: an example is longer than ``max_length``, or the template changes the prompt
            once the answer follows.
    """
    rows: Rows = []
    problems = []
    for record in records:
        prompt = prompt_ids(tokenizer, record.messages)
        if tokenizer.chat_template:
            answer = {"role": "assistant", "content": record.answer}
            full = _template(tokenizer, [*record.messages, answer], prompt=False)
            if full[: len(prompt)] != prompt:
                problems.append(f"{record.where}: the chat template rewrites the prompt")
                continue
        else:
            tail = tokenizer(record.answer, add_special_tokens=False)["input_ids"]
            full = [*prompt, *tail, tokenizer.eos_token_id]
        eos = tokenizer.eos_token_id
        if eos in full[len(prompt) :]:
            full = full[: len(full) - full[::-1].index(eos)]
        if len(full) > max_length:
            problems.append(f"{record.where}: {len(full)} tokens, --max-length is {max_length}")
            continue
        labels = [IGNORE] * len(prompt) + full[len(prompt) :]
        rows.append({"input_ids": full, "labels": labels})
    if problems:
        raise DataError("examples cannot be used:", problems)
    return rows


@dataclass(frozen=True)
class Collator:
    """Pads a batch on the left, so that all answers end at the last column.

    Then the output layer is needed on the last few columns alone: with a large vocabulary it is
    a good part of a small model's work.
    """

    pad: int

    def __call__(self, rows: Sequence[dict[str, list[int]]]) -> dict[str, Tensor]:
        """``input_ids``, ``labels``, ``attention_mask``, ``position_ids``: int64 (batch, width)."""
        width = max(len(row["input_ids"]) for row in rows)
        ids = torch.full((len(rows), width), self.pad)
        labels = torch.full((len(rows), width), IGNORE)
        mask = torch.zeros(len(rows), width, dtype=torch.int64)
        for i, row in enumerate(rows):
            n = len(row["input_ids"])
            ids[i, width - n :] = torch.tensor(row["input_ids"])
            labels[i, width - n :] = torch.tensor(row["labels"])
            mask[i, width - n :] = 1
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        return {
            "input_ids": ids,
            "labels": labels,
            "attention_mask": mask,
            "position_ids": positions,
        }
