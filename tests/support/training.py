"""Data and command lines for secura-train on the tiny bases of conftest.py."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.support import ROOT, warm

PAIRS = [
    {"prompt": f"What is {a} plus {b}?", "completion": f"{a + b}"}
    for a in range(1, 5)
    for b in range(1, 5)
]


def write(file: Path, rows: list[Any]) -> Path:
    """A JSONL file."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def flags(base: Path, data: Path, out: Path, *more: str) -> list[str]:
    """A short float32 run; ``more`` adds flags or repeats them with other values.

    In plain coordinates: for natural ones each base would have to write text first.
    """
    return [
        *("--base", str(base), "--data", str(data), "--out", str(out), "--rank", "8"),
        *("--dtype", "float32", "--device", "cpu", "--learning-rate", "0.03"),
        *("--per-device-train-batch-size", "4"),
        *("--eval-split", "0.25", "--max-steps", "6", "--coordinates", "plain"),
        *more,
    ]


def command(*argv: str) -> list[str]:
    """secura-train as a process of its own."""
    return [warm.python(), "-m", "secura_serve.train.main", *argv]


def environment() -> dict[str, str]:
    """As many threads as here, so that two runs add up in the same order."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONPATH": path}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder's one safetensors file."""
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


def same(left: Path, right: Path) -> bool:
    """Whether two folders hold the same tensors to the last bit."""
    a, b = tensors(left), tensors(right)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
