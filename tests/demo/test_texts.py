"""Proves what needs no browser: that text of a model holds no HTML, how mixes, links, commands,
differences, cards and metrics are written and read.

Needs neither gradio nor a server.
"""

from __future__ import annotations

import json
import subprocess
import time
from urllib.parse import parse_qsl

import pytest

pytest.importorskip("openai")
from demo.adapters.card import card, gallery, size
from demo.adapters.search import matching
from demo.answer import Answer
from demo.chat.conversation import Conversation
from demo.chat.difference import ADDED, MISSING, difference
from demo.chat.mix import expression, parts_of
from demo.chat.safe_text import JOINER, safe_text, without_joiners
from demo.chat.share import Shared, as_curl, as_python, from_query, to_query
from demo.compare import LONGEST, Settings, parser
from demo.endpoint import explain, without_login
from demo.retention.layers import layer_table
from demo.retention.questions import QUESTIONS, right, table
from demo.retention.results import Point, Results, heat_table, read_results
from demo.retention.tab import front, named
from demo.server import Snapshot
from tests.support import ROOT
from tests.support.fake_server import adapter_card

MARK = "<img src=x onerror=alert(1)>"


@pytest.mark.parametrize(
    "text",
    [
        MARK,
        f"`{MARK}`",
        f"a `\n{MARK} ` b",
        f"| `{MARK} | ` |",
        f"> ```\n{MARK}",
        f"- a\n\n  ```\n  b\n{MARK}",
        f"    ```\n{MARK}",
        # The fence is the address of a link's definition, so what follows is text.
        f"[a]:\n```\n{MARK}",
        f"[a]: b\n'title\n```\n{MARK}",
        # All of these end the code.
        f"```\na\n```\n{MARK}",
        f"```\na\n   ````\n{MARK}",
        f"```\na\n```~~\n{MARK}",
        f"```\na\r```\r{MARK}",
        f"~~~\na\n~~~`\n{MARK}",
        f"``` a`b\n{MARK}",
        "<!-- x",
        "</div>",
        "<?php",
        "<svg/onload=x>",
        "<A HREF=x>",
    ],
)
def test_no_tag_is_left_where_markdown_could_read_one(text):
    shown = safe_text(text)
    assert f"<{JOINER}" in shown
    after = shown.rpartition(f"<{JOINER}")[2]
    assert "<img" not in after and without_joiners(shown) == text.replace("\r", "\n")


@pytest.mark.parametrize("before", ["", "- ", "> ", "  "])
def test_a_diagram_stays_code(before):
    text = f"{before}```mermaid\ngraph TD\n```"
    assert "```mermaid" not in safe_text(text) and without_joiners(safe_text(text)) == text


def test_code_and_ordinary_signs_stay_and_images_are_not_fetched():
    code = "Look:\n```html\n<b>bold</b>\n```\nand 1 < 2 <3"
    assert safe_text(code) == code
    assert safe_text("![a](http://evil.test/x)") == f"!{JOINER}[a](http://evil.test/x)"


def test_a_mix_is_written_as_the_server_reads_it_and_read_again():
    weights = {"sentiment": 0.5, "iso-date": 1, "b.c": -0.25, "d_e": 1e-05}
    assert expression(weights) == "sentiment*0.5+iso-date+b.c*-0.25+d_e*0"
    assert parts_of("sentiment*0.5+ iso-date", {"sentiment", "iso-date"}) == {
        "sentiment": 0.5,
        "iso-date": 1.0,
    }
    assert parts_of("other*2", {"sentiment"}) == parts_of("sentiment*x", {"sentiment"}) == {}
    assert expression({}) == ""


def test_a_link_carries_models_prompt_and_settings_there_and_back():
    shared = Shared(
        ("base", "a*0.5+b", "c@0123456789ab"),
        "what?\n&a=b #c",
        "be brief",
        Settings(7, 0.5, 0.9, None),
    )
    query = dict(parse_qsl(to_query(shared)))
    assert from_query(query, 4) == shared
    assert from_query(query, 2).models == ("base", "a*0.5+b")
    assert to_query(Shared(("base",))) == "models=base"
    assert from_query({}, 4) is None
    bad = {"models": "x", "temperature": "nan", "top_p": "-3", "max_tokens": "9999999", "seed": "x"}
    assert from_query(bad, 4).settings == Settings(LONGEST)
    bad = {"models": "x", "temperature": "none", "max_tokens": "none", "seed": "none"}
    assert from_query(bad, 4).settings == Settings(seed=None)
    # Larger ones cannot be written into the page.
    assert abs(from_query({"models": "x", "seed": "-" + "9" * 30}, 4).settings.seed) < 2**63


