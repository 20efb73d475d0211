"""Proves that a mix answers as the weighted sum of its parts, beside its parts, other mixes and the
base in one batch; that what comes down to less is that, bit for bit; and what is refused.

Needs vLLM on a CPU and a tiny base; one float32 server with fewer slots than mixes. Two oracles:
transformers on weights folded in float64, and on the checkpoint that secura-merge writes for the
same expression.
"""

from __future__ import annotations

import asyncio
import copy
import json
import random
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass

import httpx
import openai
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from secura_serve.merge import plan_merge, write_merge
from secura_serve.method import MagNorm
from tests.support import agreement, oracle
from tests.support.engines import Served, random_adapter, random_fine_tune, random_lora, serving

FLAGS = ("--enforce-eager", "--dtype", "float32", "--max-model-len", "512", "--max-loras", "4")
# Fewer places than full-rank adapters and mixes of them.
FLAGS += ("--resident", "3", "--resident-dtype", "float32")
MIXES = {
    "one*0.5+two": [("one", 0.5), ("two", 1.0)],
    "two*-0.75+one*1.5": [("two", -0.75), ("one", 1.5)],
    # Of other rank, on a basis of its own, and on some linears only.
    "three+one*0.3 + few*0.25": [("three", 1.0), ("one", 0.3), ("few", 0.25)],
    "three * -1": [("three", -1.0)],
    "one*0.1+one*0.2+one*0.3": [("one", 0.6)],
}


@dataclass
class Running:
    served: Served
    http: httpx.Client

    def ask(self, model: object, path: str = "/v1/completions", **body: object) -> httpx.Response:
        known = {"prompt": "One two three", "max_tokens": 8, "temperature": 0, "logprobs": 3}
        named = {} if model is None else {"model": model}
        return self.http.post(path, json=known | named | body)

    def answer(self, model: object, **body: object) -> tuple[object, str]:
        """What tells weights apart to the last bit, and what the answer calls its model."""
        reply = self.ask(model, **body)
        assert reply.status_code == 200, reply.text
        return reply.json()["choices"][0]["logprobs"]["top_logprobs"], reply.json()["model"]

    def refusal(self, model: object, **body: object) -> tuple[int, str]:
        reply = self.ask(model, **body)
        return reply.status_code, reply.json()["error"]["message"]


@pytest.fixture(scope="module")
def started(tiny_base, tmp_path_factory) -> Iterator[Running]:
    base, root = tiny_base("llama"), tmp_path_factory.mktemp("mixes")
    folder = root / "adapters"
    random_adapter(base, folder / "one", r=6, seed=1)
    random_adapter(base, folder / "two", r=4, seed=2)
    random_adapter(base, folder / "three", r=5, seed=3, rule="lowest_norm")
    random_adapter(base, folder / "few", r=4, seed=4, only=["q_proj", "down_proj"], size=2.0)
    random_adapter(base, folder / "large", r=4, seed=5, size=40.0)
    for seed, name, tau in (
        (6, "bounded", 0.2),
        (7, "bounded-too", 0.2),
        (8, "bounded-other", 0.3),
    ):
        norm = MagNorm("bounded", tau=tau)
        random_adapter(base, folder / name, r=4, seed=seed, magnorm=norm, size=8)
    random_fine_tune(base, folder / "tuned", seed=9, only=["v_proj", "up_proj"])
    random_lora(base, folder / "lora", r=4, seed=7, only=["q_proj"])
    with (
        serving(base, folder, root / "log", *FLAGS) as server,
        httpx.Client(base_url=server.url.removesuffix("/v1"), timeout=120) as http,
    ):
        yield Running(server, http)


def check(started: Running, models: dict[str, object]) -> None:
    """Ask every model all prompts in one concurrent batch and compare each logprob."""
    tokenizer = AutoTokenizer.from_pretrained(started.served.base_path)
    prompts = {text: tokenizer(text)["input_ids"] for text in agreement.PROMPTS[:6]}
    answers = asyncio.run(agreement._ask(started.served, list(models), prompts, 10))
    for (name, text), choice in answers.items():
        tokens = list(choice.token_ids)
        want = oracle.logprobs(models[name], prompts[text], tokens)
        for i, alternatives in enumerate(choice.logprobs.top_logprobs):
            for token, value in alternatives.items():
                j = int(token.removeprefix("token_id:"))
                # Rounding in float32; a wrong part moves these by tenths.
                assert abs(value - want[i, j].item()) < 3e-4, (name, text, i)
        assert want.argmax(-1).tolist() == tokens, (name, text)


