"""What the six commands share: how a command line is read, how a failure is told, what it exits
with.

Exit status: 0 done, 1 the run failed, 2 the command was used wrongly (a wrong flag, or a name or
path that does not exist: ``SecuraError.wrong_use``), 130 Ctrl-C. An error is one message on stderr,
``secura-train: error: ...``; a traceback is left to faults of this package.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

from secura_serve import __version__
from secura_serve.errors import ConfigError, SecuraError
from secura_serve.suggest import near_names
from secura_serve.system.compiled import native_is_wanted
from secura_serve.system.os_errors import described

__all__ = ["CommandParser", "by_flags", "run_command", "suggest_flags"]

_FLAG = re.compile(r"--[a-zA-Z][\w-]*")


class CommandParser(argparse.ArgumentParser):
    """An argument parser with ``--version`` whose errors are one line with a suggestion."""

    def __init__(self, prog: str, *, description: str, epilog: str) -> None:
        super().__init__(
            prog=prog,
            description=description,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self.add_argument("--version", action="version", version=f"{prog} {__version__}")

    def flags(self) -> set[str]:
        """Return every flag that ``--help`` lists."""
        return set(_FLAG.findall(self.format_usage()))

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse as argparse does, but refuse a setting that is given under two of its names."""
        words = sys.argv[1:] if args is None else list(args)
        given: dict[str, dict[argparse.Action, str]] = {}
        for flag in (word.partition("=")[0] for word in words):
            if (action := self._option_string_actions.get(flag)) is not None:
                given.setdefault(action.dest, {})[action] = flag
        problems = [
            f"{' and '.join(flags.values())} are names of one setting; leave one out"
            for flags in given.values()
            if len(flags) > 1
        ]
        if problems:
            raise ConfigError("the settings are not valid:", problems)
        return super().parse_known_args(words, namespace)

    def error(self, message: str) -> NoReturn:
        """Raise ConfigError where argparse would print the usage and exit."""
        hint = suggest_flags(message, self.flags())
        raise ConfigError(f"{message}{hint} (--help lists the flags)")


def suggest_flags(message: str, known: Iterable[str]) -> str:
    """Return ``; did you mean --flag?`` for the unknown flags that ``message`` names, or nothing.

    Args:
        message: argparse's, ``unrecognized arguments: --adpater x``.
        known: the flags that there are.
    """
    if "unrecognized" not in message:
        return ""
    # Without the dashes, which all flags have in common.
    names = sorted(flag.removeprefix("--") for flag in known)
    unknown = [flag.removeprefix("--").replace("_", "-") for flag in _FLAG.findall(message)]
    close = [f"--{near}" for name in unknown for near in near_names(name, names, most=1)]
    return f"; did you mean {', '.join(dict.fromkeys(close))}?" if close else ""


def run_command(
    prog: str,
    call: Callable[[list[str]], int],
    argv: Sequence[str] | None = None,
    *,
    settings: type | None = None,
    interrupted: str = "",
    report: Callable[[str], None] | None = None,
) -> int:
    """Return the exit status of ``call(argv)``, its failures told in one line each.

    Args:
        prog: the command's name, which opens every message.
        call: the command; it raises a SecuraError, or returns its status.
        argv: the flags; by default those of this process.
        settings: the dataclass behind the flags: a problem with one of its fields, ``max_steps:
            got 0``, is told by the flag, ``--max-steps: got 0``.
        interrupted: what Ctrl-C left behind, for its message.
        report: prints one message; by default to stderr.
    """
    tell = report or _to_stderr
    try:
        # A wrong value would else be met in the middle of the work, where it is first asked for.
        native_is_wanted()
        status = call(list(sys.argv[1:] if argv is None else argv))
    except SecuraError as error:
        text = str(error)
        if settings is not None and isinstance(error, ConfigError):
            text = by_flags(text, settings)
        tell(f"{prog}: error: {text}")
        return 2 if error.wrong_use else 1
    except BrokenPipeError:
        # Who reads the output has seen enough, as with `| head`.
        _drop_output()
        return 1
    except OSError as error:
        tell(f"{prog}: error: {described(error)}")
        return 1
    except KeyboardInterrupt as stop:
        detail = "; ".join(filter(None, (str(stop) or "interrupted", interrupted)))
        tell(f"\n{prog}: {detail}")
        return 130
    try:
        # Started with its output closed (`>&-`), a process has none.
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:
        _drop_output()
        tell(f"{prog}: error: done, but the result cannot be printed: {described(error)}")
        return 1
    return status


def by_flags(text: str, settings: type) -> str:
    """Return a message with the flag where one of its problems begins with a field's name."""
    names = "|".join(item.name for item in dataclasses.fields(settings))
    return re.sub(
        rf"^(  - )?({names})(?=: )",
        lambda found: f"{found[1] or ''}--{found[2].replace('_', '-')}",
        text,
        flags=re.MULTILINE,
    )


def _drop_output() -> None:
    """Send what could not be printed to nowhere; it would fail again when Python exits."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr)
