"""``heddle evaluate``: what it says of a model is what the model's own logits say."""

import json
import sys

import numpy as np
import pytest
from flax import nnx
from pages import assets

from heddle import cli
from heddle.data.tokenizers import Tokenizer
from heddle.jax import Transformer
from heddle.jax.evaluate import evaluate
from heddle.jax.model_config import ModelConfig

TEXTS = ["the cat sat on the mat, " * 5, "too short", "and the dog on the other one. " * 3, "\u00e9t\u00e9 " * 20]


@pytest.fixture(scope="module")
def model():
    config = ModelConfig(
        vocab_size=257, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64,
    )  # fmt: skip
    return Transformer(config, rngs=nnx.Rngs(0))


def test_bits_are_those_of_each_window_run_alone(model):
    tokenizer = Tokenizer.bytes()
    windows = []
    for text in TEXTS:
        ids = tokenizer.encode(text)
        windows += [ids[i : i + 21] for i in range(0, len(ids), 20) if len(ids[i : i + 21]) == 21]
    bits = np.zeros(20)
    for window in windows:
        logits = np.asarray(model(np.asarray([window[:-1]])), np.float64)[0]
        chances = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        bits -= np.log2(chances[np.arange(20), window[1:]]) / len(windows)
    found = evaluate(model, tokenizer, TEXTS, seq_len=20, batch=4)
    assert [(b.begin, b.end) for b in found] == [(1, 2), (2, 4), (4, 8), (8, 16), (16, 21), (1, 21)]
    for part in found:
        assert part.tokens == len(windows) * (part.end - part.begin)
        assert part.bits_per_token == pytest.approx(bits[part.begin - 1 : part.end - 1].mean(), rel=1e-5)
    ascii_only = evaluate(model, tokenizer, TEXTS[:3], seq_len=20)
    assert ascii_only[-1].bits_per_byte == pytest.approx(ascii_only[-1].bits_per_token)
    one = evaluate(model, tokenizer, TEXTS, seq_len=20, max_windows=1)
    assert one[-1].tokens == 20


def test_what_cannot_be_is_refused(model):
    tokenizer = Tokenizer.bytes()
    for options, said in (
        ({"seq_len": 0}, "seq_len must be at least 1, got 0"),
        ({"seq_len": 65}, "seq_len must be at most the model's context of 64 tokens, got 65"),
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"max_windows": 0}, "max_windows must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=said):
            evaluate(model, tokenizer, TEXTS, **options)
    with pytest.raises(ValueError, match="documents must hold one of at least 51 tokens, got none"):
        evaluate(model, tokenizer, TEXTS[1:2], seq_len=50)


def test_the_command(model, tmp_path, monkeypatch, capsys):
    for name in "one", "two":
        model.save_pretrained(tmp_path / name / "model", Tokenizer.bytes())
    (tmp_path / "text.txt").write_text(TEXTS[0])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    models = [x for name in ("one", "two") for x in ("--model", str(tmp_path / name / "model"))]
    options = ["--corpus", str(tmp_path / "text.txt"), "--held-out", "0", "--seq-len", "20", "--json"]
    monkeypatch.setattr(sys, "argv", ["heddle", "evaluate", *models, *options, "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as exit:
        cli.main()
    assert exit.value.code == 0
    record = json.loads(capsys.readouterr().out)
    assert record["models"]["one"] == record["models"]["two"]
    assert json.loads((tmp_path / "out" / "evaluate.json").read_text()) == record
    assert not assets((tmp_path / "out" / "evaluate.html").read_text()).loaded
