"""Proves which steps a batch launches: flags by kind of adapter, in the same tensors all the time.

Needs vLLM installed; no engine is started.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from secura_serve.serve.engine.batch_flags import CUR, DELTA, KINDS, LORA, BatchFlags
from secura_serve.serve.engine.manager import CURModelManager, CURWorkerManager, _packed


@pytest.fixture
def manager():
    """A manager of slots with one adapter of each kind, on "a GPU" that serves plain LoRA too."""
    meta = SimpleNamespace(no_lora_flag_cpu=torch.tensor([False]))
    lora = SimpleNamespace(loras={"model.layers.0.mlp": object()})
    made = SimpleNamespace(
        _registered_adapters={
            1: _packed(1, 8, torch.zeros(4), 8),
            2: lora,
            3: _packed(3, 8, torch.zeros(4), 0),
        },
        punica_wrapper_mapping={"model": SimpleNamespace(token_mapping_meta=meta)},
        flags=BatchFlags(),
        lora=torch.zeros(4, dtype=torch.bool),
        device=torch.device("cuda"),
    )
    made.kinds_of = lambda number: CURModelManager.kinds_of(made, number)
    return made


@pytest.mark.parametrize(
    ("numbers", "kinds"),
    [((), ()), ((1,), (CUR,)), ((2,), (LORA,)), ((1, 2), (CUR, LORA)), ((3,), KINDS)],
)
def test_the_flags_of_a_batch(numbers, kinds, manager, monkeypatch):
    monkeypatch.setattr(CURWorkerManager.__base__, "set_active_adapters", lambda *args: None)
    flags = {kind: manager.flags[kind] for kind in KINDS}
    requests = [SimpleNamespace(lora_int_id=number) for number in numbers]
    # super() needs an instance of the class; none is made without an engine.
    worker = CURWorkerManager.__new__(CURWorkerManager)
    worker._adapter_manager = manager
    worker.set_active_adapters(requests, None)
    assert {kind for kind, flag in flags.items() if flag} == set(kinds)
    skipped = manager.punica_wrapper_mapping["model"].token_mapping_meta.no_lora_flag_cpu
    assert bool(skipped) == (LORA not in kinds)


def test_all_steps_run_until_a_batch_says_otherwise():
    flags = BatchFlags()
    assert all(flags[kind] for kind in (CUR, LORA, DELTA))
    assert all(flags[kind].device.type == "cpu" and flags[kind].shape == () for kind in KINDS)
