"""Proves that each token's slot is what vLLM itself would write, with padding left empty.

Needs vLLM installed; no engine is started.
"""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch
from vllm.lora.punica_wrapper.punica_base import PunicaWrapperBase
from vllm.lora.punica_wrapper.utils import convert_mapping

from secura_serve.serve import compat


class Wrapper(PunicaWrapperBase):
    """vLLM's wrapper without the steps themselves."""


Wrapper.__abstractmethods__ = frozenset()


def test_the_slots_are_those_that_vllm_writes():
    chance, wrapper = random.Random(0), Wrapper(64, 8, "cpu")
    compat.token_slots(wrapper).fill_(-1)
    compat.write_slots_only(wrapper)
    for tokens in (64, 7, 1, 33):
        held = chance.sample(range(1, 90), 8)
        for slot in chance.sample(range(8), 3):
            held[slot] = None
        numbers = [0, *(n for n in held if n)]
        ids = tuple(chance.choice(numbers) for _ in range(tokens))
        mapping = SimpleNamespace(index_mapping=ids, prompt_mapping=(0,))
        wrapper.update_metadata(mapping, held, 9, 32000)
        want = convert_mapping(mapping, held, 9, 32000, torch.device("cpu"))[0]
        assert torch.equal(wrapper.token_lora_indices, want)
        assert bool((compat.token_slots(wrapper)[tokens:] == -1).all())


def test_an_adapter_in_no_slot_is_not_served_as_the_base():
    wrapper = Wrapper(8, 8, "cpu")
    compat.write_slots_only(wrapper)
    with pytest.raises(KeyError, match=r"adapters \[5\] are in no slot"):
        wrapper.update_metadata(SimpleNamespace(index_mapping=(1, 5, 0)), [None, 1], 3, 1)
