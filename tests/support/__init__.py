"""What tests of several rooms share: servers, bases, data, oracles."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
"""The checkout."""
