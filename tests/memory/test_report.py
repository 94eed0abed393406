"""``heddle memory`` as a user meets it: a table, JSON, a page; the largest that fits; one line for what can't be."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
from tiny_models import hugging_face
from typer.testing import CliRunner

from heddle.cli import app, main
from heddle.memory import units
from heddle.memory.report import largest


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """A model's configuration alone: weights aren't read."""
    path = tmp_path_factory.mktemp("model")
    hugging_face("llama, bytes").config.save_pretrained(path)
    return str(path)


def heddle(*arguments: str):
    return CliRunner().invoke(app, ["memory", *arguments])


def figures(*arguments: str) -> dict:
    result = heddle(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def error_of(monkeypatch, capsys, *arguments: str) -> str:
    monkeypatch.setattr("sys.argv", ["heddle", "memory", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    return line.removeprefix("heddle: ")


def test_the_table_names_every_part_and_the_sum(folder):
    result = heddle("--model", folder, "--batch", "2", "--seq", "32")
    assert result.exit_code == 0
    found = figures("--model", folder, "--batch", "2", "--seq", "32")
    for part, size in found["parts"].items():
        assert (f"{part} " in result.stdout) == (size > 0)
        assert size == 0 or units.show(size) in result.stdout
    assert units.show(found["total"]) in result.stdout
    never = min(found["parts"]["layer at work"], found["parts"]["logits"])
    assert sum(found["parts"].values()) - never == found["total"]


def test_a_page_and_a_picture(folder, tmp_path):
    pytest.importorskip("plotly")
    found = figures("--model", folder, "--task", "generate", "--out", f"{tmp_path}/")
    assert found["files"] == [str(tmp_path / "memory.png"), str(tmp_path / "memory.html")]
    assert "KV cache" in (tmp_path / "memory.html").read_text()
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("task", ["train", "generate"])
@pytest.mark.parametrize(("what", "other"), [("batch", "seq"), ("seq", "batch")])
def test_the_largest_that_fits(folder, task, what, other):
    fixed = ["--model", folder, "--task", task, f"--{other}", "8", "--mesh", "data=2"]
    room = figures(*fixed, f"--{what}", "50")["total"]
    found = figures(*fixed, "--find", what, "--bytes", f"{room / 1024} KiB")
    assert found["total"] <= room
    step = 2 if what == "batch" else 1
    if found[what] < 96:  # the context
        assert figures(*fixed, f"--{what}", str(found[what] + step))["total"] > room
    assert found[what] >= 50


@pytest.mark.parametrize(
    ("taken", "room", "expected"),
    [
        (lambda n: 10 * n, 65, 6),
        (lambda n: 10 * n - 25 * (n > 4), 39, 6),  # 5 and 6 take less than 4, which doesn't fit
        (lambda n: 10 * n - 250 * (n > 40), 361, 61),
        (lambda n: 10, 10, 100),  # as many as there may be
    ],
)
def test_the_largest_is_found_behind_one_that_takes_more(taken, room, expected):
    @dataclasses.dataclass(frozen=True)
    class Run:
        seq: int = 0
        config = SimpleNamespace(max_position_embeddings=100)

        def least(self, what):
            return 1

    assert largest(lambda run: SimpleNamespace(total=taken(run.seq)), Run(), "seq", room).seq == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "serve"], "--task must be one of train, generate; got 'serve'"),
        (["--batch", "0"], "--batch must be at least 1, got 0"),
        (["--seq", "0"], "--seq must be at least 1, got 0"),
        (["--task", "generate", "--seq", "97"], "--seq must be at most the model's context of 96 tokens, got 97"),
        (["--mesh", "pipe=2"], "--mesh must name axes among data, fsdp, tensor, context, got 'pipe'"),
        (["--mesh", "data=2,data=2"], "--mesh must name each axis once, got data twice"),
        (["--mesh", "data=x"], "--mesh must give data a size of at least 1, as in data=2; got 'x'"),
        (["--mesh", "data=2", "--batch", "3"], "the batch must be a multiple of the 2 devices of mesh axis"),
        (["--mesh", "tensor=3"], "must be a multiple of the 3 devices of mesh axis 'tensor'"),
        (["--optimizer", "sgd"], "training.optimizer must be one of"),
        (["--dtype", "int8"], "--dtype must be one of float32, bfloat16, float16; got 'int8'"),
        (["--cache-dtype", "int4", "--task", "generate"], "--cache-dtype must be one of"),
        (["--cache-dtype", "int8"], "--cache-dtype goes with --task generate"),
        (["--task", "generate", "--remat"], "--remat goes with --task train"),
        (["--task", "generate", "--optimizer", "lion"], "--optimizer goes with --task train"),
        (["--find", "batch"], "--find and --bytes go together"),
        (["--find", "heads", "--bytes", "1GiB"], "--find must be batch or seq, got 'heads'"),
        (["--find", "batch", "--bytes", "1GB"], "--bytes must be a positive number of KiB, MiB, GiB, TiB"),
        (["--find", "batch", "--bytes", "1GiB", "--batch", "2"], "--batch must not be given where it is to be found"),
        (["--find", "batch", "--bytes", "1KiB"], "--bytes must have room for the least batch there is: batch 1 takes"),
    ],
)
def test_what_cannot_be_is_one_line(folder, arguments, message, monkeypatch, capsys):
    assert message in error_of(monkeypatch, capsys, "--model", folder, *arguments)


def test_a_model_that_is_not_there(monkeypatch, capsys):
    assert error_of(monkeypatch, capsys, "--model", "./nowhere") == "./nowhere: no such file or folder"


def test_units():
    assert [units.parse("--bytes", text) for text in ("1KiB", "1.5 GiB", "2mib")] == [1024, 3 * 2**29, 2**21]
    assert [units.show(size) for size in (0, 1023, 1024, 2**30 + 2**29)] == ["0 B", "1023 B", "1.00 KiB", "1.50 GiB"]


@pytest.mark.parametrize("framework", ["jax", "torch"])
@pytest.mark.parametrize("replicas", [1, 2])
def test_a_dry_run_plans_the_run(folder, tmp_path, framework, replicas):
    """Its own configuration's, from a base model and from none; nothing is written."""
    sizes = ["model.hidden_size=32", "model.intermediate_size=48", "model.num_hidden_layers=2"]
    for base in ([f"training.base_model={folder}"], ["training.base_model=null", "data.tokenizer=bytes", *sizes]):
        if base[0].endswith(folder) and framework == "jax" and replicas == 1:
            rest = ["--batch", "4", "--seq", "64", "--remat"]
            expected = units.show(figures("--model", folder, *rest)["total"])
        else:
            expected = " at the peak"
        options = ["training.batch_size=4", "data.seq_len=64", "training.remat=layer", f"framework={framework}"]
        options += [f"parscale.parscale_n={replicas}", f"output={tmp_path / 'run'}", "data.tokenizer=bytes", *base]
        result = CliRunner().invoke(app, ["train", "--dry-run", *options, "training.max_steps=10"])
        assert result.exit_code == 0, result.output
        assert "10 steps of 256 tokens, 2,560 in all" in result.stdout
        assert expected in result.stdout
        assert not (tmp_path / "run").exists()


