"""The curves of a run: loss and scores by step, as numbers and as a picture."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["draw", "points"]

_TRAIN = {"loss": "loss", "learning_rate": "learning_rate", "grad_norm": "grad_norm"}
_TRAIN["retention"] = "retention"
_EVAL = {"eval_loss": "loss", "eval_token_accuracy": "token_accuracy"}
_EVAL["eval_exact_match"] = "exact_match"


def points(history: Iterable[Mapping[str, Any]]) -> dict[str, list[dict[str, float]]]:
    """Return ``{"train": [...], "held_out": [...]}``, each entry with its ``step``.

    ``train`` holds the loss of the step, the learning rate, the norm of the gradient before
    clipping and the KL per token of ``--retain``; ``held_out`` loss, token
    accuracy and exact match.
    """
    curves: dict[str, list[dict[str, float]]] = {"train": [], "held_out": []}
    for entry in history:
        for name, wanted in (("train", _TRAIN), ("held_out", _EVAL)):
            values = {ours: entry[theirs] for theirs, ours in wanted.items() if theirs in entry}
            if "loss" in values:
                curves[name].append({"step": entry["step"], **values})
    return curves


def draw(curves: Mapping[str, list[dict[str, float]]], title: str) -> bytes | None:
    """Return the curves as a PNG; None where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    held_out = curves["held_out"]
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    loss, *rest = figure.subplots(1, 2 if held_out else 1, squeeze=False)[0]
    train = curves["train"]
    loss.plot([p["step"] for p in train], [p["loss"] for p in train], label="training", lw=1)
    if held_out:
        steps = [p["step"] for p in held_out]
        loss.plot(steps, [p["loss"] for p in held_out], "o-", label="held out")
        rest[0].plot(steps, [p["token_accuracy"] for p in held_out], "o-", color="C1")
        rest[0].set(xlabel="step", ylabel="held-out token accuracy")
    loss.set(xlabel="step", ylabel="loss per answer token", title=title)
    loss.legend()
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120, metadata={"Software": None})
    return picture.getvalue()
