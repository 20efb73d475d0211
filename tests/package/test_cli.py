"""Proves that the six commands answer wrong use alike: exit status, one message, suggestions.

2 for a wrong use, 1 for a failed run, 130 for Ctrl-C; never a traceback or a page of usage. Needs
no engine; what concerns unknown flags of ``secura-serve`` imports vLLM, which alone knows its own.
"""

from __future__ import annotations

import errno
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from demo.app import main as demo
from secura_serve import __version__
from secura_serve.command import by_flags, run_command, suggest_flags
from secura_serve.errors import ConfigError, MergeError
from secura_serve.evaluate.main import main as evaluate
from secura_serve.merge.main import main as merge
from secura_serve.serve.app.main import main as serve
from secura_serve.train.basis.main import main as basis
from secura_serve.train.main import main as train

COMMANDS = {
    "secura-basis": basis,
    "secura-train": train,
    "secura-merge": merge,
    "secura-eval": evaluate,
    "secura-serve": serve,
    "secura-demo": demo,
}
TRAIN = "--data d.jsonl --out never"
EVAL = "--tasks iso-date --base smollm2-135m --out never"

# command line -> exit status, and what the message must say.
WRONG: list[tuple[str, int, tuple[str, ...]]] = [
    (f"secura-train {TRAIN} --bse x", 2, ("--bse", "did you mean --base?", "--help")),
    (f"secura-train {TRAIN} --lr fast", 2, ("--lr", "fast")),
    (f"secura-train {TRAIN} --set learning=1", 2, ("learning: unknown",)),
    (f"secura-train {TRAIN} --set leraning_rate", 2, ("KEY=VALUE",)),
    ("secura-train --config nowhere.yaml --out never", 2, ("nowhere.yaml",)),
    ("secura-train --base smollm2-135m --data nowhere.jsonl --out never", 2, ("nowhere.jsonl",)),
    ("secura-train --base smollm2-135m --data /no/where --out never", 2, ("/no/where",)),
    (f"secura-train {TRAIN} --base x --method secra", 2, ("did you mean 'secura'?", "curlora")),
    (f"secura-train {TRAIN} --base x --magnorm bouded", 2, ("did you mean 'bounded'?",)),
    ("secura-basis --base x", 2, ("--out",)),
    ("secura-basis --base x --out never --lenght 9", 2, ("did you mean --length?",)),
    ("secura-basis --base x --out never --columns norm", 2, ("columns", "gradient")),
    ("secura-basis --base x --out never --sequences 0", 2, ("sequences", ">= 1")),
    ("secura-basis --base x --out .", 2, ("is a folder",)),
    ("secura-basis --base smollm2-135 --out never", 2, ("did you mean 'smollm2-135m'?",)),
    (f"secura-train {TRAIN} --base x --basis nowhere", 2, ("no basis file nowhere",)),
    (
        f"secura-train {TRAIN} --base x --basis b --selection lowest_norm",
        2,
        ("selection: lowest_norm", "calibrated"),
    ),
    ("secura-merge --base x --adpater y --out never", 2, ("did you mean --adapter?",)),
    ("secura-merge --base x", 2, ("--out",)),
    ("secura-merge --out never", 2, ("--base is missing",)),
    ("secura-merge --base x --adapter y --out never --dtype int8", 2, ("int8", "bfloat16")),
    ("secura-merge --base x --adapter y --out never --rank 2", 2, ("--approximate",)),
    ("secura-merge --base x --adapter y --out never --check --to-lora", 2, ("only one of them",)),
    ("secura-merge --base nowhere/x --adapter y*1e30 --out never", 2, ("1e30", "1000")),
    ("secura-merge --base nowhere/x --adapter y*nan --out never", 2, ("nan", "1000")),
    ("secura-merge --base ./nowhere --adapter y --out never", 2, ("nowhere", "y: no such folder")),
    ("secura-merge --to-base smollm2-135 --out x", 2, ("did you mean 'smollm2-135m'?",)),
    ("secura-merge --to-base smollm2-135m --out nowhere", 2, ("nowhere",)),
    (f"secura-eval {EVAL} --taks x", 2, ("did you mean --tasks?",)),
    (f"secura-eval {EVAL} --limit -1", 2, ("limit", ">= 0")),
    (f"secura-eval {EVAL} --limit many", 2, ("--limit", "many")),
    (f"secura-eval {EVAL} --split tests", 2, ("tests", "validation")),
    ("secura-eval --tasks iso-date --out never", 2, ("--endpoint", "--base")),
    (
        "secura-eval --tasks iso-dat --base x --no-retention --out never",
        2,
        ("'iso-dat': unknown; allowed: arc_challenge, ", "'iso-date'?", "no base model 'x'"),
    ),
    (
        "secura-eval --tasks iso-date --endpoint http://127.0.0.1:9 --no-retention --out never",
        1,
        ("cannot be reached",),
    ),
    ("secura-serve --adapter DIR --check", 2, ("--adapter", "did you mean --adapters?")),
    ("secura-serve --max-modle-len 9 --check", 2, ("did you mean --max-model-len?",)),
    ("secura-serve --ui-port many", 2, ("--ui-port", "many")),
    ("secura-serve --base ./nowhere --check", 2, ("nowhere",)),
    (
        "secura-serve --adapters ./nowhere --check",
        2,
        ("--adapters ./nowhere: does not exist", "leave the flag out"),
    ),
    ("secura-serve --adapters= --check", 2, ("--adapters: is empty",)),
    (f"secura-train {TRAIN} --base x --max-steps 0", 2, ("  - --max-steps: got 0",)),
    ("secura-merge --base x --out never --merge-method ties --density 3", 2, ("--density: got 3",)),
    ("secura-serve --resident -1 --check", 2, ("  - --resident: got -1",)),
    ("secura-demo --foo", 2, ("--foo (--help lists the flags)",)),
    ("secura-demo --prot 9000", 2, ("did you mean --port?",)),
    ("secura-demo --share all", 2, ("--share", "'public'")),
    ("secura-demo --auth me", 2, ("--auth should be USER:PASSWORD",)),
    ("secura-demo --examples nowhere.json", 2, ("nowhere.json", "No such file or directory")),
    ("secura-demo --results file.txt", 2, ("file.txt should be JSON of",)),
    (
        f"secura-train {TRAIN} --base x --lr 1e-3 --learning-rate 2e-3",
        2,
        ("--lr and --learning-rate are names of one setting",),
    ),
    (
        f"secura-train {TRAIN} --base x --magnorm bounded --tau 0.1 --magnorm-parameters tau=0.5",
        2,
        ("--tau: given in magnorm_parameters, too",),
    ),
    (
        f"secura-train {TRAIN} --base x --magnorm published --magnorm-parameters t=0.5",
        2,
        ("published has no parameter 't'; allowed: scale, eps",),
    ),
    # The same fault ends alike wherever it is met.
    ("secura-train --base empty --data rows.jsonl --out never", 2, ("has no config.json",)),
    ("secura-basis --base empty --out never", 2, ("has no config.json",)),
    ("secura-serve --base empty --check", 2, ("has no config.json",)),
    ("secura-serve --base file.txt --check", 2, ("has no config.json",)),
    ("secura-train --base x --data rows.jsonl --out file.txt/never", 2, ("cannot be written",)),
    ("secura-basis --base x --out file.txt/never", 2, ("cannot be written", "--out")),
    ("secura-merge --base empty --adapter y --out file.txt/never", 2, ("cannot be written",)),
    ("secura-eval --tasks iso-date --base x --out file.txt/never", 2, ("cannot be written",)),
    ("secura-eval --write-data file.txt", 2, ("--write-data", "is a file; name a folder")),
    ("secura-eval --write-data file.txt/never", 2, ("--write-data", "cannot be written")),
    ("secura-train --base x --data folder.jsonl --out never", 2, ("folder.jsonl: cannot be read",)),
    ("secura-train --base x --data no.parquet --out never", 2, ("no.parquet: cannot be read",)),
    ("secura-train --base x --data empty --out never", 2, ("empty: is a folder", "name one")),
    ("secura-merge --base empty --adapter holder --out never", 2, ("such as holder/one",)),
    ("secura-merge --to-base smollm2-135m --out empty", 2, ("give a merged checkpoint",)),
    (
        f"secura-train {TRAIN} --base x --push-to notaurl",
        2,
        ("--push-to: got 'notaurl'", "http://"),
    ),
    (
        "secura-eval --tasks iso-date --endpoint nope --out never",
        2,
        ("--endpoint: got 'nope'", "http://"),
    ),
    ("secura-serve --ui-port -5 --check", 2, ("--ui-port: got -5", "1 to 65535")),
    ("secura-serve --port 99999 --check", 2, ("--port: got 99999", "1 to 65535")),
    ("secura-demo --port 99999", 2, ("--port: got 99999", "1 to 65535")),
    ("secura-demo --port x", 2, ("--port: got x", "1 to 65535")),
    ("secura-demo --endpoint nope", 2, ("--endpoint: got 'nope'", "http://")),
]


