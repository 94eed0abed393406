"""Sampling: the same logits as transformers leaves, the distribution they say, a seed's own choice."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from heddle.jax.sampling import (
    FrequencyPenalty,
    Greedy,
    MinP,
    Mixed,
    PresencePenalty,
    Random,
    RepetitionPenalty,
    Temperature,
    TopK,
    TopP,
    history,
    logprobs,
    needs_history,
    remember,
    sampler,
)

LOGITS = np.random.default_rng(0).standard_normal((3, 1000)).astype(np.float32) * 4


def keys(count: int, seed: int = 0):
    return jax.random.split(jax.random.key(seed), count)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (Temperature(0.7), transformers.TemperatureLogitsWarper(0.7)),
        (TopK(1), transformers.TopKLogitsWarper(1)),
        (TopK(50), transformers.TopKLogitsWarper(50)),
        (TopK(10**6), transformers.TopKLogitsWarper(10**6)),
        (TopP(0.05), transformers.TopPLogitsWarper(0.05)),
        (TopP(0.9), transformers.TopPLogitsWarper(0.9)),
        (TopP(1.0), transformers.TopPLogitsWarper(1.0)),
        (MinP(0.02), transformers.MinPLogitsWarper(0.02)),
        (MinP(0.0), transformers.MinPLogitsWarper(0.0)),
        (MinP(1.0), transformers.MinPLogitsWarper(1.0)),
    ],
)
def test_transforms_are_those_of_transformers(ours, theirs):
    expected = theirs(None, torch.from_numpy(LOGITS.copy())).numpy()
    np.testing.assert_allclose(jax.jit(ours)(jnp.asarray(LOGITS), None), expected, rtol=1e-6)


def test_the_repetition_penalty_is_that_of_transformers():
    ids = np.array([[1, 5, 5], [0, 2, 999], [7, 8, 9]])
    seen = jnp.asarray(history(list(ids), [()] * 3, LOGITS.shape[1]))
    theirs = transformers.RepetitionPenaltyLogitsProcessor(1.7)
    expected = theirs(torch.from_numpy(ids), torch.from_numpy(LOGITS.copy())).numpy()
    np.testing.assert_allclose(RepetitionPenalty(1.7)(jnp.asarray(LOGITS), seen), expected, rtol=1e-6)


def test_presence_and_frequency_penalties_count_the_answer_alone():
    # OpenAI's formula: logit - count * frequency - (count > 0) * presence, of what was sampled.
    said = history([[1, 5], [2]], [[5, 7, 7], []], 10)
    np.testing.assert_array_equal(said, [[0, -1, 0, 0, 0, 1, 0, 2, 0, 0], [0, 0, -1, *[0] * 7]])
    counts = np.array([[0, 0, 0, 0, 0, 1, 0, 2, 0, 0], [0] * 10])
    logits, said = jnp.asarray(LOGITS[:2, :10]), jnp.asarray(said)
    np.testing.assert_allclose(PresencePenalty(0.7)(logits, said), LOGITS[:2, :10] - 0.7 * (counts > 0), rtol=1e-6)
    np.testing.assert_allclose(FrequencyPenalty(-0.4)(logits, said), LOGITS[:2, :10] + 0.4 * counts, rtol=1e-6)


def test_what_is_said_is_remembered():
    said = jnp.asarray(history([[1], [2]], [[], [3]], 5))
    for tokens in ([1, 3], [4, 0], [1, 3]):
        said = remember(said, jnp.asarray(tokens))
    np.testing.assert_array_equal(said, history([[1], [2]], [[1, 4, 1], [3, 3, 0, 3]], 5))


def test_log_probabilities_are_the_models():
    told = logprobs(jnp.asarray(LOGITS), jnp.asarray([4, 5, 6]), 3)
    exact = LOGITS - np.log(np.exp(LOGITS.astype(np.float64)).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(told.chosen, exact[[0, 1, 2], [4, 5, 6]], rtol=1e-5)
    order = np.argsort(-LOGITS, axis=1)[:, :3]
    np.testing.assert_array_equal(told.ids, order)
    np.testing.assert_allclose(told.top, np.take_along_axis(exact, order, 1), rtol=1e-5)
    # Each row at a temperature of its own.
    divided = LOGITS / np.array([[0.5], [1.0], [2.0]])
    exact = divided - np.log(np.exp(divided).sum(axis=1, keepdims=True))
    told = logprobs(jnp.asarray(LOGITS), jnp.asarray([4, 5, 6]), 3, jnp.asarray([0.5, 1.0, 2.0]))
    np.testing.assert_allclose(told.chosen, exact[[0, 1, 2], [4, 5, 6]], rtol=1e-5)
    np.testing.assert_array_equal(told.ids, order)
    np.testing.assert_allclose(told.top, np.take_along_axis(exact, order, 1), rtol=1e-5)


MIXTURE = [
    sampler(), sampler(0.7, top_k=5), sampler(2.0, top_p=0.8, frequency_penalty=0.5), sampler(1.0, min_p=0.1),
    sampler(0.0, repetition_penalty=3.0), sampler(3.0, 40, 0.9, 0.01, 1.2, 0.5, -0.5),
    sampler(1.0, top_k=10**9, presence_penalty=2.0),
]  # fmt: skip


@pytest.mark.parametrize("rows", [[5, 0, 2, 6], [4, 0], [1, 3]])
def test_a_mixed_batch_chooses_as_each_sampler_alone(rows):
    rng = np.random.default_rng(1)
    choose = jax.jit(lambda chosen, *rest: chosen(*rest))
    for trial in range(5):
        logits = jnp.asarray(rng.standard_normal((len(rows), 300)).astype(np.float32))
        before = [list(rng.integers(0, 300, (len(rows), n))) for n in (50, 90)]
        said = jnp.asarray(history(*before, 300))
        own = keys(len(rows), seed=trial)
        found = choose(Mixed.of([MIXTURE[row] for row in rows]), logits, own, said)
        for at, row in enumerate(rows):
            assert found[at] == choose(MIXTURE[row], logits[at : at + 1], own[at : at + 1], said[at : at + 1])[0]
    assert choose._cache_size() <= 1 + len(set(rows))


def test_at_the_limits_of_a_request_a_mixed_batch_is_what_each_sampler_is_alone():
    """Numbers that float32 rounds to 0, or an int32 doesn't hold: the likeliest token, or any."""
    rng = np.random.default_rng(2)
    logits = jnp.asarray(40 * rng.standard_normal((1, 300)).astype(np.float32))
    own, likeliest = keys(1), int(jnp.argmax(logits))
    choose = jax.jit(lambda chosen, *rest: chosen(*rest))
    said = jnp.zeros((1, 300), jnp.int32)
    cold = [sampler(t) for t in (5e-324, 1e-50, 1e-38, 1e-20)]
    alone = [sampler(1.0, top_p=p) for p in (5e-324, 1e-50, 1e-38)] + [sampler(1e-50, 2**31 - 1, 1e-50, 1.0, 1.0)]
    free = [sampler(2.0, top_k=k) for k in (2**24 + 1, 2**31 - 1)] + [sampler(2.0, min_p=1e-50)]
    penalised = [sampler(1e-38, repetition_penalty=1e-6), sampler(1e-50, repetition_penalty=100.0)]
    for chosen in (*cold, *alone, *penalised):
        assert choose(Mixed.of([chosen]), logits, own, said)[0] == choose(chosen, logits, own, said)[0] == likeliest
        assert chosen(logits, own, said)[0] == likeliest
    for chosen in free:
        expected = choose(sampler(2.0), logits, own, said)[0]
        assert choose(Mixed.of([chosen]), logits, own, said)[0] == choose(chosen, logits, own, said)[0] == expected


