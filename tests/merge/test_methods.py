"""Proves the merge methods beside the weighted sum: TIES and DARE on the U of adapters that share a
basis, and that a merge says which method made it.

Needs PEFT and a tiny base. The oracle of TIES follows the paper, one entry at a time.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from secura_serve import adapter as A
from secura_serve.errors import ConfigError, MergeError
from secura_serve.merge import Part, open_source, plan_fold, plan_merge, write_merge
from secura_serve.merge.main import main
from secura_serve.merge.methods import LINEAR, MergeMethod, combined_parts
from secura_serve.method import Basis
from tests.support.merging import make_adapter

BASIS = Basis(torch.arange(6), torch.arange(6) + 3)
WEIGHTS = (0.7, 1.0, 1.5)


def parts(weights=WEIGHTS):
    generator = torch.Generator().manual_seed(0)
    return [
        Part(f"a{i}", weight, torch.randn(6, 6, generator=generator), BASIS, "print")
        for i, weight in enumerate(weights)
    ]


def ties(parts, density):
    """Trim, elect, mean of those that agree: one number at a time."""
    r, kept = 6, []
    for part in parts:
        flat = sorted(part.U.abs().flatten().tolist(), reverse=True)
        least = flat[int(density * r * r) - 1]
        kept.append([[v if abs(v) >= least else 0.0 for v in row] for row in part.U.tolist()])
    found = torch.zeros(r, r, dtype=torch.float64)
    for i, j in itertools.product(range(r), range(r)):
        entries = [k[i][j] for k in kept]
        positive = sum(entries) >= 0
        agree = [
            weight * value
            for value, weight in zip(entries, (p.weight for p in parts), strict=True)
            if value != 0 and (value > 0) == positive
        ]
        found[i, j] = sum(agree) / max(len(agree), 1)
    return found


@pytest.mark.parametrize("density", [0.2, 0.5, 0.9])
def test_ties_is_what_the_paper_says(density):
    [part] = combined_parts(MergeMethod("ties", density), "q", parts())
    assert part.weight == 1 and part.basis is BASIS and part.fingerprint == "print"
    assert torch.allclose(part.U.double(), ties(parts(), density), atol=1e-6)


def test_dare_drops_and_rescales_by_a_seed():
    def made(name, seed, module="q"):
        return combined_parts(MergeMethod(name, 0.5, seed), module, parts([1.0]))[0].U

    state = torch.get_rng_state()
    [whole] = parts([1.0])
    for name in ("dare_linear", "dare_ties"):
        U = made(name, 3)
        kept = U != 0
        assert torch.allclose(U[kept], 2 * whole.U[kept]) and 0 < kept.sum() < 36
        assert torch.equal(U, made(name, 3)) and not torch.equal(U, made(name, 4))
        assert not torch.equal(U, made(name, 3, "other"))
    mean = sum(made("dare_linear", seed) for seed in range(2000)) / 2000
    assert (mean - whole.U).abs().max() < 6 * whole.U.abs().max() / 2000**0.5
    assert torch.equal(state, torch.get_rng_state())


def test_linear_leaves_the_parts_and_others_need_one_basis():
    given = parts()
    assert combined_parts(LINEAR, "q", given) == tuple(given)
    other = Part("b", 1.0, torch.ones(6, 6), Basis(BASIS.rows.flip(0), BASIS.cols), "print")
    with pytest.raises(MergeError, match="a0 and b have other rows or columns in q"):
        combined_parts(MergeMethod("ties", 0.5), "q", [*given, other])
    for name, density in (("slerp", 0.5), ("ties", 1.0), ("ties", 0.0), ("dare_ties", 2.0)):
        with pytest.raises(ConfigError):
            MergeMethod(name, density)


def test_a_merge_by_ties_is_the_fold_of_its_u_and_says_so(tiny_base, tmp_path, capsys):
    base = tiny_base("llama")
    one, two = (make_adapter(base, tmp_path / f"a{i}", seed=i) for i in range(2))
    specs = [f"{one}*0.7", str(two)]
    out = tmp_path / "out"
    plan = plan_merge(str(base), specs, out, "float32", method=MergeMethod("ties", 0.4))
    write_merge(plan)
    said = json.loads((out / "secura_manifest.json").read_text())
    assert said["method"] == {"name": "ties", "density": 0.4, "seed": 0}
    assert "ties" in (out / "README.md").read_text() and "ties" in plan.summary()
    name = "model.layers.0.self_attn.q_proj"
    loaded = [A.load(Path(folder)).modules[name] for folder in (one, two)]
    stacked = [
        Part(str(i), weight, cur.U, cur.basis, "")
        for i, (cur, weight) in enumerate(zip(loaded, (0.7, 1.0), strict=True))
    ]
    [combined] = combined_parts(MergeMethod("ties", 0.4), name, stacked)
    W = load_file(next(base.glob("*.safetensors")))[f"{name}.weight"].double()
    C, R = W[:, loaded[0].cols.long()], W[loaded[0].rows.long()]
    want = W + C @ combined.U.double() @ R
    got = load_file(next(out.glob("*.safetensors")))[f"{name}.weight"].double()
    assert torch.allclose(got, want, atol=1e-5)

    def command(*more):
        flags = ["--base", str(base), "--dtype", "float32", "--out", str(out)]
        return main([*flags, *(f for spec in specs for f in ("--adapter", spec)), *more])

    assert command("--check", "--merge-method", "ties", "--density", "0.4") == 0
    assert command("--check", "--merge-method", "ties", "--density", "0.5") == 1
    assert "its method was" in capsys.readouterr().err
    assert command("--check") == 1
    for wrong in (["--density", "0.4"], ["--merge-method", "ties"], ["--merge-method", "x"]):
        try:
            assert command("--check", *wrong) == 2
        except SystemExit as ended:
            assert ended.code == 2
    source = open_source(str(base), specs, method=MergeMethod("dare_linear", 0.5, 7))
    once, again = (plan_fold(source).targets[f"{name}.weight"].parts for _ in range(2))
    assert len(once) == 1 and torch.equal(once[0].U, again[0].U)
