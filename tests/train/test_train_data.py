"""Proves that secura-train reads JSONL, CSV, parquet and what the ``datasets`` library finds alike,
and that data which cannot be used is refused with file, line or row, and field.

Needs datasets (with pyarrow) and the tiny bases of conftest.py; no hub: a folder stands for one.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from transformers import AutoTokenizer

from secura_serve.errors import DataError
from secura_serve.train.data import IGNORE, encode
from secura_serve.train.data.records import read, read_jsonl
from secura_serve.train.main import main
from tests.support.training import PAIRS, flags, write

TinyBase = Callable[[str], Path]
COLUMNS = {"prompt": "question", "completion": "answer"}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write_csv(file: Path, rows: list[dict[str, Any]]) -> Path:
    with file.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(
            handle, list(rows[0]), delimiter="\t" if "tsv" in file.name else ","
        )
        writer.writeheader()
        writer.writerows(rows)
    return file


def write_parquet(file: Path, rows: list[dict[str, Any]]) -> Path:
    datasets.Dataset.from_list(rows).to_parquet(file)
    return file


def test_every_source_gives_the_same_examples(tmp_path: Path) -> None:
    renamed = [{COLUMNS[k]: v for k, v in pair.items()} for pair in PAIRS]
    hub = tmp_path / "hub"
    hub.mkdir()
    write_parquet(hub / "test.parquet", renamed)
    wanted = read_jsonl(write(tmp_path / "plain.jsonl", PAIRS))
    for source in (
        str(write(tmp_path / "d.jsonl", renamed)),
        str(write_csv(tmp_path / "d.csv", renamed)),
        str(write_csv(tmp_path / "d.tsv", renamed)),
        str(write_parquet(tmp_path / "d.parquet", renamed)),
        f"{hub}:test",
    ):
        found = read(source, columns=COLUMNS)
        assert [(r.messages, r.answer) for r in found] == [(r.messages, r.answer) for r in wanted]
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    talk = write_parquet(tmp_path / "talk.parquet", [{"chat": turns}])
    assert read(str(talk), columns={"messages": "chat"})[0].answer == "b"


def test_faults_are_named_by_row_and_field(tmp_path: Path) -> None:
    rows = [
        *PAIRS[:2],
        {"prompt": "two\nlines", "completion": ""},
        {"prompt": "", "completion": "x"},
    ]
    with pytest.raises(DataError) as caught:
        read(str(write_csv(tmp_path / "bad.csv", rows)))
    # Line numbers of the file, though a quoted field takes two lines.
    assert "bad.csv:4: field 'completion'" in caught.value.problems[0]
    assert "bad.csv:6: field 'prompt'" in caught.value.problems[1]
    with pytest.raises(DataError, match="bad.parquet row 3: field 'completion'"):
        read(str(write_parquet(tmp_path / "bad.parquet", rows)))
    with pytest.raises(DataError, match="no field 'question' and no field 'answer'; there are 'pr"):
        read(str(write_csv(tmp_path / "names.csv", PAIRS)), columns=COLUMNS)
    for text, said in (
        ("prompt,completion\nSay, please: hi,hi\n", "ragged.csv:2: 3 values for 2 columns; quote"),
        ("prompt,completion\na,b\nc\n", "ragged.csv:3: field 'completion' must be a non-empty"),
        ("prompt,prompt,completion\na,b,c\n", "ragged.csv:1: a column name is given twice"),
        ("prompt;completion\na;b\n", "there are 'prompt;completion'"),
    ):
        (tmp_path / "ragged.csv").write_text(text)
        with pytest.raises(DataError, match=said):
            read(str(tmp_path / "ragged.csv"))
    (tmp_path / "latin.csv").write_bytes(b"prompt,completion\nx,y\n\xe9,z\n")
    with pytest.raises(DataError, match="latin.csv:3: not UTF-8"):
        read(str(tmp_path / "latin.csv"))
    (tmp_path / "quote.csv").write_text('prompt,completion\nx,"y\n')
    with pytest.raises(DataError, match="quote.csv:2: unexpected end"):
        read(str(tmp_path / "quote.csv"))
    (tmp_path / "torn.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="torn.parquet: not a whole parquet file"):
        read(str(tmp_path / "torn.parquet"))
    os.mkfifo(tmp_path / "pipe.parquet")
    with pytest.raises(DataError, match="pipe.parquet: cannot be read: it is no regular file"):
        read(str(tmp_path / "pipe.parquet"))
    datasets.Dataset.from_dict({"prompt": [], "completion": []}).to_parquet(tmp_path / "e.parquet")
    with pytest.raises(DataError, match="e.parquet: no examples"):
        read(str(tmp_path / "e.parquet"))
    for missing in ("none.csv", "none.parquet", "none.jsonl"):
        with pytest.raises(DataError, match="cannot be read"):
            read(str(tmp_path / missing))
    (tmp_path / "head.csv").write_text("prompt,completion\n")
    with pytest.raises(DataError, match="no examples"):
        read(str(tmp_path / "head.csv"))


def test_what_is_on_no_hub_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nobody/nothing:train: cannot be loaded as a data set"):
        read("nobody/nothing:train")
    with pytest.raises(DataError, match="must be id"):
        read("a:b:c:d")
    write_parquet(tmp_path / "train.parquet", PAIRS)
    with pytest.raises(DataError, match='cannot be loaded as a data set: Unknown split "dev"'):
        read(f"{tmp_path}:dev")


@pytest.mark.parametrize(
    "line, said",
    [
        ('{"prompt": "a", "completion": ', "not valid JSON: Expecting value at column 31"),
        ('{"prompt": "a", "completion": "b", "completion": "c"}', "'completion' is given twice"),
        ('{"prompt": "a"}', "no field 'completion'; there are 'prompt'"),
        ('{"prompt": "a", "messages": []}', "holds field 'messages' and 'prompt' or 'completion'"),
        ('{"messages": [{"role": "assistant", "content": "a"}, {"role": "assistant",'
         ' "content": "b"}]}', "must hold a user's message before the answer"),
    ],
)  # fmt: skip
def test_what_a_json_line_cannot_say(tmp_path: Path, line: str, said: str) -> None:
    (tmp_path / "d.jsonl").write_text(line + "\n")
    with pytest.raises(DataError, match="d.jsonl:1: ") as caught:
        read_jsonl(tmp_path / "d.jsonl")
    assert said in str(caught.value)


def test_a_completion_outside_the_labels_is_named(tmp_path: Path, tiny_base: TinyBase) -> None:
    rows = [{"prompt": "x", "completion": c} for c in ("good", "bad", "so-so")]
    file = write(tmp_path / "c.jsonl", rows)
    with pytest.raises(DataError, match=r"c.jsonl:3: field 'completion' 'so-so' is not one of"):
        read(str(file), labels=["good", "bad"])
    assert main(flags(tiny_base("llama"), file, tmp_path / "o", "--labels", "good, bad")) == 1
    assert len(read(str(file), labels=["good", "bad", "so-so"])) == 3


def test_line_separators_inside_a_string_do_not_end_the_line(tmp_path: Path) -> None:
    file = tmp_path / "u.jsonl"
    file.write_text(json.dumps({"prompt": "a\u2028b", "completion": "c"}, ensure_ascii=False))
    assert read_jsonl(file)[0].messages[0]["content"] == "a\u2028b"


def test_over_long_examples(tmp_path: Path, tiny_base: TinyBase) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_base("llama"))
    rows = [PAIRS[0], {"prompt": "x", "completion": "y " * 99}]
    records = read_jsonl(write(tmp_path / "d.jsonl", rows))
    with pytest.raises(DataError, match=r"d.jsonl:2: \d+ tokens, --max-length is 60"):
        encode(records, tokenizer, 60)
    whole = encode(records, tokenizer, 512)
    assert encode(records, tokenizer, 60, "skip") == whole[:1]
    cut = encode(records, tokenizer, 60, "truncate")
    assert cut[0] == whole[0] and cut[1]["labels"] == whole[1]["labels"][:60]
    assert cut[1]["labels"][-1] != IGNORE
    for how, message in (("truncate", "d.jsonl:1: the prompt alone"), ("skip", "no example")):
        with pytest.raises(DataError, match=message):
            encode(records, tokenizer, 8, how)