def test_mixes_parts_and_base_in_one_batch_agree_with_float64(started):
    served = started.served
    models = {served.base: oracle.adapted(served.base_path, None)}
    models |= {name: oracle.adapted(served.base_path, served.path(name)) for name in ("one", "few")}
    for text, parts in MIXES.items():
        paths = [(served.path(name), weight) for name, weight in parts]
        models[text] = oracle.mixed(served.base_path, paths)
    check(started, models)
    # They are all different, so that agreement means something.
    ids = AutoTokenizer.from_pretrained(served.base_path)("One two three")["input_ids"]
    last = [oracle.logprobs(model, ids, ids)[-1] for model in models.values()]
    assert min(float((a - b).abs().max()) for i, a in enumerate(last) for b in last[:i]) > 0.05


@pytest.mark.slow
def test_a_hundred_random_batches_agree_with_float64(started):
    """Base, adapters low-rank and full-rank, a plain LoRA, a fine-tune and random mixes of random
    parts, as they come: not more than there are places for at a time."""
    served, rng = started.served, random.Random(16)
    tokenizer = AutoTokenizer.from_pretrained(served.base_path)
    models = {served.base: oracle.adapted(served.base_path, None)}
    models |= {
        name: oracle.adapted(served.base_path, served.path(name))
        for name in ("one", "two", "three", "few", "lora", "bounded", "bounded-other", "tuned")
    }
    for _ in range(24):
        names = rng.sample(["one", "two", "three", "few"], rng.randint(1, 4))
        parts = [(name, round(rng.uniform(-1, 1.5), 3)) for name in names]
        text = "+".join(f"{name}*{weight}" for name, weight in parts)
        models[text] = oracle.mixed(served.base_path, [(served.path(n), w) for n, w in parts])
    for _ in range(4):
        parts = [(n, round(rng.uniform(-1, 1.5), 3)) for n in ("bounded", "bounded-too")]
        text = "+".join(f"{name}*{weight}" for name, weight in parts)
        models[text] = oracle.mixed(served.base_path, [(served.path(n), w) for n, w in parts])
    words = ["the", "of", "film", "capital", "rice", "energy", "was", "and", "7", "42"]
    batches = [
        (rng.sample(list(models), 6), " ".join(rng.choices(words, k=9)), rng.randint(1, 12))
        for _ in range(100)
    ]

    async def ask() -> list[tuple[str, list[int], object]]:
        return [
            (name, prompt, choice)
            for names, text, tokens in batches
            for prompt in [tokenizer(text)["input_ids"]]
            for (name, _), choice in (
                await agreement._ask(served, names, {text: prompt}, tokens)
            ).items()
        ]

    # A random model magnifies rounding: transformers in float32 is the measure of what is right.
    exact = {name: copy.deepcopy(model).double() for name, model in models.items()}
    worst, rounding = (0.0, ""), 0.0
    for name, prompt, choice in asyncio.run(ask()):
        tokens = list(choice.token_ids)
        want = oracle.logprobs(exact[name], prompt, tokens)
        coarse = oracle.logprobs(models[name], prompt, tokens)
        for i, alternatives in enumerate(choice.logprobs.top_logprobs):
            for token, value in alternatives.items():
                j = int(token.removeprefix("token_id:"))
                worst = max(worst, (abs(value - want[i, j].item()), name))
                rounding = max(rounding, (coarse[i, j] - want[i, j]).abs().item())
    print(f"worst {worst}, transformers in float32 {rounding}")
    assert worst[0] < max(1e-4, 2 * rounding), (worst, rounding)


def test_the_bound_acts_on_a_mix_of_bounded_adapters(started):
    served, mixes = started.served, {}
    for text, parts in {
        "bounded*0.5": [("bounded", 0.5)],
        "bounded+bounded-too*-0.75": [("bounded", 1.0), ("bounded-too", -0.75)],
        "bounded-too*0.3 + bounded*0.3": [("bounded", 0.3), ("bounded-too", 0.3)],
        "bounded-other*2": [("bounded-other", 2.0)],
    }.items():
        mixes[text] = oracle.mixed(served.base_path, [(served.path(n), w) for n, w in parts])
    # Four of them, and three places.
    for text, model in mixes.items():
        check(started, {text: model})
    assert started.answer("bounded*1") == started.answer("bounded")
    assert started.answer("bounded-too+bounded*0")[0] == started.answer("bounded-too")[0]


def test_secura_merge_of_the_same_expression_answers_alike(started, tmp_path):
    served = started.served
    models = {}
    for number, text in enumerate(("one*0.5+two", "three+one*0.3 + few*0.25")):
        specs = [f"{served.path(name)}*{weight}" for name, weight in MIXES[text]]
        write_merge(plan_merge(str(served.base_path), specs, tmp_path / str(number), "float32"))
        models[text] = AutoModelForCausalLM.from_pretrained(
            tmp_path / str(number), dtype=torch.float32, attn_implementation="eager"
        ).eval()
    check(started, models)


