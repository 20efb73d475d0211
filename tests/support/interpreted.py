"""Runs tests of Triton kernels in a process of their own: interpreted on the CPU, or compiled.

The interpreter has to be chosen before Triton is imported.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.support import ROOT

RELEASES = ROOT / "build" / "triton"
# The installed one at every change, the others when there is time.
OTHERS = [pytest.param(name, marks=pytest.mark.slow) for name in ("3.6.0", "3.7.1", "3.8.0")]
TRITON_RELEASES = ["", *OTHERS]


def run(code, *, interpreted):
    """Raise CalledProcessError unless the code runs to its end."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    if interpreted:
        env["TRITON_INTERPRET"] = "1"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env=env)


def compiled(code, release=""):
    """Run code under a release of Triton; "" is the installed one.

    What has not changed since is not compiled again: Triton names a result by all that it is made
    from, its own version included.
    """
    paths = [str(ROOT)]
    if release:
        if not (RELEASES / release).is_dir():
            pytest.skip(f"no triton {release} in build/triton: make triton")
        paths.insert(0, str(RELEASES / release))
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": os.pathsep.join(paths), "TRITON_CACHE_DIR": str(RELEASES / "cache")}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
