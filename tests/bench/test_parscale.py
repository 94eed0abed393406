"""The ParScale benchmark: its law, and a whole run on a tiny model."""

import json

import pytest
from tiny_models import hugging_face
from typer.testing import CliRunner

from heddle.bench import parscale, report
from heddle.cli import app
from heddle.data.tokenizers import Tokenizer


@pytest.fixture
def folder(tmp_path):
    hugging_face("llama, bytes").save_pretrained(tmp_path / "model")
    Tokenizer.bytes().save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_a_whole_run(folder, tmp_path):
    out = tmp_path / "out"
    options = ["--replicas", "1,4", "--batch", "2", "--prompt-tokens", "5", "--tokens", "2", "--repeats", "2"]
    options += ["--cross-attn", "joint", "--out", str(out)]
    result = CliRunner().invoke(app, ["bench", "parscale", "--model", folder, *options])
    assert result.exit_code == 0, result.output
    record = json.loads((out / "parscale.json").read_text())
    one, four = record["results"]
    assert (one["replicas"], four["replicas"], four["batch"]) == (1, 4, 2)
    # 2 layers, hidden 32, 2 key heads of 8; prefixes of 48 tokens; a bias a head and a projection for the joint mode.
    extra = 4 * 32**2 + 32 + 4 * 32 + 4 + 2 * 4 * 2 * 48 * 8 * 2 + 2 * (32**2 + 4)
    assert four["weight_bytes"] - one["weight_bytes"] == 4 * extra
    assert four["cache_bytes"] == 4 * one["cache_bytes"]
    assert four["deeper"]["layers"] == 3  # of 2, 1.55 times
    assert four["deeper"]["cache_bytes"] == 1.5 * one["cache_bytes"]
    assert min(four["decode_s"], four["products_s"], four["prefill_s"], four["deeper"]["decode_s"]) > 0
    assert "P = 4" in result.output
    assert (out / "parscale.html").stat().st_size > 10**6
    assert "| P = 4 |" in report.write(out, tmp_path / "report.md").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"replicas": "2,4"}, "--replicas must begin with 1, .*, got 2,4"),
        ({"batch": "2,1"}, "--batch must be positive whole numbers in order as in 1,2,4, got '2,1'"),
        ({"cross_attn": "all"}, "--cross-attn must be one of none, joint, sublayer, got all"),
        ({"law": "code"}, "--law must be one of stack, pile, got code"),
        ({"tokens": 33}, "--tokens must be at most 32"),
        ({"repeats": 0}, "--repeats must be at least 1, got 0"),
        ({"replicas": "1", "tokens": 32}, "must fit in the context of 96 with all rounds, got 321"),
    ],
)
def test_options_that_cannot_be(folder, options, message):
    with pytest.raises(ValueError, match=message):
        parscale.run(folder, **options)
