"""Proves that a change of the base's files on disk is seen, whichever it is. Needs no vLLM."""

from __future__ import annotations

import os

import pytest

from secura_serve.serve.app.base_files import BaseFiles


@pytest.fixture
def base(tmp_path):
    for name in ("a.safetensors", "blob"):
        (tmp_path / name).write_bytes(b"weights")
    # As the hub's cache lies on disk.
    (tmp_path / "b.safetensors").symlink_to(tmp_path / "blob")
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def _replace(base):
    (base / "new").write_bytes(b"weights")
    (base / "new").replace(base / "a.safetensors")


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (_replace, "a.safetensors"),
        (lambda base: (base / "a.safetensors").unlink(), "a.safetensors"),
        (lambda base: (base / "a.safetensors").write_bytes(b"others"), "a.safetensors"),
        (lambda base: (base / "blob").unlink(), "b.safetensors"),
        (lambda base: (base / "c.safetensors").write_bytes(b""), "c.safetensors"),
    ],
)
def test_a_change_is_named(change, name, base):
    files = BaseFiles(base)
    change(base)
    assert files.changed() == name


def test_what_alters_no_weight_is_no_change(base):
    files = BaseFiles(base)
    (base / "config.json").write_text("[]")
    (base / "a.safetensors").chmod(0o600)
    os.link(base / "a.safetensors", base / "copy")
    assert files.changed() is None and BaseFiles(base / "nowhere").changed() is None
