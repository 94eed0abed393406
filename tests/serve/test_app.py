"""The server as OpenAI's own client, a browser and a careless programmer meet it."""

import gc
import itertools
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from servers import NAME, load, save, serving

from heddle.data.tokenizers import Tokenizer
from heddle.jax import generate, paged
from heddle.jax import sampler as usual
from heddle.jax.answer import Answer, TokenLogprobs
from heddle.jax.engine import Engine
from heddle.jax.requests import Event, Handle, Request
from heddle.serve.answers import CompletionForm
from heddle.serve.app import Limits, create_app
from heddle.serve.protocol import ChatBody, CompletionBody, refuse_invalid

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
IGNORE = {"ignore_eos": True}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save(folder)
    return load(folder)


def engine_of(pair, **options) -> Engine:
    return Engine(*pair, **{"max_batch": 8, "blocks": 48, "block_size": 16, "prefill_chunk": 32, **options})


@pytest.fixture(scope="module")
def server(pair):
    engine = engine_of(pair)
    with serving(engine, limits=Limits(body_bytes=5000, max_tokens=60)) as url:
        yield url, engine


@pytest.fixture(scope="module")
def client(server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server[0] + "/v1", api_key="any", max_retries=0) as client:
        yield client


def expected(pair, prompt, **options):
    return generate(*pair, [prompt], **{"max_tokens": 16, **options})[0]


# ---------------------------------------------------------------------- OpenAI's client


def test_models(client):
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).id == NAME
    with pytest.raises(openai.NotFoundError, match="model must be 'tiny', got 'other'"):
        client.models.retrieve("other")


def test_a_completion(client, pair):
    found = client.completions.create(model=NAME, prompt="some text", temperature=0)
    one = expected(pair, "some text")
    assert (found.choices[0].text, found.choices[0].finish_reason) == (one.text, one.finish_reason)
    usage = found.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (9, 16, 25)
    assert usage.prompt_tokens_details.cached_tokens == 0


def test_several_prompts_with_several_answers_each(client, pair):
    sampler = usual(1.5, top_p=0.9, presence_penalty=0.5)
    for prompt in (["one", "two"], [[111, 110, 101], [116, 119, 111]]):
        found = client.completions.create(
            model=NAME, prompt=prompt, n=2, temperature=1.5, top_p=0.9, presence_penalty=0.5, seed=7, max_tokens=5
        )
        options = {"sampler": sampler, "max_tokens": 5}
        texts = [expected(pair, p, seed=7 + i, **options).text for p in ("one", "two") for i in (0, 1)]
        assert [choice.text for choice in found.choices] == texts
        assert [choice.index for choice in found.choices] == [0, 1, 2, 3]


def test_a_chat_and_its_stream(client, pair):
    parts = [{"type": "text", "text": "hi"}]
    messages = [{"role": "developer", "content": "be brief"}, {"role": "user", "content": parts}]
    options = {"model": NAME, "messages": messages, "temperature": 0, "max_completion_tokens": 12}
    whole = client.chat.completions.create(**options)
    one = expected(pair, "[sbe brief][uhi][a", max_tokens=12)
    assert (whole.choices[0].message.content, whole.choices[0].finish_reason) == (one.text, one.finish_reason)
    assert whole.choices[0].message.role == "assistant"
    chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == one.text
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + [one.finish_reason]
    assert (chunks[-1].choices, chunks[-1].usage.total_tokens) == ([], whole.usage.total_tokens)
    assert {chunk.usage for chunk in chunks[:-1]} == {None}
    assert len({chunk.id for chunk in chunks}) == 1


