"""Proves the step of resident updates against float64 loops, in torch and in C++, where a compiler
is there. Needs torch only.
"""

from __future__ import annotations

import pytest
import torch

from secura_serve.serve.kernels import (
    PADDED,
    DeltaSlots,
    choose_delta_step,
    delta_blocks,
    delta_step,
)

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}
PLACES = torch.tensor([2, -1, 0, 1, -1, -1], dtype=torch.int32)
SLOTS = len(PLACES) - 1

CPU = torch.device("cpu")
FORM = choose_delta_step(CPU, torch.float32)
needs_native = pytest.mark.skipif(FORM != "native", reason="no C++ compiler, or torch before 2.10")


ALWAYS = torch.tensor(True)


def torch_step(y, x, slots, places, held, active):
    torch.ops.secura_delta.step_(
        y, x, slots, places, held.weight, held.scale, held.segments, held.used
    )


def case(outs, inner, dtype, weight, tokens):
    """Three updates of a linear with slices of these widths; a slice with None stays as it is."""
    gen = torch.Generator().manual_seed(tokens + inner)
    widths = [abs(out) for out in outs]
    segments, row, column = [], 0, 0
    for out in outs:
        if out > 0:
            segments.append((column, row, out))
            row += out
        column += abs(out)
    K, padded = 3, -(-inner // PADDED) * PADDED
    held = DeltaSlots(
        torch.zeros(K, row, padded, dtype=weight),
        torch.rand(K, row, generator=gen) * 0.02 if weight == torch.int8 else torch.ones(K, row),
        torch.tensor(segments),
        delta_blocks(segments, CPU),
        torch.ones(K, len(segments), dtype=torch.uint8),
        FORM,
    )
    values = torch.randint(-127, 128, (K, row, inner), generator=gen)
    if weight == torch.float32:
        values = torch.randn(K, row, inner, generator=gen)
    held.weight[..., :inner] = values.to(weight)
    held.used[1, 0] = 0
    y = torch.randn(tokens, sum(widths), generator=gen).to(dtype)
    x = torch.randn(tokens, inner, generator=gen).to(dtype)
    return held, y, x, torch.randint(-1, SLOTS, (tokens,), generator=gen)


def loops(held, y, x, slots):
    want = y.double().clone()
    for t, slot in enumerate(slots.tolist()):
        place = int(PLACES[slot])
        if place < 0:
            continue
        for s, (column, first, count) in enumerate(held.segments.tolist()):
            if held.used[place, s]:
                part = slice(first, first + count)
                D = held.weight[place, part].double() * held.scale[place, part].double()[:, None]
                want[t, column : column + count] += D[:, : x.shape[1]] @ x[t].double()
    return want


def assert_near(got, want):
    worst = (got.double() - want).abs().max() / want.abs().max()
    assert worst < TOLERANCE[got.dtype], worst


@pytest.mark.parametrize(
    "step", [torch_step, pytest.param(delta_step, marks=needs_native)], ids=["torch", "native"]
)
@pytest.mark.parametrize("weight", [torch.int8, torch.float32])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(
    ("outs", "inner"), [((40,), 32), ((40, -16, 17), 72), ((9, 8), 33), ((-5, 3), 1)]
)
def test_equals_loops(outs, inner, dtype, weight, step):
    for tokens in (1, 3, 5, 12, 70):
        held, y, x, slots = case(outs, inner, dtype, weight, tokens)
        want, untouched = loops(held, y, x, slots), y.clone()
        step(y, x, slots, PLACES, held, ALWAYS)
        assert_near(y, want)
        idle = PLACES[slots] < 0
        assert torch.equal(y[idle], untouched[idle])


@pytest.mark.parametrize("step", [torch_step, pytest.param(delta_step, marks=needs_native)])
def test_rows_of_wider_matrices_and_a_token_that_is_not_finite(step):
    held, y, x, slots = case((24,), 40, torch.float32, torch.int8, 9)
    slots[:] = torch.tensor([0, 1, 2, 0, 3, 0, -1, 2, 0])
    sheet, left = torch.randn(9, 40), torch.randn(9, 50)
    sheet[:, 8:32], left[:, 5:45] = y, x
    left[3] = float("nan")
    want, before = loops(held, y, left[:, 5:45], slots), sheet.clone()
    step(sheet[:, 8:32], left[:, 5:45], slots, PLACES, held, ALWAYS)
    fine = torch.arange(9) != 3
    assert_near(sheet[fine, 8:32], want[fine])
    assert torch.equal(sheet[:, :8], before[:, :8]) and torch.equal(sheet[:, 32:], before[:, 32:])


def test_a_batch_without_updates_is_untouched_and_empty_batches_pass():
    held, y, x, slots = case((24,), 40, torch.bfloat16, torch.int8, 9)
    before = y.clone()
    delta_step(y, x, torch.full_like(slots, 1), PLACES, held, ALWAYS)
    assert torch.equal(y, before)
    delta_step(y[:0], x[:0], slots[:0], PLACES, held, ALWAYS)


@pytest.mark.long
def test_compiled_with_the_linear_before_it():
    held, _, _, _ = case((24, 8), 40, torch.float32, torch.int8, 1)
    W = torch.randn(32, 40)

    def layer(x, slots):
        y = x @ W.T
        delta_step(y, x, slots[: y.shape[0]], PLACES, held, ALWAYS)
        return torch.relu(y)

    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    slots = torch.randint(-1, SLOTS, (64,), generator=torch.Generator().manual_seed(3))
    for tokens in (5, 16, 31):
        x = torch.randn(tokens, 40)
        torch.testing.assert_close(compiled(x, slots), layer(x, slots), rtol=1e-4, atol=1e-4)


@needs_native
def test_other_dtypes_are_refused():
    held, y, x, slots = case((8,), 32, torch.float32, torch.int8, 4)
    args = (slots, PLACES, held.weight, held.scale, held.segments, held.used)
    with pytest.raises(RuntimeError, match="bfloat16, float16 or float32"):
        torch.ops.secura.delta_(y.double(), x.double(), *args)
    with pytest.raises(RuntimeError, match="int8 or float32"):
        torch.ops.secura.delta_(
            y, x, slots, PLACES, held.weight.short(), held.scale, held.segments, held.used
        )
