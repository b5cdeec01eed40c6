"""`gearcpp serve` over a real socket, by OpenAI's own client: answers, errors, limits, and clients that go."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import http.client
import json
import math
import re
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from chat_models import write_chat_model
from prometheus_client.parser import text_string_to_metric_families
from server_process import PATIENCE, Server, serve

from gearcpp.server import forced
from gearcpp.server.errors import RequestError
from gearcpp.server.whole import joined

PROMPT = "Once upon a time there was a"
LONG: dict[str, Any] = {"max_tokens": 2000, "extra_body": {"ignore_eos": True}}  # seconds on any machine


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serve("-c", "4096", "-np", "2", "--queue", "1", "--embeddings", "--chat-template", "chatml", "-a", "books", "--max-body", "256") as running:
        yield running


@pytest.fixture(autouse=True)
def idle(request: pytest.FixtureRequest) -> Iterator[None]:
    """Each test finds and leaves the shared server without work."""
    yield
    if "server" in request.fixturenames:
        request.getfixturevalue("server").wait(
            lambda m: m["gearcpp_requests_running"] == m["gearcpp_requests_waiting"] == m["llamacpp:requests_processing"] == 0
        )


def post(server: Server, path: str, body: bytes, **headers: str) -> tuple[int, dict[str, Any]]:
    """Status and JSON of a request that no client library would send."""
    request = urllib.request.Request(server.url + path, body, {"Content-Type": "application/json", **headers})
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def long_stream(server: Server, **more: Any) -> Any:
    """A stream that has begun."""
    stream = server.client().completions.create(model="books", prompt=PROMPT, stream=True, **{**LONG, **more})
    next(iter(stream))
    return stream


# ---------------------------------------------------------------------------------------------------------------------------------------------
# Answers
# ---------------------------------------------------------------------------------------------------------------------------------------------


def test_completion(server: Server) -> None:
    answer = server.client().completions.create(model="books", prompt=PROMPT, max_tokens=12, temperature=0)
    (choice,) = answer.choices
    assert choice.finish_reason == "length" and len(choice.text) > 12
    assert answer.usage and answer.usage.completion_tokens == 12 and answer.usage.total_tokens == answer.usage.prompt_tokens + 12
    assert answer.model == "books"


def test_a_stream_gives_the_text_of_the_whole_answer(server: Server) -> None:
    whole = server.client().completions.create(model="books", prompt=PROMPT, max_tokens=40, temperature=0)
    chunks = list(server.client().completions.create(model="books", prompt=PROMPT, max_tokens=40, temperature=0, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert len(chunks) > 20


def test_chat_whole_and_streamed(server: Server) -> None:
    arguments: dict[str, Any] = {"model": "books", "messages": [{"role": "user", "content": "Who are you?"}], "temperature": 0}
    whole = server.client().chat.completions.create(**arguments, max_completion_tokens=15)
    assert whole.choices[0].message.role == "assistant" and whole.choices[0].finish_reason in ("stop", "length")
    assert whole.usage and whole.usage.completion_tokens <= 15
    chunks = list(server.client().chat.completions.create(**arguments, max_tokens=15, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content


def test_a_stream_tells_what_it_took_where_that_is_asked_for(server: Server) -> None:
    chunks = list(
        server.client().completions.create(model="books", prompt=PROMPT, max_tokens=9, temperature=0, stream=True, stream_options={"include_usage": True})
    )
    assert chunks[-1].usage and chunks[-1].usage.completion_tokens == 9
    assert all(chunk.usage is None and chunk.choices for chunk in chunks[:-1])
    messages: Any = [{"role": "user", "content": "Who are you?"}]
    events = list(
        server.client().chat.completions.create(model="books", messages=messages, max_tokens=9, stream=True, stream_options={"include_usage": True})
    )
    assert (
        events[-1].usage
        and events[-1].choices == []
        and events[-1].usage.prompt_tokens > 5
        and events[-1].id == events[0].id
        and events[-1].object == events[0].object
    )


def test_a_stop_string_ends_the_answer_and_is_not_part_of_it(server: Server) -> None:
    free = server.client().completions.create(model="books", prompt=PROMPT, max_tokens=30, temperature=0).choices[0].text
    stop = free[10:15]  # cuts across tokens
    for stream in (False, True):
        answer = server.client().completions.create(model="books", prompt=PROMPT, max_tokens=30, temperature=0, stop=[stop], stream=stream)
        chunks = list(answer) if stream else [answer]
        assert "".join(chunk.choices[0].text for chunk in chunks) == free[: free.index(stop)]
        assert chunks[-1].choices[0].finish_reason == "stop"


def test_a_seed_repeats_an_answer_and_without_one_answers_differ(server: Server) -> None:
    def answer(**more: Any) -> str:
        return server.client().completions.create(model="books", prompt=PROMPT, max_tokens=24, temperature=1.2, **more).choices[0].text

    assert answer(seed=7) == answer(seed=7)
    assert len({answer() for _ in range(3)}) > 1


def test_log_probabilities_without_logits_all(server: Server) -> None:
    answer = server.client().completions.create(model="books", prompt=PROMPT, max_tokens=8, temperature=0, logprobs=3).model_dump()
    found = answer["choices"][0]["logprobs"]["content"]  # llama-server gives both kinds of completion the form of a chat's
    assert "".join(item["token"] for item in found) == answer["choices"][0]["text"] and len(found) == 8
    for item in found:
        top = {other["token"]: other["logprob"] for other in item["top_logprobs"]}
        assert len(top) == 3 and item["logprob"] == max(top.values()) == top[item["token"]]  # greedy
        assert sum(math.exp(value) for value in top.values()) < 1
    chat = server.client().chat.completions.create(
        model="books", messages=[{"role": "user", "content": "Hm"}], max_tokens=4, logprobs=True, top_logprobs=2, temperature=0
    )
    assert chat.choices[0].logprobs and chat.choices[0].logprobs.content and len(chat.choices[0].logprobs.content[0].top_logprobs) == 2


def test_a_grammar_and_a_logit_bias_are_followed(server: Server) -> None:
    answer = server.client().completions.create(model="books", prompt=PROMPT, max_tokens=30, extra_body={"grammar": 'root ::= ("yes" | "no") " sir"'})
    assert answer.choices[0].text in ("yes sir", "no sir") and answer.choices[0].finish_reason == "stop"
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
    form: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    chat = server.client().chat.completions.create(model="books", messages=[{"role": "user", "content": "?"}], max_tokens=100, response_format=form)
    assert isinstance(json.loads(chat.choices[0].message.content or "")["a"], bool)
    _, tokens = post(server, "/tokenize", b'{"content": " the"}')
    biased = server.client().completions.create(model="books", prompt=PROMPT, max_tokens=4, temperature=0, logit_bias={str(tokens["tokens"][-1]): 100})
    assert biased.choices[0].text == " the the the the"


def test_embeddings_have_unit_length_and_likeness_shows(server: Server) -> None:
    texts = ["The cat sat on the mat.", "A cat sat upon a mat.", "Parliament voted against the treaty in 1802."]
    answer = server.client().embeddings.create(model="books", input=texts)
    vectors = [item.embedding for item in answer.data]
    assert [len(vector) for vector in vectors] == [256] * 3
    assert all(abs(math.fsum(x * x for x in vector) - 1) < 1e-4 for vector in vectors)

    def likeness(i: int, j: int) -> float:
        return sum(x * y for x, y in zip(vectors[i], vectors[j], strict=True))

    assert likeness(0, 1) > likeness(0, 2)
    alone = server.client().embeddings.create(model="books", input=texts[2]).data[0].embedding
    assert max(abs(x - y) for x, y in zip(alone, vectors[2], strict=True)) < 1e-2


def test_several_answers_and_several_prompts(server: Server) -> None:
    answer = server.client().completions.create(model="books", prompt=PROMPT, max_tokens=8, n=2, temperature=1.5)
    assert [choice.index for choice in answer.choices] == [0, 1] and answer.choices[0].text != answer.choices[1].text
    answer = server.client().completions.create(model="books", prompt=[PROMPT, "Said the"], max_tokens=3, temperature=0)
    assert len(answer.choices) == 2 and answer.choices[0].text != answer.choices[1].text


def test_messages_in_parts_and_developers(server: Server) -> None:
    def answer(*messages: Any) -> Any:
        return server.client().chat.completions.create(model="books", messages=list(messages), max_tokens=6, temperature=0).choices[0].message.content

    parts = [{"type": "text", "text": "One"}, {"type": "text", "text": "two"}]
    plain = answer({"role": "system", "content": "Be."}, {"role": "user", "content": "One\ntwo"})
    assert answer({"role": "developer", "content": "Be."}, {"role": "user", "content": parts}) == plain


TOOL: Any = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string", "maxLength": 8}}, "required": ["city"]}},
}


def test_tools_for_a_template_without_them_are_refused(server: Server) -> None:
    asked: Any = {"model": "books", "messages": [{"role": "user", "content": "Hm"}], "tools": [TOOL], "max_tokens": 1}
    for choice in ("auto", "required"):
        with pytest.raises(openai.BadRequestError, match="chat template knows no tools"):
            server.client().chat.completions.create(**asked, tool_choice=choice)
    assert server.client().chat.completions.create(**asked, tool_choice="none").choices


def test_a_whole_answer_is_what_its_stream_says() -> None:
    calls: list[dict[str, Any]] = [
        {"role": "assistant", "content": None},
        {"tool_calls": [{"index": 0, "id": "a", "type": "function", "function": {"name": "weather", "arguments": ""}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": '{"city":'}}, {"index": 1, "id": "b", "function": {"name": "time", "arguments": "{"}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": '"Bonn"}'}}, {"index": 1, "function": {"arguments": "}"}}]},
        {"reasoning_content": "Hm"},
        {"reasoning_content": "."},
    ]
    events = [{"object": "chat.completion.chunk", "choices": [{"index": 0, "finish_reason": None, "delta": delta}]} for delta in calls]
    events.append({"object": "chat.completion.chunk", "choices": [{"index": 0, "finish_reason": "tool_calls", "delta": {}}]})
    events.append({"object": "chat.completion.chunk", "choices": [], "usage": {"total_tokens": 9}})

    async def chunks() -> AsyncIterator[bytes]:
        data = "".join(f"data: {json.dumps(event)}\n\n" for event in events).encode()
        yield data[:100]
        yield data[100:]

    whole = json.loads(asyncio.run(joined(chunks())))
    functions = [{"name": "weather", "arguments": '{"city":"Bonn"}'}, {"name": "time", "arguments": "{}"}]
    assert whole["choices"][0]["message"] == {
        "role": "assistant",
        "content": None,
        "reasoning_content": "Hm.",
        "tool_calls": [{"id": name, "type": "function", "function": function} for name, function in zip("ab", functions, strict=True)],
    }
    assert (whole["object"], whole["choices"][0]["finish_reason"], whole["usage"]) == ("chat.completion", "tool_calls", {"total_tokens": 9})
    events[-2]["choices"][0]["finish_reason"] = None  # type: ignore[index]
    with pytest.raises(RequestError, match="without a reason"):
        asyncio.run(joined(chunks()))


def test_langchain(server: Server) -> None:
    chat_openai = pytest.importorskip("langchain_openai", reason="LangChain is not installed: pip install langchain-openai").ChatOpenAI
    chat = chat_openai(model="books", base_url=f"{server.url}/v1", api_key="none", temperature=0, max_tokens=8)
    assert "".join(str(chunk.content) for chunk in chat.stream("Hm")) == chat.invoke("Hm").content != ""


def test_prometheus_reads_the_metrics(server: Server) -> None:
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=PATIENCE) as response:
        families = list(text_string_to_metric_families(response.read().decode()))
    names = [family.name for family in families]
    assert {"gearcpp_kv_bytes", "gearcpp_requests", "llamacpp:tokens_predicted", "process_open_fds"} <= {*names}
    assert len(names) == len({*names}), "a metric in two places, which Prometheus refuses"
    samples = [(sample.name, *sorted(sample.labels.items())) for family in families for sample in family.samples]
    assert len(samples) == len({*samples})
    labelled = {sample.labels.get("model") for family in families for sample in family.samples if family.name.startswith(("gearcpp_kv", "llamacpp"))}
    assert labelled == {"books", "books-embeddings"}


def test_the_web_page_and_its_files_are_served(server: Server) -> None:
    """As a browser asks: the page of llama.cpp's server, what it loads, and its requests, which bear this server's own origin."""
    with urllib.request.urlopen(urllib.request.Request(server.url, headers={"Accept-Encoding": "gzip"}), timeout=PATIENCE) as response:
        page = response.read()
        page = gzip.decompress(page) if response.headers.get("content-encoding") == "gzip" else page
    files = re.findall(r"""(?:src|href)=["'](?:\./|/)([^"':]+\.(?:js|css|svg|ico|webmanifest))["']""", page.decode())
    assert b"<script" in page
    for file in files:
        with urllib.request.urlopen(urllib.request.Request(f"{server.url}/{file}", headers={"Accept-Encoding": "gzip"}), timeout=PATIENCE) as response:
            assert response.status == 200 and response.read(1), file
    with urllib.request.urlopen(urllib.request.Request(f"{server.url}/props", headers={"Origin": server.url}), timeout=PATIENCE) as response:
        assert json.load(response)["total_slots"] == 2
    for path in ("/", "/props", "/v1/models"):
        request = urllib.request.Request(f"{server.url}{path}", headers={"Origin": "https://evil.example", "Sec-Fetch-Site": "cross-site"})
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(request, timeout=PATIENCE)
        assert caught.value.code == 403, path


def test_other_routes_of_llama_server(server: Server) -> None:
    status, answer = post(server, "/v1/messages", json.dumps({"messages": [USER], "max_tokens": 3}).encode())
    assert status == 200 and answer["role"] == "assistant" and answer["content"][0]["text"]
    response = server.client().responses.create(model="books", input="Hm", max_output_tokens=16)
    assert response.output_text
    status, answer = post(server, "/v1/nothing", b"{}")
    assert status == 404 and answer["error"]["message"] == "there is no POST /v1/nothing here"
    status, answer = post(server, "/detokenize", b'{"tokens": [99999]}')
    assert status == 400 and "0 to 4095" in answer["error"]["message"]
    request = urllib.request.Request(server.url, headers={"Accept-Encoding": "gzip"})
    with urllib.request.urlopen(request, timeout=PATIENCE) as page:
        assert page.headers["content-type"].startswith("text/html")


USER = {"role": "user", "content": "Hm"}
REFUSED = [
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}]}, "image input is not supported"),
    ({"messages": []}, "at least one message"),
    ({"messages": "Hm"}, "messages must be a list"),
    ({"messages": [{"content": "x"}]}, "role"),
    ({"messages": [USER], "tool_choice": "required"}, "no tools"),
    ({"messages": [USER], "max_tokens": -7}, "max_tokens"),
    ({"messages": [USER], "max_tokens": 0}, "max_tokens must be at least 1"),
    ({"messages": [USER], "temperature": "hot"}, "temperature"),
    ({"messages": [USER], "stop": {"a": 1}}, "stop must be"),
    ({"messages": [USER], "min_tokens": 5}, "min_tokens is not supported: ignore_eos"),
    ({"messages": [USER], "response_format": {"type": "xml"}}, "response_format"),
    ({"messages": [USER], "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}}}, "nonsense"),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED)
def test_what_is_asked_for_is_done_or_refused_in_a_line(server: Server, fields: dict[str, Any], message: str) -> None:
    status, answer = post(server, "/v1/chat/completions", json.dumps({"model": "books", **fields}).encode())
    assert status == 400, answer
    assert message in answer["error"]["message"] and len(answer["error"]["message"]) < 250


def test_models_are_listed_and_an_unknown_name_means_the_first(server: Server) -> None:
    assert [model.id for model in server.client().models.list()] == ["books", "books-embeddings"]
    assert server.client().completions.create(model="gpt-4o", prompt=PROMPT, max_tokens=1).model == "books"


# ---------------------------------------------------------------------------------------------------------------------------------------------
# During a generation
# ---------------------------------------------------------------------------------------------------------------------------------------------


def test_health_metrics_and_models_answer_during_a_generation(server: Server) -> None:
    stream = long_stream(server)
    with urllib.request.urlopen(f"{server.url}/health", timeout=PATIENCE) as response:
        assert json.load(response) == {"status": "ok"}
    assert len(list(server.client().models.list())) == 2
    first = server.metrics()
    later = server.wait(lambda m: m["gearcpp_kv_exact_rows"] > first["gearcpp_kv_exact_rows"])
    assert first["llamacpp:requests_processing"] == 1
    assert 0 < later["gearcpp_kv_bytes_used"] <= later["gearcpp_kv_bytes"] < later["gearcpp_kv_bytes_f16"]
    rest = list(stream)
    assert rest[-1].choices[0].finish_reason == "length"
    done = server.metrics()
    assert done["llamacpp:tokens_predicted_total"] > first["llamacpp:tokens_predicted_total"]
    assert done["gearcpp_kv_packed_tiles"] > 0 and done["gearcpp_kv_packed_rows"] > 0 and done["llamacpp:requests_processing"] == 0


def test_a_full_queue_is_429_and_nobody_in_it_suffers(server: Server) -> None:
    with ThreadPoolExecutor() as pool:
        streams = [long_stream(server, max_tokens=2500, extra_body={"ignore_eos": True}) for _ in range(2)]
        waiting = pool.submit(lambda: server.client().completions.create(model="books", prompt=PROMPT, max_tokens=3))
        server.wait(lambda m: m["gearcpp_requests_waiting"] == 1)
        with pytest.raises(openai.RateLimitError, match="3 requests are in work or waiting") as caught:
            server.client().completions.create(model="books", prompt=PROMPT)
        assert caught.value.response.headers["retry-after"] == "1"
        with pytest.raises(openai.RateLimitError):
            server.client().completions.create(model="books", prompt=PROMPT, stream=True)
        for stream in streams:
            assert list(stream)[-1].choices[0].finish_reason == "length"
        assert waiting.result(PATIENCE).choices[0].finish_reason == "length"
    assert server.client().completions.create(model="books", prompt=PROMPT, max_tokens=1).choices


def test_a_client_that_goes_stops_its_generation_and_no_other(server: Server) -> None:
    before = server.metrics()["llamacpp:tokens_predicted_total"]
    staying, going = long_stream(server, max_tokens=300, extra_body={"ignore_eos": True}), long_stream(server)
    going.close()
    rest = list(staying)
    assert rest[-1].choices[0].finish_reason == "length"
    done = server.wait(lambda m: m["llamacpp:requests_processing"] == 0)
    assert 300 <= done["llamacpp:tokens_predicted_total"] - before < 300 + 2000


@pytest.mark.parametrize("among_others", [False, True])
def test_a_client_that_goes_without_a_stream_stops_its_generation_too(server: Server, among_others: bool) -> None:
    before = server.metrics()["llamacpp:tokens_predicted_total"]
    staying = long_stream(server, max_tokens=600) if among_others else None
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=PATIENCE)
    connection.request(
        "POST", "/v1/completions", json.dumps({"prompt": PROMPT, "max_tokens": 1200, "ignore_eos": True}), {"Content-Type": "application/json"}
    )
    server.wait(lambda m: m["llamacpp:requests_processing"] == 1 + among_others)
    connection.close()
    done = server.wait(lambda m: m["llamacpp:requests_processing"] <= among_others)
    if staying:
        assert done["llamacpp:requests_processing"] == 1, "the client that stayed was through first: nothing is shown"
        assert list(staying)[-1].choices[0].finish_reason == "length"
    assert done["llamacpp:tokens_predicted_total"] - before < 1200


def test_one_after_the_other_no_stream_is_cut() -> None:
    with serve("-c", "1024", "-np", "1") as server:

        def answer(i: int) -> tuple[int, str | None]:
            extra: Any = {"ignore_eos": True}
            chunks = list(server.client().completions.create(model="x", prompt=f"{i}. {PROMPT}", max_tokens=60, stream=True, extra_body=extra))
            return len(chunks), chunks[-1].choices[0].finish_reason

        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(answer, range(8)))
        assert [reason for _, reason in answers] == ["length"] * 8
        assert server.metrics()["llamacpp:tokens_predicted_total"] == 8 * 60


# ---------------------------------------------------------------------------------------------------------------------------------------------
# Mistakes
# ---------------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": "word " * 5000}, "exceeds the available context size \\(4096 tokens\\)"),
        ({"prompt": PROMPT, "suffix": "end"}, "suffix is not supported"),
        ({"prompt": PROMPT, "echo": True}, "echo is not supported"),
        ({"prompt": PROMPT, "temperature": "hot"}, "temperature"),
        ({"prompt": PROMPT, "logit_bias": {"99999": 1}}, "logit_bias names token 99999"),
        ({"prompt": PROMPT, "extra_body": {"grammar": "root ::= nonsense ("}}, "failed to parse grammar: expecting '\\)' at"),
    ],
)
def test_what_is_wrong_with_a_request_is_said_as_a_400(server: Server, arguments: dict[str, Any], message: str, stream: bool) -> None:
    with pytest.raises(openai.BadRequestError, match=message) as caught:
        server.client().completions.create(model="books", stream=stream, **arguments)
    assert caught.value.body["type"] == "invalid_request_error"  # type: ignore[index]


def test_a_prompt_too_long_has_openais_code(server: Server) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        server.client().completions.create(model="books", prompt="word " * 5000)
    assert caught.value.code == "context_length_exceeded"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"{", "the body is not JSON"),
        (b"\xff\xfe", "the body is not JSON"),
        (b"[" * 100000, "the body is not JSON"),
        (b"[]", "must be a JSON object"),
        (b'{"prompt": 5}', "prompt"),
    ],
)
def test_bodies_that_are_not_requests(server: Server, body: bytes, message: str) -> None:
    status, answer = post(server, "/v1/completions", body)
    assert status == 400 and message in answer["error"]["message"]
    assert post(server, "/v1/chat/completions", b'{"messages": []}')[0] == 400
    assert post(server, "/v1/embeddings", b'{"input": []}')[0] == 400


def test_a_body_too_large_is_413_however_it_is_sent(server: Server) -> None:
    status, answer = post(server, "/v1/completions", json.dumps({"prompt": "x" * 300 * 1024}).encode())
    assert status == 413 and "larger than 262144 bytes" in answer["error"]["message"]
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=PATIENCE)
    connection.request("POST", "/v1/completions", iter([b"x" * 65536] * 5), {"Content-Type": "application/json"}, encode_chunked=True)
    assert connection.getresponse().status == 413
    connection.close()


def test_a_text_too_long_to_embed_is_not_cut_off(server: Server) -> None:
    with pytest.raises(openai.BadRequestError, match="too large to process"):
        server.client().embeddings.create(model="books", input="word " * 3000)


def test_no_page_of_another_origin_may_use_it(server: Server) -> None:
    port = server.url.rpartition(":")[2]
    for origin, status in (("https://evil.example", 403), ("null", 403), ("http://localhost:1", 403), (f"http://127.0.0.1:{port}", 200)):
        connection = http.client.HTTPConnection("127.0.0.1", int(port), timeout=PATIENCE)
        connection.request("POST", "/tokenize", b'{"content": "x"}', {"Origin": origin, "Content-Type": "text/plain"})
        response = connection.getresponse()
        assert response.status == status, origin
        assert not [name for name, _ in response.getheaders() if name.lower().startswith("access-control")]
        connection.close()


def test_a_page_whose_name_points_here_is_refused(server: Server) -> None:
    port = server.url.rpartition(":")[2]
    for host, status in (("evil.example", 403), (f"evil.example:{port}", 403), ("", 403), (f"LOCALHOST:{port}", 200), (f"[::1]:{port}", 200)):
        connection = http.client.HTTPConnection("127.0.0.1", int(port), timeout=PATIENCE)
        connection.request("GET", "/v1/models", headers={"Host": host})
        assert connection.getresponse().status == status, host
        connection.close()


def test_a_half_request_holds_no_place(server: Server) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    sockets = [socket.create_connection((host, int(port)), PATIENCE) for _ in range(5)]
    for connection in sockets:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
    assert server.client().completions.create(model="books", prompt=PROMPT, max_tokens=1).choices
    for connection in sockets:
        connection.close()


def test_api_key_chat_template_and_origins(tmp_path: Path) -> None:
    model = write_chat_model(tmp_path / "chat.gguf")
    with serve("-m", model, "-c", "512", "--api-key", "secret", "--cors-origin", "https://good.example") as server:
        with pytest.raises(openai.AuthenticationError, match="the API key is missing or wrong"):
            server.client("wrong").completions.create(model="x", prompt="Hi")
        for path in ("/v1/models", "/metrics", "/slots", "/"):
            with pytest.raises(urllib.error.HTTPError) as caught:
                urllib.request.urlopen(server.url + path, timeout=PATIENCE)
            assert caught.value.code == 401
        assert urllib.request.urlopen(f"{server.url}/health", timeout=PATIENCE).status == 200
        chat = server.client("secret").chat.completions.create(model="x", messages=[{"role": "user", "content": "Hi"}], max_tokens=5, temperature=0)
        assert chat.usage and chat.usage.prompt_tokens == 1 + len("user:▁Hi\nassistant:▁".encode())  # one <s>, then bytes
        with pytest.raises(openai.BadRequestError, match="does not embed: start it with --embeddings"):
            server.client("secret").embeddings.create(model="x", input="Hi")
        request = urllib.request.Request(f"{server.url}/health", headers={"Origin": "https://good.example"})
        assert urllib.request.urlopen(request, timeout=PATIENCE).headers["access-control-allow-origin"] == "https://good.example"


def test_a_chat_with_a_model_without_a_template_is_refused() -> None:
    with serve("-c", "512", "--kv", "q8_0") as server:
        for stream in (False, True):
            with pytest.raises(openai.BadRequestError, match="this model has no chat template"):
                server.client().chat.completions.create(model="x", messages=[{"role": "user", "content": "Hi"}], stream=stream)


def test_a_server_stops_in_the_middle_of_a_stream() -> None:
    with serve("-c", "4096") as server:
        stream = long_stream(server)
        reader = threading.Thread(target=lambda: _drain(stream), daemon=True)
        reader.start()
    reader.join(PATIENCE)
    assert not reader.is_alive()


def _drain(stream: Any) -> None:
    """Read to the end, whichever it is."""
    with contextlib.suppress(Exception):  # the HTTP library's own, which differs between releases of the client
        list(stream)


TIME_TOOL: Any = {"type": "function", "function": {"name": "time", "parameters": {"type": "object", "properties": {}}}}


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
@pytest.mark.parametrize("stream", [False, True])
def test_a_demanded_tool_is_called(choice: Any, stream: bool) -> None:
    """What the gate asks for, and what it makes of the answer."""
    tools = [TOOL, TIME_TOOL]
    request = {"tools": tools, "tool_choice": choice, "messages": []}
    functions = forced.demanded(request, "/chat/completions")
    assert [function["name"] for function in functions] == (["weather", "time"] if choice == "required" else ["weather"])
    asked = forced.as_schema(request, functions)
    schema = asked["response_format"]["json_schema"]["schema"]
    assert asked["tool_choice"] == "none" and asked["tools"] == tools
    text = '{"name": "weather", "arguments": {"city": "Bonn"}}' if choice == "required" else '{"city": "Bonn"}'
    if choice == "required":
        assert [one["properties"]["name"] for one in schema["anyOf"]] == [{"const": "weather"}, {"const": "time"}]
    else:
        assert schema == TOOL["function"]["parameters"]
    answer = {
        "object": "chat.completion",
        "usage": {},
        "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}],
    }
    whole = forced.as_call(json.dumps(answer).encode(), functions)
    if stream:
        events = [json.loads(line[6:]) for line in forced.as_stream(whole, has_usage=True).decode().split("\n\n") if line.startswith("data: {")]
        assert [event["choices"][0]["finish_reason"] for event in events[:2]] == [None, "tool_calls"] and events[2]["usage"] == {}
        message = events[0]["choices"][0]["delta"]
        assert message["tool_calls"][0]["index"] == 0
    else:
        assert whole["choices"][0]["finish_reason"] == "tool_calls"
        message = whole["choices"][0]["message"]
    (call,) = message["tool_calls"]
    assert call["function"]["name"] == "weather" and json.loads(call["function"]["arguments"]) == {"city": "Bonn"}


def test_demanded_calls_that_are_cut_off_say_so() -> None:
    answer = {"choices": [{"index": 0, "finish_reason": "length", "message": {"role": "assistant", "content": '{"ci'}}]}
    one = forced.as_call(json.dumps(answer).encode(), [TOOL["function"]])["choices"][0]
    assert one["finish_reason"] == "length" and one["message"]["tool_calls"][0]["function"]["arguments"] == '{"ci'
    several = forced.as_call(json.dumps(answer).encode(), [TOOL["function"], TIME_TOOL["function"]])["choices"][0]
    assert several["finish_reason"] == "length" and several["message"]["content"] == '{"ci'


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"tool_choice": "must"}, "tool_choice must be"),
        ({"tool_choice": {"type": "function", "function": {"name": "none"}}}, "'none', which is not among the tools"),
        ({"tools": [{"type": "function"}]}, "must be a function with a name"),
        ({"response_format": {"type": "json_object"}}, "response_format does not go together"),
        ({"n": 2}, "n must be 1"),
    ],
)
def test_demands_that_cannot_be_met(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(RequestError, match=reason):
        forced.demanded({"tools": [TOOL], "tool_choice": "required", **changes}, "/chat/completions")


TOOL_TEMPLATE = (
    "{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}{% for message in messages %}{{ message.role }}: {{ message.content }}\n"
    "{% for call in message.tool_calls %}{{ call.function.name }}{{ call.function.arguments | tojson }}{% endfor %}{% endfor %}assistant: "
)


def test_a_demanded_tool_is_called_by_a_real_server() -> None:
    """With a template that knows tools; the model never saw one, so that only the schema can make it call."""
    with serve("-c", "1024", "-np", "1", "--chat-template", TOOL_TEMPLATE) as own:
        asked: Any = {"model": "m", "messages": [{"role": "user", "content": "Weather?"}], "max_tokens": 60, "temperature": 0}
        demand: Any = {"type": "function", "function": {"name": "weather"}}
        answer = own.client().chat.completions.create(**asked, tools=[TOOL], tool_choice=demand).choices[0]
        (call,) = answer.message.tool_calls or []
        assert answer.finish_reason == "tool_calls" and call.function.name == "weather" and set(json.loads(call.function.arguments)) == {"city"}
        pieces = [piece.choices[0] for piece in own.client().chat.completions.create(**asked, tools=[TOOL], tool_choice=demand, stream=True)]
        assert pieces[-1].finish_reason == "tool_calls" and pieces[0].delta.tool_calls and pieces[0].delta.tool_calls[0].function
