import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from heddle.attention.rope import Rope, rotate

HALF = 8
RULES = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 3.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "llama3 of another factor": {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 32},
    "yarn not truncated": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "truncate": False,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
    },
    "yarn with mscale": {
        "rope_type": "yarn",
        "factor": 16.0,
        "original_max_position_embeddings": 32,
        "mscale": 0.7,
        "mscale_all_dim": 1.2,
    },
    "longrope": {
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "short_factor": [1.0 + 0.1 * i for i in range(HALF)],
        "long_factor": [1.0 + i for i in range(HALF)],
    },
}


def config_of(name: str) -> dict:
    parameters = {"rope_type": name, "rope_theta": 5000.0} | RULES[name]
    return {"max_position_embeddings": 128, "rope_parameters": parameters}


def theirs(name: str, positions: np.ndarray):
    config = LlamaConfig(hidden_size=4 * 2 * HALF, num_attention_heads=4, **config_of(name))
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.as_tensor(positions))
    return cos[..., :HALF].numpy(), sin[..., :HALF].numpy()


@pytest.mark.parametrize("length", [20, 64, 65, 200])
@pytest.mark.parametrize("name", RULES)
def test_every_rule_equals_transformers(name, length):
    positions = np.arange(length)[None]
    cos, sin = Rope.from_config(config_of(name), 2 * HALF).tables(positions)
    their_cos, their_sin = theirs(name, positions)
    np.testing.assert_allclose(cos, their_cos, rtol=0, atol=2e-5)
    np.testing.assert_allclose(sin, their_sin, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", RULES)
def test_every_rule_is_the_same_in_every_framework_and_traced(name):
    positions = np.stack([np.arange(70), np.arange(70) // 2])
    rope = Rope.from_config(config_of(name), 2 * HALF)
    expected = rope.tables(positions)
    for got in (
        rope.tables(torch.as_tensor(positions)),
        rope.tables(jnp.asarray(positions)),
        jax.jit(rope.tables)(jnp.asarray(positions)),
    ):
        for a, b in zip(got, expected):
            assert a.dtype in (torch.float32, jnp.float32)
            np.testing.assert_allclose(np.asarray(a), b, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["dynamic", "longrope"])
def test_a_row_of_a_ragged_batch_gets_what_it_gets_alone(name):
    rope = Rope.from_config(config_of(name), 2 * HALF)
    short = np.minimum(np.arange(200), 30)[None]
    together = rope.tables(np.concatenate([np.arange(200)[None], short]))
    np.testing.assert_array_equal(together[0][1], rope.tables(short)[0][0])


@given(st.integers(0, 50), st.integers(0, 50), st.integers(0, 100))
def test_products_depend_on_the_distance_alone(a, b, shift):
    rng = np.random.default_rng(0)
    q, k = (rng.standard_normal((1, 1, 1, 10)) for _ in range(2))
    rope = Rope(10)

    def product(i, j):
        turned = (rotate(x, *rope.tables(np.array([[p]]))) for x, p in ((q, i), (k, j)))
        first, second = turned
        return (first * second).sum()

    np.testing.assert_allclose(product(a, b), product(a + shift, b + shift), rtol=0, atol=1e-4)


def test_rotate_is_the_half_split_layout_and_passes_the_rest():
    x = np.zeros((1, 1, 1, 6), np.float32)
    x[..., 0], x[..., 5] = 1.0, 7.0
    rope = Rope(6, partial_rotary_factor=4 / 6)
    turned = rotate(x, *rope.tables(np.array([[2]])))
    np.testing.assert_allclose(turned[0, 0, 0], [np.cos(2), 0, np.sin(2), 0, 0, 7], rtol=1e-6)


def test_both_spellings_of_a_config():
    old = {"rope_theta": 1e5, "rope_scaling": {"type": "linear", "factor": 2.0}, "max_position_embeddings": 64}
    new = {
        "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e5},
        "max_position_embeddings": 64,
    }
    assert Rope.from_config(old, 8) == Rope.from_config(new, 8)
    assert Rope.from_config({"rope_theta": 1e5, "rope_scaling": None}, 8) == Rope(8, 1e5)
    assert hash(Rope(8)) == hash(Rope(8))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rule": "ntk"}, "rope rule must be one of default, linear.*got 'ntk'"),
        ({"rule": "linear"}, "rope rule 'linear' needs factor"),
        ({"rule": "linear", "factor": 0.0}, "factor must be a positive number, got 0.0"),
        ({"head_dim": 7}, "head_dim"),
        ({"theta": -1.0}, "theta must be a positive number, got -1.0"),
        (
            {"rule": "longrope", "original_max_position": 8, "short_factor": (1.0,), "long_factor": (1.0,)},
            "short_factor must have rotary_dim / 2 = 4 numbers, got 1",
        ),
        ({"rule": "dynamic", "factor": 2.0, "max_position": 8, "head_dim": 2}, "at least 4"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        Rope(**{"head_dim": 8} | arguments)


LLAMA3 = {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_scaling": {"rope_type": "linear", "factor": "4"}}, "factor must be a positive number, got '4'"),
        ({"rope_scaling": {"rope_type": ["x"]}}, r"rope rule must be one of .*, got \['x'\]"),
        ({"rope_scaling": "linear"}, "rope_scaling must be an object, got 'linear'"),
        ({"rope_parameters": [1]}, r"rope_parameters must be an object, got \[1\]"),
        ({"rope_theta": "x"}, "rope_theta must be a positive number, got 'x'"),
        ({"rope_theta": True}, "rope_theta must be a positive number, got True"),
        ({"rope_theta": 0}, "rope_theta must be a positive number, got 0"),
        ({"partial_rotary_factor": "1"}, "partial_rotary_factor must be a positive number, got '1'"),
        (
            {"rope_scaling": {"rope_type": "yarn", "original_max_position_embeddings": 0}},
            "original_max_position_embeddings must be a positive number, got 0",
        ),
        ({"rope_scaling": {"rope_type": "yarn", "beta_fast": 0}}, "beta_fast must be a positive number, got 0"),
        ({"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}}, "low_freq_factor must be below high_freq_factor"),
        ({"rope_scaling": LLAMA3 | {"low_freq_factor": "1"}}, "low_freq_factor must be a number, got '1'"),
        (
            {"rope_scaling": {"rope_type": "longrope", "short_factor": 1.0, "long_factor": [1.0] * 4}},
            "short_factor must have rotary_dim / 2 = 4 numbers, got 1.0",
        ),
        (
            {"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 0.0, "x"]}},
            "long_factor must be a positive number, got 0.0",
        ),
    ],
)
@pytest.mark.usefixtures("unhooked")
def test_a_broken_field_of_a_config_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        Rope.from_config({"max_position_embeddings": 64} | changes, 8)


def test_where_both_spellings_are_there_transformers_is_followed():
    both = {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e5},
        "rope_scaling": {"rope_type": "linear", "factor": 2.0},
        "max_position_embeddings": 64,
    }
    for config in (both, both | {"rope_theta": 700.0}):
        theirs = LlamaConfig(head_dim=8, **copy.deepcopy(config)).rope_parameters
        ours = Rope.from_config(config, 8)
        assert (ours.rule, ours.factor, ours.theta) == ("linear", theirs["factor"], theirs["rope_theta"])
        assert theirs["rope_type"] == "linear"


def test_dynamic_is_exactly_the_default_up_to_the_maximum():
    for factor in (1.7, 3.0, 8.0):
        dynamic = Rope(8, 500.0, "dynamic", factor=factor, max_position=96)
        for positions in (np.arange(96)[None], np.arange(96)[:, None]):
            for xp in (np, jnp):
                got, expected = (rope.tables(xp.asarray(positions)) for rope in (dynamic, Rope(8, 500.0)))
                for a, b in zip(got, expected, strict=True):
                    np.testing.assert_array_equal(a, b)
    assert not dynamic.by_length


def test_config_errors():
    with pytest.raises(ValueError, match="got fctor"):
        Rope.from_config({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "fctor": 3.0}}, 8)
    with pytest.raises(ValueError, match="a set for each of full_attention"):
        Rope.from_config({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, 8)
