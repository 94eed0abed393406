"""Contenders that are several ranks: their outputs, the balance figures, a rank that dies."""

import json

import numpy as np
import pytest

from heddle.bench import attention, context_parallel
from heddle.bench.attention_peers import Problem

TINY = Problem(seq=96, heads=4, kv_heads=2, head_dim=8, documents=3, batch=2, pad=10)


@pytest.mark.slow
@pytest.mark.parametrize(("framework", "seq"), [("torch", 90), ("jax", 96)])
def test_ranks_agree_with_one_device(framework, seq, tmp_path, capfd):
    attention.run(
        TINY, seq=[seq], framework=framework, peers="none", repeats=1,
        context_parallel=2, show_mask=True, out=tmp_path,
    )  # fmt: skip
    record = json.loads((tmp_path / "attention.json").read_text())
    names = {r["name"] for r in record["results"]}
    absent = {f"torch ×2 {method} zigzag" for method in ("all_gather", "ring")} if seq == 90 else set()
    assert names == {f"heddle-{framework}", *context_parallel.contenders([framework], 2)} - absent
    assert record["not_run"] == dict.fromkeys(absent, "90 tokens are no multiple of 4")
    assert len(names) == 7 - len(absent)
    assert all(r["difference"] < 1e-6 for r in record["results"])
    assert record["area_max_over_mean"][str(seq)].keys() == {"area", "none"} | ({"zigzag"} if seq == 96 else set())
    assert f"visible pairs of 2 ranks, max/mean at {seq} tokens: area 1.0" in capfd.readouterr().out
    made = {"attention.json", "attention.html", f"mask-{seq}.png", f"mask-{seq}.html"}
    assert {p.name for p in tmp_path.iterdir()} == made


@pytest.mark.parametrize("seed", range(3))
def test_the_balance_of_packed_documents(seed):
    areas = context_parallel.areas(Problem(seq=32768, documents=12, seed=seed), 8)
    assert areas["area"] <= 1.02
    assert areas["zigzag"] > 1.2
    assert context_parallel.areas(Problem(seq=32768, documents=1), 8)["zigzag"] == pytest.approx(1, abs=1e-3)


def test_a_dead_rank_is_an_error():
    workers = context_parallel._Workers(TINY, "jax", 2)
    workers.ask(("all_gather", "area", 0, False))
    with pytest.raises(ChildProcessError, match="a rank of --context-parallel ended"):
        workers.ask(("no such method", "area", 0, False))


def test_memory_is_of_one_process():
    with pytest.raises(ValueError, match="--memory measures one process"):
        attention.run(TINY, seq=[96], memory=True, context_parallel=2)
    with pytest.raises(ValueError, match="--context-parallel must be at least 1, got 0"):
        attention.run(TINY, seq=[96], context_parallel=0)
    assert np.isfinite(context_parallel.areas(TINY, 4)["area"])
