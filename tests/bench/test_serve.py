"""The serving benchmark: its arithmetic, and a whole run against a server of a tiny model."""

import json
import threading
import time

import pytest
from servers import save
from typer.testing import CliRunner

from heddle.bench import serve
from heddle.cli import app


def test_figures_follow_from_the_answers(monkeypatch):
    class Fixed:
        def __init__(self, seconds):
            self.seconds = seconds

    def interleave(steps, repeats, tell):
        for _ in range(1 + repeats):  # a first round warms up
            for step in steps.values():
                step(0)
        return {"1 clients": Fixed((2.0, 2.0)), "4 clients": Fixed((1.0, 4.0))}

    monkeypatch.setattr(serve, "interleave", interleave)
    asked = []

    def ask(number):
        asked.append(number)
        return serve.Answer(first_token=0.1 * (number % 10), seconds=1.0, tokens=10)

    one, four = serve.measure(ask, [1, 4], lambda count: 10, 2)
    assert sorted(asked) == list(range(60))  # no prompt twice
    assert (one["clients"], one["requests"], four["clients"]) == (1, 10, 4)
    assert one["tokens_per_s"] == pytest.approx(100 / 2)
    assert four["tokens_per_s"] == pytest.approx((100 / 1 + 100 / 4) / 2)
    assert one["first_token_s"] == pytest.approx(0.45)
    assert one["first_token_p90_s"] == pytest.approx(0.8)
    assert one["answer_s"] == 1.0
    record = {"results": [one, four], "problem": {"model": "m", "prompt_tokens": 3, "tokens": 10}}
    [(header, rows)] = serve.tables(record)
    assert len(header) == len(rows[0])
    assert [row[:3] for row in rows] == [["1", "50.0", "1.00×"], ["4", "62.5", "1.25×"]]


def test_so_many_clients_ask_at_once():
    now, most, lock = [0], [0], threading.Lock()

    def ask(number):
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        time.sleep(0.05)
        with lock:
            now[0] -= 1
        return serve.Answer(0.0, 0.05, 1)

    serve.measure(ask, [3], lambda count: 9, 1)
    assert most == [3]


@pytest.mark.slow
def test_a_whole_run(tmp_path):
    save(tmp_path / "tiny")
    options = ["--clients", "1,3", "--prompt-tokens", "9", "--tokens", "4", "--repeats", "1", "--out", str(tmp_path)]
    result = CliRunner().invoke(app, ["bench", "serve", "--model", str(tmp_path / "tiny"), *options])
    assert result.exit_code == 0, result.output
    assert "tiny served, 9 tokens in, 4 out" in result.output
    record = json.loads((tmp_path / "serve.json").read_text())
    assert [r["clients"] for r in record["results"]] == [1, 3]
    assert all(0 < r["first_token_s"] <= r["answer_s"] for r in record["results"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clients": "one"}, "--clients must be positive whole numbers as in 2,4, got 'one'"),
        ({"clients": "0,4"}, "--clients must be positive whole numbers as in 2,4, got '0,4'"),
        ({"tokens": 1}, "--tokens must be at least 2, got 1"),
        ({"repeats": 0}, "--repeats must be at least 1, got 0"),
        ({"model": "./nowhere"}, "./nowhere: no such file or folder"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises((ValueError, OSError), match=message):
        serve.run(**options)