def test_what_comes_down_to_less_is_that_bit_for_bit(started):
    base, one = started.answer(started.served.base), started.answer("one")
    assert base[0] != one[0] and one[1] == "one"
    for text in ("one*0", "one*0+two*0", "one+one*-1", "bounded*0", "lora*0+one*0"):
        assert started.answer(text) == base, text
    for text in ("one*1", "one*0.25+one*0.75", " one + two*0 ", "one*1e0"):
        assert started.answer(text) == one, text
    assert started.answer("lora*1") == started.answer("lora")


def test_one_mix_however_it_is_written(started):
    forms = ["one*0.5+two", "two+one*0.5", " two*1 + one * .50 ", "one*5e-1+two*2+two*-1"]
    answers = [started.answer(text) for text in forms]
    assert all(answer == answers[0] for answer in answers)
    assert answers[0][1] == "one*0.5+two"
    digest = started.http.get("/v1/adapters/one").json()["digest"]
    assert started.answer(f"one@{digest[:8]}*0.5+two") == answers[0]
    started.http.put("/v1/aliases/prod", json={"adapter": "two"}).raise_for_status()
    assert started.answer("prod+one*0.5") == answers[0]
    started.http.delete("/v1/aliases/prod").raise_for_status()
    listed = {model["id"] for model in started.http.get("/v1/models").json()["data"]}
    assert "one" in listed and not any("+" in model or "*" in model for model in listed)
    assert started.http.get("/v1/models/one*0.5+two").status_code == 404


def test_the_field_for_clients_with_a_fixed_name(started):
    client = openai.OpenAI(base_url=started.served.url, api_key="none")
    parts = [{"name": "one", "weight": 0.5}, {"name": "two"}]
    same = client.chat.completions.create(
        model=started.served.base,
        messages=[{"role": "user", "content": "Go"}],
        max_tokens=4,
        temperature=0,
        extra_body={"adapters": parts},
    )
    assert same.model == "one*0.5+two"
    want = started.answer("one*0.5+two")
    assert started.answer(None, adapters=parts) == want
    assert started.answer(started.served.base, adapters=parts) == want
    # As any JSON parser reads it.
    body = {"prompt": "One two three", "max_tokens": 8, "temperature": 0, "logprobs": 3}
    text = json.dumps(body | {"adapters": parts})
    for raw in (text.replace("adapters", "\\u0061dapters").encode(), text.encode("utf-16")):
        headers = {"content-type": "application/json"}
        reply = started.http.post("/v1/completions", content=raw, headers=headers)
        assert reply.json()["model"] == "one*0.5+two", reply.text
    assert started.answer(started.served.base, adapters=[]) == started.answer(None)
    assert started.answer("one", adapters=None) == started.answer("one")
    for model in ("one", "one*0.5+two", "nothing"):
        status, said = started.refusal(model, adapters=parts)
        assert status == 400 and "name the base" in said
    status, said = started.refusal(None, adapters=[{"name": "one", "weight": "0.5"}])
    assert status == 400 and "must be a number" in said


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Go"}]}),
        ("/v1/responses", {"input": "Go", "max_output_tokens": 4, "prompt": None}),
        ("/v1/messages", {"messages": [{"role": "user", "content": "Go"}]}),
        ("/v1/completions", {}),
        ("/tokenize", {}),
        ("/invocations", {}),
        ("/v1/messages/count_tokens", {"messages": [{"role": "user", "content": "Go"}]}),
    ],
)
def test_every_route_that_names_a_model_takes_a_mix(started, path, body):
    plain = {"logprobs": None} if path != "/v1/completions" else {}
    for named in ({"model": "one*0.5+two"}, {"adapters": [{"name": "two", "weight": 2}]}):
        reply = started.http.post(
            path, json={"prompt": "Go", "max_tokens": 4} | plain | body | named
        )
        assert reply.status_code == 200, reply.text
        status = started.http.post(path, json={"prompt": "Go"} | body | {"model": "one*0.5+tow"})
        assert status.status_code == 404, status.text


@pytest.mark.parametrize(
    ("text", "status", "said"),
    [
        ("0.5*one", 400, "write one*0.5"),
        ("one*0.5+", 400, "empty part"),
        ("one*2000", 400, "between -1000 and 1000"),
        ("one*900+one*900", 400, "add up"),
        ("one+tow", 404, "Did you mean two"),
        ("one+two@ffffff", 404, "has these versions: two@"),
        ("one+" + "{base}", 400, "is the base"),
        ("one+lora", 400, "is a plain LoRA"),
        ("lora*0.5", 400, "is a plain LoRA"),
        ("one+tuned", 400, "is a whole fine-tune"),
        ("bounded+bounded-other", 400, "the same mode and parameters"),
        ("bounded+one", 400, "the same mode and parameters"),
        ("large*999+large*-0.5+one", 409, "Use smaller weights"),
    ],
)
def test_what_is_refused_says_why(started, text, status, said):
    found = started.refusal(text.format(base=started.served.base))
    assert found[0] == status and said in found[1], found


