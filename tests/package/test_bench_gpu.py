"""Proves that ``make bench-gpu`` runs where there is no vLLM, no BLAKE3 and no network, keeps the
parts of earlier runs, and refuses a machine without a GPU.

Needs the package ``triton``; tiny shapes in its interpreter, where the numbers mean nothing.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import psutil
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
    assert {"linear_then_step_us", "linear_and_step_us"} <= parts["step"]["rows"][0].keys()
    assert parts["fold"]["rows"][0]["fold_gb_per_s"] >= 0
    # What was rehearsed is not mixed with what was measured, and a part whose time is over before
    # its first row leaves the earlier one.
    done = _bench(tmp_path, "--rehearse", "--parts", "fold", "--minutes", "0.001")
    kept = json.loads((tmp_path / "gpu.json").read_text())
    assert done.returncode == 0 and kept["rehearsal"] and kept["parts"]["fold"] == parts["fold"]
    (tmp_path / "gpu.json").write_text(json.dumps({"parts": parts}))
    done = _bench(tmp_path, "--rehearse", "--parts", "fold")
    assert done.returncode == 1 and "holds measurements, which this run would mix" in done.stderr


@pytest.mark.long
def test_a_part_whose_time_is_over_keeps_its_rows_and_leaves_no_process(tmp_path):
    done = _bench(tmp_path, "--rehearse", "--parts", "fold", "--minutes", "0.01")
    assert done.returncode == 0, done.stderr[-2000:]
    part = json.loads((tmp_path / "gpu.json").read_text())["parts"]["fold"]
    assert part["status"] == "time was over" and part["seconds"] < 30


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--minutes", "0"), "0 minutes; must be more than 0"),
        (("--rehearse",), "is not a report of this command"),
    ],
)
def test_what_cannot_be_meant_is_refused(tmp_path, flags, said):
    (tmp_path / "gpu.json").write_text("nonsense")
    done = _bench(tmp_path, *flags)
    assert done.returncode in (1, 2) and said in done.stderr
    assert (tmp_path / "gpu.json").read_text() == "nonsense"


@pytest.mark.long
def test_a_stop_from_outside_leaves_no_process(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(ABSENT)
    env = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "benchmarks.gpu", "--out", str(tmp_path / "gpu.json")]
    run = psutil.Popen([*command, "--rehearse", "--parts", "kernels"], cwd=ROOT, env=env)
    while not (parts := run.children()):
        time.sleep(0.1)
    run.terminate()
    assert run.wait(20) == 143
    assert psutil.wait_procs(parts, timeout=5)[1] == []


def test_the_model_and_its_page_are_those_of_the_launches():
    from benchmarks.gpu_model import overhead

    file = json.loads((ROOT / "benchmarks/results/gpu_model.json").read_text())
    page = (ROOT / "docs/gpu.md").read_text()
    for tokens, most in ((1, 0.07), (8, 0.07), (16, 0.07), (64, 0.07), (256, 0.10)):
        made = overhead(32, tokens, tokens)
        assert made in file["steps"], "run python -m benchmarks.gpu_model"
        assert made["of_launches_and_bytes"][1] <= most and made["launches_after"] == 96
        shown = [f"{100 * low:.1f}–{100 * high:.1f} %" for low, high in (
            made["of_launches_and_bytes"], made["overhead"])]  # fmt: skip
        row = next(
            line for line in page.splitlines() if line.startswith(f"| 32 | {tokens} | {tokens} |")
        )
        assert all(value in row for value in shown), row
    assert file["launches_without_adapters"] == 0


def test_a_machine_without_a_gpu_is_refused(tmp_path):
    done = _bench(tmp_path)
    assert done.returncode == 1 and "--rehearse tries the command on a CPU" in done.stderr
