"""Proves that the GPU kernels compile for GPUs that are not here, without spilled registers and
with wide loads of U, C and y, from the launches of the adapter step itself.

Needs the package ``triton``; no GPU. Each release that supported installs use is tried where `make
triton` has put it (3.6 for torch 2.11, 3.7.1 for 2.13, 3.8 for vLLM 0.33's torch 2.14), besides
the installed one. In processes of their own, since one process can hold one Triton.
"""

from __future__ import annotations

import pytest

from tests.support.interpreted import TRITON_RELEASES, compiled

pytest.importorskip("triton", reason="no triton package")


STEP = """
import itertools, torch
from benchmarks._launches import ACTIVATIONS, LLAMA3_8B, step_launches
from tests.support.triton_aot import TARGETS, faults
import triton

assert triton.__version__.startswith({release!r}), triton.__version__
found = []
for r, tokens in itertools.product({ranks}, (1, 64, 1024)):
    for target in TARGETS:
        early = target in ("sm_90", "sm_100")
        for launch in step_launches((4096, 1024, 1024), r, tokens, biased=True, early=early):
            # At most one 16-byte value, and beyond the ranks that adapters have by far.
            found += faults(launch, target, ("bank", "C", "y"), stack=16 if r > 256 else 0)
    # The second kernel in the activation that follows, with the widths of Llama-3-8B.
    for target in TARGETS if (r, tokens) in ((32, 1), (32, 1024), (128, 64)) else ():
        early, outs = target in ("sm_90", "sm_100"), (14336, 14336)
        launches = step_launches(outs, r, tokens, early=early, biased=True, activation="silu")
        # Few tokens of a small rank are taken in one launch, which reads U itself.
        alone = (r, tokens) == (32, 1)
        assert len(launches) == 2 - alone
        found += faults(launches[-1], target, ("C", "y", "bank") if alone else ("C", "y"))
# Begun beside the linear: two launches there, one after it, which waits for two streams and so for
# all of them to end.
for (name, (width, outs)), (r, tokens) in itertools.product(
    LLAMA3_8B.items(), ((32, 1), (32, 64), (16, 256), (128, 64))
):
    follows = ACTIVATIONS.get(name)
    for target in TARGETS if (r, tokens) == (32, 64) else ("sm_90", "sm_100"):
        early = target in ("sm_90", "sm_100")
        made = step_launches(outs, r, tokens, early=early, width=width, activation=follows)
        assert [launch.options.get("PDL") for launch in made] == [None, None, False]
        for launch, wide in zip(made, (("x", "matrix"), ("bank",), ("C", "y"))):
            found += faults(launch, target, wide)
for launch in step_launches((4096, 1024, 1024), 512, 64, width=4096)[:2]:
    found += faults(launch, "sm_90", ("bank", "x", "matrix"))
# Numbers of 4 bytes, of which none may be read alone either.
for launch in step_launches((4096,), 64, 64, dtype=torch.float32):
    found += faults(launch, "sm_90", ("bank", "C", "y"))
(_, launch) = step_launches((4096, 4096), 64, 64, dtype=torch.float32, activation="gelu_tanh")
found += faults(launch, "sm_90", ("C", "y"))
assert not found, "\\n".join(found)
"""


@pytest.mark.long
@pytest.mark.parametrize("release", TRITON_RELEASES)
def test_the_step_compiles_for_every_gpu(release):
    compiled(STEP.format(release=release, ranks=(8, 32, 128, 512)), release)


NARROW = """
from benchmarks._launches import step_launches
from tests.support.triton_aot import TARGETS, build, faults
for target in TARGETS:
    (_, expand) = step_launches((4097,), 32, 1, early=target in ("sm_90", "sm_100"))
    # y and C have rows of an odd length: nothing is aligned.
    assert any("narrow loads of C" in fault for fault in faults(expand, target, ("C", "y")))
# Before its wait the first kernel has loaded all but g, the second C; to wait is an exit's, too.
core, expand = (build(launch, TARGETS["sm_90"]).code for launch in step_launches((4096,), 32, 1))
before, after, exit = core.split("griddepcontrol.wait")
assert (before.count("ld.global"), after.count("ld.global"), exit.count("ld.")) == (7, 1, 0)
before, after, exit = expand.split("griddepcontrol.wait")
assert exit.count("ld.") == 0 and before.count("ld.global") > after.count("ld.global") > 0
assert step_launches((4096,), 32, 64, active=False) == []
assert step_launches((4096, 4096), 32, 64, active=False, activation="silu") == []
"""


@pytest.mark.long
def test_narrow_loads_are_seen():
    compiled(NARROW)
