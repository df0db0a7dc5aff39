"""Real clients through the proxy: openai in every way that it is used, and curl."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess

import fake_openai
import openai
import pytest

ASKED = [{"role": "user", "content": "hello"}]
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


@pytest.fixture
def url(start):
    return f"{start().proxy.url}/v1"


@pytest.fixture
def client(url):
    with openai.OpenAI(base_url=url, api_key="k", max_retries=0, timeout=10) as one:
        yield one


def create(client, **fields):
    request = {"model": "m", "temperature": 0, "messages": ASKED} | fields
    response = client.chat.completions.with_raw_response.create(**request)
    return response.headers["x-cache"], response.parse()


def test_a_whole_answer(client, upstream):
    upstream.usage = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
    for expected in ("miss", "hit"):
        cache, answer = create(client)
        assert cache == expected
        assert answer.choices[0].message.content == fake_openai.answer_to("hello")
        assert answer.usage.total_tokens == 3


def test_a_stream(client):
    for expected in ("miss", "hit"):
        cache, chunks = create(client, stream=True)
        text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        assert (cache, text) == (expected, fake_openai.answer_to("hello"))


def test_a_stream_made_of_a_whole_answer_and_the_reverse(client):
    create(client)
    cache, chunks = create(client, stream=True)
    parts = [c.choices[0] for c in chunks]
    assert cache == "hit"
    assert "".join(p.delta.content or "" for p in parts) == fake_openai.answer_to("hello")
    assert parts[-1].finish_reason == "stop"
    other = [{"role": "user", "content": "good bye"}]
    _, chunks = create(client, messages=other, stream=True)
    assert list(chunks)
    cache, answer = create(client, messages=other)
    assert cache == "hit"
    assert answer.choices[0].message.content == fake_openai.answer_to("good bye")


def test_many_calls_at_once_of_the_asynchronous_client(url, upstream):
    async def ask():
        async with openai.AsyncOpenAI(base_url=url, api_key="k", timeout=10) as client:
            answers = await asyncio.gather(
                *(
                    client.chat.completions.create(model="m", temperature=0, messages=ASKED)
                    for _ in range(20)
                )
            )
            stream = await client.chat.completions.create(
                model="m", temperature=0, messages=ASKED, stream=True
            )
            streamed = [chunk async for chunk in stream]
        return answers, streamed

    answers, streamed = asyncio.run(ask())
    assert {a.choices[0].message.content for a in answers} == {fake_openai.answer_to("hello")}
    assert streamed[-1].choices[0].finish_reason == "stop"
    assert upstream.calls == 1


def test_a_tool_call_is_passed_on_and_not_kept(client):
    for _ in range(2):
        cache, answer = create(client, tools=[TOOL], tool_choice="required")
        assert cache == "miss"
        assert answer.choices[0].message.tool_calls[0].function.name == "add"


def test_an_answer_in_json(client):
    for expected in ("miss", "hit"):
        cache, answer = create(client, response_format={"type": "json_object"})
        assert cache == expected
        content = json.loads(answer.choices[0].message.content)
        assert content == {"answer": fake_openai.answer_to("hello")}


def test_several_choices_are_passed_on_and_not_kept(client):
    for _ in range(2):
        cache, answer = create(client, n=3)
        assert (cache, len(answer.choices)) == ("miss", 3)


def test_log_probabilities_are_kept(client):
    for expected in ("miss", "hit"):
        cache, answer = create(client, logprobs=True)
        assert cache == expected
        assert answer.choices[0].logprobs.content[0].logprob == -0.5


def test_embeddings(client):
    for expected in ("miss", "hit"):
        response = client.embeddings.with_raw_response.create(
            model="e", input="hello", encoding_format="float"
        )
        assert response.headers["x-cache"] == expected
        assert response.parse().data[0].embedding == [0.5, 1.0]


def test_errors_of_the_server_reach_the_client(client, upstream):
    upstream.mode = "error"
    with pytest.raises(openai.InternalServerError, match="no"):
        create(client)


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
@pytest.mark.parametrize(
    "options", [[], ["-H", "Transfer-Encoding: chunked"], ["-H", "Expect: 100-continue"]]
)
def test_curl(url, upstream, options):
    body = json.dumps({"model": "m", "temperature": 0, "messages": ASKED})
    command = ["curl", "-sS", "-i", "--noproxy", "*", "-d", body, *options]
    command += ["-H", "Content-Type: application/json", f"{url}/chat/completions"]
    for expected in ("miss", "hit"):
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        assert f"x-cache: {expected}" in done.stdout
        assert fake_openai.answer_to("hello") in done.stdout
    assert upstream.calls == 1
