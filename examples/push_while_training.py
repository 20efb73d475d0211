"""Train an adapter with TRL's GRPO on answers that the server gives with its newest version.

Needs a running server, and `pip install openai trl` beside the extra `train`:

    secura-serve --base smollm2-135m --adapters ./adapters
    python examples/push_while_training.py
    python examples/push_while_training.py --steps 40 --push-every 4

The reward is for short words. Each line of the output is one step: the version that answered, and
its mean reward. Afterwards the adapter is there as `live`; `curl -X DELETE
127.0.0.1:8000/v1/adapters/live` removes it.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from datasets import Dataset
from openai import OpenAI
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback
from trl import GRPOConfig, GRPOTrainer

from secura_serve import SecuraConfig, resolve_base
from secura_serve.client import push
from secura_serve.train import PushCallback

QUESTIONS = ["Why is the sky blue?", "What is bread?", "How do birds fly?", "What is a river?"]
ANSWERS = 4  # to each question, which GRPO compares with each other
LONGEST = 24

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--base", default="smollm2-135m")
parser.add_argument("--name", default="live", help="of the adapter in the server (%(default)s)")
parser.add_argument("--steps", type=int, default=12)
parser.add_argument("--push-every", type=int, default=2)
parser.add_argument("--endpoint", default="http://127.0.0.1:8000/v1")
args = parser.parse_args()

client = OpenAI(base_url=args.endpoint, api_key=os.environ.get("OPENAI_API_KEY", "none"))
base = resolve_base(args.base).path
tokenizer = AutoTokenizer.from_pretrained(base)
to_server = PushCallback(args.endpoint, args.name, args.push_every)


def ask(prompt: list[dict[str, str]]) -> tuple[list[int], list[int], list[float]]:
    """Return the prompt and one sampled answer as tokens, and the answer's log-probabilities."""
    ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
    answer = client.completions.create(
        model=args.name,
        prompt=ids,
        max_tokens=LONGEST,
        temperature=1.0,
        logprobs=1,
        extra_body={"return_token_ids": True},
    ).choices[0]
    return ids, answer.token_ids, answer.logprobs.token_logprobs


def ask_server(prompts: list[Any], trainer: GRPOTrainer) -> dict[str, list[Any]]:
    """Return one answer per prompt, as GRPOTrainer wants them."""
    with ThreadPoolExecutor(len(prompts)) as threads:
        asked, answers, logprobs = zip(*threads.map(ask, prompts), strict=True)
    return {"prompt_ids": [*asked], "completion_ids": [*answers], "logprobs": [*logprobs]}


def short_words(completions: list[Any], **_: Any) -> list[float]:
    """Return 1 over the mean length of an answer's words; 0 for an answer without any."""
    words = [answer[0]["content"].split() for answer in completions]
    rewards = [len(each) / sum(map(len, each)) if each else 0.0 for each in words]
    version = (to_server.last or first).digest
    print(f"{args.name}@{version[:8]}  reward {sum(rewards) / len(rewards):.3f}", flush=True)
    return rewards


with tempfile.TemporaryDirectory() as folder:
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        processing_class=tokenizer,
        reward_funcs=short_words,
        rollout_func=ask_server,
        args=GRPOConfig(
            folder,
            max_steps=args.steps,
            learning_rate=0.02,
            lr_scheduler_type="constant",
            per_device_train_batch_size=len(QUESTIONS) * ANSWERS,
            num_generations=ANSWERS,
            max_completion_length=LONGEST,
            use_cpu=not torch.cuda.is_available(),
            bf16=False,
            gradient_checkpointing=False,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(
            [{"prompt": [{"role": "user", "content": text}]} for text in QUESTIONS]
        ),
        peft_config=SecuraConfig(r=32, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[to_server],
    )
    trainer.remove_callback(PrinterCallback)
    # The first answers come from the adapter as it starts, which changes nothing.
    first = push(trainer.model, args.endpoint, args.name)
    trainer.train()
assert to_server.last is not None, "no push was taken"
print(
    f"{to_server.pushed} versions pushed; the last one: {to_server.last.bytes_sent / 1e6:.2f} MB "
    f"in {to_server.last.seconds * 1e3:.0f} ms"
)
