"""Proves that a mode and a selection rule can be added from outside the package, by one call each,
and then work everywhere: a toy mode without a native form and a toy rule are trained, saved,
loaded, compared with their base, merged and folded; an unknown name is an error, never a default.

Needs torch and the tiny Llama of conftest; no vLLM, no network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import secura_serve
from secura_serve import ConfigError, MagNorm, Mode, Parameter, register_mode, register_rule
from secura_serve.checkpoint import Checkpoint
from secura_serve.errors import AdapterFormatError, UnservableError
from secura_serve.method import (
    apply,
    derivative,
    get_mode,
    mode_names,
    rule_names,
    rules,
    select,
    write,
)
from secura_serve.method.modes import base as modes
from secura_serve.method.modes.base import NativeForm
from secura_serve.registry import Registry
from tests.support.merging import make_adapter, tensors_of


def shrink(W: Tensor, delta: Tensor, parameters: Mapping[str, float], rho_max: Any) -> Tensor:
    """W' = W + Δ / (1 + k·|Δ|)."""
    return W + delta / (1 + parameters["k"] * delta.abs())


def largest_first(p: np.ndarray, key: str) -> np.ndarray:
    return -p


@pytest.fixture(autouse=True)
def toys(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Both registries with a toy in them, and as they were afterwards."""
    for registry in (modes._MODES, rules._RULES):
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    register_mode(Mode("shrink", shrink, parameters={"k": Parameter(3.0)}, combinable=True))
    register_rule("largest")(largest_first)
    yield


def norm(k: float = 5.0) -> MagNorm:
    return MagNorm("shrink", k=k)


def expected(W: Tensor, D: Tensor, k: float) -> Tensor:
    return W + D / (1 + k * D.abs())


def test_a_toy_mode_is_applied_and_has_a_derivative() -> None:
    W, D = torch.randn(9, 7).double(), torch.randn(9, 7).double()
    torch.testing.assert_close(apply(W, D, norm()), expected(W, D, 5))
    torch.testing.assert_close(derivative(W, D, norm()), (1 + 5 * D.abs()) ** -2)
    L, R = torch.randn(40, 3), torch.randn(3, 7)
    base, out = torch.randn(40, 7), torch.empty(40, 7, dtype=torch.bfloat16)
    stats = write(out, base, (L, R), norm(), measure=True)
    assert torch.equal(out, expected(base, L @ R, 5).bfloat16()) and stats is not None
    assert stats.moved == pytest.approx(float((out.float() - base).square().sum()), rel=1e-4)


def test_a_toy_mode_in_json() -> None:
    assert norm().to_json() == {"mode": "shrink", "k": 5.0}
    assert MagNorm.from_json({"mode": "shrink"}) == MagNorm("shrink", k=3.0) != norm()
    assert norm().k == 5.0 and hash(norm()) == hash(norm(5.0))
    for bad, said in (({"k": -1}, "finite number > 0"), ({"q": 1}, "allows k")):
        with pytest.raises(ConfigError, match=said):
            MagNorm.from_json({"mode": "shrink"} | bad)
    with pytest.raises(ConfigError, match="no parameter 'k'"):
        MagNorm("bounded", k=1)


def test_a_toy_mode_and_rule_go_through_save_load_merge_and_fold(
    tiny_base: Callable[[str], Path], tmp_path: Path
) -> None:
    base = tiny_base("llama")
    folder = make_adapter(base, tmp_path / "a", norm=norm(), rule="largest")
    adapter = secura_serve.load_adapter(folder)
    assert adapter.config.magnorm == norm() and adapter.config.selection["rule"] == "largest"
    checkpoint = Checkpoint(base)
    secura_serve.verify_adapter(adapter, checkpoint)
    saved = secura_serve.save_adapter(tmp_path / "b", adapter.config, adapter.modules)
    assert secura_serve.load_adapter(saved).config == adapter.config
    secura_serve.write_merge(
        secura_serve.plan_merge(str(base), [f"{folder}*0.5", str(saved)], tmp_path / "out")
    )
    before, after = tensors_of(base), tensors_of(tmp_path / "out")
    for name, cur in adapter.modules.items():
        W = checkpoint.weight(name)
        picked = select(W, 2, module=name, rule="largest").rows
        assert set(picked.tolist()) <= set(W.norm(dim=1).topk(2).indices.tolist())
        D = 1.5 * (W[:, cur.basis.cols] @ cur.U @ W[cur.basis.rows])
        key = f"{name}.weight"
        torch.testing.assert_close(after[key], expected(W, D, 5), rtol=1e-5, atol=1e-6)
        assert not torch.equal(after[key], before[key])


def test_a_toy_mode_and_rule_are_trained(tiny_base: Callable[[str], Path], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    base = tiny_base("llama")
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = secura_serve.SecuraConfig(
        r=4, target_modules=["q_proj"], magnorm={"mode": "shrink", "k": 2.0}, selection="largest"
    )
    model = peft.get_peft_model(model, config)
    tokens = torch.arange(3, 21)[None]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    losses = []
    for _ in range(6):
        loss = model(tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    logits = model(tokens).logits.detach()
    model.save_pretrained(tmp_path / "trained")
    secura_serve.write_merge(
        secura_serve.plan_merge(str(base), [str(tmp_path / "trained")], tmp_path / "out")
    )
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(merged(tokens).logits, logits, rtol=1e-4, atol=1e-4)


def test_a_mode_on_activations_that_needs_a_whole_new_form() -> None:
    register_mode(Mode("louder", lambda y, d, p, _: y + p["g"] * d, acts_on="activations",
                       parameters={"g": Parameter(2.0)}))  # fmt: skip
    y, d = torch.randn(3, 4), torch.randn(3, 4)
    louder = MagNorm("louder")
    assert torch.equal(secura_serve.method.apply_to_activations(y, d, louder), y + 2 * d)
    for call in (apply, derivative):
        with pytest.raises(ConfigError, match="acts on activations"):
            call(y, d, louder)
    with pytest.raises(ConfigError, match="acts on activations"):
        write(y, y, d, louder)


def test_a_mode_with_rho_max_is_stored_with_it(
    tiny_base: Callable[[str], Path], tmp_path: Path
) -> None:
    by_peak = Mode("by_peak", lambda W, D, p, peak: W + D / float(peak), needs_rho_max=True)
    register_mode(by_peak)
    folder = make_adapter(tiny_base("llama"), tmp_path / "a")
    adapter = secura_serve.load_adapter(folder)
    config = replace(adapter.config, magnorm=MagNorm("by_peak"))
    with pytest.raises(AdapterFormatError, match="'by_peak' needs secura_rho_max"):
        secura_serve.save_adapter(tmp_path / "b", config, adapter.modules)
    # Without one that is given it is that of the whole update, also where it comes in blocks.
    W, L, R = torch.rand(40, 2**14) + 1, torch.rand(40, 2), torch.rand(2, 2**14)
    out, peak = torch.empty_like(W), ((L @ R) / (W + 1e-8)).max()
    write(out, W, (L, R), MagNorm("by_peak"))
    torch.testing.assert_close(out, W + L @ R / peak)
    with pytest.raises(secura_serve.MergeError, match="alone and with weight 1"):
        modules = {n: replace(c, rho_max=1.0) for n, c in adapter.modules.items()}
        saved = secura_serve.save_adapter(tmp_path / "c", config, modules)
        secura_serve.plan_merge(str(tiny_base("llama")), [f"{saved}*2"], tmp_path / "out")


@pytest.mark.parametrize("name", ["best", "", None, ["bounded"], 3])
def test_an_unknown_name_is_an_error_that_lists_what_is_allowed(name: Any) -> None:
    with pytest.raises(ConfigError, match="unknown magnorm mode .*none, published, bounded"):
        MagNorm(name)
    with pytest.raises(ConfigError, match="unknown magnorm mode .*shrink"):
        MagNorm.from_json({"mode": name})
    with pytest.raises(ConfigError, match="unknown selection rule .*inverse_sampled, lowest_norm"):
        select(torch.rand(4, 4), 2, module="m", rule=name)


def test_names_are_taken_once_and_entries_are_checked() -> None:
    assert mode_names()[:5] == ("none", "published", "bounded", "reference", "activation")
    assert rule_names()[:2] == ("inverse_sampled", "lowest_norm")
    with pytest.raises(ConfigError, match="registered already"):
        register_mode(Mode("bounded", shrink))
    with pytest.raises(ConfigError, match="registered already"):
        register_rule("lowest_norm")(largest_first)
    assert register_mode(get_mode("bounded")) is get_mode("bounded")
    with pytest.raises(ConfigError, match="non-empty string"):
        Registry[int]("thing").add("", 1)
    with pytest.raises(ConfigError, match="no form 'other'"):
        Mode("x", shrink, native=NativeForm("other"))
    with pytest.raises(ConfigError, match="allowed: weights, activations"):
        Mode("x", shrink, acts_on="weight")  # type: ignore[arg-type]
    register_rule("broken")(lambda p, key: p[:1])
    with pytest.raises(ConfigError, match="one score for each of 4"):
        select(torch.rand(4, 4), 2, module="m", rule="broken")


def test_adapters_of_a_mode_that_cannot_be_combined_stay_alone(
    tiny_base: Callable[[str], Path],
) -> None:
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    register_mode(Mode("alone", shrink, parameters={"k": Parameter(3.0)}))
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_base("llama"))
    config = secura_serve.SecuraConfig(r=4, target_modules=["q_proj"], magnorm="alone")
    model = peft.get_peft_model(model, config)
    model.add_adapter("two", config)
    with pytest.raises(UnservableError, match="cannot be combined"):
        model.base_model.merge_adapter(["default", "two"])
