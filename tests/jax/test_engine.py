"""The engine: every answer as it is alone, whoever else is served; no block is ever lost."""

import asyncio
import dataclasses
import functools
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_models import hugging_face, tokens

from heddle.data.tokenizers import Tokenizer
from heddle.jax import ModelConfig, Transformer, generate, paged
from heddle.jax import engine as engine_module
from heddle.jax import sampler as usual
from heddle.jax.engine import Closed, Engine, QueueFull, Request
from heddle.jax.sampling import Random, TopK, TopP

BYTES = Tokenizer.bytes()
FREE = {"stop_ids": ()}
PROMPTS = [tokens(n, seed=n).tolist() for n in (3, 40, 11, 1, 70, 33, 17)]
RANDOM = usual(2.0, top_k=40)
SCARCE = 8  #: blocks, too few for a batch; always the same number, as each compiles anew


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Transformer:
    folder = tmp_path_factory.mktemp("model")
    hugging_face("llama, bytes").save_pretrained(folder)
    return Transformer.from_pretrained(folder)


def alone(model, prompt, **options):
    [completion] = generate(model, BYTES, [prompt], **{"max_tokens": 20, **FREE, **options})
    return completion


def small(model, **options) -> Engine:
    return Engine(model, BYTES, **{"max_batch": 4, "blocks": 24, "block_size": 16, "prefill_chunk": 32, **options})


def check_empty(engine: Engine) -> None:
    assert (engine.scheduler.blocks.held, engine.running, engine.waiting) == (0, 0, 0)
    assert engine.scheduler.blocks.available == engine.scheduler.blocks.count


