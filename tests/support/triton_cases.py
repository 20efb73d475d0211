"""The GPU kernels' cases: interpreted by the tests here, compiled on a GPU by the tests and by
``benchmarks/gpu.py``. Source text, because each runs in a process of its own; needs torch only."""

from __future__ import annotations

STEP = """
import itertools, torch
from dataclasses import replace
from secura_serve.serve.kernels import triton_step
from secura_serve.serve.kernels.triton_kernel import TritonKernel
from tests.support.stepping import Linear

device = torch.device({device!r})
# Slices that end at odd columns, ranks that are no multiples of 8, and tiles of ranks.
shapes = [((40,), (3,)), ((96, 32, 32), (16, 5, 1)), ((201, 131), (33, 8)), ((304,), (200, 72))]
cases = itertools.product(enumerate(shapes), enumerate({dtypes}), (False, True))
for (i, (outs, ranks)), (j, dtype), biased in cases:
    # Interpreted, which takes long, half of them: each two of shape, dtype and bias meet.
    if device.type == "cpu" and (i + j) % 2 != biased:
        continue
    linear = Linear(TritonKernel(), outs, ranks, dtype, biased, device=device)
    for tokens in (1, 5, 67):
        linear.check(tokens)
    # As for long prompts: tokens grouped by adapter, with many in a tile and with one.
    triton_step._DECODE, triton_step._GROUPED_RANK = 0, 0
    linear.check(37)
    linear.check(70, slots=torch.arange(70) // 40 - 1)
    triton_step._DECODE, triton_step._GROUPED_RANK = 512, 64
# Entries that were made elsewhere, and an empty batch.
linear = Linear(TritonKernel(), (24, 8), (6, 4), torch.float32, False, device=device)
y, slots = linear.noise(9, 32).to(device), torch.randint(-1, 2, (9,)).to(device)
plain = linear.step(y.clone(), slots)
rows = linear.state.rows
source = y[:, rows.flatten().clamp(min=0).long()].contiguous()
straight = torch.arange(rows.numel(), dtype=torch.int32, device=device).view(rows.shape)
linear.state = replace(linear.state, rows=straight)
torch.testing.assert_close(linear.step(y.clone(), slots, source), plain)
linear.step(y[:0], slots[:0])
# A batch without adapters is left alone, whatever the buffer of slots holds.
assert torch.equal(linear.step(y.clone(), slots, source, active=False), y)
"""

LINEAR = """
import itertools, torch
from secura_serve.serve.kernels import triton_beside, triton_linear
from secura_serve.serve.kernels.triton_kernel import TritonKernel
from tests.support.stepping import Linear

device = torch.device({device!r})
# One chunk of inputs that no tile divides, several, and several that are longer than usual; slices
# that hold fewer rows than others; ranks in one tile and in two.
shapes = [((40, 24), (16, 5), (16, 9), 72), ((96, 32, 32), (8, 3), None, 1030),
          ((201,), (150, 40), None, 520)]
for (outs, ranks, fill, width), dtype in itertools.product(shapes, {dtypes}):
    linear = Linear(TritonKernel(), outs, ranks, dtype, True, fill=fill, device=device)
    triton_beside._PARTS = 32 if width < 1000 else 2
    for tokens in (1, 7, 67):
        t = torch.arange(tokens)
        few = torch.where(t % 9 == 3, t % 2, -1) if tokens > 7 else None
        linear.check_linear(tokens, width, few, own_R=tokens == 7)
triton_beside._PARTS = 32
linear = Linear(TritonKernel(), (72, 72), (16, 5), {dtypes}[-1], False, device=device)
for tokens in (2, 20):
    linear.check_linear(tokens, 40, activation="silu", own_R=tokens == 2)
# Inputs whose rows are not contiguous, and rows apart.
linear.check_linear(5, 40, lay=lambda x: x.T.contiguous().T)
linear.check_linear(5, 40, lay=lambda x: torch.nn.functional.pad(x, (3, 5))[:, 3:-5])
linear.check_linear(5, 40, activation="silu", lay=lambda x: x.T.contiguous().T)
# A batch that is too large for that takes the step after the linear, and one without adapters none.
triton_linear.BESIDE = 4
linear.check_linear(5, 40)
linear.check_linear(5, 40, own_R=True)
linear.check_linear(5, 40, activation="silu")
triton_linear.BESIDE = 512
x, W = linear.noise(3, 40).to(device), linear.noise(144, 40).to(device)
slots, off = torch.zeros(3, dtype=torch.int64).to(device), torch.tensor(False)
got = linear.kernel.linear(x, W, None, None, slots, linear.part, linear.ranks, linear.state, off)
assert torch.equal(got, x @ W.T)
assert linear.kernel.linear(x[:0], W, None, None, slots[:0], *(
    linear.part, linear.ranks, linear.state, torch.tensor(True))).shape == (0, 144)
"""

