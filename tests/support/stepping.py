"""A packed linear with adapters of several ranks, for any kernel, and its float64 oracle."""

from __future__ import annotations

from dataclasses import replace

import torch

from secura_serve.serve.engine.bank import Bank

CPU = torch.device("cpu")
TOLERANCE = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Largest error over the largest number of the result."""


class Linear:
    """Random C, U and rows; numbers of ``dtype``, kept as plain matrices beside the kernel's."""

    def __init__(self, kernel, outs, ranks, dtype, biased, *, fill=None, device=CPU):
        self.gen = torch.Generator().manual_seed(0)
        self.kernel, self.outs, self.dtype, self.out = kernel, outs, dtype, sum(outs)
        r = max(ranks)
        fill = fill or [r] * len(outs)
        self.firsts = [sum(outs[:s]) for s in range(len(outs) + 1)]
        self.rows = [self.firsts[s] + self.pick(o, fill[s]) for s, o in enumerate(outs)]
        self.C = [self.noise(o, f) for o, f in zip(outs, fill, strict=True)]
        self.b = self.noise(self.out) if biased else None
        self.U = [[self.noise(min(k, f), min(k, f)) * 0.3 for f in fill] for k in ranks]

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
            C[: fill[s], self.firsts[s] : self.firsts[s + 1]] = self.C[s].T
            rows[s, : fill[s]] = self.rows[s]
        offset = None if self.b is None else self.b[rows.clamp(min=0)].flatten().to(device)
        self.state = kernel.prepare(rows, C.to(device), offset, self.firsts)

    def noise(self, *shape):
        return torch.randn(*shape, generator=self.gen).to(self.dtype)

    def pick(self, count, r):
        return torch.randperm(count, generator=self.gen)[:r]

    def step(self, y, slots, source=None, active=True):
        flag = torch.tensor(active)
        return self.kernel.step(y, source, slots, self.part, self.ranks, self.state, flag)

    def activated(self, y, slots, activation, source=None, active=True):
        flag = torch.tensor(active)
        held = (self.part, self.ranks, self.state, flag, activation)
        return self.kernel.activated_step(y, source, slots, *held)

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
        y, slots = self._batch(tokens, slots)
        want, device = self.wanted(y, slots), self.part.device
        got = self.step(y.clone().to(device), slots.to(device)).cpu()
        self._near(got, want)
        assert torch.equal(got[slots < 0], y[slots < 0])

    def check_linear(self, tokens, width, slots=None, *, activation=None, own_R=False, lay=None):
        """The same where the kernel takes the linear along, W·x + b, and R·x comes of x.

        Args:
            own_R: whether R is held beside W.
            lay: lays x out otherwise.
        """
        _, slots = self._batch(tokens, slots)
        x, W = self.noise(tokens, width), self.noise(self.out, width) / width**0.5
        exact = x.double() @ W.double().T
        exact = exact if self.b is None else exact + self.b.double()
        y = exact.to(self.dtype)
        # What is added comes of the exact product, not of the rounded output.
        want, device = self.wanted(exact.clone(), slots) - exact + y.double(), self.part.device
        state, R = self.state, None
        if own_R:
            R = W[state.rows.flatten().clamp(min=0).long().cpu()].to(device)
            rows = torch.arange(len(R), dtype=torch.int32, device=device).view_as(state.rows)
            state = replace(state, rows=rows, offset=None)
        bias = None if self.b is None else self.b.to(device)
        x = x.to(device) if lay is None else lay(x.to(device))
        batch = (x, W.to(device), bias, R, slots.to(device))
        held = (self.part, self.ranks, state, torch.tensor(True))
        got = self.kernel.linear(*batch, *held, activation).cpu()
        if activation is None:
            torch.testing.assert_close(got[slots < 0], y[slots < 0])
        else:
            gate, up = want.chunk(2, dim=1)
            want = gate / (1 + (-gate).exp()) * up
        self._near(got, want)

    def check_activated(self, tokens, activation, slots=None):
        """The same for the step in the activation after it, which leaves y as it is."""
        y, slots = self._batch(tokens, slots)
        gate, up = self.wanted(y, slots).chunk(2, dim=1)
        act = torch.tanh(0.7978845608028654 * (gate + 0.044715 * gate**3))
        want = (gate / (1 + (-gate).exp()) if activation == "silu" else gate * (1 + act) / 2) * up
        given = y.to(self.part.device)
        got = self.activated(given, slots.to(given.device), activation).cpu()
        self._near(got, want)
        assert torch.equal(given.cpu(), y)

    def _batch(self, tokens, slots):
        if slots is None:
            slots = torch.randint(-1, len(self.U), (tokens,), generator=self.gen)
        return self.noise(tokens, self.out), slots

    def _near(self, got, want):
        worst = float((got.double() - want).abs().max() / want.abs().max())
        assert worst < TOLERANCE[self.dtype], (tuple(got.shape), worst)
