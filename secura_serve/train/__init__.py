"""Training of CUR adapters: a PEFT tuner, and ``secura-train`` on top of it.

The names below load on first use, so that the package itself stays instant for
``secura-train --help``. Any name of the tuner (``SecuraConfig`` to ``extend_peft_type``) makes PEFT
know the method: import one before ``PeftModel.from_pretrained``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from secura_serve.lazy import lazy

if TYPE_CHECKING:
    from secura_serve.train.callbacks import ExactResume, Fusion, PushCallback
    from secura_serve.train.continual import (
        AccuracyMatrix,
        SequenceConfig,
        Strategy,
        register_strategy,
        train_sequence,
        write_sequence,
    )
    from secura_serve.train.methods import (
        Method,
        PreparedModel,
        load_base,
        prepare,
        register_method,
    )
    from secura_serve.train.output.card import write
    from secura_serve.train.run import Run, train
    from secura_serve.train.settings import TrainConfig
    from secura_serve.train.tuner import (
        SecuraConfig,
        SecuraLayer,
        SecuraLinear,
        SecuraModel,
        adapter_layers,
        extend_peft_type,
    )

__all__ = [
    "AccuracyMatrix",
    "ExactResume",
    "Fusion",
    "Method",
    "PreparedModel",
    "PushCallback",
    "Run",
    "SecuraConfig",
    "SecuraLayer",
    "SecuraLinear",
    "SecuraModel",
    "SequenceConfig",
    "Strategy",
    "TrainConfig",
    "adapter_layers",
    "extend_peft_type",
    "load_base",
    "prepare",
    "register_method",
    "register_strategy",
    "train",
    "train_sequence",
    "write",
    "write_sequence",
]

if not TYPE_CHECKING:
    __getattr__ = lazy(
        __name__,
        {
            **dict.fromkeys(("ExactResume", "Fusion", "PushCallback"), "callbacks"),
            **dict.fromkeys(
                (
                    *("AccuracyMatrix", "SequenceConfig", "Strategy", "register_strategy"),
                    *("train_sequence", "write_sequence"),
                ),
                "continual",
            ),
            **dict.fromkeys(
                ("Method", "PreparedModel", "load_base", "prepare", "register_method"), "methods"
            ),
            **dict.fromkeys(("Run", "train"), "run"),
            "TrainConfig": "settings",
            "write": "output.card",
            **dict.fromkeys(
                (
                    *("SecuraConfig", "SecuraLayer", "SecuraLinear", "SecuraModel"),
                    *("adapter_layers", "extend_peft_type"),
                ),
                "tuner",
            ),
        },
    )