def _put_files(folder: Path) -> None:
    """Make what the command lines name beside what is not there."""
    for name in ("empty", "folder.jsonl", "holder/one"):
        (folder / name).mkdir(parents=True)
    (folder / "file.txt").write_text("text")
    (folder / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (folder / "holder" / "one" / "adapter_config.json").write_text("{}")


@pytest.mark.long
@pytest.mark.parametrize(("line", "status", "said"), WRONG, ids=[line for line, _, _ in WRONG])
def test_wrong_use_is_told_in_one_message(
    line: str,
    status: int,
    said: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    _put_files(tmp_path)
    prog, *argv = line.split()
    assert COMMANDS[prog](argv) == status
    printed = capsys.readouterr()
    assert printed.err.startswith(f"{prog}: error: ") and printed.err.count(f"{prog}: ") == 1
    assert all(part in printed.err for part in said), printed.err
    assert "Traceback" not in printed.err and "usage:" not in printed.err
    # Several problems are a list, one a line.
    _, *more = printed.err.splitlines()
    assert all(rest.startswith("  - ") for rest in more), printed.err
    assert not printed.out and not (tmp_path / "never").exists()


@pytest.mark.parametrize("prog", COMMANDS)
def test_version_and_help_end_with_0(prog: str, capsys: pytest.CaptureFixture[str]) -> None:
    for flag, said in (("--version", f"{prog} {__version__}\n"), ("--help", "--version")):
        with pytest.raises(SystemExit) as stopped:
            COMMANDS[prog]([flag])
        assert not stopped.value.code
        assert said in capsys.readouterr().out


def test_python_is_told_the_setting_where_the_command_line_is_told_the_flag() -> None:
    from secura_serve.config import build
    from secura_serve.merge.config import MergeConfig

    with pytest.raises(ConfigError) as caught:
        build(MergeConfig, {"out": "x", "base": "b", "merge_method": "ties", "density": 3.0})
    assert caught.value.problems == ("density: got 3.0, must be between 0 and 1",)
    assert str(caught.value).startswith("the settings are not valid:\n")
    said = "the settings are not valid:\n  - merge_seed: no\n  - rank and density: no"
    told = by_flags(said, MergeConfig)
    assert told == said.replace("- merge_seed", "- --merge-seed")


def _raiser(error: BaseException) -> Callable[[list[str]], int]:
    def call(argv: list[str]) -> int:
        raise error

    return call


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (ConfigError("--x is wrong"), 2, "error: --x is wrong"),
        (MergeError("it failed"), 1, "error: it failed"),
        (MergeError("no such folder", wrong_use=True), 2, "error: no such folder"),
        (
            OSError(errno.ENOSPC, "No space left on device", "/full/file"),
            1,
            "error: No space left on device: /full/file",
        ),
        (OSError("odd"), 1, "error: odd"),
        (KeyboardInterrupt(), 130, "interrupted; nothing was written"),
    ],
)
def test_each_failure_has_its_status(
    error: BaseException, status: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    call = _raiser(error)
    assert run_command("secura-x", call, [], interrupted="nothing was written") == status
    assert capsys.readouterr().err.strip() == f"secura-x: {said}"


@pytest.mark.parametrize(
    ("value", "status"), [("", 0), ("1", 0), ("off", 0), ("False", 0), ("banana", 2), ("2", 2)]
)
def test_the_switch_of_compiled_code_is_on_or_off(
    value: str, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SECURA_NATIVE", value)
    assert run_command("secura-x", lambda argv: 0, []) == status
    said = "SECURA_NATIVE=" + value + ": allowed: 1, true, on, 0, false, off"
    assert (said in capsys.readouterr().err) == (status == 2)


def test_a_fault_of_ours_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        run_command("secura-x", _raiser(ZeroDivisionError()), [])


def test_a_command_without_an_output_ends_as_it_would() -> None:
    code = "from secura_serve.cli import evaluate; evaluate()"
    shell = f"{sys.executable} -c '{code}' --list >&-"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr


def test_a_reader_that_leaves_early_is_no_error() -> None:
    code = "from secura_serve.cli import evaluate; evaluate()"
    shell = f"{sys.executable} -c '{code}' --list | head -c 1"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=True)
    assert done.stdout and not done.stderr


def test_no_line_of_vllms_stands_before_an_error() -> None:
    code = (
        "import logging, secura_serve.serve.console as _; "
        "log = logging.getLogger('vllm.triton_utils.importing'); "
        "log.warning('Triton is installed, but does not include CPU backend'); log.warning('more')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.split() == ["more"]


def test_suggestions_are_near_or_none() -> None:
    known = {"--adapters", "--max-model-len"}
    assert suggest_flags("unrecognized arguments: --adapter x", known).endswith("--adapters?")
    assert "--max-model-len" in suggest_flags("unrecognized arguments: --max_model_le=3", known)
    assert not suggest_flags("unrecognized arguments: --zzz", known)
    assert not suggest_flags("expected one argument: --adapter", known)


def test_old_flags_are_accepted_with_a_notice(capsys: pytest.CaptureFixture[str]) -> None:
    from secura_serve.config import build
    from secura_serve.evaluate.config import EvalConfig
    from secura_serve.evaluate.main import parser

    argv = [*EVAL.split(), "--items", "3", "--shots", "1"]
    config = build(EvalConfig, {k: v for k, v in vars(parser().parse_args(argv)).items()
                                if k not in ("list", "write_data")})  # fmt: skip
    assert (config.limit, config.num_fewshot) == (3, 1)
    said = capsys.readouterr().err
    assert "--items is now called --limit" in said
    assert "--shots is now called --num-fewshot" in said
    assert "--items" not in parser().format_help()


def test_old_keys_are_accepted_unless_the_new_one_is_there_too(
    capsys: pytest.CaptureFixture[str],
) -> None:
    from secura_serve.config import build
    from secura_serve.evaluate.config import EvalConfig

    values = {"tasks": ["iso-date"], "base": "x", "out": "y", "items": 3}
    assert build(EvalConfig, values).limit == 3
    assert "items is now called limit" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="items is the old name of limit"):
        build(EvalConfig, values | {"limit": 4})