def test_mixes_beyond_the_slots_and_prompts_that_share_a_prefix(started):
    """Each expression twice with one long prompt: cached keys must not cross."""
    prompt = "The quick brown fox jumps over the lazy dog. " * 8
    texts = [f"one*{i / 10}+two" for i in range(1, 13)]
    first, again = ([started.answer(t, prompt=prompt)[0] for t in texts] for _ in range(2))
    assert first == again and len({json.dumps(answer) for answer in first}) == len(texts)


def test_a_mix_runs_on_while_its_part_goes(started):
    served = started.served
    shutil.copytree(served.path("two"), served.folder / ".going")
    (served.folder / ".going").rename(served.folder / "going")
    until(lambda: started.ask("going").status_code == 200)
    want = started.answer("one*0.5+two")[0]
    assert started.answer("one*0.5+going")[0] == want
    long = {"prompt": "Go", "max_tokens": 400, "ignore_eos": True, "n": 64, "seed": 3}

    async def run() -> list[dict]:
        async with httpx.AsyncClient(base_url=str(started.http.base_url), timeout=120) as http:
            asked = [
                asyncio.create_task(http.post("/v1/completions", json=long | {"model": model}))
                for model in ("one*0.5+going", "one*0.5+two")
            ]
            async with asyncio.timeout(60):
                while (await http.get("/admin/fold")).json()["running_requests"] < 2:
                    assert not any(task.done() for task in asked), "over before they were seen"
                    await asyncio.sleep(0.05)
            await asyncio.to_thread(shutil.rmtree, served.folder / "going")
            async with asyncio.timeout(60):
                while (await http.get("/v1/adapters/going")).status_code == 200:
                    await asyncio.sleep(0.05)
            assert not any(task.done() for task in asked), "they were over before it went"
            refused = await http.post("/v1/completions", json={"model": "one*0.5+going"})
            assert refused.status_code == 404
            return [(await task).json() for task in asked]

    going, stays = asyncio.run(run())
    assert {c["text"] for c in going["choices"]} == {c["text"] for c in stays["choices"]}
    assert started.answer("one*0.5+two")[0] == want


def test_a_later_version_of_a_part_makes_another_mix(started):
    served = started.served
    shutil.copytree(served.path("one"), served.folder / ".new")
    (served.folder / ".new").rename(served.folder / "new")
    until(lambda: started.ask("new").status_code == 200)
    before = started.answer("new*0.5+two*0.5")[0]
    assert before == started.answer("one*0.5+two*0.5")[0]
    digest = started.http.get("/v1/adapters/new").json()["digest"]
    shutil.copytree(served.path("three"), served.folder / ".next")
    shutil.rmtree(served.folder / "new")
    (served.folder / ".next").rename(served.folder / "new")
    until(lambda: started.http.get("/v1/adapters/new").json().get("digest") not in (digest, None))
    assert started.answer("new*0.5+two*0.5")[0] == started.answer("three*0.5+two*0.5")[0]
    assert started.answer(f"new@{digest}*0.5+two*0.5")[0] == before
    both = started.answer(f"new@{digest}*0.5+new*0.5")
    assert both[1].count("@") == 2 and both[0] == started.answer("one*0.5+three*0.5")[0]


def test_metrics_know_one_name_for_all_mixes(started):
    started.answer("one*0.123+two")
    text = started.http.get("/metrics").text
    ours = [line for line in text.splitlines() if line.startswith("secura_adapter_requests_total")]
    assert any('adapter="(mixes)"' in line for line in ours)
    assert not any("*" in line.partition("{")[2] for line in text.splitlines() if line[0] != "#")


def test_while_another_is_folded_a_mix_says_what_an_adapter_says(started):
    started.http.post("/admin/fold", json={"name": "bounded"}).raise_for_status()
    try:
        status, said = started.refusal("one*0.5+two")
        assert status == 409 and "bounded is folded" in said and "unfold" in said
        assert started.refusal("one*0")[0] == started.refusal(None, adapters=[{"name": "one"}])[0]
        assert started.refusal("one*0.5+tow")[0] == 404
    finally:
        started.http.post("/admin/unfold").raise_for_status()
    assert started.answer("one*0.5+two")[1] == "one*0.5+two"


def until(true, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)