def test_a_mixed_batch_refuses_what_it_cannot_mix():
    for transforms in ((TopP(0.5), TopK(3)), (TopK(3), TopK(4)), (lambda logits, history: logits,)):
        with pytest.raises(ValueError, match="sampler must be a usual chain"):
            Mixed.of([sampler(), Random(transforms)])


def test_a_number_for_each_sequence():
    logits = jnp.asarray(LOGITS)
    cases = {Temperature: [0.5, 1.0, 2.0], TopK: [1, 7, 900], TopP: [0.1, 0.9, 1.0], MinP: [0.0, 0.1, 1.0]}
    for kind, values in cases.items():
        apply = jax.jit(lambda transform, logits: transform(logits, None))
        together = apply(kind(jnp.array(values)), logits)
        for row, value in enumerate(values):
            np.testing.assert_allclose(together[row], apply(kind(value), logits[row : row + 1])[0], rtol=1e-6)


def test_top_k_keeps_ties_and_top_p_at_least_one():
    level = jnp.array([[1.0, 3.0, 3.0, 3.0, -jnp.inf]])
    np.testing.assert_array_equal(jnp.isfinite(TopK(2)(level, None)), [[False, True, True, True, False]])
    np.testing.assert_array_equal(jnp.isfinite(TopP(1e-9)(jnp.array([[0.0, 9.0]]), None)), [[False, True]])


