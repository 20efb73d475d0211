"""Callbacks of transformers' Trainer: progress, early ends, fusion, exact resuming, pushes."""

from __future__ import annotations

from secura_serve.train.callbacks.fusion import Fusion
from secura_serve.train.callbacks.progress import Progress
from secura_serve.train.callbacks.pushing import PushCallback
from secura_serve.train.callbacks.resume import ExactResume
from secura_serve.train.callbacks.stopping import Divergence, Interrupt

__all__ = ["Divergence", "ExactResume", "Fusion", "Interrupt", "Progress", "PushCallback"]
