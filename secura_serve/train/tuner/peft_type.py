"""Adds a member to PEFT's closed ``PeftType`` enum; a test pins this to PEFT 0.21."""

from __future__ import annotations

from peft.utils import PeftType, register_peft_method

__all__ = ["extend_peft_type", "register"]


def extend_peft_type(name: str) -> PeftType:
    """Add the member ``name`` to :class:`peft.PeftType`, or return the one that is there.

    ``register_peft_method`` refuses names that are not members, and Python offers no way to add a
    member to an enum, so its three internal tables are filled by hand.
    """
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    member._sort_order_ = len(PeftType._member_names_)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    type.__setattr__(PeftType, name, member)
    return member


def register(config_cls: type, model_cls: type) -> None:
    """Make PEFT know the SECURA method; safe to call twice."""
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    if extend_peft_type("SECURA") not in PEFT_TYPE_TO_TUNER_MAPPING:
        register_peft_method(name="secura", config_cls=config_cls, model_cls=model_cls)
