"""Proves which linears a fold has to send along. Needs vLLM installed; no engine is started."""

from __future__ import annotations

from secura_serve.serve.engine.worker_extension import with_siblings

PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
HELD = [
    f"model.layers.{i}.{name}"
    for i in range(2)
    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
                 "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
]  # fmt: skip


def test_packed_siblings_come_along_and_nothing_else():
    found = with_siblings(["model.layers.1.self_attn.v_proj"], PACKED, HELD)
    assert found == [f"model.layers.1.self_attn.{n}_proj" for n in "qkv"]
    assert with_siblings(["model.layers.0.mlp.down_proj"], PACKED, HELD) == [
        "model.layers.0.mlp.down_proj"
    ]
    assert with_siblings(HELD, PACKED, HELD) == HELD
    assert with_siblings([], PACKED, HELD) == []


def test_a_fused_checkpoint_has_no_siblings_to_send():
    assert with_siblings(["h.0.attn.c_attn"], {}, ["h.0.attn.c_attn", "h.0.attn.c_proj"]) == [
        "h.0.attn.c_attn"
    ]
