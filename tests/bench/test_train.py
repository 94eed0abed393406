"""The training benchmark: its data and arithmetic, and a whole run on a tiny model, where all must find one loss."""

import json

import numpy as np
import pytest
from tiny_models import hugging_face
from typer.testing import CliRunner

from heddle.bench import train
from heddle.bench.train_peers import OURS, PEERS, Runner, Step, Task, places, split, targets
from heddle.cli import app, main
from heddle.data.tokenizers import Tokenizer
from heddle.flops import TrainingFlops

LENGTHS = [9, 3, 12, 5, 2, 7, 6, 4]


@pytest.fixture
def task(tmp_path):
    documents = [np.arange(length) + 20 * i for i, length in enumerate(LENGTHS)]
    return Task(str(tmp_path / "nowhere"), documents, seq=12, rows=2, steps=2)


@pytest.fixture
def folder(tmp_path):
    hugging_face("llama, bytes").save_pretrained(tmp_path / "model")
    Tokenizer.bytes().save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture
def corpus(tmp_path):
    (tmp_path / "corpus").mkdir()
    for i in range(60):
        (tmp_path / "corpus" / f"{i}.txt").write_text("the cat sat on the mat, and the dog on it. "[: 4 + 7 * i % 40])
    (tmp_path / "corpus" / "long.txt").write_text("x" * 1000)
    return str(tmp_path / "corpus")


def test_all_train_on_the_same_documents(task):
    batches = task.batches
    assert [b.tokens.shape for b in batches] == [(2, 12)] * 2
    found = [document for batch in batches for document in split(batch)]
    assert sorted(map(tuple, found)) == sorted(map(tuple, task.documents))
    assert sum(map(targets, batches)) == sum(LENGTHS) - len(LENGTHS)
    for batch in batches:
        lengths = [len(document) for document in split(batch)]
        assert places("hf-padded", batch) == max(lengths) * len(lengths)
        assert all(places(name, batch) == 24 for name in [*OURS, "hf-packed"])


def test_figures_follow_from_the_times(task, monkeypatch):
    class Fixed:
        def __init__(self, seconds):
            self.seconds = seconds
            self.median, self.quartiles = seconds[0], (seconds[0], seconds[0])

    class Fake(Runner):
        def __init__(self, name, task):
            self.name, self.steps, self.peak_bytes = name, [], None
            self.failed = "out of memory" if name == "hf-padded" else None

        def step(self):
            loss = 3.5 if self.name == "hf-packed" else 3.0
            self.steps.append(Step(loss + len(self.steps), 4.0 + 100 * (not self.steps)))

        def finish(self):
            self.peak_bytes = 7

        def __exit__(self, *_):
            pass

    seconds = {"heddle-jax": 2.0, "heddle-torch": 4.0, "hf-packed": 5.0, "hf-padded": 0.1, "products": 0.5}

    def interleave(steps, repeats, tell):
        assert repeats == 1
        for _ in range(2):
            for name, step in steps.items():
                if name != "products":
                    step(0)
        rounds = {"products": (9.0, seconds["products"])}  # of which the best counts
        return {name: Fixed(rounds.get(name, (seconds[name],))) for name in steps}

    monkeypatch.setattr(train, "interleave", interleave)
    monkeypatch.setattr(train, "Runner", Fake)
    flops = TrainingFlops(weights=10, head=0, heads=1, head_dim=1, windows=[])
    record = train.measure(task, [*OURS, *PEERS], flops)
    peak = 8 * 2 * 2048**3 / 0.5
    assert record["product_flops_per_second"] == peak
    assert record["not_run"] == {"hf-padded": "out of memory"}
    ours, _, peer = record["results"]
    learned, used = targets(task.batches[1]), (task.batches[1].segment_ids >= 0).sum()
    assert ours["tokens_per_second"] == learned / 2
    assert ours["mfu"] == pytest.approx(10 * used / 2 / peak)
    assert peer["times"] == {"jax": 2.5, "torch": 1.25}
    assert (ours["loss_difference"], peer["loss_difference"]) == (0, 0.5)
    assert (ours["cpu_seconds"], ours["peak_bytes"]) == (4.0, 7)


@pytest.mark.slow
def test_a_whole_run(folder, corpus, tmp_path):
    options = ["--corpus", corpus, "--seq", "48", "--batch", "2", "--repeats", "1", "--layers", "1"]
    result = CliRunner().invoke(app, ["bench", "train", "--model", folder, *options, "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "out" / "train.json").read_text())
    assert record["not_run"] == {}
    assert [r["name"] for r in record["results"]] == [*OURS, *PEERS]
    for r in record["results"]:
        assert r["loss_difference"] < 1e-4, r  # documents see and learn themselves alone, in all of them
        assert r["name"] in result.output
        assert r["tokens_per_second"] == pytest.approx(record["problem"]["targets"][0] / r["seconds"])
        assert r["peak_bytes"] > 2**27
        assert r["mfu"] > 0
    assert record["results"][0]["loss"] == pytest.approx(np.log(257), rel=0.2)
    assert record["results"][3]["places_per_token"] > record["results"][2]["places_per_token"]
    assert max(record["problem"]["documents"]) > 2
    assert train.tables(record)[0][0][6:8] == ["÷ jax", "÷ torch"]


def test_a_contender_that_fails_says_why(task):
    with Runner("hf-packed", task) as runner:
        runner.step()
        runner.step()
        runner.finish()
    assert runner.steps == []
    assert runner.failed is not None
    assert "nowhere" in runner.failed


def test_a_process_that_dies_is_noticed(task):
    with Runner("hf-packed", task) as runner:
        runner._process.kill()
        runner.step()
    assert runner.failed == "the system ended its process: more memory than there is"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--seq 1", "--seq must be at least 2, got 1"),
        ("--batch 0", "--batch must be at least 1, got 0"),
        ("--repeats 0", "--repeats must be at least 1, got 0"),
        ("--framework flax", "--framework must be torch, jax or both, got 'flax'"),
        ("--peers trl", "--peers must be all, none or of hf-packed, hf-padded; got trl"),
        ("--layers 3", "--layers must be between 1 and the model's 2, got 3"),
        ("--seq 3", "--corpus must hold documents of 2 to --seq 3 tokens, got none in "),
    ],
)
def test_errors_are_one_line(options, message, folder, corpus, monkeypatch, capsys):
    words = ["heddle", "bench", "train", "--model", folder, "--corpus", corpus, *options.split()]
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("heddle: " + message)
