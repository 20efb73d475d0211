"""Proves that a run without --dtype takes the one that the machine is faster with, and keeps it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest

from secura_serve.train import dtype
from secura_serve.train.settings import TrainConfig

XEON = "flags\t\t: fpu sse2 avx2 avx512f avx512_bf16 avx512_fp16"
NEEDED = {"base": "b", "data": "d", "out": "o", "device": "cpu"}


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (XEON, "float32"),
        (f"{XEON} amx_bf16 amx_tile", "bfloat16"),
        (f"vendor_id\t: AuthenticAMD\n{XEON}", "bfloat16"),
        ("vendor_id\t: AuthenticAMD\nflags\t\t: fpu avx2", "float32"),
        ("Features\t: fp asimd bf16", "bfloat16"),
        ("Features\t: fp asimd", "float32"),
        (None, "float32"),
    ],
)
def test_matrix_instructions_decide(
    words: str | None, wanted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dtype, "CPU_INFO", tmp_path / "cpuinfo")
    if words is not None:
        (tmp_path / "cpuinfo").write_text(words)
    config = TrainConfig(**NEEDED)
    assert config.dtype == asdict(config)["dtype"] == wanted
    # Its dtype is that of the checkpoint which is written.
    assert TrainConfig(**NEEDED, method="full").dtype == "bfloat16"
    assert TrainConfig(**NEEDED, dtype="float16").dtype == "float16"
