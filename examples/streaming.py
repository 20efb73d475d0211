"""Print an adapter's answer while it is being written, then how many tokens it took.

Needs a running server, and `pip install openai`:

    secura-serve --base smollm2-135m --adapters ./adapters
    python examples/streaming.py
    python examples/streaming.py --model smollm2-135m "Why is the sky blue?"
"""

from __future__ import annotations

import argparse
import os
import time

from openai import OpenAI

EXTRACT = "Extract name, item, quantity and city as JSON: Sofia in Warsaw needs 64 umbrellas."

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("prompt", nargs="?", default=EXTRACT)
parser.add_argument("--model", default="extract")
parser.add_argument("--endpoint", default="http://127.0.0.1:8000/v1")
args = parser.parse_args()

client = OpenAI(base_url=args.endpoint, api_key=os.environ.get("OPENAI_API_KEY", "none"))
start = time.perf_counter()
stream = client.chat.completions.create(
    model=args.model,
    messages=[{"role": "user", "content": args.prompt}],
    max_tokens=96,
    temperature=0,
    stream=True,
    stream_options={"include_usage": True},
)
for chunk in stream:
    for choice in chunk.choices:
        print(choice.delta.content or "", end="", flush=True)
    if chunk.usage:
        seconds = time.perf_counter() - start
        print(f"\n\n{chunk.usage.completion_tokens} tokens in {seconds:.1f} s")
