"""Proves that ``make bench-gpu`` runs where there is no vLLM, no BLAKE3 and no network, keeps the
parts of earlier runs, and refuses a machine without a GPU.

Needs the package ``triton``; tiny shapes in its interpreter, where the numbers mean nothing.
"""

from __future__ import annotations

import json
import os
import subprocess

import pytest

from tests.support import ROOT, warm

pytest.importorskip("triton", reason="no triton package")

ABSENT = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("vllm", "blake3", "fastapi", "httpx", "pytest"):
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Absent())
"""


def _bench(tmp_path, *flags):
    (tmp_path / "sitecustomize.py").write_text(ABSENT)
    env = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "CUDA_VISIBLE_DEVICES": ""}
    command = [warm.python(), "-m", "benchmarks.gpu", "--out", str(tmp_path / "gpu.json"), *flags]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)


@pytest.mark.long
def test_the_parts_run_and_are_kept(tmp_path):
    for part in ("step", "fold", "serve"):
        done = _bench(tmp_path, "--rehearse", "--parts", part)
        assert done.returncode == 0, done.stderr[-2000:]
    parts = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert set(parts) == {"step", "fold", "serve"}
    assert all(part["status"] == 0 and part["rows"] for part in parts.values())
    assert parts["step"]["rows"][0]["lora_needs"]["launches"] == 2
    assert all(
        ("step_in_activation_us" in r) == (r["linear"] == "gate_up") for r in parts["step"]["rows"]
    )
    assert parts["fold"]["rows"][0]["fold_gb_per_s"] >= 0


@pytest.mark.long
def test_a_part_whose_time_is_over_keeps_its_rows_and_leaves_no_process(tmp_path):
    done = _bench(tmp_path, "--rehearse", "--parts", "fold", "--minutes", "0.01")
    assert done.returncode == 0, done.stderr[-2000:]
    part = json.loads((tmp_path / "gpu.json").read_text())["parts"]["fold"]
    assert part["status"] == "time was over" and part["seconds"] < 30


def test_a_machine_without_a_gpu_is_refused(tmp_path):
    done = _bench(tmp_path)
    assert done.returncode == 1 and "--rehearse tries the command on a CPU" in done.stderr
