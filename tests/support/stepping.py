"""A packed linear with adapters of several ranks, for any kernel, and its float64 oracle."""

from __future__ import annotations

import torch

from secura_serve.serve.engine.bank import Bank

CPU = torch.device("cpu")
TOLERANCE = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Largest error over the largest number of the result."""


class Linear:
    """Random C, U and rows; numbers of ``dtype``, kept as plain matrices beside the kernel's."""

    def __init__(self, kernel, outs, ranks, dtype, biased, *, device=CPU):
        self.gen = torch.Generator().manual_seed(0)
        self.kernel, self.outs, self.dtype, self.out = kernel, outs, dtype, sum(outs)
        r = max(ranks)
        self.firsts = [sum(outs[:s]) for s in range(len(outs) + 1)]
        self.rows = [self.firsts[s] + self.pick(o, r) for s, o in enumerate(outs)]
        self.C = [self.noise(o, r) for o in outs]
        self.b = self.noise(self.out) if biased else None
        self.U = [[self.noise(k, k) * 0.3 for _ in outs] for k in ranks]

        layout = kernel.layout(len(outs), r, dtype)
        names = [f"slice{s}" for s in range(len(outs))]
        # A second linear, on which the adapters are wider; parts of a row are not contiguous then.
        other, wide = kernel.layout(1, r + 70, dtype), self.noise(r + 70, r + 70)
        bank = Bank(len(ranks), [(["other"], other), (names, layout)], dtype, device)
        for slot, cores in enumerate(self.U):
            bank.put(slot, *bank.pack(dict(zip(names, cores, strict=True)) | {"other": wide}))
        self.part, self.ranks = bank.part(1), bank.ranks
        C = torch.zeros(layout.r, self.out, dtype=dtype)
        rows = torch.full((len(outs), layout.r), -1)
        for s in range(len(outs)):
            C[:r, self.firsts[s] : self.firsts[s + 1]] = self.C[s].T
            rows[s, :r] = self.rows[s]
        offset = None if self.b is None else self.b[rows.clamp(min=0)].flatten().to(device)
        self.state = kernel.prepare(rows, C.to(device), offset, self.firsts)

    def noise(self, *shape):
        return torch.randn(*shape, generator=self.gen).to(self.dtype)

    def pick(self, count, r):
        return torch.randperm(count, generator=self.gen)[:r]

    def step(self, y, slots, source=None, active=True):
        flag = torch.tensor(active)
        return self.kernel.step(y, source, slots, self.part, self.ranks, self.state, flag)

    def wanted(self, y, slots):
        """Float64 loops over tokens and slices."""
        want = y.double()
        for t, slot in enumerate(slots.tolist()):
            for s in range(len(self.outs)) if slot >= 0 else ():
                U = self.U[slot][s].double()
                k = len(U)
                g = y[t, self.rows[s][:k]].double()
                if self.b is not None:
                    g = g - self.b[self.rows[s][:k]].double()
                want[t, self.firsts[s] : self.firsts[s + 1]] += self.C[s][:, :k].double() @ (U @ g)
        return want

    def check(self, tokens, slots=None):
        """Raise AssertionError unless the kernel does what the loops do."""
        if slots is None:
            slots = torch.randint(-1, len(self.U), (tokens,), generator=self.gen)
        y = self.noise(tokens, self.out)
        want, device = self.wanted(y, slots), self.part.device
        got = self.step(y.clone().to(device), slots.to(device)).cpu()
        worst = float((got.double() - want).abs().max() / want.abs().max())
        assert worst < TOLERANCE[self.dtype], (tokens, worst)
        assert torch.equal(got[slots < 0], y[slots < 0])