def test_the_commands_say_what_the_page_sends(tmp_path):
    nasty = 'it\'s "$(touch {})" `x` \\ \n{{}}'.format(tmp_path / "made")
    asks = [("a*0.5+b", [{"role": "user", "content": nasty}])]
    curl = as_curl("http://127.0.0.1:8000/v1", asks, Settings(5))
    shown = subprocess.run(
        ["bash", "-c", 'curl() { printf %s "${!#}"; }\n' + curl], capture_output=True, check=True
    )
    body = json.loads(shown.stdout)
    assert body["messages"][0]["content"] == nasty and body["model"] == "a*0.5+b"
    assert (body["max_tokens"], body["temperature"], body["seed"]) == (5, 0.0, 0)
    assert not (tmp_path / "made").exists()
    program = as_python("http://127.0.0.1:8000/v1", asks, Settings(5))
    assert repr(nasty) in program
    compile(program, "shared.py", "exec")


def test_differences_say_which_words_are_whose():
    pieces = difference("The sky is blue today.", "The sky is very blue")
    assert (
        "".join(text for text, label in pieces if label != MISSING).strip()
        == "The sky is very blue"
    )
    assert ("very ", ADDED) in pieces and ("today.", MISSING) in pieces
    assert difference("same  words", "same words") == [("same words", None)]
    assert difference("a b c", "a x c") == [
        ("a ", None),
        ("b ", MISSING),
        ("x ", ADDED),
        ("c", None),
    ]


@pytest.mark.parametrize("swapped", [False, True])
def test_answers_that_repeat_words_are_compared_at_once(swapped):
    pair = ["a " * 4000, "b a " * 99 + "end"]
    start = time.perf_counter()
    for first, other in (pair, ["x a " * 2000, "a b " * 2000]):
        if swapped:
            first, other = other, first
        pieces = difference(first, other)
        assert "".join(text for text, label in pieces if label != MISSING) == other
        kept = "".join(text for text, label in pieces if label != ADDED)
        assert kept.split() == first.split() or kept.split() == first.replace("end", " end").split()
    assert time.perf_counter() - start < 5


def test_a_conversation_sends_what_was_said_and_leaves_out_what_failed():
    talk = Conversation()
    first = talk.ask("base", "one")
    first.text, first.state = "1", "done"
    failed = talk.ask("base", "two")
    failed.state, failed.error = "failed", "no"
    talk.ask("base", "three")
    sent = talk.messages("be brief")
    assert [m["content"] for m in sent] == ["be brief", "one", "1", "three"]
    assert len(talk.shown()) == 6 and talk.shown()[3]["content"] == "**No answer.** no"
    failed.text = "```\nx"
    assert talk.shown()[3]["content"] == "```\nx\n```\n\n**This answer broke off.** no"


def test_a_card_shows_everything_and_escapes_what_others_wrote():
    shown = card(adapter_card("x", task=MARK, reason="<b>", recipe={"<i>": "<u>"}), ["base"])
    assert "<img" not in shown and "<b>" not in shown and "<i>" not in shown and "<u>" not in shown
    for fact in (
        "32 on 210 linears",
        "990 kB; a LoRA of this rank 39 MB (39.4 times)",
        "the base 0.505",
    ):
        assert fact in shown
    assert "2 versions" in shown and "?models=base%2Cx" in shown and "0f1e2d3c4b5a" in shown
    many = [adapter_card(f"a{i}") for i in range(100)]
    assert gallery(many, ["base"], 100).count("<article") == 60
    assert size(1_500_000_000) == "1.5 GB" and size(None) == ""
    bare = {"id": "y", "object": "adapter", "state": "refused", "reason": "NaN", "versions": []}
    assert "NaN" in card(bare, []) and "<a " not in card(bare, [])


def test_an_endpoint_is_an_address_and_shown_without_its_password():
    with pytest.raises(SystemExit):
        parser().parse_args(["x", "--endpoint", "http://[::1"])
    assert without_login("http://u:p@h:1/v1") == "http://h:1/v1"
    assert "p@" not in explain(ValueError("no"), "http://u:p@h:1/v1")