STREAMS = """
import torch
from contextlib import nullcontext
from secura_serve.serve.kernels import triton_beside, triton_linear
from secura_serve.serve.kernels.triton_kernel import TritonKernel
from tests.support.stepping import Linear

# Layers whose output is the next one's input, as in a model: each step begins while the linear
# ahead of it has just ended, in memory that was just given back. With the launches of both streams
# on one, the same numbers must come out to the last bit.
device, gpu = torch.device({device!r}), {device!r} == "cuda"
widths, dtype = (512, 4096, 1024) if gpu else (24, 40), {dtypes}[-1]
wide, layers = widths[0], []
for out in (*widths[1:], wide) * (8 if gpu else 1):
    layer = Linear(TritonKernel(), (out,), (32, 5) if gpu else (8, 3), dtype, False, device=device)
    gated = Linear(TritonKernel(), (out, out), (16, 5), dtype, False, device=device)
    weights = [(layer.noise(o, w) / w**0.5).to(device) for o, w in ((out, wide), (2 * out, out))]
    layers.append((layer, gated, *weights))
    wide = out
slots = (torch.arange(256) % 3 - 1).to(device)
on = torch.tensor(True)

def normal(x):
    x = x.float()
    return (x / x.square().mean(1, keepdim=True).sqrt()).to(dtype)

def model(x, scratch):
    mine = slots[: len(x)]
    for layer, gated, W, V in layers:
        held = (None, None, mine, layer.part, layer.ranks, layer.state, on)
        x = normal(layer.kernel.linear(x, W, *held))
        held = (None, None, mine, gated.part, gated.ranks, gated.state, on, "silu")
        x = normal(x + gated.kernel.linear(x, V, *held))
        if scratch:
            # Whoever is given memory too early writes over it.
            torch.full((len(x) * 64,), torch.nan, device=device), torch.full_like(x, torch.nan)
    return x

def captured(x, pool):
    graph, given = torch.cuda.CUDAGraph(), torch.zeros_like(x)
    with torch.cuda.graph(graph, pool=pool):
        made = model(given, False)
    return graph, given, made

def replay(x, graph, given, made):
    given.copy_(x)
    graph.replay()
    return made.clone()

counts = (1, 16, 17, 64, 200) if gpu else (3,)
inputs = {{t: layers[0][0].noise(t, widths[0]).to(device) for t in counts}}
beside, join = triton_beside._on_stream, triton_linear.join
triton_beside._on_stream, triton_linear.join = lambda device: nullcontext(), lambda device: None
wanted = {{t: model(x, False) for t, x in inputs.items()}}
assert all(bool(y.isfinite().all()) and bool(y.any()) for y in wanted.values())
replayed = {{t: replay(x, *captured(x, None)) for t, x in inputs.items()}} if gpu else {{}}
triton_beside._on_stream, triton_linear.join = beside, join
for _ in range(20 if gpu else 1):
    for t, x in inputs.items():
        assert torch.equal(model(x, True), wanted[t]), t
# Graphs in one pool, replayed by turns.
pool = torch.cuda.graph_pool_handle() if gpu else None
graphs = {{t: captured(inputs[t], pool) for t in replayed}}
for _ in range(50):
    for t, graph in graphs.items():
        assert torch.equal(replay(inputs[t], *graph), replayed[t]), t
"""

