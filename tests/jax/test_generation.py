"""Generation: transformers' own tokens, each prompt as if alone, ends where it is told to, whole characters."""

import heapq
import inspect
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from tiny_models import hugging_face, tokens

from heddle.data.tokenizers import Tokenizer
from heddle.jax import Completion, PromptLookup, Transformer, generate, generation, stream
from heddle.jax import sampler as usual
from heddle.jax.answer import Answer
from heddle.jax.decoding import STEPS, decode, prefill
from heddle.jax.generation import PREFILL, Past, _pieces_of

BYTES = Tokenizer.bytes()
PROMPTS = [tokens(n, seed=n).tolist() for n in (3, 40, 11)]
FREE = {"stop_ids": ()}  # nothing ends a text but its length
RANDOM = usual(3.0, top_k=40)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Transformer:
    """A byte-level model of 96 tokens of context, whose texts are random bytes."""
    folder = tmp_path_factory.mktemp("model")
    hugging_face("llama, bytes").save_pretrained(folder)
    return Transformer.from_pretrained(folder)


@pytest.fixture(scope="module")
def logits_of(model):
    """The logits behind each token of a text, by the whole forward; of one length, so that it is compiled once."""
    whole = jax.jit(lambda ids: model(ids)[0])

    def logits(ids):
        return np.asarray(whole(np.pad(ids, (0, 96 - len(ids)))[None]))[: len(ids)]

    return logits


def test_greedy_tokens_are_those_of_transformers(model):
    completions = generate(model, BYTES, PROMPTS, max_tokens=STEPS + 8, **FREE)
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        ids = torch.tensor([prompt])
        expected = hugging_face("llama, bytes").generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=STEPS + 8, do_sample=False, eos_token_id=None
        )
        assert list(completion.tokens) == expected[0, len(prompt) :].tolist()
        assert (completion.finish_reason, completion.prompt_tokens) == ("length", len(prompt))
        assert completion.text == BYTES.decode(completion.tokens)


@pytest.mark.parametrize("sampler", [usual(), usual(3.0, top_k=40, repetition_penalty=1.3)])
def test_a_ragged_batch_is_each_prompt_alone(model, sampler):
    together = generate(model, BYTES, PROMPTS, max_tokens=20, sampler=sampler, seed=[7, 8, 9], **FREE)
    for prompt, seed, completion in zip(PROMPTS, (7, 8, 9), together, strict=True):
        assert generate(model, BYTES, [prompt], max_tokens=20, sampler=sampler, seed=seed, **FREE) == [completion]


def test_a_seed_gives_one_text_and_another_another(model):
    same = generate(model, BYTES, [PROMPTS[0]] * 3, max_tokens=20, sampler=RANDOM, seed=[5, 6, 5], **FREE)
    assert same[0] == same[2] != same[1]
    one = generate(model, BYTES, [PROMPTS[0]] * 2, max_tokens=20, sampler=RANDOM, seed=5, **FREE)
    assert one == [same[0]] * 2


def test_a_strong_penalty_repeats_nothing(model):
    sampler = usual(0.7, repetition_penalty=1e6)
    [completion] = generate(model, BYTES, [PROMPTS[2]], max_tokens=40, sampler=sampler, **FREE)
    # Logits that are penalised are 0 or far below; those of tokens not seen are above 0 somewhere.
    assert len(set(completion.tokens) | set(PROMPTS[2])) == 40 + len(set(PROMPTS[2]))


def test_a_frequency_penalty_counts_what_was_said(model, logits_of):
    prompt, said = PROMPTS[2], []
    for _ in range(12):
        counts = np.bincount(said, minlength=257) if said else np.zeros(257)
        said.append(int(np.argmax(logits_of([*prompt, *said])[-1] - 5.0 * counts - 0.5 * (counts > 0))))
    sampler = usual(frequency_penalty=5.0, presence_penalty=0.5)
    [completion] = generate(model, BYTES, [prompt], max_tokens=12, sampler=sampler, **FREE)
    assert list(completion.tokens) == said


