"""The benchmark's arithmetic, its record, and its errors; nothing here depends on how fast anything is."""

import importlib.metadata
import json
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
from typer.testing import CliRunner

from heddle import Mask, attend
from heddle.bench import attention, attention_peers
from heddle.bench.attention_peers import OURS, PEERS, Problem
from heddle.cli import app, main

TINY = Problem(seq=96, heads=4, kv_heads=2, head_dim=8, documents=3, batch=2, pad=10)


def test_documents_are_drawn_by_seed_and_row():
    problem = Problem(seq=1000, batch=3, documents=5, pad=100)
    lengths = [row for _, row in problem.rows]
    assert lengths == [row for _, row in Problem(seq=1000, batch=3, documents=5, pad=100).rows]
    assert all(len(row) == 5 and sum(row) == 900 and min(row) >= 1 for row in lengths)
    assert len({tuple(row) for row in lengths}) == 3
    assert len(set(lengths[0])) > 1
    assert lengths != [row for _, row in Problem(seq=1000, batch=3, documents=5, pad=100, seed=7).rows]


def test_the_mask_is_of_those_documents():
    for b, (_, lengths) in enumerate(TINY.rows):
        segments = np.concatenate([np.repeat(np.arange(3), lengths), np.full(10, -1)])[None]
        want = Mask.documents(segments).dense(96)
        np.testing.assert_array_equal(TINY.mask.dense(96)[b], want[0])


def test_flops_count_the_visible_pairs():
    pairs = sum(n * (n + 1) // 2 for _, lengths in TINY.rows for n in lengths)
    assert TINY.visible == pairs
    assert TINY.flops == 2 * 2 * 8 * 4 * pairs  # two products of two FLOPs a pair, element of a head and head
    assert Problem(**vars_of(TINY) | {"backward": True}).flops == 3.5 * TINY.flops
    causal, window = Problem(seq=50, documents=1), Problem(seq=50, documents=1, window=7)
    assert causal.visible == 50 * 51 // 2
    assert window.visible == 7 * 8 // 2 + 43 * 7


def vars_of(problem: Problem) -> dict:
    return {name: getattr(problem, name) for name in Problem.__dataclass_fields__}


def test_inputs_rotate_and_exceed_the_caches():
    assert Problem(seq=4096).sets * 4 * 4096 * 8 * 64 * 4 >= 128 << 20
    assert Problem(seq=1 << 20).sets == 2
    first, second = TINY.arrays(0), TINY.arrays(1)
    assert [a.shape for a in first] == TINY.shapes
    assert not np.array_equal(first[0], second[0])


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("name", [*OURS, "sdpa-dense", "sdpa-documents", "jax-dense"])
def test_contenders_compute_attention(name, backward):
    problem = Problem(**vars_of(TINY) | {"backward": backward})
    query, key, value, _ = problem.arrays(1)
    want = attend(query, key, value, problem.mask)
    seen = problem.mask.counts() > 0
    out = attention._numpy((OURS | PEERS)[name].prepare(problem)(1))
    np.testing.assert_allclose(out[seen], want[seen], rtol=0, atol=1e-5)


def test_plain_causal():
    problem = Problem(seq=64, heads=2, kv_heads=2, head_dim=8, documents=1)
    query, key, value, _ = problem.arrays(0)
    out = attention._numpy(PEERS["jax-causal"].prepare(problem)(0))
    np.testing.assert_allclose(out, attend(query, key, value, Mask.causal(64)), rtol=0, atol=1e-5)


@pytest.mark.slow
def test_flex():
    """In a new process: the tests' shape checks hide the signatures that FlexAttention reads."""
    options = "--seq 128 --documents 3 --heads 2 --kv-heads 1 --head-dim 16 --framework torch --peers flex --repeats 1"
    command = [sys.executable, "-m", "heddle", "bench", "attention", *options.split(), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600)
    ours, flex = json.loads(done.stdout)["results"]
    assert (ours["name"], flex["name"]) == ("heddle-torch", "flex")
    assert flex["difference"] < 1e-5


@pytest.fixture
def small(monkeypatch):
    """Few inputs, as the sizes are tiny."""
    monkeypatch.setattr(attention_peers, "INPUT_BYTES", 0)


SIZES = ["--heads", "2", "--head-dim", "8", "--documents", "3", "--repeats", "2"]


def test_the_command_writes_its_record_and_page(tmp_path, small, monkeypatch):
    words = ["bench", "attention", "--seq", "64,128", *SIZES, "--peers", "sdpa-dense,jax-dense", "--backward"]
    words += ["--out", str(tmp_path / "new" / "results")]
    monkeypatch.setattr("sys.argv", ["heddle", *words])
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "new" / "results" / "attention.json").read_text())
    assert record["benchmark"] == "attention"
    assert shlex.split(record["command"]) == ["heddle", *words]
    assert set(record["machine"]) >= {"processor", "cores", "memory_gib", "python", "versions", "date"}
    assert record["machine"]["versions"]["torch"] == importlib.metadata.version("torch")
    assert record["problem"] == {
        "batch": 1, "heads": 2, "kv_heads": 2, "head_dim": 8, "documents": 3, "pad": 0, "window": None,
        "backward": True, "dtype": "float32", "seed": 0,
    }  # fmt: skip
    names = ["heddle-torch", "heddle-jax", "sdpa-dense", "jax-dense"]
    assert [(r["seq"], r["name"]) for r in record["results"]] == [(n, name) for n in (64, 128) for name in names]
    for r in record["results"]:
        visible = record["visible"][str(r["seq"])]
        assert r["flops"] == 4 * 8 * 2 * visible * 3.5
        assert r["flops_per_second"] == pytest.approx(r["flops"] / (r["median_ms"] / 1e3))
        low, high = r["quartiles_ms"]
        assert low <= r["median_ms"] <= high
        assert r["repeats"] == 2
        assert r["difference"] < 1e-5
        assert r["peak_bytes"] is None
        own = record["results"][names.index("heddle-jax") + (4 if r["seq"] == 128 else 0)]
        assert r["times"]["heddle-jax"] == pytest.approx(r["median_ms"] / own["median_ms"])
        assert (r["implementation"] is not None) == r["name"].startswith("heddle")

    page = (tmp_path / "new" / "results" / "attention.html").read_text()
    assert "Plotly.newPlot" in page
    assert "heddle-torch sdpa" in page
    for name in names:
        assert len(re.findall(rf"^ *{name}\b", result.output, re.MULTILINE)) == 2
    assert "forward and backward: 3 documents" in result.output


