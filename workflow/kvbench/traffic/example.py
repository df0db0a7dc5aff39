"""The shipped example log, made anew: ``python -m kvbench.traffic.example FILE``.

The stream of the study ``one_stream`` as a service would log it: OpenAI request bodies with times,
users and token counts. All texts are the project's own; the same call gives the same lines.
"""

from __future__ import annotations

import gzip
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from kvbench import layout

#: The log that ships with the project.
PATH = layout.shipped("resources") / "traffic" / "one_stream.jsonl.gz"

REQUESTS = 240
SEED = 2025
_MIX = {"repeats": 0.3, "paraphrases": 0.3, "near_misses": 0.1}
_USERS = 12
_MEAN_GAP_S = 20.0
_NEW_TOKENS = 32
#: An own system prompt, long enough to fill blocks.
_SYSTEM = (
    "You are the assistant of a public service desk. Answer in the language of the question, in at "
    "most three sentences. Say so when you do not know. Never ask for passwords, card numbers or "
    "other secrets. Give amounts with their currency and times with their time zone. If a question "
    "has several readings, answer the most usual one and name the other in one sentence."
)


def lines() -> Iterator[str]:
    """The log's lines: times from 0, a question every 20 seconds in the mean, twelve users."""
    from tokenizers import Tokenizer

    from kvbench.caching import paraphrases
    from kvbench.studies.measuring.one_stream import stream

    folder = layout.shipped("resources") / "embedded-llama"
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    rng = np.random.default_rng([SEED, 12])
    asked = stream(paraphrases.load(), REQUESTS, _MIX, SEED)
    moments = np.cumsum(rng.exponential(_MEAN_GAP_S, REQUESTS))
    users = rng.choice(_USERS, size=REQUESTS, p=_weights(_USERS))
    for request, moment, user in zip(asked, moments - moments[0], users, strict=True):
        messages = [
            {"role": "system", "content": _SYSTEM},
            {"role": "user", "content": request.text},
        ]
        prompt = "".join(f"{one['role']}\n{one['content']}\n" for one in messages)
        yield json.dumps(
            {
                "timestamp": round(float(moment), 3),
                "user": f"user-{user + 1}",
                "model": "embedded",
                "messages": messages,
                "temperature": 0,
                "max_tokens": _NEW_TOKENS,
                "usage": {
                    "prompt_tokens": len(tokenizer.encode(prompt).ids),
                    "completion_tokens": _NEW_TOKENS,
                },
            }
        )


def _weights(count: int) -> np.ndarray:
    ranks = 1 / np.arange(1, count + 1)
    return ranks / ranks.sum()


def packed() -> bytes:
    """The log as a gzip file without a date or a name."""
    buffer = io.BytesIO()
    with gzip.GzipFile(filename="", mode="wb", fileobj=buffer, mtime=0) as file:
        for line in lines():
            file.write(line.encode() + b"\n")
    return buffer.getvalue()


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else PATH
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(packed())
    print(target)