def test_log_probabilities_are_those_of_the_whole_text(model, logits_of):
    options = {"max_tokens": 40, "sampler": RANDOM, "seed": 3, **FREE}
    together = generate(model, BYTES, PROMPTS, logprobs=4, **options)
    for prompt, completion in zip(PROMPTS, together, strict=True):
        assert completion.tokens == generate(model, BYTES, [prompt], **options)[0].tokens
        exact = np.asarray(jax.nn.log_softmax(logits_of([*prompt, *completion.tokens])[len(prompt) - 1 : -1]))
        assert len(completion.logprobs) == len(completion.tokens)
        for told, token, row in zip(completion.logprobs, completion.tokens, exact, strict=True):
            assert told.chosen == pytest.approx(row[token], abs=1e-4)
            assert [value for _, value in told.top] == pytest.approx(np.sort(row)[::-1][:4], abs=1e-4)
            assert [row[token] for token, _ in told.top] == pytest.approx([value for _, value in told.top], abs=1e-4)
    [divided] = generate(
        model, BYTES, PROMPTS[:1], logprobs=2, logprobs_temperature=0.7, speculate=PromptLookup(), **options
    )
    exact = jax.nn.log_softmax(logits_of([*PROMPTS[0], *divided.tokens])[len(PROMPTS[0]) - 1 : -1] / 0.7)
    exact = np.asarray(exact)
    assert divided.tokens == together[0].tokens
    for told, token, row in zip(divided.logprobs, divided.tokens, exact, strict=True):
        assert told.chosen == pytest.approx(row[token], abs=1e-4)
        assert [value for _, value in told.top] == pytest.approx(np.sort(row)[::-1][:2], abs=1e-4)
    pieces = list(stream(model, BYTES, PROMPTS[0], logprobs=2, logprobs_temperature=0.7, **options))
    expected = [told.chosen for told in divided.logprobs]
    assert [piece.logprobs.chosen for piece in pieces] == pytest.approx(expected, abs=1e-4)
    pieces = list(stream(model, BYTES, PROMPTS[0], logprobs=0, **options))
    expected = [told.chosen for told in together[0].logprobs]
    assert [piece.logprobs.chosen for piece in pieces] == pytest.approx(expected, abs=1e-4)
    assert pieces[0].logprobs.top == ()


@pytest.mark.parametrize("sampler", [usual(), RANDOM])
def test_streamed_pieces_add_up(model, sampler):
    for prompt in PROMPTS:
        [whole] = generate(model, BYTES, [prompt], max_tokens=30, sampler=sampler, seed=3, **FREE)
        pieces = list(stream(model, BYTES, prompt, max_tokens=30, sampler=sampler, seed=3, **FREE))
        assert "".join(piece.text for piece in pieces) == whole.text
        assert tuple(piece.token for piece in pieces) == whole.tokens
        assert [piece.finish_reason for piece in pieces] == [None] * 29 + ["length"]


def test_stop_ids_end_a_text_and_only_their_own(model):
    free = generate(model, BYTES, PROMPTS, max_tokens=30, **FREE)
    end = free[1].tokens[4]
    ended = generate(model, BYTES, PROMPTS, max_tokens=30, stop_ids=[end])
    for before, after in zip(free, ended, strict=True):
        at = before.tokens.index(end) if end in before.tokens else None
        if at is None:
            assert after == before
        else:
            expected = (BYTES.decode(before.tokens[:at]), before.tokens[: at + 1], "stop")
            assert (after.text, after.tokens, after.finish_reason) == expected
    assert ended[1].finish_reason == "stop"
    # The default: the tokenizer's ends, and the model's.
    tokenizer = Tokenizer(BYTES.backend, stop_ids=[end])
    ended = generate(model, BYTES, PROMPTS, max_tokens=30, stop_ids=[end, *model.config.eos_ids])
    assert generate(model, tokenizer, PROMPTS, max_tokens=30) == ended


