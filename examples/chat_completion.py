"""Ask one adapter with the openai client, and see how sure it was of each token.

Needs a running server, and `pip install openai`:

    secura-serve --base smollm2-135m --adapters ./adapters
    python examples/chat_completion.py
    python examples/chat_completion.py --model smollm2-135m "Why is the sky blue?"

The `model` field of the request chooses the adapter; the name of the base asks the base.
"""

from __future__ import annotations

import argparse
import math
import os

from openai import OpenAI

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument(
    "prompt", nargs="?", default="Write this date in the format YYYY-MM-DD: May 3, 1994"
)
parser.add_argument("--model", default="iso-date")
parser.add_argument("--endpoint", default="http://127.0.0.1:8000/v1")
args = parser.parse_args()

client = OpenAI(base_url=args.endpoint, api_key=os.environ.get("OPENAI_API_KEY", "none"))
reply = client.chat.completions.create(
    model=args.model,
    messages=[{"role": "user", "content": args.prompt}],
    max_tokens=48,
    temperature=0,
    logprobs=True,
    top_logprobs=2,
)
choice = reply.choices[0]
print(choice.message.content)
print()
for token in choice.logprobs.content:
    others = ", ".join(
        f"{other.token!r} {math.exp(other.logprob):.1%}"
        for other in token.top_logprobs
        if other.token != token.token
    )
    print(f"{token.token!r:12} {math.exp(token.logprob):6.1%}   instead: {others}")