def test_streams_of_several_choices_each_add_up(client):
    options = {"model": NAME, "prompt": ["a", "bc"], "n": 2, "seed": 3, "max_tokens": 10}
    whole = client.completions.create(**options)
    texts, reasons = [""] * 4, [None] * 4
    for chunk in client.completions.create(**options, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert texts == [choice.text for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]


def test_stop_strings_and_echo(client, pair):
    free = expected(pair, "go").text
    stop = free[4:6]
    found = client.completions.create(model=NAME, prompt="go", temperature=0, stop=["never", stop]).choices[0]
    assert (found.text, found.finish_reason) == (free[: free.index(stop)], "stop")
    options = {"model": NAME, "prompt": ["go", "on"], "temperature": 0, "echo": True}
    echoed = client.completions.create(**options).choices
    assert [choice.text for choice in echoed] == ["go" + free, "on" + expected(pair, "on").text]
    texts = ["", ""]
    for chunk in client.completions.create(**options, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [choice.text for choice in echoed]


def test_the_end_of_text_can_be_ignored(pair):
    model, words = pair
    one = expected(pair, "go")
    end = one.tokens[5]
    ends = Tokenizer(words.backend, words.special, stop_ids=[end])
    with serving(engine_of((model, ends))) as url:
        found = [post(url, {"model": NAME, "prompt": "go", "temperature": 0} | more).json() for more in ({}, IGNORE)]
        streamed = post(url, {"model": NAME, "prompt": "go", "temperature": 0, "stream": True} | IGNORE).text
    short = words.decode(one.tokens[: one.tokens.index(end)])
    for answer, whole in zip(found, ((short, "stop"), (one.text, "length")), strict=True):
        assert (answer["choices"][0]["text"], answer["choices"][0]["finish_reason"]) == whole
    events = [json.loads(line[6:]) for line in streamed.splitlines() if line.startswith("data: {")]
    assert "".join(event["choices"][0]["text"] for event in events) == one.text


def test_log_probabilities(client, pair):
    one = expected(pair, "hello", logprobs=2)
    told = client.completions.create(model=NAME, prompt="hello", temperature=0, logprobs=2).choices[0].logprobs
    assert told.token_logprobs == pytest.approx([each.chosen for each in one.logprobs], abs=1e-4)
    assert told.tokens == [pair[1].decode([token], skip_special=False) for token in one.tokens]
    names = [{pair[1].decode([token], skip_special=False) for token, _ in each.top} for each in one.logprobs]
    assert [set(top) for top in told.top_logprobs] == names
    chat = expected(pair, "[uhello][a", logprobs=3)
    told = chat.logprobs[:-1] if chat.finish_reason == "stop" else chat.logprobs  # what ends it isn't part of it
    options = {"model": NAME, "messages": [{"role": "user", "content": "hello"}], "temperature": 0, "max_tokens": 16}
    content = client.chat.completions.create(**options, logprobs=True, top_logprobs=3).choices[0].logprobs.content
    assert [entry.logprob for entry in content] == pytest.approx([each.chosen for each in told], abs=1e-4)
    for entry, each in zip(content, told, strict=True):
        assert [top.logprob for top in entry.top_logprobs] == pytest.approx([v for _, v in each.top], abs=1e-4)
    streamed = client.chat.completions.create(**options, logprobs=True, stream=True)
    told = [entry for chunk in streamed if chunk.choices[0].logprobs for entry in chunk.choices[0].logprobs.content]
    assert [entry.logprob for entry in told] == pytest.approx([entry.logprob for entry in content], abs=1e-4)


def test_the_sampled_token_is_among_those_told(client):
    options = {"model": NAME, "prompt": "hello", "temperature": 2, "seed": 5}
    for n in (0, 2):
        told = client.completions.create(**options, logprobs=n).choices[0].logprobs
        assert len(told.tokens) == 16
        for token, logprob, top in zip(told.tokens, told.token_logprobs, told.top_logprobs, strict=True):
            assert top[token] == logprob
            assert len(top) <= n + 1


def test_offsets_are_those_of_whole_characters_streamed_or_not():
    tokenizer, text = Tokenizer.bytes(), "é!🎉x"
    body = CompletionBody(model=NAME, prompt="x", logprobs=0)
    handle = Handle(Request("x", logprobs=0), 1, frozenset(), lambda handle: None)
    form = CompletionForm(NAME, tokenizer, body, [handle])
    answer, streamed = Answer(tokenizer.decoder(), ("x?",), frozenset(), 100), []
    for byte in text.encode():
        event = Event(0, *answer.add(byte, TokenLogprobs(-1.0, ())))
        streamed += form.add(0, handle, event)["choices"][0]["logprobs"]["text_offset"]
    assert streamed == [0, 0, 1, 2, 2, 2, 2, 3]
    assert form.whole()["choices"][0]["logprobs"]["text_offset"] == streamed


def test_an_answer_goes_back_as_openais_client_writes_it(client, pair):
    messages = [{"role": "user", "content": "hi"}]
    options = {"model": NAME, "temperature": 0, "max_tokens": 5}
    nothing = dict.fromkeys(("functions", "reasoning_effort", "audio", "tools", "prediction", "verbosity"))
    first = client.chat.completions.create(messages=messages, **options, extra_body=nothing).choices[0].message
    messages.append(first.model_dump())
    assert messages[-1] | {"tool_calls": None, "annotations": None} == messages[-1]
    messages.append({"role": "assistant", "content": "", "tool_calls": [], "annotations": [], "refusal": None})
    messages.append({"role": "user", "content": "more"})
    second = client.chat.completions.create(messages=messages, **options).choices[0].message
    assert second.content == expected(pair, f"[uhi][a{first.content}][a][umore][a", max_tokens=5).text


def test_streams_end_no_line_where_a_text_does(server):
    text = "a\u2028b\u0085c\u2029é"
    body = {"model": NAME, "prompt": text, "echo": True, "stream": True, "max_tokens": 1}
    response = post(server[0], body)
    assert response.content.isascii()
    assert json.loads(response.text.splitlines()[0].removeprefix("data: "))["choices"][0]["text"] == text


def test_a_prompt_seen_before_is_told_as_cached(client):
    prompt = "x" * 40
    counts = []
    for _ in range(2):
        usage = client.completions.create(model=NAME, prompt=prompt, max_tokens=1).usage
        counts.append(usage.prompt_tokens_details.cached_tokens)
    assert counts == [0, 32]


# ---------------------------------------------------------------------- refusals


def post(url: str, body, path: str = TEXT, **options) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"content-type": "application/json"} | options.pop("headers", {})
    return httpx.post(url + path, content=content, headers=headers, timeout=60, **options)


GOOD = {"model": NAME, "prompt": "x", "max_tokens": 2}
TALK = {"model": NAME, "messages": [{"role": "user", "content": "x"}], "max_tokens": 2}


@pytest.mark.parametrize(
    ("changes", "param", "words"),
    [
        ({"temperature": 3}, "temperature", "less than or equal to 2"),
        ({"temperature": "1"}, "temperature", "valid number"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"top_k": 0}, "top_k", "greater than or equal to 1"),
        ({"top_k": 2**31}, "top_k", "less than or equal to 2147483647"),
        ({"repetition_penalty": 1e-50}, "repetition_penalty", "greater than or equal to 0.01"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"n": 9}, "n", "the largest batch"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": 61}, "max_tokens", "at most 60, got 61"),
        ({"max_tokens": True}, "max_tokens", "valid integer"),
        ({"prompt": ""}, "prompt", "at least one token"),
        ({"prompt": []}, "prompt", "at least one token"),
        ({"prompt": [["a"]]}, "prompt.0.0", "valid integer"),
        ({"prompt": [5] * 30 + [999] * 30}, "prompt", r"prompt must hold ids in [0, 257), got 999"),
        ({"prompt": "x" * 96}, "prompt", "shorter than the model's context of 96 tokens"),
        ({"prompt": ["x"] * 129}, "prompt", "at most 128 prompts"),
        ({"stop": [""]}, "stop", "aren't empty"),
        ({"logprobs": 21}, "logprobs", "less than or equal to 20"),
        ({"echo": True, "logprobs": 1}, "echo", "must be false with logprobs"),
        ({"best_of": 3}, "best_of", "must be n"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "must go with stream"),
        ({"logit_bias": {"5": 1.0}}, "logit_bias", ""),
        ({"suffix": "x"}, "suffix", ""),
        ({"surprise": 1}, "surprise", "not supported"),
        ({"model": "other"}, "model", "must be 'tiny'"),
        ({"model": None}, "model", "valid string"),
    ],
)
def test_what_a_completion_cannot_be_is_refused_by_name(server, changes, param, words):
    response = post(server[0], GOOD | changes)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (404 if "other" in changes.values() else 400, param)
    assert error["type"] == "invalid_request_error"
    assert words in error["message"]


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content.0.type"),
        ({"messages": [{"role": "user", "content": "x" * 200}]}, "messages"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"max_completion_tokens": 61}, "max_completion_tokens"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format.type"),
        ({"prompt": "x"}, "prompt"),
    ],
)
def test_what_a_chat_cannot_be_is_refused_by_name(server, changes, param):
    response = post(server[0], TALK | changes, CHAT)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