ACTIVATED = """
import itertools, torch
from secura_serve.serve.kernels import triton_step, use_base_activation
from secura_serve.serve.kernels.triton_kernel import TritonKernel
from tests.support.stepping import Linear

device = torch.device({device!r})
# Slices that hold fewer rows than the other, and widths that no block of columns divides.
shapes = [(131, (8, 3), (8, 5)), (136, (32, 7), (11, 32)), (72, (72, 20), (72, 30)),
          (128, (128, 40), (128, 90))]
for (width, ranks, fill), dtype in itertools.product(shapes, {dtypes}):
    linear = Linear(TritonKernel(), (width, width), ranks, dtype, True, fill=fill, device=device)
    # One launch for up to 8 tokens where ranks are small, two elsewhere.
    for tokens in (1, 7) if max(ranks) < 72 else (1,):
        linear.check_activated(tokens, "silu")
    for tokens in (17, 64):
        # One in nine has an adapter: a token of the first kernel takes long in the interpreter.
        t = torch.arange(tokens)
        linear.check_activated(tokens, "silu", slots=torch.where(t % 9 == 3, t % 2, -1))
    if width == 136:
        linear.check_activated(5, "gelu_tanh")
linear = Linear(TritonKernel(), (136, 136), (16, 5), {dtypes}[-1], False, device=device)
linear.check_activated(40, "silu", slots=torch.arange(40) // 35 - 1)
# Tall tiles, of which the last has few tokens.
triton_step._PROGRAMS = 1
linear.check_activated(130, "silu", slots=torch.arange(130) // 128 - 1)
# A batch without adapters takes the base's own, whatever the buffer of slots holds.
use_base_activation("silu", lambda y: y[:, :3] + 1)
y, slots = linear.noise(4, 272).to(device), torch.zeros(4, dtype=torch.int64).to(device)
assert torch.equal(linear.activated(y, slots, "silu", active=False), y[:, :3] + 1)
"""

