"""LiteLLM's and LangChain's clients through the proxy, on demand, in an environment of their own.

    python3 -m venv /tmp/clients && /tmp/clients/bin/pip install litellm langchain-openai
    PYTHONPATH=workflow python tests/benchmarks/others/clients.py /tmp/clients/bin/python

Each asks the same twice, whole and as a stream; the server behind must have been asked once by each.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(ROOT / "workflow"), str(ROOT / "tests" / "unit")]

import fake_openai  # noqa: E402
from kvbench.caching import proxy  # noqa: E402

LITELLM = """
import litellm, sys
question = [{"role": "user", "content": "hello from litellm"}]
shared = dict(model="openai/m", api_base=sys.argv[1], api_key="k", temperature=0, messages=question)
for _ in range(2):
    print(litellm.completion(**shared).choices[0].message.content)
    print("".join(c.choices[0].delta.content or "" for c in litellm.completion(**shared, stream=True)))
"""
LANGCHAIN = """
import sys
from langchain_openai import ChatOpenAI
model = ChatOpenAI(model="m", base_url=sys.argv[1], api_key="k", temperature=0)
for _ in range(2):
    print(model.invoke("hello from langchain").content)
    print("".join(chunk.content for chunk in model.stream("hello from langchain")))
"""


def main() -> None:
    python = sys.argv[1]
    with (
        fake_openai.serving() as upstream,
        proxy.serving(proxy.Settings(upstream=upstream.url)) as front,
    ):
        upstream.usage = {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
        for name, program in (("litellm", LITELLM), ("langchain", LANGCHAIN)):
            before = upstream.calls
            done = subprocess.run(
                [python, "-c", program, f"{front.url}/v1"],
                capture_output=True,
                text=True,
                check=True,
            )
            said = [line for line in done.stdout.splitlines() if line.startswith("answer")]
            assert said == [fake_openai.answer_to(f"hello from {name}")] * 4, done.stdout
            print(f"{name}: 4 right answers, {upstream.calls - before} calls to the server")


if __name__ == "__main__":
    main()
