"""The dilated benchmark: its arithmetic, its record, its errors; nothing here depends on how fast anything is."""

import json
import shlex

import numpy as np
import pytest
import torch
from pages import figures_in
from typer.testing import CliRunner

from heddle.attention.dilated import dilated_attention
from heddle.attention.dilated_patterns import check_patterns
from heddle.bench import dilated
from heddle.bench.dilated import Problem
from heddle.cli import app, main

LISTS = [16, 32], [1, 2]
TINY = Problem(seq=64, batch=2, heads=4, head_dim=8, patterns=check_patterns(*LISTS))


def test_flops_are_those_of_equation_17():
    """Counted pair by pair; the paper's formula has half of the diagonal's as well."""
    pairs = sum(1 for i in range(64) for j in range(64) if i // 16 == j // 16)
    pairs += sum(1 for i in range(64) for j in range(64) if i // 32 == j // 32 and i % 2 == j % 2 == 0)
    assert TINY.flops("dilated") == 2 * 2 * 2 * 4 * 8 * pairs
    assert TINY.flops("improved") == TINY.flops("dilated")
    assert TINY.flops("vanilla") == 2 * 2 * 2 * 4 * 8 * 64 * 64
    causal = Problem(64, 2, 4, 8, TINY.patterns, is_causal=True, backward=True)
    assert causal.flops("dilated") == TINY.flops("dilated") / 2 * 3.5


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("name", [*dilated.OURS, *dilated.PEERS])
def test_contenders_compute_what_they_say(name, backward):
    problem = Problem(64, 2, 4, 8, TINY.patterns, is_causal=True, backward=backward)
    query, key, value = torch.randn(3, 2, 64, 4, 8, generator=torch.Generator().manual_seed(0))
    lists = ([64], [1]) if name == "vanilla" else LISTS
    want = dilated_attention(query, key, value, *lists, is_causal=True)
    got = problem.prepare(name)(0).detach()
    got = got.transpose(1, 2) if name == "vanilla" else got
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def test_the_exponent_is_the_slope():
    for power in (1.0, 2.0):
        found = [{"seq": n, "median_ms": 3 * n**power} for n in (100, 200, 800)]
        assert dilated.exponent(found) == pytest.approx(power)
    assert dilated.exponent([{"seq": 100, "median_ms": 1.0}]) is None


def test_sweeps():
    lengths = [1 << n for n in range(13, 18)]
    tokens = list(dilated.sizes(TINY, 1 << 18, 2, [], "tokens"))
    assert [(each.seq, each.batch) for each in tokens] == [(n, (1 << 18) // n) for n in lengths]
    assert [(each.seq, each.batch) for each in dilated.sizes(TINY, 1 << 18, 2, [], "length")] == [
        (n, 1) for n in lengths
    ]
    assert [each.seq for each in dilated.sizes(TINY, 64, 1, [16, 32], "tokens")] == [16, 32]


SIZES = "--total-tokens 7 --heads 2 --head-dim 8 --segment-lengths 16,32 --dilation-rates 1,2 --seq 64,128 --repeats 2"


def test_the_command_writes_its_record_and_page(tmp_path, monkeypatch):
    words = ["bench", "dilated", *SIZES.split(), "--causal", "--backward", "--out", str(tmp_path / "o")]
    monkeypatch.setattr("sys.argv", ["heddle", *words])
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "o" / "dilated.json").read_text())
    assert shlex.split(record["command"]) == ["heddle", *words]
    names = [*dilated.OURS, *dilated.PEERS]
    assert [(r["sweep"], r["seq"], r["batch"], r["name"]) for r in record["results"]] == [
        (sweep, n, 128 // n if sweep == "tokens" else 1, name)
        for sweep in ("tokens", "length") for n in (64, 128) for name in names
    ]  # fmt: skip
    for r in record["results"]:
        seconds = r["median_ms"] / 1e3
        assert r["tokens_per_second"] == pytest.approx(r["seq"] * r["batch"] / seconds)
        assert r["flops_per_second"] == pytest.approx(r["flops"] / seconds)
        product, sdpa = r["yardsticks"].values()
        assert r["of_matrix_product"] == pytest.approx(r["flops_per_second"] / product)
        assert r["of_sdpa"] == pytest.approx(r["flops_per_second"] / sdpa)
    for name in names:
        times = [r["median_ms"] for r in record["results"] if r["name"] == name and r["sweep"] == "length"]
        assert record["exponents"][name] == pytest.approx(np.log2(times[1] / times[0]))
    assert "forward and backward: dilated attention, w 16,32, r 1,2, 2 heads of 8, float32, causal" in result.output
    assert "fitted exponent" in result.output
    figures = figures_in((tmp_path / "o" / "dilated.html").read_text())
    assert len(figures) == 4  # time and throughput of two sweeps


def test_what_takes_too_long_is_left_out_at_greater_lengths(monkeypatch):
    monkeypatch.setattr(dilated, "LONGEST_STEP", 0.0)
    result = CliRunner().invoke(app, ["bench", "dilated", *SIZES.split(), "--sweep", "length", "--json"])
    record = json.loads(result.stdout)
    assert {r["seq"] for r in record["results"]} == {64}
    names = [f"{name} beyond 64 tokens" for name in (*dilated.OURS, "vanilla")]
    assert record["not_run"] == dict.fromkeys(names, "a step took over a minute")


@pytest.mark.slow
def test_peak_memory_is_linear():
    """At most the output, and as much again as the inputs and it."""
    problem = Problem(1 << 14, 1, 2, 32, check_patterns([1024, 4096], [1, 4]))
    unit = problem.seq * 2 * 32 * 4
    assert dilated._peak(problem, "improved") < 5 * unit


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--total-tokens 0", "--total-tokens must be the tokens' binary logarithm, 1 to 40, got 0"),
        ("--heads 0", "--heads must be at least 1, got 0"),
        ("--repeats 0", "--repeats must be at least 1, got 0"),
        ("--segment-lengths 2k", "--segment-lengths must be positive whole numbers as in 2,4, got '2k'"),
        ("--dilation-rates 1,2", "segment_lengths and dilation_rates must be of one length, got 5 and 2"),
        ("--seq 64,0", "--seq must be positive whole numbers as in 2,4, got '64,0'"),
        ("--dtype int8", "--dtype must be one of float32, bfloat16, float16, got 'int8'"),
        ("--device tpu", "--device must be one of cpu, cuda, got 'tpu'"),
        ("--sweep all", "--sweep must be one of tokens, length, both, got 'all'"),
        ("--peers sdpa", "--peers must be all, none or of vanilla; got sdpa"),
        ("--total-tokens 3 --batch-size 9", "--batch-size must be at most the 8 tokens there are, got 9"),
    ],
)
def test_errors_are_one_line(options, message, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["heddle", "bench", "dilated", *options.split()])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("heddle: " + message)