FOLD = """
import itertools, torch
from secura_serve.merge.fold import triton_fold
from secura_serve.merge.fold import Part, Target
from secura_serve.method import Basis, MagNorm, apply

device, gen = torch.device({device!r}), torch.Generator().manual_seed(0)
TOLERANCE = {{torch.float32: 1e-6, torch.float16: 6e-4, torch.bfloat16: 5e-3}}
NORMS = [MagNorm("none"), MagNorm("bounded", tau=0.05), MagNorm("published")]
SHAPES = [((48, 80), (5,)), ((130, 67), (16, 3)), ((64, 128), (40,))]

def case(shape, ranks, dtype, norm, transposed):
    W = torch.randn(shape, generator=gen).to(dtype)
    W[3, 5:9] = 0
    parts = []
    for i, r in enumerate(ranks):
        basis = Basis(torch.randperm(shape[0], generator=gen)[:r],
                      torch.randperm(shape[1], generator=gen)[:r])
        U = torch.randn(r, r, generator=gen) * 0.02
        parts.append(Part("a", 1 - 0.25 * i, U, basis, "", None))
    D = sum(p.weight * W.double()[:, p.basis.cols] @ p.U.double() @ W.double()[p.basis.rows]
            for p in parts)
    peak = float((D.abs() / (W.double().abs() + 1e-8)).max()) if norm.needs_rho_max else None
    parts = [Part(p.adapter, p.weight, p.U, p.basis, "", peak) for p in parts]
    want = apply(W.double(), D, norm, peak=peak)
    held = (W.T.contiguous() if transposed else W).to(device)
    target = Target("m", tuple(parts), transposed)
    bad = torch.zeros(1, dtype=torch.int32, device=device)
    assert triton_fold.supports(held, target, norm)
    got = triton_fold.fold_on_gpu(held, target, norm, dtype, bad)
    got = (got.T if transposed else got).cpu().double()
    worst = float((got - want).abs().max() / want.abs().max())
    assert worst < TOLERANCE[dtype], (shape, ranks, dtype, norm, worst)
    assert not bool(bad.any())

for (shape, ranks), dtype, norm in itertools.product(SHAPES, {dtypes}, NORMS):
    case(shape, ranks, dtype, norm, False)
case((48, 80), (5,), torch.float32, NORMS[1], True)
# The parts of a float32, one after the other, as for bfloat16.
triton_fold._SPLIT = (torch.bfloat16, torch.float16)
case((48, 80), (16,), torch.float16, NORMS[0], False)
case((70, 140), (40,), torch.float16, NORMS[1], False)
W = torch.ones(16, 32, dtype=torch.float16, device=device)
bad = torch.zeros(1, dtype=torch.int32, device=device)
one = Part("a", 1.0, torch.full((1, 1), 1e6), Basis(torch.tensor([0]), torch.tensor([1])), "")
triton_fold.fold_on_gpu(W, Target("m", (one,)), NORMS[0], torch.float16, bad)
assert bool(bad.all())

# The stream that every consumer reads: the same weights as torch's own fold, and errors at its end.
from secura_serve.errors import MergeError
from secura_serve.merge import FoldPlan, fold_stream, stream

W = torch.randn(64, 96, generator=gen).to(device)
basis = Basis(torch.arange(8), torch.arange(8))
for U, fine in ((torch.randn(8, 8, generator=gen) * 0.02, True), (torch.full((8, 8), 3e38), False)):
    target = Target("m", (Part("a", 1.0, U, basis, ""),))
    plan = FoldPlan({{"m.weight": target}}, NORMS[0], None, True)
    folds = []
    for quick in (False, True):
        stream.takes_triton = lambda *args: quick
        try:
            folds.append(dict(fold_stream([("m.weight", W), ("n", W)], plan)))
        except MergeError as error:
            assert not fine and "m: NaN or Inf" in str(error.problems)
    assert len(folds) == 2 * fine
    for name in ("m.weight", "n") if fine else ():
        torch.testing.assert_close(folds[0][name], folds[1][name])
"""

