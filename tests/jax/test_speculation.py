"""Prompt lookup: drafts by a plain search, texts that are those without it."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import hugging_face, tokens

from heddle.data.tokenizers import Tokenizer
from heddle.jax import PromptLookup, Transformer, generate, sampler, stream
from heddle.jax.generation import Generation

BYTES = Tokenizer.bytes()
PROMPTS = [tokens(n, seed=n).tolist() * times for n, times in ((3, 1), (9, 3), (5, 2))]
LOOKUP = PromptLookup(num_tokens=3, max_ngram=3, min_ngram=1)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Transformer:
    folder = tmp_path_factory.mktemp("model")
    hugging_face("llama, bytes").save_pretrained(folder)
    return Transformer.from_pretrained(folder)


def draft_of(text: list[int], lookup: PromptLookup) -> list[int]:
    """Of the longest common end the latest place, by trying all."""
    best = (0, 0)
    for place in range(1, len(text)):
        common = 0
        while common < min(place, lookup.max_ngram) and text[place - 1 - common] == text[len(text) - 1 - common]:
            common += 1
        if common >= lookup.min_ngram:
            best = max(best, (common, place))
    return text[best[1] :][: lookup.num_tokens] if best[0] else []


@settings(deadline=None, max_examples=60)
@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=16), min_size=3, max_size=3))
def test_a_draft_is_what_followed_the_longest_end(texts):
    rows = np.full((3, 17), -1, np.int32)
    for row, text in zip(rows, texts, strict=True):
        row[: len(text)] = text
    for lookup in (LOOKUP, PromptLookup(num_tokens=4, max_ngram=2, min_ngram=2)):
        draft, count = lookup.propose(rows, np.array([len(text) for text in texts], np.int32))
        assert [d[:n].tolist() for d, n in zip(np.asarray(draft), count, strict=True)] == [
            draft_of(text, lookup) for text in texts
        ]


@pytest.mark.parametrize(
    "choose", [sampler(), sampler(0.7, top_k=3), sampler(0.5, repetition_penalty=1.1, frequency_penalty=0.2)]
)
def test_the_text_is_what_it_is_without(model, choose):
    """Of a ragged batch, to the end of the context, with stop ids and log-probabilities."""
    options: dict = {"max_tokens": 90, "sampler": choose, "seed": [3, 4, 5], "stop_ids": [7], "logprobs": 2}
    want = generate(model, BYTES, PROMPTS, **options)
    got = generate(model, BYTES, PROMPTS, speculate=LOOKUP, **options)
    for one, other in zip(got, want, strict=True):
        assert (one.tokens, one.text, one.finish_reason) == (other.tokens, other.text, other.finish_reason)
        assert one.logprobs
        assert other.logprobs
        for mine, theirs in zip(one.logprobs, other.logprobs, strict=True):
            np.testing.assert_allclose(mine.chosen, theirs.chosen, atol=1e-4)


def test_a_step_that_guessed_right_gives_several_tokens(model):
    """A greedy text that goes round in circles, as a model's does that knows the last token alone; also streamed."""
    model = nnx.clone(model)
    for layer in model.layers:
        for linear in (layer.attention.o, layer.ffn.down):
            linear.weight[...] = jnp.zeros_like(linear.weight[...])
    want = generate(model, BYTES, [PROMPTS[1]], max_tokens=60, stop_ids=())[0]
    run = Generation(model, BYTES, [PROMPTS[1]], max_tokens=60, stop_ids=(), speculate=LOOKUP)
    steps = [len(run.fresh[0])]
    while not run.finished:
        run.advance(1)
        steps.append(len(run.fresh[0]))
    assert tuple(run.answers[0].tokens) == want.tokens
    assert max(steps) == LOOKUP.num_tokens + 1
    assert min(steps) == 1
    pieces = list(stream(model, BYTES, PROMPTS[1], max_tokens=60, stop_ids=(), speculate=LOOKUP))
    assert tuple(piece.token for piece in pieces) == want.tokens


def test_dynamic_rope_is_the_default_within_the_context(model):
    rope = replace(model.config.rotary, rule="dynamic", factor=2.0, max_position=96)
    other = Transformer(replace(model.config, rope=rope), rngs=nnx.Rngs(0))
    plain = Transformer(model.config, rngs=nnx.Rngs(0))
    for speculate in (None, LOOKUP):
        options = {"max_tokens": 90, "stop_ids": (), "speculate": speculate}
        assert generate(other, BYTES, [PROMPTS[1]], **options) == generate(plain, BYTES, [PROMPTS[1]], **options)


def test_refusals(model):
    for wrong, name in (({"num_tokens": 0}, "num_tokens"), ({"min_ngram": 5, "max_ngram": 4}, "min_ngram")):
        with pytest.raises(ValueError, match=f"{name} must be"):
            PromptLookup(**wrong)
    factors = {"short_factor": (1.0,) * 4, "long_factor": (2.0,) * 4}
    rope = replace(model.config.rotary, rule="longrope", original_max_position=24, max_position=96, **factors)
    for change, message in (
        ({"model_type": "mistral", "sliding_window": 5, "layer_types": None}, "the cache loses keys"),
        ({"rope": rope}, "text's length"),
    ):
        other = Transformer(replace(model.config, **change), rngs=nnx.Rngs(0))
        with pytest.raises(ValueError, match=f"speculate must be None where .*{message}"):
            generate(other, BYTES, ["x"], speculate=LOOKUP)
