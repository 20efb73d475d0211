"""One log record, one line of JSON; for our own lines, vLLM's and uvicorn's, in every process."""

from __future__ import annotations

from pythonjsonlogger.core import RESERVED_ATTRS
from pythonjsonlogger.json import JsonFormatter

__all__ = ["JsonLines"]


class JsonLines(JsonFormatter):
    """Formats a record as ``{"time", "level", "logger", "message"}``.

    ``time`` is in UTC. A traceback stands in ``exc_info``; ``process`` is vLLM's name of the
    process that wrote the line, where it has one.
    """

    def __init__(self) -> None:
        super().__init__(
            "%(levelname)s %(name)s %(message)s",
            timestamp="time",
            rename_fields={
                "levelname": "level",
                "name": "logger",
                "vllm_process_name": "process",
            },
            # uvicorn repeats its messages with colours.
            reserved_attrs=[*RESERVED_ATTRS, "color_message"],
        )