def test_stop_strings_end_a_text_before_them(model):
    free = generate(model, BYTES, PROMPTS, max_tokens=60, **FREE)
    for prompt, before in zip(PROMPTS, free, strict=True):
        stop = before.text[20:23]
        at = before.text.index(stop)
        options = {"max_tokens": 60, "stop": ["never in it", stop], **FREE}
        [after] = generate(model, BYTES, [prompt], **options)
        assert (after.text, after.finish_reason) == (before.text[:at], "stop")
        assert after.tokens == before.tokens[: len(after.tokens)]
        assert "".join(piece.text for piece in stream(model, BYTES, prompt, **options)) == after.text
        assert generate(model, BYTES, PROMPTS, **options)[PROMPTS.index(prompt)] == after


def answer(text: str, *stop: str, limit: int = 1000, ids: tuple[int, ...] = ()) -> list[str]:
    """The pieces of a text, byte by byte, up to its end."""
    assembling = Answer(BYTES.decoder(), stop, frozenset(ids), limit)
    pieces = []
    for byte in text.encode():
        pieces.append(assembling.add(byte).text)
        if assembling.finish_reason:
            break
    assert assembling.text == "".join(pieces)
    return pieces


def test_what_may_begin_a_stop_string_is_held_back():
    assert answer("ab<end>cd", "<end>") == ["a", "b", "", "", "", "", ""]
    assert answer("a<en<end>", "<end>") == ["a", "", "", "", "<en", "", "", "", ""]
    assert answer("aab", "ab", "zz") == ["", "a", ""]
    assert answer("x<e", "<end>", limit=3) == ["x", "", "<e"]
    assert answer("é!é?", "é?") == ["", "", "é!", "", "", ""]
    assert answer("é", "é", limit=1) == ["\ufffd"]
    assert answer("ab!c", ids=(ord("!"),)) == ["a", "b", ""]
    assert answer("x<!", "<end>", ids=(ord("!"),)) == ["x", "", "<"]


def test_the_context_bounds_a_text(model):
    context = model.config.max_position_embeddings
    completions = generate(model, BYTES, [tokens(context - 2).tolist(), PROMPTS[0]], max_tokens=10, **FREE)
    assert [(len(c.tokens), c.finish_reason) for c in completions] == [(2, "length"), (10, "length")]


def test_one_text_is_one_prompt(model):
    completions = generate(model, BYTES, "hello", max_tokens=1, **FREE)
    assert [type(completion) for completion in completions] == [Completion]
    assert completions[0].prompt_tokens == 5


def test_longer_texts_compile_nothing_anew(model):
    generate(model, BYTES, [PROMPTS[0]], max_tokens=5, **FREE)
    sizes = prefill._cache_size(), decode._cache_size()
    for prompt, seed in ((PROMPTS[2], 1), (PROMPTS[0], 2)):
        generate(model, BYTES, [prompt], max_tokens=40, seed=seed, stop_ids=[1, 2, 3])
        list(stream(model, BYTES, prompt, max_tokens=7))
    assert (prefill._cache_size(), decode._cache_size()) == sizes


def test_pieces_cover_every_length():
    for length in range(1, 2000):
        pieces = _pieces_of(length)
        assert set(pieces) <= set(PREFILL)
        assert sum(pieces[:-1]) < length <= sum(pieces)
        assert sum(pieces) <= max(2 * length, PREFILL[0])


# ---------------------------------------------------------------------- conversations


def test_a_conversation_reads_only_what_is_new(model, monkeypatch):
    read = []
    monkeypatch.setattr(generation, "_pieces_of", lambda n: read.append(n) or _pieces_of(n))
    past, prompt = Past(), PROMPTS[2]
    options = {"max_tokens": 6, **FREE}
    for _ in range(3):
        fresh = list(stream(model, BYTES, prompt, **options))
        assert list(stream(model, BYTES, prompt, past=past, **options)) == fresh
        prompt = [*prompt, *(piece.token for piece in fresh), 65, 66]
    # All; then the last token of the answer, which no step read, and the two new ones.
    assert read[1::2] == [11, 3, 3]
    other = [*prompt[:9], 70, 71]
    assert list(stream(model, BYTES, other, past=past, **options)) == list(stream(model, BYTES, other, **options))
    assert read[-2] == 2
    assert list(stream(model, BYTES, other, past=past, **options)) == list(stream(model, BYTES, other, **options))
    assert read[-2] == 1  # the same prompt again: only its last token


