"""Proves the adapter step against float64 loops on each of its paths. Needs torch only."""

from __future__ import annotations

import pytest
import torch

from secura_serve.serve.kernels import torch_step as step

SHAPES = [(1, 1, 4, 3), (7, 2, 8, 2), (300, 3, 16, 4)]


def _case(tokens, n, r, slots, dtype=torch.float32):
    g = torch.Generator().manual_seed(tokens + n)
    bank = torch.randn(slots + 1, n, r, r, generator=g).to(dtype)
    bank[-1] = 0
    ids = torch.randint(-1, slots, (tokens,), generator=g)
    return bank, ids, torch.randn(tokens, n, r, generator=g).to(dtype)


def _loops(bank, ids, g):
    want = torch.zeros(g.shape, dtype=torch.float64)
    for t, slot in enumerate(ids.tolist()):
        for s in range(g.shape[1]):
            if slot >= 0:
                want[t, s] = bank[slot, s].double() @ g[t, s].double()
    return want


@pytest.mark.parametrize("path", ["gather", "per-adapter", "compiled"])
@pytest.mark.parametrize("shape", SHAPES)
def test_mix_equals_loops(shape, path, monkeypatch):
    bank, ids, g = _case(*shape)
    monkeypatch.setattr(step, "_GATHER_LIMIT", 0 if path == "per-adapter" else 1 << 30)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: path == "compiled")
    got = step.mix(bank, ids, g).double()
    torch.testing.assert_close(got, _loops(bank, ids, g), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("biased", [False, True])
def test_step_equals_folded_weights(biased):
    gen = torch.Generator().manual_seed(0)
    tokens, out, inner, r, slots = 9, 24, 20, 4, 3
    W = torch.randn(out, inner, generator=gen, dtype=torch.float64)
    b = torch.randn(out, generator=gen, dtype=torch.float64) * biased
    rows, cols = torch.randperm(out, generator=gen)[:r], torch.randperm(inner, generator=gen)[:r]
    bank, ids, _ = _case(tokens, 1, r, slots, torch.float64)
    x = torch.randn(tokens, inner, generator=gen, dtype=torch.float64)
    y = x @ W.T + b
    g = y[:, rows] - b[rows]
    got = step.adapter_step(y, g, ids, bank=bank, C_t=W[:, cols].T.contiguous())
    for t, slot in enumerate(ids.tolist()):
        folded = W + (W[:, cols] @ bank[slot, 0] @ W[rows] if slot >= 0 else 0)
        torch.testing.assert_close(got[t], folded @ x[t] + b, rtol=1e-5, atol=1e-5)


def test_tokens_without_adapter_are_untouched():
    bank, _, _ = _case(5, 1, 4, 2)
    y = torch.randn(5, 12)
    got = step.adapter_step(y, y[:, :4], torch.full((5,), -1), bank=bank, C_t=torch.randn(4, 12))
    assert torch.equal(got, y)
