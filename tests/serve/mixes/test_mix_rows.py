"""Proves that the row of a mix is the row of the summed U, in every layout and dtype; and that a
sum that is too large is refused.

Needs torch alone; the oracle packs U that were summed in float64.
"""

from __future__ import annotations

import pytest
import torch

from secura_serve.adapter import LARGEST_RMS, CURModule
from secura_serve.errors import UnservableError
from secura_serve.method import Basis
from secura_serve.serve.basis import SharedBasis
from secura_serve.serve.engine.bank import Bank
from secura_serve.serve.engine.mixing import KeptRow, check_mix, mixed_row
from secura_serve.serve.kernels.layout import Layout

LAYOUTS = (
    [(["q", None, "v"], Layout(3, 12)), (["down"], Layout(1, 12))],
    [(["q", None, "v"], Layout(3, 12, 2, 16)), (["down"], Layout(1, 12, 2, 16))],
)
MODULES = ("q", "v", "down")


def indices(seed, r):
    return torch.randperm(40, generator=torch.Generator().manual_seed(seed))[:r].int()


@pytest.fixture(scope="module")
def adapters():
    """Three adapters: two nested, one on rows and columns of its own that overlap with theirs."""
    made = []
    for number, (seed, r) in enumerate([(1, 6), (1, 4), (2, 5)]):
        generator = torch.Generator().manual_seed(number)
        names = MODULES if number else MODULES[:2]
        made.append(
            {
                name: CURModule(
                    torch.randn(r, r, generator=generator),
                    indices(seed, r),
                    indices(seed + 10, r),
                )
                for name in names
            }
        )
    return made


@pytest.fixture(scope="module")
def shared(adapters):
    basis = {}
    for name in MODULES:
        users = [a[name] for a in adapters if name in a]
        rows, cols = (
            torch.tensor(list(dict.fromkeys(i for u in users for i in getattr(u, axis).tolist())))
            for axis in ("rows", "cols")
        )
        basis[name] = Basis(rows, cols)
    return SharedBasis(basis, {})


def kept(bank, shared, adapter, size=0.0):
    moved = {name: shared.to_shared_basis(name, cur) for name, cur in adapter.items()}
    row, used = bank.pack(moved)
    return KeptRow(row, used, 4, dict.fromkeys(adapter, size))


def summed(shared, adapters, weights):
    """U of the sum, in float64, where the shared basis has it."""
    total = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        for name, cur in adapter.items():
            U = torch.zeros(12, 12, dtype=torch.float64)
            part = shared.to_shared_basis(name, cur).double()
            U[: part.shape[0], : part.shape[1]] = part
            total[name] = total.get(name, 0) + weight * U
    return total


@pytest.mark.parametrize("places", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_row_of_a_mix_is_the_row_of_the_sum(adapters, shared, places, dtype):
    bank = Bank(2, places, dtype, torch.device("cpu"))
    weights = [0.5, -1.25, 0.3]
    parts = [(kept(bank, shared, a), w) for a, w in zip(adapters, weights, strict=True)]
    row = mixed_row(parts)
    assert row.dtype == dtype
    exact = Bank(2, places, torch.float64, torch.device("cpu"))
    want, _ = exact.pack(summed(shared, adapters, weights))
    # Each part is rounded once as it is served, and their sum once.
    unit = torch.finfo(dtype).eps
    scale = sum(abs(w) * k.row.abs().max().item() for k, w in parts)
    assert (row.double() - want).abs().max().item() <= unit * scale
    # Apart from the rounding of the parts, it is the sum rounded once.
    served = sum(w * k.row.double() for k, w in parts)
    assert torch.allclose(row.double(), served, rtol=unit / 2 + 1e-6, atol=1e-7)


def test_weight_one_is_the_row_itself_and_the_order_is_the_caller_s(adapters, shared):
    bank = Bank(2, LAYOUTS[1], torch.bfloat16, torch.device("cpu"))
    rows = [kept(bank, shared, adapter) for adapter in adapters]
    assert torch.equal(mixed_row([(rows[0], 1.0)]), rows[0].row)
    assert torch.equal(mixed_row([(rows[0], 2.0)]), rows[0].row * 2)
    gone = mixed_row([(rows[0], 1.0), (rows[0], -1.0)])
    assert not gone.any()


def test_a_sum_that_is_too_large_is_refused(adapters, shared):
    bank = Bank(2, LAYOUTS[0], torch.float16, torch.device("cpu"))
    one = kept(bank, shared, adapters[0], LARGEST_RMS / 4)
    two = kept(bank, shared, adapters[1], LARGEST_RMS / 4)
    check_mix([(one, 2.0), (two, -2.0)])
    for weights in ((2.0, 2.1), (-2.1, 2.0), (5.0, 0.1)):
        with pytest.raises(UnservableError, match="smaller weights"):
            check_mix(list(zip((one, two), weights, strict=True)))
    huge = {name: CURModule(cur.U * 2e4, cur.rows, cur.cols) for name, cur in adapters[0].items()}
    with pytest.raises(UnservableError, match="float16, the engine's dtype"):
        check_mix([(kept(bank, shared, huge), 10.0)])