def test_an_answer_that_is_broken_off_is_remembered_as_far_as_it_came(model):
    past = Past()
    pieces = stream(model, BYTES, PROMPTS[2], past=past, max_tokens=20, **FREE)
    came = [next(pieces).token for _ in range(5)]
    pieces.close()
    prompt = [*PROMPTS[2], *came, 65]
    expected = list(stream(model, BYTES, prompt, max_tokens=5, **FREE))
    assert list(stream(model, BYTES, prompt, past=past, max_tokens=5, **FREE)) == expected


def test_a_conversations_cache_grows(model, monkeypatch):
    monkeypatch.setattr(generation, "LEAST_ROOM", 8)
    past, prompt, rooms = Past(max_len=8), PROMPTS[0], []
    for _ in range(3):
        expected = list(stream(model, BYTES, prompt, max_tokens=12, **FREE))
        assert list(stream(model, BYTES, prompt, past=past, max_tokens=12, **FREE)) == expected
        rooms.append(past.cache.max_len)
        prompt = [*prompt, *(piece.token for piece in expected)]
    assert rooms == [16, 32, 64]


def test_a_conversation_past_the_pretrained_length_is_that_of_a_fresh_start(model):
    """longrope turns all keys by other factors from there on, and by the first again in a shorter text."""
    factors = {"short_factor": (1.0, 1.5, 2.0, 2.5), "long_factor": (1.0, 2.0, 4.0, 8.0)}
    rope = replace(model.config.rotary, rule="longrope", original_max_position=24, max_position=96, **factors)
    long = Transformer(replace(model.config, rope=rope), rngs=nnx.Rngs(1))
    past, options, begun = Past(), {"max_tokens": 12, **FREE}, tokens(30, seed=5).tolist()
    prompt = begun[:10]
    texts = []
    for _ in range(4):  # of 10, 23, 36 and 49 tokens
        fresh = list(stream(long, BYTES, prompt, **options))
        assert list(stream(long, BYTES, prompt, past=past, **options)) == fresh
        texts.append(prompt)
        prompt = [*prompt, *(piece.token for piece in fresh), 65]
    for again in (texts[1], texts[3], texts[0]):
        fresh = list(stream(long, BYTES, again, **options))
        assert list(stream(long, BYTES, again, past=past, **options)) == fresh


def test_a_cache_of_another_dtype(model):
    options = {"max_tokens": 20, "logprobs": 2, **FREE}
    [exact], [rounded] = (generate(model, BYTES, [PROMPTS[1]], cache_dtype=d, **options) for d in (None, "int8"))
    assert exact == generate(model, BYTES, [PROMPTS[1]], cache_dtype="float32", **options)[0]
    assert exact.logprobs != rounded.logprobs
    pieces = list(stream(model, BYTES, PROMPTS[1], cache_dtype=jnp.int8, **options))
    assert tuple(piece.logprobs for piece in pieces) == rounded.logprobs
    past = Past(cache_dtype="int8")
    assert [piece.logprobs for piece in stream(model, BYTES, PROMPTS[1], past=past, **options)] == list(
        rounded.logprobs
    )
    assert past.cache.keys[0].dtype == jnp.int8
    with pytest.raises(ValueError, match=r"cache_dtype must be one of .*int8, got int4"):
        generate(model, BYTES, "x", cache_dtype="int4")
    with pytest.raises(ValueError, match="cache_dtype must be None where there is a past"):
        stream(model, BYTES, "x", cache_dtype="int8", past=past)


