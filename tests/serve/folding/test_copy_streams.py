"""Proves that copies are queued beside the folds, and that a fold waits for the copy it needs.

Needs torch alone: a stand-in for its CUDA streams writes down what they are told.
"""

from __future__ import annotations

from contextlib import contextmanager

import torch

from secura_serve.serve.engine.fold import copy_streams


def test_copies_run_beside_the_folds_that_wait_for_them(monkeypatch):
    said = []

    class Stream:
        def __init__(self, name="main"):
            self.name = name

        def record_event(self):
            said.append(f"{self.name} marks")
            return "mark"

        def wait_event(self, event):
            said.append(f"{self.name} waits for {event}")

    class Cuda:
        Stream = staticmethod(lambda device: Stream("bus"))
        current_stream = staticmethod(lambda device: Stream())
        synchronize = staticmethod(lambda device: said.append("all wait"))

        @staticmethod
        @contextmanager
        def stream(stream):
            said.append(f"on {stream.name}")
            yield
            said.append(f"off {stream.name}")

    class Held:
        device = torch.device("cuda")

        def copy_(self, source, non_blocking=False):
            said.append(f"copy, non-blocking: {non_blocking}")

    monkeypatch.setattr(copy_streams.torch, "cuda", Cuda)
    copy_streams.CopyStreams(torch.device("cuda")).copy(Held(), Held())
    assert said == [
        *("all wait", "on bus", "copy, non-blocking: True", "bus marks", "off bus"),
        "main waits for mark",
    ]