def test_a_dry_run_counts_what_a_run_keeps_besides(folder):
    """An average and a reference, each of all parameters; the cache that completions are sampled with."""

    def parts(*options):
        words = [f"training.base_model={folder}", "training.batch_size=8", "data.seq_len=64", *options]
        result = CliRunner().invoke(app, ["train", "--dry-run", "data.tokenizer=bytes", *words])
        assert result.exit_code == 0, result.output
        return result.stdout

    model = figures("--model", folder)["parts"]["parameters"]
    assert "copies of parameters" not in parts()
    assert f"copies of parameters {units.show(model)} " in " ".join(parts("training.ema_decay=0.9").split())
    grpo = ["training.objective=grpo", "data.corpus=largest", "grpo.max_completion=16", "grpo.num_generations=4"]
    plain = " ".join(parts(*grpo).split())
    assert "copies of parameters" not in plain
    config = hugging_face("llama, bytes").config
    keys = 8 * 64 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    assert f"KV cache {units.show(2 * keys)} " in plain
    both = " ".join(parts(*grpo, "grpo.beta=0.1", "training.ema_decay=0.9").split())
    assert f"copies of parameters {units.show(2 * model)} " in both
    assert "takes more than training.remat=dots" in parts("training.remat=dots")


@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_a_dry_run_refuses_what_the_run_would(folder, monkeypatch, capsys, framework):
    """A tokenizer larger than the base model's vocabulary, say."""
    words = ["train", "--dry-run", f"framework={framework}", f"training.base_model={folder}", "data.tokenizer=embedded"]
    monkeypatch.setattr("sys.argv", ["heddle", *words])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    assert "data.tokenizer must have at most the 257 tokens" in capsys.readouterr().err


def test_a_dry_run_wants_the_mesh_in_numbers(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["heddle", "train", "--dry-run", "mesh.fsdp=-1"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    assert "mesh must say how many devices lie along each axis for a dry run, got -1" in capsys.readouterr().err