# ---------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "prompts must hold at least one prompt, got none"),
        (["a", ""], {}, r"prompts\[1\] must hold at least one token, got ''"),
        ([[]], {}, r"prompts\[0\] must hold at least one token, got \[\]"),
        (["x" * 96], {}, r"prompts\[0\] must be shorter than the model's context of 96 tokens, got 96"),
        ([[5, 257]], {}, r"prompts\[0\] must hold ids in \[0, 257\)"),
        (["a"], {"max_tokens": 0}, "max_tokens must be an integer of at least 1, got 0"),
        (["a"], {"stop": ["x", ""]}, "stop must hold strings that aren't empty"),
        (["a", "b"], {"seed": [1]}, "seed must be one integer or one for each of 2 prompts, got 1"),
        (["a"], {"logprobs": -1}, r"logprobs must be None or an integer in \[0, 257\], got -1"),
        (["a"], {"logprobs_temperature": 0.0}, "logprobs_temperature must be a positive number, got 0.0"),
        (["a"], {"seed": -1}, r"seed must be an integer in \[0, 2\*\*32\), got -1"),
    ],
)
def test_wrong_arguments_are_named(model, prompts, options, message):
    with pytest.raises(ValueError, match=message):
        generate(model, BYTES, prompts, **options)


def test_streaming_refuses_at_the_call_too(model):
    with pytest.raises(ValueError, match=r"prompts\[0\] must hold at least one token"):
        stream(model, BYTES, "")


def test_a_tokenizer_of_another_model_is_refused(model):
    with pytest.raises(ValueError, match="tokenizer must have at most the model's vocab_size 257, got 49152"):
        generate(model, Tokenizer.from_pretrained(), "x")


# ---------------------------------------------------------------------- a real model


@pytest.fixture(scope="module")
def smollm2() -> tuple[Transformer, Tokenizer]:
    return Transformer.from_pretrained(), Tokenizer.from_pretrained()


@pytest.mark.slow
def test_smollm2_knows_the_capital_of_france(smollm2):
    model, tokenizer = smollm2
    question = tokenizer.chat([{"role": "user", "content": "What is the capital of France?"}])
    prompts = [tokenizer.encode(question, add_special=False), "Once upon a time", "1, 2, 3, 4,"]
    completions = generate(model, tokenizer, prompts, max_tokens=12)
    assert completions[0].text == "The capital of France is Paris."
    assert completions[0].finish_reason == "stop"
    assert "".join(piece.text for piece in stream(model, tokenizer, prompts[0], max_tokens=12)) == completions[0].text
    assert generate(model, tokenizer, [prompts[1]], max_tokens=12) == [completions[1]]


@pytest.mark.slow
def test_smollm2s_logits_are_those_of_transformers(smollm2, tmp_path):
    model, tokenizer = smollm2
    model.save_pretrained(tmp_path / "model", tokenizer)
    text = inspect.getsource(heapq)
    ids = np.asarray(tokenizer.encode(text))[None, :512]
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "model")(text).input_ids[:512] == ids[0].tolist()

    def theirs(dtype):
        peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=dtype)
        with torch.inference_mode():
            return peer(torch.from_numpy(ids)).logits.numpy()

    # Logits reach 30 here, and float32's rounding alone takes transformers 1e-4 away from its own float64.
    exact, rounded = theirs(torch.float64), theirs(torch.float32)
    found = np.asarray(model(jnp.asarray(ids)))
    np.testing.assert_allclose(found, exact, rtol=5e-6, atol=1e-4)
    assert np.square(found - exact).mean() ** 0.5 < 2 * np.square(rounded - exact).mean() ** 0.5 < 1e-4


@pytest.mark.slow
def test_smollm2_writes_what_transformers_does(smollm2, tmp_path):
    """200 greedy tokens, token for token; with prompt lookup too."""
    model, tokenizer = smollm2
    model.save_pretrained(tmp_path / "model")
    prompt = tokenizer.encode(tokenizer.chat([{"role": "user", "content": "Tell me a story about a weaver."}]))
    (found,) = generate(model, tokenizer, [prompt], max_tokens=200, stop_ids=())
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    ids = torch.tensor([prompt])
    expected = peer.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=200, do_sample=False, eos_token_id=None
    )
    assert list(found.tokens) == expected[0, len(prompt) :].tolist()
    lookup = generate(model, tokenizer, [prompt], max_tokens=200, stop_ids=(), speculate=PromptLookup())[0]
    assert lookup.tokens == found.tokens