def test_each_answer_is_the_one_it_is_alone(model):
    engine = small(model)
    answers = engine.run([Request(prompt, max_tokens=20, **FREE) for prompt in PROMPTS])
    assert [answer for [answer] in answers] == [alone(model, prompt) for prompt in PROMPTS]
    check_empty(engine)
    # Again: now prompts are found in the cache.
    again = engine.run([Request(prompt, max_tokens=20, **FREE) for prompt in PROMPTS])
    assert again == answers
    assert engine.counters.reused_tokens == sum((len(prompt) - 1) // 16 * 16 for prompt in PROMPTS)


def test_when_blocks_run_out_the_youngest_is_read_again(model):
    engine = small(model, blocks=SCARCE)
    requests = [Request(prompt, max_tokens=40, **FREE) for prompt in PROMPTS if len(prompt) < 50]
    answers = engine.run(requests)
    assert engine.scheduler.preemptions > 0
    assert [answer for [answer] in answers] == [alone(model, r.prompt, max_tokens=40) for r in requests]
    check_empty(engine)


def test_samplers_and_seeds_are_each_requests_own(model):
    samplers = [usual(), RANDOM, usual(3.0, top_p=0.9, frequency_penalty=0.7), usual(0.0, repetition_penalty=1.5)]
    requests = [Request(PROMPTS[i], 20, chosen, seed=i, **FREE) for i, chosen in enumerate(samplers)]
    for request, [answer] in zip(requests, small(model).run(requests)):
        assert answer == alone(model, request.prompt, sampler=request.sampler, seed=request.seed)


@pytest.mark.parametrize("blocks", [24, SCARCE])
def test_many_answers_share_one_prompt(model, blocks):
    engine = small(model, blocks=blocks)
    prompts = [PROMPTS[1], PROMPTS[2], PROMPTS[3]]  # the last of one token: nothing is read before it
    requests = [Request(prompt, 20, RANDOM, seed=5, n=3, **FREE) for prompt in prompts]
    for prompt, answers in zip(prompts, engine.run(requests)):
        assert answers == [alone(model, prompt, sampler=RANDOM, seed=5 + i) for i in range(3)]
    assert engine.counters.prompt_tokens == sum(map(len, prompts))
    check_empty(engine)


def test_log_probabilities_and_stops_are_those_of_generate(model):
    free = [alone(model, prompt) for prompt in PROMPTS]
    stop, end = free[0].text[5:7], free[2].tokens[4]
    requests = [
        Request(PROMPTS[0], 20, stop=stop, **FREE),
        Request(PROMPTS[2], 20, stop_ids=[end]),
        Request(PROMPTS[1], 20, logprobs=3, **FREE),
        Request(PROMPTS[5], 20, logprobs=0, **FREE),
    ]
    [cut], [ended], [three], [none] = small(model).run(requests)
    assert cut == alone(model, PROMPTS[0], stop=stop)
    assert ended == alone(model, PROMPTS[2], stop_ids=[end])
    theirs = alone(model, PROMPTS[1], logprobs=3), alone(model, PROMPTS[5], logprobs=0)
    for found, expected in zip((three, none), theirs):
        assert found.tokens == expected.tokens
        for ours, theirs in zip(found.logprobs, expected.logprobs, strict=True):
            assert ours.chosen == pytest.approx(theirs.chosen, abs=1e-4)
            assert [value for _, value in ours.top] == pytest.approx([value for _, value in theirs.top], abs=1e-4)


def decoded(model, prompts: list[list[int]], steps: int, size: int = 16, chunk: int = 16) -> list[list[int]]:
    """Each prompt and what greedily follows, through the device's steps alone."""
    device, rows = paged.Device(model, 5 * len(prompts), size), [list(prompt) for prompt in prompts]
    held = [list(range(5 * i, 5 * i + 5))[::-1] for i in range(len(rows))]
    for begin in range(0, max(map(len, rows)), chunk):  # of all prompts at once, one after another in a row
        unread = [(row, begin, min(begin + chunk, len(row) - 1), blocks) for row, blocks in zip(rows, held)]
        if parts := [part for part in unread if part[1] < part[2]]:
            device.read(parts)
    count = len(rows)
    for step in range(steps):
        now = [(row, blocks[: -(-len(row) // size)]) for row, blocks in zip(rows, held)]
        greedy = paged.Mixed.of([usual()] * count)
        chosen, _ = device.decode(now, [], greedy, [0] * count, [step] * count, [None] * count, False)
        for row, token in zip(rows, chosen.tolist()):
            row.append(token)
    return rows


@pytest.mark.parametrize("name", ["mistral, window", "qwen3, window", "llama, llama3, tied"])
def test_every_family_and_window(name, tmp_path):
    hugging_face(name).save_pretrained(tmp_path)
    model = Transformer.from_pretrained(tmp_path)
    prompts = [tokens(n, seed=n).tolist() for n in (3, 40, 20)]
    for prompt, row in zip(prompts, decoded(model, prompts, 8)):
        logits = np.asarray(model(jnp.asarray([row[:-1]])))[0]
        assert row[len(prompt) :] == logits[len(prompt) - 1 :].argmax(axis=1).tolist()


def test_dynamic_rope_is_the_default_within_the_context():
    config = ModelConfig(
        vocab_size=257, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=96, initializer_range=0.3,
    )  # fmt: skip
    rope = dataclasses.replace(config.rotary, rule="dynamic", factor=3.0, max_position=96)
    dynamic = Transformer(dataclasses.replace(config, rope=rope), rngs=nnx.Rngs(0))
    requests = [Request(prompt, 90, **FREE) for prompt in PROMPTS[:3]]
    answers = small(dynamic).run(requests)
    assert answers == [[alone(dynamic, request.prompt, max_tokens=90)] for request in requests]
    assert answers == small(Transformer(config, rngs=nnx.Rngs(0))).run(requests)


@pytest.mark.parametrize("mode", ["joint", "sublayer"])
def test_replicas_have_pools_of_their_own(mode):
    config = ModelConfig(
        vocab_size=257, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=96, model_type="qwen2_parscale", initializer_range=0.3,
        parscale_n=3, parscale_n_tokens=4, enable_cross_attn=True, parscale_cross_attn_mode=mode,
    )  # fmt: skip
    model = Transformer(config, rngs=nnx.Rngs(0))
    prompts = [tokens(n, seed=n).tolist() for n in (3, 40, 20)]
    engine = small(model)
    answers = engine.run([Request(prompt, 12, n=2, **FREE) for prompt in prompts])
    assert answers == [[alone(model, prompt, max_tokens=12)] * 2 for prompt in prompts]


def test_a_step_writes_into_the_pool_and_never_copies_it(model):
    device = paged.Device(model, 64, 16)
    row = [1, 2, 3, 4]
    where = [array.unsafe_buffer_pointer() for array in jax.tree.leaves(device._pool)]
    device.read([(row, 0, 3, [7])])
    for copies in ([], [(7, 9)]):
        device.decode([(row, [9])], copies, paged.Mixed.of([RANDOM]), [0], [0], [None], True)
    assert [array.unsafe_buffer_pointer() for array in jax.tree.leaves(device._pool)] == where
    ids, at = device._nowhere(2, 1, 3)
    mixed = paged.Mixed.of([usual()] * 2)
    arguments = [device._structure, device._leaves, device._pool, ids, at, mixed]
    numbers = np.zeros(2, np.uint32)
    told = np.bool_(False), np.ones(2, np.float32)
    text = paged._decode.lower(*arguments, numbers, numbers, None, *told).compile().as_text()
    size = ",".join(map(str, device._pool.keys[0].shape))
    assert not [line for line in text.splitlines() if " copy(" in line and f"[{size}]" in line]


# ---------------------------------------------------------------------- int8


def test_int8_answers_are_those_of_an_int8_cache(model):
    """Of prompts that are shared and blocks that are copied too: their scales go with them."""
    engine = small(model, cache_dtype="int8")
    requests = [Request(prompt, 20, n=1 + index % 2, logprobs=2, **FREE) for index, prompt in enumerate(PROMPTS)]
    answers, again = engine.run(requests), engine.run(requests)
    assert engine.counters.reused_tokens
    exact = small(model)
    assert exact.run(requests) != answers
    tokens_of_one, heads, dim = 24 * 16 * 2, 2, 8  # keys and values, both layers
    assert engine._device.nbytes == 2 * tokens_of_one * heads * (dim + 4)
    assert exact._device.nbytes == 2 * tokens_of_one * heads * dim * 4

    for request, found, later in zip(requests, answers, again, strict=True):
        expected = alone(model, request.prompt, logprobs=2, cache_dtype="int8")
        for completion in (*found, *later):
            assert completion.tokens == expected.tokens
            for ours, theirs in zip(completion.logprobs, expected.logprobs, strict=True):
                assert ours.chosen == pytest.approx(theirs.chosen, abs=1e-4)


def test_int8_is_what_rounding_makes_of_keys_and_values():
    """Log-probabilities of a model of one layer, by NumPy in float64 from keys and values rounded to 1/127 of their
    token's and head's largest number."""
    config = ModelConfig(
        vocab_size=257, hidden_size=32, intermediate_size=8, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=96, initializer_range=0.3,
    )  # fmt: skip
    model, prompt = Transformer(config, rngs=nnx.Rngs(0)), PROMPTS[1]
    layer = model.layers[0]
    layer.ffn.down.weight[...] = jnp.zeros_like(layer.ffn.down.weight[...])
    x, _, step, _ = model.prepare(jnp.asarray([prompt]))
    q, k, v = (np.asarray(part, np.float64)[0] for part in layer.attention.heads(layer.attention_norm(x), step))

    def after(k, v):
        weights = np.exp(np.einsum("gqd,kgd->gqk", q[-1].reshape(2, 2, 8), k) * 8**-0.5)
        out = np.einsum("gqk,kgd->gqd", weights / weights.sum(-1, keepdims=True), v).reshape(-1)
        hidden = np.asarray(x, np.float64)[0, -1] + out @ np.asarray(layer.attention.o.weight, np.float64)
        hidden /= np.sqrt(np.mean(hidden**2) + config.rms_norm_eps)
        logits = hidden @ np.asarray(model.head.weight, np.float64)
        return logits - np.log(np.exp(logits).sum())

    def rounded(x):
        scale = np.abs(x).max(-1, keepdims=True) / 127
        return np.round(x / scale) * scale

    request = Request(prompt, 1, logprobs=20, **FREE)
    [[answer]] = small(model, cache_dtype="int8").run([request])
    exact, expected = after(k, v), after(rounded(k), rounded(v))
    assert np.abs(exact - expected).max() > 1e-3  # so that it says something
    for token, found in answer.logprobs[0].top:
        assert found == pytest.approx(expected[token], abs=1e-4)


def test_log_probabilities_at_a_temperature_of_each_requests_own(model):
    """Of all tokens, whatever few are sampled from, beside requests that ask for the model's own or for none."""
    choose = usual(0.7, top_k=5)
    temperatures = (0.7, 1.0, 2.5, None)
    requests = [
        Request(
            PROMPTS[1], 12, choose, seed=at, logprobs=None if temperature is None else 3,
            logprobs_temperature=temperature or 1.0, **FREE,
        )
        for at, temperature in enumerate(temperatures)
    ]  # fmt: skip
    for [answer], temperature in zip(small(model).run(requests), temperatures, strict=True):
        if temperature is None:
            assert answer.logprobs is None
            continue
        ids = jnp.asarray([[*PROMPTS[1], *answer.tokens]])
        exact = jax.nn.log_softmax(np.asarray(model(ids), np.float32)[0, len(PROMPTS[1]) - 1 : -1] / temperature)
        for told, token, row in zip(answer.logprobs, answer.tokens, np.asarray(exact), strict=True):
            assert told.chosen == pytest.approx(row[token], abs=1e-4)
            assert [value for _, value in told.top] == pytest.approx(np.sort(row)[::-1][:3], abs=1e-4)


# ---------------------------------------------------------------------- coming and going


def test_requests_come_from_other_threads_at_any_time(model):
    found: dict[int, list] = {}
    with small(model, max_batch=3) as engine:

        def ask(index: int) -> None:
            time.sleep(0.01 * index)
            events = list(engine.submit(Request(PROMPTS[index], 20, **FREE)))
            found[index] = events

        threads = [threading.Thread(target=ask, args=(index,)) for index in range(len(PROMPTS))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for index, events in found.items():
        expected = alone(model, PROMPTS[index])
        assert tuple(event.token for event in events) == expected.tokens
        assert "".join(event.text for event in events) == expected.text
        assert [event.finish_reason for event in events] == [None] * 19 + ["length"]
    check_empty(engine)


def test_events_can_be_awaited(model):
    async def gather(handle):
        return [event async for event in handle]

    async def ask(engine):
        handles = [engine.submit(Request(prompt, 20, n=2, **FREE)) for prompt in PROMPTS[:3]]
        return await asyncio.gather(*map(gather, handles))

    with small(model) as engine:
        answers = asyncio.run(ask(engine))
    for prompt, events in zip(PROMPTS, answers):
        for index in range(2):
            assert tuple(e.token for e in events if e.index == index) == alone(model, prompt).tokens


def test_a_request_that_is_cancelled_gives_its_blocks_back_and_harms_nobody(model):
    with small(model) as engine:
        gone = engine.submit(Request(PROMPTS[1], 50, n=2, **FREE))
        stays = engine.submit(Request(PROMPTS[0], 20, **FREE))
        waits = [engine.submit(Request(PROMPTS[4], 20, n=4, **FREE)) for _ in range(2)]
        next(iter(gone))
        gone.cancel()
        waits[1].cancel()
        assert {event.finish_reason for event in gone} == {None, "cancelled"}
        assert stays.result() == [alone(model, PROMPTS[0])]
        assert waits[0].result() == [alone(model, PROMPTS[4])] * 4
        assert [answer.finish_reason for answer in waits[1].result()] == ["cancelled"] * 4
        gone.cancel()  # once more does nothing
    check_empty(engine)
    assert engine.counters.finished == {"cancelled": 6, "length": 5}


def test_a_request_that_takes_too_long_ends(model):
    engine = small(model)
    late, fine = (
        engine.submit(Request(PROMPTS[0], 40, timeout=0.001, **FREE)),
        engine.submit(Request(PROMPTS[2], 3, **FREE)),
    )
    time.sleep(0.01)
    while engine.step():
        pass
    assert [event.finish_reason for event in late] == ["timeout"]
    assert fine.result() == [alone(model, PROMPTS[2], max_tokens=3)]
    check_empty(engine)


def test_the_queue_is_bounded(model):
    engine = small(model, max_queue=2)
    handles = [engine.submit(Request(PROMPTS[0], 3, **FREE)) for _ in range(2)]
    with pytest.raises(QueueFull, match="2 requests wait already"):
        engine.submit(Request(PROMPTS[0], 3, **FREE))
    assert engine.counters.refused == 1
    # One's own batch is as long as it is.
    assert len(engine.run([Request(PROMPTS[0], 3, **FREE)] * 5)) == 5
    assert [len(handle.result()) for handle in handles] == [1, 1]


def test_closing_finishes_what_is_under_way(model):
    engine = small(model).start()
    handles = [engine.submit(Request(prompt, 20, **FREE)) for prompt in PROMPTS]
    engine.close()
    assert [handle.result() for handle in handles] == [[alone(model, prompt)] for prompt in PROMPTS]
    with pytest.raises(Closed):
        engine.submit(Request(PROMPTS[0]))
    with pytest.raises(Closed):
        engine.run([Request(PROMPTS[0])])
    check_empty(engine)


def test_closing_at_once_cancels(model):
    engine = small(model).start()
    handle = engine.submit(Request(PROMPTS[0], 90, **FREE))
    next(iter(handle))
    engine.close(timeout=0.0)
    assert [event.finish_reason for event in handle][-1] in ("cancelled", "length")
    check_empty(engine)


def test_a_step_that_fails_costs_its_requests_and_nothing_else(model, monkeypatch, caplog):
    decode = paged.Device.decode

    def fail(*arguments):
        monkeypatch.setattr(paged.Device, "decode", decode)
        raise MemoryError("no memory")

    with small(model) as engine:
        monkeypatch.setattr(paged.Device, "decode", fail)
        answers = engine.submit(Request(PROMPTS[1], 20, n=2, **FREE)).result()
        assert [answer.finish_reason for answer in answers] == ["error"] * 2
        assert "MemoryError: no memory" in caplog.text
        assert engine.submit(Request(PROMPTS[1], 20, **FREE)).result() == [alone(model, PROMPTS[1])]
    check_empty(engine)


def test_where_no_new_cache_can_be_had_everybody_is_told_and_nothing_more_taken(model, monkeypatch, caplog):
    class Broken:
        def __init__(self, *arguments):
            raise MemoryError("nor for another")

    submitted = threading.Event()

    def fail(*arguments):
        assert submitted.wait(60)  # an engine that ended already takes no request
        monkeypatch.setattr(engine_module, "Device", Broken)
        raise MemoryError("no memory")

    with small(model) as engine:
        assert engine.alive
        monkeypatch.setattr(paged.Device, "decode", fail)
        handles = [engine.submit(Request(prompt, 20, **FREE)) for prompt in PROMPTS]
        submitted.set()
        assert {answer.finish_reason for handle in handles for answer in handle.result()} == {"error"}
        engine._thread.join(60)
        assert (engine.alive, engine.closing) == (False, True)
        with pytest.raises(Closed):
            engine.submit(Request(PROMPTS[1], 20, **FREE))
    assert "MemoryError: nor for another" in caplog.text


def test_new_weights_forget_what_the_old_ones_computed(model, tmp_path):
    config = model.config
    other = Transformer(config, rngs=nnx.Rngs(3))
    engine = small(model)
    request = Request(PROMPTS[1], 20, **FREE)
    engine.run([request])
    engine.update(other)
    assert engine.run([request]) == [[alone(other, PROMPTS[1])]]
    engine.submit(request)
    with pytest.raises(ValueError, match="no request under way"):
        engine.update(model)


def test_after_warming_up_nothing_is_compiled_for_short_texts(model):
    engine = small(model)
    engine.warm_up()
    compiled = paged._read._cache_size(), paged._decode._cache_size()
    answers = engine.run([Request(prompt, 20, **FREE) for prompt in PROMPTS])
    assert [answer for [answer] in answers] == [alone(model, prompt) for prompt in PROMPTS]
    engine.run([Request(prompt, 20, usual(frequency_penalty=1.0), **FREE) for prompt in PROMPTS])
    assert (paged._read._cache_size(), paged._decode._cache_size()) == compiled
    with pytest.raises(ValueError, match="warm_up must come before the first request"):
        engine.warm_up()


@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_comes_and_goes_nothing_is_lost(model, data):
    """Requests that come, fork and are cancelled between any steps: the rest are as alone, and all blocks come back."""
    engine = small(model, blocks=SCARCE, max_batch=data.draw(st.sampled_from([2, 4])))
    handles, dropped = [], set()
    for _ in range(data.draw(st.integers(1, 12))):
        match data.draw(st.sampled_from(["come", "come", "step", "step", "drop"])):
            case "come":
                which, n = data.draw(st.sampled_from([0, 1, 2, 3, 5])), data.draw(st.integers(1, 2))
                handles.append((which, n, engine.submit(Request(PROMPTS[which], 20, n=n, **FREE))))
            case "step":
                for _ in range(data.draw(st.integers(1, 9))):
                    engine.step()
            case "drop":
                if handles:
                    handle = data.draw(st.sampled_from(handles))[2]
                    handle.cancel()
                    dropped.add(handle)
    while engine.step():
        pass
    for which, n, handle in handles:
        answers = handle.result()
        if handle not in dropped:
            assert answers == [known(model, which)] * n
    check_empty(engine)


@functools.cache
def known(model, which):
    return alone(model, PROMPTS[which])


# ---------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request(""), "prompt must hold at least one token, got ''"),
        (Request("x" * 96), "prompt must be shorter than the model's context of 96 tokens, got 96"),
        (Request([300]), r"prompt must hold ids in \[0, 257\)"),
        (Request("a", max_tokens=0), "max_tokens must be an integer of at least 1, got 0"),
        (Request("a", seed=-1), r"seed must be an integer in \[0, 2\*\*32\), got -1"),
        (Request("a", n=0), r"n must be in \[1, 4\], the largest batch, got 0"),
        (Request("a", n=5), r"n must be in \[1, 4\], the largest batch, got 5"),
        (Request("a", stop=["x", ""]), "stop must hold strings that aren't empty"),
        (Request("a", logprobs=21), r"logprobs must be None or an integer in \[0, 20\], got 21"),
        (Request("a", logprobs_temperature=-1.0), "logprobs_temperature must be a positive number, got -1.0"),
        (Request("a", timeout=0.0), "timeout must be a positive number of seconds, got 0"),
        (Request("a", sampler=Random((TopP(0.5), TopK(3)))), "sampler must be a usual chain"),
    ],
)
def test_a_request_that_cannot_be_is_refused_at_once(model, request_, message):
    engine = small(model)
    with pytest.raises(ValueError, match=message):
        engine.submit(request_)
    assert engine.counters.requests == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_batch": 0}, "max_batch must be at least 1, got 0"),
        ({"block_size": 8}, "block_size must be 16, 32, 64 or 128, got 8"),
        ({"prefill_chunk": 0}, "prefill_chunk must be at least 1, got 0"),
        ({"max_queue": 0}, "max_queue must be at least 1, got 0"),
        ({"blocks": 0}, "count must be at least 1, got 0"),
        ({"cache_dtype": "int4"}, "cache_dtype must be one of float32, bfloat16, float16 or int8, got int4"),
    ],
)
def test_wrong_sizes_are_named(model, options, message):
    with pytest.raises(ValueError, match=message):
        small(model, **options)


def test_a_small_cache_bounds_a_text(model):
    engine = small(model, blocks=2)
    [[answer]] = engine.run([Request(PROMPTS[2], 90, **FREE)])
    assert (len(answer.tokens), answer.finish_reason) == (32 - len(PROMPTS[2]), "length")
    with pytest.raises(ValueError, match="prompt must be shorter than the cache's room of 32 tokens, got 33"):
        engine.submit(Request(PROMPTS[5]))


def test_a_model_that_cannot_be_served_is_refused(model, tmp_path):
    hugging_face("llama, longrope").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="rope rule that doesn't depend on the text's length, got 'longrope'"):
        Engine(Transformer.from_pretrained(tmp_path), BYTES)
    hugging_face("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="tokenizer must have at most the model's vocab_size 199, got 257"):
        Engine(Transformer.from_pretrained(tmp_path), BYTES)