def test_search_and_filter():
    cards = [
        adapter_card("one", task="Dates."),
        adapter_card("two", state="resident", pinned=True, type="lora", magnorm=None),
    ]
    found = lambda text, wanted="all": [c["id"] for c in matching(cards, text, wanted)]  # noqa: E731
    assert found("") == found(None, None) == ["one", "two"]
    assert found("DATES one") == ["one"] and found("dates two") == []
    assert found("", "pinned") == found("", "resident") == found("", "LoRA") == ["two"]
    assert found("", "CUR") == ["one"]


def test_questions_count_what_is_kept():
    base = [Answer("base", wanted.split("|")[0], state="done") for _, wanted in QUESTIONS]
    kept = [Answer("x", each.text, state="done") for each in base]
    kept[0] = Answer("x", MARK, state="done")
    shown = table(base, kept)
    assert (
        "12 of 12 answered: 11 in the base's words; of the 12 that the base gets right, 11" in shown
    )
    assert "<img" not in shown and right("It is SEVEN.", "seven|7")


def test_layers_are_rows_whatever_the_modules_are_called():
    gpt2 = {"attn.c_proj": 0.02, "mlp.c_proj": 0.01, "mlp.c_fc": 0.0}
    shown = layer_table(
        "x", {f"transformer.h.{i}.{k}": v for i in (0, 10) for k, v in gpt2.items()}
    )
    heads = [f">{head}</th>" for head in ("layer", "attn.c_proj", "mlp.c_proj", "c_fc", "0", "10")]
    assert all(head in shown for head in heads) and shown.count("<tr>") == 3
    assert 'title="transformer.h.10.mlp.c_proj: 1 %">1.00</td>' in shown
    for most, said in ((1.5, "150"), (0.15, "15.0"), (0.001, "0.10"), (0.00012, "0.012")):
        assert f">{said}</td>" in layer_table("x", {"h.0.q": most})
    odd = layer_table("x", {"a.0.q": 0.0, "b.0.v": 0.0, MARK: 0.0})
    assert "a.0</th>" in odd and "b.0</th>" in odd and odd.count("not changed") == 6
    assert "<img" not in odd


def test_results_are_read_by_their_shape(tmp_path):
    good, bad = tmp_path / "continual.json", tmp_path / "bad.json"
    raw = {"tasks": ["a", "<b>"], "accuracy": "m", "matrix": {"m": [[1, 0], [0.5, 1]]}}
    good.write_text(json.dumps(raw))
    matrix = read_results([str(good)]).matrices[0]
    assert matrix.rows == ((1.0, 0.0), (0.5, 1.0)) and "&lt;b&gt;" in heat_table(matrix)
    partly = {"tasks": ["a"], "accuracy": "m", "matrix": {"m": [[float("nan")]]}}
    good.write_text(json.dumps(partly))
    assert "<td>–</td>" in heat_table(read_results([str(good)]).matrices[0])
    unknown = {"single": {"x": {"score": {"mean": float("nan")}, "kl": {"mean": 0.1}}}}
    good.write_text(json.dumps(unknown))
    assert read_results([str(good)]).points == ()
    for text in ("[" * 100_000, "[]", "{}", "no", json.dumps(raw | {"matrix": {"m": [[1]]}})):
        bad.write_text(text)
        with pytest.raises(ValueError, match="bad.json should be JSON of"):
            read_results([str(bad)])
    with pytest.raises(ValueError, match="cannot read"):
        read_results([str(tmp_path / "none")])


def test_the_shipped_experiment_is_the_measured_one():
    measured = json.loads((ROOT / "benchmarks/results/experiment/summary.json").read_text())
    shipped = read_results([str(ROOT / "adapters/experiment.json")]).points
    assert {p.name: (p.score, p.kl) for p in shipped} == {
        name: (facts["score"]["mean"], facts["kl"]["mean"])
        for name, facts in measured["single"].items()
    }
    assert {p.task for p in shipped} == {"iso-date"}


def test_the_picture_has_one_task_and_a_name_for_each_point():
    other = adapter_card("x", scores={"accuracy": 0.9, "base_accuracy": 0.1}, retention={"kl": 0.1})
    now = Snapshot(adapters=(adapter_card("a"), adapter_card("b"), other))
    points = (Point("far", 0.9, 4.4), Point("lora", 0.9, 0.1, "x"), Point("any", 0.5, 0.01))
    drawn = front(now, "a", Results(points))
    assert list(drawn["name"]) == ["any", "b", "a"] and list(drawn["what"])[-1] == "this adapter"
    assert list(front(now, "x", Results(points))["name"]) == ["lora", "any", "x"]
    assert named(drawn).index(">any<") < named(drawn).index(">a<") and named(drawn[:0]) == ""