def test_json_on_the_terminal(small):
    result = CliRunner().invoke(
        app, ["bench", "attention", "--seq", "64", *SIZES, "--framework", "torch", "--peers", "none", "--json"]
    )
    record = json.loads(result.stdout)
    assert [r["name"] for r in record["results"]] == ["heddle-torch"]
    assert record["results"][0]["times"] == {"heddle-torch": 1.0}


def test_peers_that_cannot_serve_are_named(small):
    contenders, absent = attention_peers.choose(Problem(window=5, backward=True), "both", "all")
    assert list(contenders) == ["heddle-torch", "heddle-jax", "sdpa-dense", "jax-dense"]
    on_cuda = dict.fromkeys(("cudnn", "flash-attn", "kvax"), "it needs a CUDA device")
    assert set(absent) == {"sdpa-documents", "flex", "jax-causal", *on_cuda}
    assert absent.items() >= on_cuda.items()
    contenders, absent = attention_peers.choose(Problem(documents=1), "jax", "all")
    assert list(contenders) == ["heddle-jax", "jax-dense", "jax-causal"]
    assert absent == {"kvax": "it needs a CUDA device"}


@pytest.mark.slow
def test_peak_memory_counts_what_a_step_holds():
    """A dense mask becomes float32, q_len x kv_len, which attend never holds."""
    problem = Problem(seq=2048, heads=1, kv_heads=1, head_dim=8, documents=8)
    ours, dense = (attention._peak_in_a_new_process(problem, name) for name in ("heddle-torch", "sdpa-dense"))
    assert dense > 4 * 2048 * 2048
    assert ours < 4 << 20


def test_a_contender_that_dies_is_left_out_of_the_memory(monkeypatch, small, capsys, tmp_path):
    monkeypatch.setattr(attention, "_peak_in_a_new_process", lambda problem, name: 1 << 20 if name in OURS else None)
    problem = Problem(heads=2, kv_heads=2, head_dim=8, documents=3)
    for seq in ([64], [64, 96]):
        attention.run(problem, seq=seq, framework="torch", peers="sdpa-dense", repeats=1, memory=True, out=tmp_path)
        shown = capsys.readouterr().out.splitlines()
        assert [line.split()[-1] for line in shown if " sdpa" in line or "sdpa-" in line] == ["1.0", "killed"] * len(
            seq
        )


@pytest.mark.slow
def test_a_process_that_dies_is_noticed(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        """
import os
from heddle.bench import attention

def lives(problem, name):
    return 5

def dies(problem, name):
    os._exit(9)  # as the system ends a process that takes too much memory

if __name__ == "__main__":
    for attention._peak in (lives, dies):
        print(attention._peak_in_a_new_process(attention.Problem(), "heddle-torch"))
"""
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=600)
    assert done.stdout == "5\nNone\n", done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--seq 4k", "--seq must be positive whole numbers as in 2,4, got '4k'"),
        ("--seq 64,0", "--seq must be positive whole numbers as in 2,4, got '64,0'"),
        ("--heads 6 --kv-heads 4", "--heads must be a multiple of --kv-heads, got 6 and 4"),
        ("--documents 0", "--documents must be at least 1, got 0"),
        ("--documents 65", "--documents must be at most the 64 tokens there are, got 65"),
        ("--pad 64", "--pad must leave a token of --seq 64, got 64"),
        ("--window 0", "--window must be at least 1, got 0"),
        ("--dtype float8", "--dtype must be one of float32, bfloat16, float16, got 'float8'"),
        ("--framework flax", "--framework must be torch, jax or both, got 'flax'"),
        ("--peers sdpa", "--peers must be all, none or of sdpa-dense, "),
        ("--peers flex --framework jax", "--peers flex can't serve this: it runs in torch"),
        ("--peers jax-causal", "--peers jax-causal can't serve this: is_causal can't say documents"),
        ("--repeats 0", "--repeats must be at least 1, got 0"),
        ("--seed -1", "--seed must be at least 0, got -1"),
    ],
)
def test_errors_are_one_line(options, message, monkeypatch, capsys):
    words = options.split() if "--seq" in options else ["--seq", "64", *options.split()]
    monkeypatch.setattr("sys.argv", ["heddle", "bench", "attention", *words])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("heddle: " + message)
