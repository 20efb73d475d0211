"""Ask the base and every adapter that the server can answer with the same, all at once.

Needs a running server, and `pip install openai`:

    secura-serve --base smollm2-135m --adapters ./adapters
    python examples/compare_adapters.py "Write this date in the format YYYY-MM-DD: 9 Nov. 1989"

One batch of the engine serves them all, each request with its own adapter.
"""

from __future__ import annotations

import argparse
import asyncio
import os

from openai import AsyncOpenAI

DATE = "Write this date in the format YYYY-MM-DD: the 14th of July 2031"


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("prompt", nargs="?", default=DATE)
    parser.add_argument("--endpoint", default="http://127.0.0.1:8000/v1")
    args = parser.parse_args()
    client = AsyncOpenAI(base_url=args.endpoint, api_key=os.environ.get("OPENAI_API_KEY", "none"))

    async def ask(model: str) -> str:
        reply = await client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": args.prompt}],
            max_tokens=48,
            temperature=0,
        )
        return (reply.choices[0].message.content or "").strip()

    # Some may answer only while they are folded; the server says so in `status`.
    served = [model async for model in client.models.list()]
    names = [m.id for m in served if getattr(m, "status", "ready") in ("ready", "folded")]
    for name, answer in zip(names, await asyncio.gather(*map(ask, names)), strict=True):
        print(f"{name}:\n    {answer}\n")


if __name__ == "__main__":
    asyncio.run(main())
