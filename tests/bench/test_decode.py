"""The decoding benchmark: its arithmetic, and a whole run on a tiny model with transformers beside it."""

import json

import numpy as np
import pytest
from tiny_models import hugging_face
from typer.testing import CliRunner

from heddle.bench import decode
from heddle.cli import app
from heddle.data.tokenizers import Tokenizer


@pytest.fixture
def folder(tmp_path):
    hugging_face("llama, bytes").save_pretrained(tmp_path / "model")
    Tokenizer.bytes().save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_figures_follow_from_the_times(monkeypatch):
    seconds = {"ours, batch 2": 2.0, "ours, batch 2, first token": 0.5, "bandwidth": 0.1}
    seconds |= {"peer, batch 2": 8.0, "peer, batch 2, first token": 2.0}
    seconds |= {"ours, batch 1": 1.0, "ours, batch 1, first token": 0.4}
    seconds |= {"peer, batch 1": 4.0, "peer, batch 1, first token": 1.0}

    class Fixed:
        def __init__(self, median):
            self.median = median

    def interleave(steps, repeats, tell):
        for step in steps.values():
            step(0)
        return {name: Fixed(seconds[name]) for name in steps}

    monkeypatch.setattr(decode, "interleave", interleave)
    ours = lambda prompts, tokens: np.array([[1, 2, 3, 4], [5, 6, 7, 8]])[: len(prompts)]  # noqa: E731
    peer = lambda prompts, tokens: np.array([[1, 2, 3, 4], [5, 6, 0, 8]])[: len(prompts)]  # noqa: E731
    prompts = [np.zeros((batch, 3), np.int64) for batch in (1, 2)]
    record = decode.measure({"ours": ours, "peer": peer}, prompts, 4, 4_000_000, 5)
    assert record["bandwidth"] == pytest.approx(4e7)
    assert record["roofline_tokens_per_s"] == pytest.approx(10)
    alone, _, ours, peer = record["results"]
    assert (alone["batch"], ours["batch"]) == (1, 2)
    assert alone["decode_tokens_per_s"] == pytest.approx(3 / 0.6)
    assert ours["total_tokens_per_s"] == pytest.approx(2 * 4 / 2)
    assert ours["decode_tokens_per_s"] == pytest.approx(2 * 3 / 1.5)
    assert ours["roofline_share"] == pytest.approx(4 / 2 / 10)
    assert peer["decode_tokens_per_s"] == pytest.approx(1)
    assert (ours["same_tokens"], peer["same_tokens"]) == (4, 2)


def test_a_whole_run(folder, tmp_path):
    options = [
        "--prompt-tokens",
        "9",
        "--tokens",
        "12",
        "--batch",
        "1,2",
        "--repeats",
        "2",
        "--out",
        str(tmp_path / "o"),
    ]
    result = CliRunner().invoke(app, ["bench", "decode", "--model", folder, *options])
    assert result.exit_code == 0, result.output
    assert "float32, 9 tokens in, 12 out" in result.output
    record = json.loads((tmp_path / "o" / "decode.json").read_text())
    assert [r["name"] for r in record["results"]] == ["heddle", "transformers"] * 2
    assert record["not_run"] == {"llama.cpp": "it reads GGUF files alone"}
    assert "llama.cpp did not run: it reads GGUF files alone" in result.output
    # The same weights, so greedily the same tokens.
    assert [r["same_tokens"] for r in record["results"]] == [12] * 4
    untied = 257 * 32  # of whose rows a step reads one
    assert record["problem"]["weight_bytes"] == 4 * (hugging_face("llama, bytes").num_parameters() - untied)


def test_json_alone_and_no_peers(folder):
    options = ["--peers", "none", "--json", "--tokens", "4", "--prompt-tokens", "3", "--repeats", "1"]
    result = CliRunner().invoke(app, ["bench", "decode", "--model", folder, *options])
    assert [r["name"] for r in json.loads(result.stdout)["results"]] == ["heddle"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": "0"}, "--batch must be positive whole numbers as in 2,4, got '0'"),
        ({"tokens": 1}, "--tokens must be at least 2, got 1"),
        ({"peers": "llama"}, "--peers must be all, none or of transformers, llama.cpp; got llama"),
        ({"prompt_tokens": 90}, "--prompt-tokens and --tokens must fit in the context of 96, got 90 and 128"),
    ],
)
def test_options_that_cannot_be(folder, options, message):
    with pytest.raises(ValueError, match=message):
        decode.run(folder, **options)