@pytest.mark.parametrize(
    "chain", [(), (Temperature(0.5),), (TopK(4),), (Temperature(1.5), TopP(0.8)), (TopK(6), MinP(0.2))]
)
def test_tokens_come_as_often_as_their_probabilities_say(chain):
    logits = np.array([2.0, 1.0, 0.5, 0.0, -0.5, -1.0, -2.0, 1.5], np.float32)
    draws = 20_000
    rows = jnp.broadcast_to(jnp.asarray(logits), (draws, 8))
    tokens = np.asarray(jax.jit(Random(chain))(rows, keys(draws)))
    transformed = jnp.asarray(logits)[None]
    for transform in chain:
        transformed = transform(transformed, None)
    expected = np.asarray(jax.nn.softmax(transformed[0])) * draws
    found = np.bincount(tokens, minlength=8)
    assert (found[expected == 0] == 0).all()
    likely = expected > 0
    chi_square = ((found - expected)[likely] ** 2 / expected[likely]).sum()
    assert chi_square < 30  # 7 degrees of freedom: p < 1e-4 for a right sampler; this seed's draw is fixed


def test_a_key_chooses_alike_in_every_batch():
    logits = jnp.asarray(LOGITS)
    choose, own = Random((Temperature(3.0),)), keys(3, seed=5)
    together = choose(logits, own)
    np.testing.assert_array_equal(together[::-1], choose(logits[::-1], own[::-1]))
    np.testing.assert_array_equal(together[1:2], choose(logits[1:2], own[1:2]))
    assert not np.array_equal(together, choose(logits, keys(3, seed=6)))


def test_greedy_takes_the_highest_and_the_first_of_equals():
    np.testing.assert_array_equal(Greedy()(jnp.asarray(LOGITS), None), LOGITS.argmax(axis=1))
    assert int(Greedy()(jnp.array([[1.0, 4.0, 4.0]]), None)[0]) == 1
    seen = jnp.asarray([[0, -1, 0]])
    assert int(Greedy((RepetitionPenalty(2.0),))(jnp.array([[1.5, 2.0, 1.0]]), None, seen)[0]) == 0


def test_another_number_compiles_nothing_anew():
    compiled = jax.jit(lambda chosen, logits, keys: chosen(logits, keys))
    for temperature, top_p in ((0.3, 0.5), (0.4, 0.6), (0.5, 0.7)):
        compiled(sampler(temperature, top_p=top_p), jnp.asarray(LOGITS), keys(3))
    assert compiled._cache_size() == 1


@pytest.mark.parametrize("kind", [Temperature, TopK, TopP, MinP, RepetitionPenalty, PresencePenalty, FrequencyPenalty])
def test_numpys_numbers_are_checked_too(kind):
    assert kind(np.float32(1.0)) == kind(1)
    for wrong in (np.float32("nan"), np.float16("inf"), np.bool_(True)):
        with pytest.raises(ValueError, match=f"must be .*, got {wrong}"):
            kind(wrong)


def test_the_usual_chain():
    assert sampler() == Greedy()
    assert sampler(0.0, top_k=5, repetition_penalty=1.1) == Greedy((RepetitionPenalty(1.1),))
    chain = (RepetitionPenalty(1.1), Temperature(0.5), TopK(4), TopP(0.9), MinP(0.1))
    assert sampler(0.5, 4, 0.9, 0.1, 1.1) == Random(chain)
    assert needs_history(Random(chain))
    assert needs_history(sampler(frequency_penalty=1.0))
    assert needs_history(sampler(presence_penalty=1.0))
    assert not needs_history(sampler(0.5, 4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_p": 0.0}, r"top_p must be a number in \(0, 1\], got 0"),
        ({"top_p": 1.1}, "top_p must be"),
        ({"top_p": float("nan")}, "top_p must be .*, got nan"),
        ({"top_k": 0}, r"top_k must be an integer of at least 1, below 2\*\*31, got 0"),
        ({"top_k": 2**31}, "top_k must be"),
        ({"repetition_penalty": 1e-50}, "repetition_penalty must be a positive number, at least 1e-6, got 1e-50"),
        ({"min_p": -0.1}, "min_p must be"),
        ({"temperature": -1.0}, "temperature must be a number of at least 0, got -1.0"),
        ({"temperature": float("nan")}, "temperature must be"),
        ({"temperature": float("inf")}, "temperature must be"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be a positive number"),
        ({"presence_penalty": float("nan")}, "presence_penalty must be a number, got nan"),
        ({"frequency_penalty": float("inf")}, "frequency_penalty must be a number, got inf"),
    ],
)
def test_numbers_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        sampler(**{"temperature": 0.7, **options})
    with pytest.raises(ValueError, match=message):  # in greedy choice too, where they would not matter
        sampler(**options)