SHARD = """
import itertools, torch
from secura_serve.merge.fold import Part, Target, shard
from secura_serve.merge.fold.journal import Journal, journal_bits
from secura_serve.merge.fold.triton_fold import take_back
from secura_serve.method import Basis, MagNorm, apply

device, gen = torch.device({device!r}), torch.Generator().manual_seed(0)
shard.takes_triton = lambda *given: True
TOLERANCE = {{torch.float32: 1e-6, torch.float16: 6e-4, torch.bfloat16: 5e-3}}

def drawn(W, ranks, norm, size=0.02):
    '''A target on W, and W' in float64.'''
    parts = []
    for i, r in enumerate(ranks):
        basis = Basis(torch.randperm(W.shape[0], generator=gen)[:r],
                      torch.randperm(W.shape[1], generator=gen)[:r])
        U = torch.randn(r, r, generator=gen) * size
        parts.append(Part("a", 1 - 0.25 * i, U, basis, "", None))
    D = sum(p.weight * W.double()[:, p.basis.cols] @ p.U.double() @ W.double()[p.basis.rows]
            for p in parts)
    peak = float((D.abs() / (W.double().abs() + 1e-8)).max()) if norm.needs_rho_max else None
    parts = [Part(p.adapter, p.weight, p.U, p.basis, "", peak) for p in parts]
    return Target("m", tuple(parts)), apply(W.double(), D, norm, peak=peak)

def bits(t):
    return t.view(torch.int16 if t.itemsize == 2 else torch.int32)

def base(shape, dtype):
    W = torch.randn(shape, generator=gen).to(dtype)
    W[3, 5:9], W[4, 5:9] = 0, -0.0
    # Just above and below powers of two, and numbers that hardly are.
    W[5, :4] = torch.tensor([1.0, 2.0, -4.0, 1.001])
    W[6, :4] = torch.tensor([6e-8, 1e-7, 3e-5, -6e-5])
    return W

def fold(held, W, rows, cols, target, norm, old=None, new=None):
    flags = torch.zeros(2, dtype=torch.int32, device=device)
    gathered, problems = shard.gather_shard(W, target, rows, cols, checked=True)
    assert not problems
    gathered = gathered.map(lambda t: t.to(device))
    shard.fold_shard(held, target, norm, gathered, flags, old, new)
    return flags.tolist()

# Column-parallel, row-parallel and both, whole and in a part of a larger parameter.
SLICES = [(slice(0, 64), slice(0, 134)), (slice(64, 130), slice(None)),
          (slice(None), slice(67, 134)), (slice(33, 66), slice(10, 31))]
NORMS = [MagNorm("none"), MagNorm("bounded", tau=0.05), MagNorm("published")]
for (rows, cols), dtype, norm in itertools.product(SLICES, {dtypes}, NORMS):
    W = base((130, 134), dtype)
    target, want = drawn(W, (16, 3) if norm.combinable else (16,), norm)
    parameter = torch.zeros(200, W[rows, cols].shape[1], dtype=dtype, device=device)
    held = parameter[40 : 40 + W[rows].shape[0]]
    held.copy_(W[rows, cols])
    assert fold(held, W, rows, cols, target, norm) == [0, 0]
    worst = float((held.cpu().double() - want[rows, cols]).abs().max() / want.abs().max())
    assert worst < TOLERANCE[dtype], (rows, cols, dtype, norm, worst)
    assert not parameter[:40].any() and not parameter[40 + len(held) :].any()

# The way back from the journal alone, and from one adapter to the next, to the last bit.
for dtype, (rows, cols) in itertools.product([d for d in {dtypes} if d.itemsize == 2], SLICES):
    W = base((130, 134), dtype)
    p = 8 if dtype == torch.bfloat16 else 11
    narrow, wide = MagNorm("bounded", tau=5.1 / 2**p), MagNorm("bounded", tau=70 / 2**p)
    assert [journal_bits(norm, dtype) for norm in (narrow, wide)] == [4, 8]
    # Much more than the norm lets through, so that weights move as far as they can.
    one, other, third = (drawn(W, (9,), norm, size=9.0) for norm in (narrow, narrow, wide))
    held = W[rows, cols].clone().to(device)
    pristine, flags = held.clone(), torch.zeros(2, dtype=torch.int32, device=device)
    first, last = Journal.empty(held, 4), Journal.empty(held, 8)
    assert all(j.data.nbytes == Journal.nbytes(held, j.bits) for j in (first, last))
    assert fold(held, W, rows, cols, one[0], narrow, None, first) == [0, 0]
    assert int((bits(held).int() - bits(pristine).int()).abs().max()) == 5
    alone = pristine.clone()
    # In the same memory, and from 4 bits to 8.
    assert fold(held, W, rows, cols, other[0], narrow, first, first) == [0, 0]
    fold(alone, W, rows, cols, other[0], narrow)
    assert torch.equal(bits(alone), bits(held))
    assert fold(held, W, rows, cols, third[0], wide, first, last) == [0, 0]
    worst = float((held.cpu().double() - third[1][rows, cols]).abs().max() / third[1].abs().max())
    assert worst < TOLERANCE[dtype], worst
    take_back(held, last, flags)
    assert torch.equal(bits(held), bits(pristine)) and flags.tolist() == [0, 0]
    # A journal that is too narrow says so.
    assert fold(held, W, rows, cols, third[0], wide, None, first) == [0, 1]
W = torch.ones(16, 32, dtype=torch.float16)
one = Part("a", 1.0, torch.full((1, 1), 1e6), Basis(torch.tensor([0]), torch.tensor([1])), "")
held = W.clone().to(device)
assert fold(held, W, slice(None), slice(None), Target("m", (one,)), NORMS[0]) == [1, 0]
"""