MANY = 100_000


@pytest.mark.parametrize(
    ("path", "changes"),
    [
        (TEXT, {"prompt": [0] * MANY + ["x"]}),
        (TEXT, {"prompt": ["x"] * MANY + [0]}),
        (TEXT, {"prompt": [[0]] * MANY + ["x"]}),
        (TEXT, {"prompt": [[0, "x"] * MANY]}),
        (TEXT, {"stop": [0] * MANY}),
        (TEXT, {str(i): 0 for i in range(MANY // 2)}),
        (TEXT, {"logit_bias": {str(i): "x" for i in range(MANY // 2)}}),
        (CHAT, {"messages": [{}] * MANY}),
        (CHAT, {"messages": [{"role": "user", "content": [{}] * MANY}]}),
        (CHAT, {"messages": [{"role": "user", "content": "x"} | {str(i): 0 for i in range(MANY // 2)}]}),
        (CHAT, {"tools": [0] * MANY}),
        (CHAT, {"modalities": [0] * MANY}),
    ],
)
def test_a_body_full_of_mistakes_costs_no_more_than_one(path, changes):
    body = json.dumps((TALK if path == CHAT else GOOD) | changes).encode()
    assert MANY < len(body) <= Limits().body_bytes
    with pytest.raises(ValidationError) as error:
        (ChatBody if path == CHAT else CompletionBody).model_validate_json(body)
    assert error.value.error_count() <= 5
    refusal = refuse_invalid(error.value)
    assert (refusal.status, len(refusal.message) < 200) == (400, True)


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        (b"{", {}, 400),
        (b"\xff\xfe", {}, 400),
        (b"[" * 4000, {}, 400),
        (b'{"model": "tiny", "prompt": "\\ud800"}', {}, 400),
        (b'{"model": "tiny", "prompt": "x", "temperature": NaN}', {}, 400),
        (b"", {}, 400),
        (b"null", {}, 400),
        (json.dumps(GOOD).encode(), {"content-type": "text/plain"}, 415),
        (b"x" * 5001, {}, 413),
    ],
)
def test_what_is_no_request_is_refused(server, body, headers, status):
    response = post(server[0], body, headers=headers)
    assert response.status_code == status
    assert response.json()["error"]["message"]


def test_a_body_that_grows_too_large_is_refused_as_it_comes(server):
    pieces = (b" " * 1000 for _ in range(20))
    response = httpx.post(server[0] + TEXT, content=pieces, headers={"content-type": "application/json"})
    assert response.status_code == 413


def test_unknown_paths_and_methods_are_errors_of_the_same_form(server):
    assert httpx.get(server[0] + "/v1/engines").json()["error"]["message"] == "GET /v1/engines: Not Found"
    assert httpx.get(server[0] + TEXT).status_code == 405
    assert httpx.get(server[0] + "/docs").status_code == 404


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
FIELDS = st.sampled_from(
    ["model", "prompt", "messages", "max_tokens", "temperature", "top_p", "top_k", "n", "stop", "seed", "logprobs",
     "stream", "stream_options", "echo", "best_of", "user", "tools", "presence_penalty", "min_p", "logit_bias",
     "ignore_eos", "max_completion_tokens", "top_logprobs", "response_format", "repetition_penalty"]
)  # fmt: skip


@settings(max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    path=st.sampled_from([CHAT, TEXT]),
    changes=st.dictionaries(FIELDS | st.text(max_size=5), JSON, max_size=4),
    whole=st.none() | JSON,
)
def test_whatever_is_asked_the_answer_is_a_refusal_or_right(server, path, changes, whole):
    url = server[0]
    body = whole if whole is not None else (TALK if path == CHAT else GOOD) | changes
    response = post(url, body, path)
    assert response.status_code == 200 or 400 <= response.status_code < 500, response.text
    if response.status_code >= 400:
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert httpx.get(url + "/health").json() == {"status": "ok"}


NONSENSE = (
    b"{", b"\xff", b"[" * 4000, b"x" * 2**21, b"null", b'{"model": "tiny"}', json.dumps(GOOD | {"n": 9}).encode(),
    json.dumps(GOOD | {"prompt": "x" * 96}).encode(), json.dumps(GOOD | {"prompt": [10**9]}).encode(),
)  # fmt: skip


def test_nonsense_harms_no_neighbour(pair):
    """Answers under way while it arrives are those of a server that is asked nothing else."""
    prompts, over = ["a", "one two", "abc" * 9, "go", "x" * 20, "z"], threading.Event()
    headers = {"content-type": "application/json"}
    with (
        serving(engine_of(pair)) as url,
        httpx.Client(base_url=url, headers=headers, timeout=300) as client,
        ThreadPoolExecutor(7) as pool,
    ):

        def disturb() -> set[int]:
            statuses = set()
            while not over.is_set():
                statuses |= {client.post(TEXT, content=body).status_code for body in NONSENSE}
            return statuses

        def ask(prompt: str) -> str:
            body = {"model": NAME, "prompt": prompt, "temperature": 0, "max_tokens": 60}
            return client.post(TEXT, json=body).json()["choices"][0]["text"]

        careless = pool.submit(disturb)
        try:
            answers = list(pool.map(ask, prompts))
        finally:
            over.set()
        assert careless.result() == {400, 413}
    assert answers == [expected(pair, prompt, max_tokens=60).text for prompt in prompts]


# ---------------------------------------------------------------------- keys, limits, load


def test_keys(pair):
    engine = engine_of(pair)
    with serving(engine, api_keys=["first", "second"]) as url:
        for key in ("first", "second"):
            with openai.OpenAI(base_url=url + "/v1", api_key=key) as client:
                assert client.models.list().data[0].id == NAME
        for given in (None, "Bearer wrong", "Basic first", "first", "Bearer first second"):
            response = post(url, GOOD, headers={} if given is None else {"authorization": given})
            assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key")
        assert httpx.get(url + "/health").status_code == 200  # what watches the server needs no key
    with pytest.raises(ValueError, match="api_keys must not be empty strings"):
        create_app(engine, NAME, api_keys=["good", ""])
    with pytest.raises(ValueError, match="max_tokens must be positive, got 0"):
        Limits(max_tokens=0)


def test_a_full_queue_is_told_and_passes(pair):
    engine = engine_of(pair, max_batch=1, max_queue=1)
    with serving(engine) as url, openai.OpenAI(base_url=url + "/v1", api_key="any", max_retries=0) as client:
        options = {"model": NAME, "prompt": "x", "max_tokens": 80, "temperature": 0}
        refused, done = [], []

        def ask():
            try:
                done.append(client.completions.create(**options))
            except openai.RateLimitError as error:
                refused.append(error)

        threads = [threading.Thread(target=ask) for _ in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert refused
        assert done
        assert refused[0].code == "queue_full"
        assert refused[0].response.headers["retry-after"] == "1"
        assert f"heddle_requests_refused_total {float(len(refused))}" in httpx.get(url + "/metrics").text
        # Several prompts are taken in all together or not at all.
        assert post(url, options | {"prompt": ["x"] * 9}).status_code == 429
        client.completions.create(**options)
    assert engine.scheduler.blocks.held == 0


def test_an_answer_that_takes_too_long_is_broken_off(pair):
    engine = engine_of(pair)
    with serving(engine, limits=Limits(seconds=0.001)) as url:
        response = post(url, GOOD | {"max_tokens": 90})
        assert (response.status_code, response.json()["error"]["code"]) == (408, "timeout")
        with openai.OpenAI(base_url=url + "/v1", api_key="any", max_retries=2) as client:
            with pytest.raises(openai.APIStatusError) as refused:
                client.completions.create(**GOOD | {"max_tokens": 90})
            assert refused.value.status_code == 408
        assert engine.counters.requests == 2  # the client did not ask again
        response = post(url, GOOD | {"max_tokens": 90, "stream": True})
        assert response.status_code == 200  # what went before can't be taken back: the error is an event
        assert json.loads(response.text.strip().splitlines()[-1].removeprefix("data: "))["error"]["code"] == "timeout"


def test_while_a_long_text_becomes_ids_others_are_answered(pair):
    model, words = pair
    reading, read = threading.Event(), threading.Event()

    class Long(Tokenizer):
        def encode(self, text, **options):
            reading.set()
            assert read.wait(60)
            return super().encode(text, **options)

    slow = Long(words.backend, words.special, chat_template=words.chat_template)
    with serving(engine_of((model, slow))) as url, ThreadPoolExecutor(1) as pool:
        for body, path in ((GOOD, TEXT), (TALK, CHAT)):
            asked = pool.submit(post, url, body, path)
            assert reading.wait(60)
            assert httpx.get(url + "/health", timeout=60).json() == {"status": "ok"}
            assert not asked.done()
            read.set()
            assert asked.result().status_code == 200
            reading.clear()
            read.clear()


def test_an_engine_that_has_ended_is_told_as_ill(pair, monkeypatch):
    class Broken:
        def __init__(self, *arguments):
            raise MemoryError("nor for another")

    def fail(*arguments):
        monkeypatch.setattr("heddle.jax.engine.Device", Broken)
        raise MemoryError("no memory")

    engine = engine_of(pair)
    with serving(engine) as url:
        monkeypatch.setattr(paged.Device, "decode", fail)
        assert post(url, GOOD).status_code == 500
        engine._thread.join(60)
        health = httpx.get(url + "/health")
        assert (health.status_code, health.json()) == (503, {"status": "stopped"})
        assert (post(url, GOOD).status_code, post(url, TALK, CHAT).json()["error"]["code"]) == (503, "stopping")


class Held(Engine):
    """Whose answers, after their first tokens, are under way until it may go on."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.go_on = threading.Event()

    def step(self) -> bool:
        assert self.counters.tokens < 3 or self.go_on.wait(60)
        return super().step()


def test_what_comes_while_the_rest_is_finished_is_refused(pair):
    engine = Held(*pair, max_batch=4, blocks=24, block_size=16, prefill_chunk=32)
    body = {"model": NAME, "prompt": "x", "max_tokens": 90, "temperature": 0, "stream": True}
    with serving(engine) as url, httpx.stream("POST", url + TEXT, json=body, timeout=60) as response:
        lines = response.iter_lines()
        next(lines)
        engine.stop()
        refused = post(url, GOOD)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "stopping")
        assert refused.headers["retry-after"] == "5"
        assert httpx.get(url + "/health").json() == {"status": "stopping"}
        engine.go_on.set()
        assert list(lines)[-2] == "data: [DONE]"


def test_a_client_that_vanishes_frees_its_blocks(pair):
    engine = engine_of(pair)
    body = {"model": NAME, "prompt": "x", "max_tokens": 90, "temperature": 0}
    with serving(engine) as url:
        with httpx.stream("POST", url + TEXT, json=body | {"stream": True}, timeout=60) as response:
            next(response.iter_lines())
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(url + TEXT, json=body | {"n": 8}, timeout=httpx.Timeout(60, read=0.01))
        deadline = time.monotonic() + 60
        while engine.running or engine.waiting or engine.scheduler.blocks.held:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert post(url, body).status_code == 200
    assert engine.counters.finished["cancelled"] >= 8


class Slow(Engine):
    """Whose answers take long enough to be left."""

    def step(self) -> bool:
        time.sleep(0.02)
        return super().step()


def test_sixty_four_clients_of_whom_a_third_vanish(pair):
    """All others complete, each with the answer it gets alone; no block is lost."""
    engine = Slow(*pair, max_batch=8, blocks=48, block_size=16, prefill_chunk=32)
    prompts = ["abcdefghij"[: 1 + i % 7] * (1 + i % 5) for i in range(64)]
    lengths = [5 + 11 * i % 50 for i in range(64)]
    answers: dict[int, str] = {}
    with serving(engine) as url:

        def ask(i: int) -> None:
            with openai.OpenAI(base_url=url + "/v1", api_key="any", max_retries=0, timeout=300) as client:
                options = {"model": NAME, "prompt": prompts[i], "temperature": 0, "max_tokens": lengths[i]}
                if i % 3 == 1:
                    answers[i] = client.completions.create(**options).choices[0].text
                    return
                with client.completions.create(**options, stream=True) as stream:
                    text = ""
                    for count, chunk in enumerate(stream):
                        text += chunk.choices[0].text
                        if i % 3 == 0 and count == i % 4:
                            return  # without a word
                    answers[i] = text

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(64)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        deadline = time.monotonic() + 60
        while engine.running or engine.waiting:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        text = httpx.get(url + "/metrics").text
        assert 'heddle_cache_blocks{state="held"} 0.0' in text
        assert "heddle_sequences_running 0.0" in text
    assert {i for i in range(64) if i % 3} <= set(answers)
    for i, answer in answers.items():
        assert answer == expected(pair, prompts[i], max_tokens=lengths[i]).text
    assert engine.scheduler.blocks.available == engine.scheduler.blocks.count
    assert engine.counters.finished["cancelled"] > 10  # of 22 who left: not all of them had their answer already


def test_the_page_and_the_metrics(server):
    page = httpx.get(server[0] + "/")
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    metrics = httpx.get(server[0] + "/metrics")
    assert metrics.headers["content-type"].startswith("text/plain")
    for name in ("heddle_requests_total", "heddle_first_token_seconds_bucket", "heddle_http_responses_total"):
        assert name in metrics.text


@pytest.mark.slow
def test_two_thousand_requests_take_no_more_memory(pair):
    """Whole, streamed, left in the middle and refused, from eight clients at once."""
    import psutil

    engine, process = engine_of(pair), psutil.Process()
    with serving(engine) as url, httpx.Client(base_url=url, timeout=120) as client, ThreadPoolExecutor(8) as pool:

        def ask(i: int) -> None:
            body = GOOD | {"prompt": f"request {i}", "max_tokens": 3, "temperature": 0}
            if i % 3 == 0:
                assert client.post(TEXT, json=body).status_code == 200
            elif i % 3 == 1:
                assert client.post(TEXT, json=body | {"stream": True}).text.endswith("data: [DONE]\n\n")
            else:
                with client.stream("POST", TEXT, json=body | {"stream": True, "max_tokens": 60}) as response:
                    next(response.iter_lines())
            if i % 8 == 0:
                assert client.post(TEXT, json=body | {"surprise": 1}).status_code == 400

        def left_after(count: int) -> tuple[int, int]:
            """Objects, and bytes of the process."""
            list(pool.map(ask, range(count)))
            deadline = time.monotonic() + 60
            while engine._handles:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            gc.collect()
            return len(gc.get_objects()), process.memory_info().rss

        objects, sizes = zip(*(left_after(count) for count in (400, 500, 500, 500, 500)), strict=True)
    # What is compiled or filled once may fall into any stretch; what each request leaves behind falls into all of them.
    assert min(after - before for before, after in itertools.pairwise(objects)) < 100
    assert sizes[-1] - sizes[0] < 30e6
    assert engine.scheduler.blocks.held == 0
    assert engine.scheduler.blocks.available == engine.scheduler.blocks.count
