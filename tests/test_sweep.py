"""Sweeps: which runs they are, here and on wandb, and what is drawn of them."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from pages import assets, figures_in

from heddle import cli, sweep
from heddle.config import load_config
from heddle.sweep import Result

SMALL = [
    "training.base_model=null", "model.hidden_size=16", "model.intermediate_size=24", "model.num_hidden_layers=1",
    "model.num_attention_heads=2", "model.num_key_value_heads=1", "data.seq_len=64", "data.window=4096",
    "data.held_out=0.3", "training.batch_size=2", "training.accumulation=1", "training.max_steps=2",
    "training.warmup_steps=0", "training.compute_dtype=float32", "training.eval_batches=1",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _no_config_file(monkeypatch):
    monkeypatch.delenv("CONFIG_FILE", raising=False)


def heddle(monkeypatch, capfd, *arguments):
    """Exit code, stdout and stderr of the command, in this process."""
    monkeypatch.setattr(sys, "argv", ["heddle", *arguments])
    with pytest.raises(SystemExit) as exit:
        cli.main()
    captured = capfd.readouterr()
    return exit.value.code, captured.out, captured.err


def test_the_four_sweeps_are_twenty_runs():
    runs = {name: sweep.load(name).runs() for name in sweep.names()}
    assert {name: len(each) for name, each in runs.items()} == {
        "lr_verification": 8, "parscale_scaling": 4, "xattn_all_layers": 4, "xattn_preset_layers": 4
    }  # fmt: skip
    rate, replicas = "training.learning_rate", "parscale.parscale_n"
    assert runs["lr_verification"] == [{rate: r, replicas: p} for r in (1e-4, 3e-4, 5e-4, 1e-3) for p in (1, 4)]
    for name in ("parscale_scaling", "xattn_all_layers", "xattn_preset_layers"):
        assert runs[name] == [{replicas: p} for p in (1, 2, 4, 8)]


def test_each_run_is_a_configuration_with_its_own_folder():
    described = sweep.load(
        "xattn_preset_layers", ["training.seed=[0,1]", "--training.max_steps=7", "output=some/where"]
    )
    configs = [sweep._config(described, values) for values in described.runs()]
    assert len({config.output for config in configs}) == 8
    assert configs[-1].output == "some/where/parscale_n=8,seed=1"
    for config in configs:
        assert (config.training.base_model, config.training.max_steps) == ("Qwen/Qwen2-1.5B", 7)
        assert config.parscale.enable_cross_attn
        assert config.parscale.parscale_cross_attn_layers == [0, 6, 12, 18]
    assert [(c.parscale.parscale_n, c.training.seed) for c in configs] == [(p, s) for p in (1, 2, 4, 8) for s in (0, 1)]
    # What varies can be set, and what is set be set otherwise.
    other = sweep.load("xattn_preset_layers", ["parscale.parscale_n=2", "parscale.parscale_cross_attn_layers=[1,3]"])
    (values,) = other.runs()
    config = sweep._config(other, values)
    assert (config.parscale.parscale_n, config.parscale.parscale_cross_attn_layers) == (2, [1, 3])


ERRORS = {
    ("list", "--jsn"): "No such option: --jsn",
    ("run", "no_such"): "NAME must be one of lr_verification, parscale_scaling, xattn_all_layers, "
    "xattn_preset_layers; got 'no_such'",
    ("run", "parscale_scaling", "training.max_step=3"): "training.max_step is not an option (from the command line); "
    "did you mean training.max_steps?",
    ("run", "parscale_scaling", "training.seed=[0,-1]"): "training.seed must be at least 0, got -1",
    ("run", "parscale_scaling", "training.seed=[0"): "training.seed=[0 isn't a YAML value: ",
    ("run", "parscale_scaling", "--backend", "wandb"): "--backend must be local to run a sweep, got 'wandb'; "
    "heddle sweep create is for wandb",
    ("create", "parscale_scaling", "--backend", "local"): "--backend must be wandb to create a sweep, got 'local'; "
    "heddle sweep run is for local",
    ("create", "parscale_scaling"): "creating a wandb sweep needs the wandb package: pip install wandb",
}


@pytest.mark.parametrize("arguments", ERRORS, ids=" ".join)
def test_errors_are_one_line(arguments, monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "wandb", None)
    code, out, error = heddle(monkeypatch, capfd, "sweep", *arguments)
    assert (code, out) == (2, "")
    assert error.startswith(f"heddle: {ERRORS[arguments]}")
    assert error.count("\n") == 1


def test_list(monkeypatch, capfd):
    code, out, _ = heddle(monkeypatch, capfd, "sweep", "list")
    assert code == 0
    assert out.splitlines()[-1] == "20 runs in all"
    code, out, _ = heddle(monkeypatch, capfd, "sweep", "list", "--json")
    assert [each["runs"] for each in json.loads(out)] == [8, 4, 4, 4]


# ---------------------------------------------------------------------- wandb


def test_wandbs_runs_are_ours(monkeypatch, capfd):
    """What an agent would call, its macros filled in as its manual says, is a run with its own folder."""
    code, out, _ = heddle(
        monkeypatch, capfd, "sweep", "create", "lr_verification", "--dry-run", "training.max_steps=7"
    )  # fmt: skip
    described = yaml.safe_load(out)
    assert (code, described["method"]) == (0, "grid")
    assert described["metric"] == {"name": "eval_loss", "goal": "minimize"}
    assert {k: len(v["values"]) for k, v in described["parameters"].items()} == {
        "training.learning_rate": 4, "parscale.parscale_n": 2
    }  # fmt: skip
    env, *command, args = described["command"]
    assert (env, args, command[:3]) == ("${env}", "${args}", ["heddle", "train", "--config"])
    monkeypatch.setenv("WANDB_RUN_ID", "abc")
    given = [f"--{name}={parameter['values'][-1]}" for name, parameter in described["parameters"].items()]
    config = load_config(command[3], [*command[4:], *given])
    assert (config.training.learning_rate, config.parscale.parscale_n, config.training.max_steps) == (1e-3, 4, 7)
    assert (config.training.report_to, config.output) == ("wandb", "runs/lr_verification/abc")


def test_creating_on_wandb(monkeypatch, capfd):
    created = []
    fake = SimpleNamespace(sweep=lambda described, project: created.append((described, project)) or "x1y2")
    monkeypatch.setitem(sys.modules, "wandb", fake)
    code, out, _ = heddle(monkeypatch, capfd, "sweep", "create", "parscale_scaling", "--project", "mine")
    assert (code, out) == (0, "wandb agent x1y2\n")
    assert created == [(sweep.as_wandb(sweep.load("parscale_scaling")), "mine")]

    def refuse(described, project):
        raise RuntimeError("no API key\nconfigured")

    fake.sweep = refuse
    code, _, error = heddle(monkeypatch, capfd, "sweep", "create", "parscale_scaling")
    assert code == 2
    assert error == "heddle: wandb did not create the sweep, log in with `wandb login`: no API key configured\n"


# ---------------------------------------------------------------------- here


def test_means_and_standard_errors_over_seeds():
    losses = {(1, 0): 3.0, (1, 1): 3.5, (2, 0): 2.0, (2, 1): 2.0}
    results = [Result({"parscale.parscale_n": p, "training.seed": s}, loss, Path()) for (p, s), loss in losses.items()]
    assert sweep.summary(results) == [
        {"values": {"parscale.parscale_n": 1}, "seeds": 2, "loss": 3.25, "standard_error": pytest.approx(0.25)},
        {"values": {"parscale.parscale_n": 2}, "seeds": 2, "loss": 2.0, "standard_error": 0.0},
    ]
    (alone,) = sweep.summary([Result({"parscale.parscale_n": 1}, 3.0, Path())])
    assert (alone["seeds"], alone["standard_error"]) == (1, None)


def test_the_picture_has_a_curve_for_each_of_what_varies_besides_and_bars(tmp_path):
    described = sweep.load("lr_verification", [f"output={tmp_path}", "training.seed=[0,1,2]"])
    results = [
        Result(v, 3 - v["parscale.parscale_n"] / 10 + v["training.seed"] / 100, tmp_path / "run")
        for v in described.runs()
    ]
    text = sweep.report(described, results)
    assert text.count("± 0.0058") == 8
    page = (tmp_path / "sweep.html").read_text()
    assert not assets(page).loaded
    ((curves, layout, _),) = figures_in(page)
    assert [curve["name"] for curve in curves] == [f"learning_rate={r}" for r in (0.0001, 0.0003, 0.0005, 0.001)]
    assert curves[0]["x"] == [1, 4]
    assert curves[0]["y"] == pytest.approx([2.91, 2.61])
    assert curves[0]["error_y"]["array"] == pytest.approx([0.01 / 3**0.5] * 2)
    assert layout["xaxis"]["title"]["text"] == "replicas P"
    assert (tmp_path / "sweep.png").stat().st_size > 5000


def test_final_loss_is_the_last_evaluations_or_the_last_tenth_of_steps(tmp_path):
    config = load_config(None, [f"output={tmp_path}"])
    records = [{"step": step, "loss": float(step)} for step in range(1, 31)]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert sweep.final_loss(config) == 29.0
    with path.open("a") as file:
        file.write('{"step": 15, "eval_loss": 7.0}\n{"step": 30, "eval_loss": 6.0}\n')
    assert sweep.final_loss(config) == 6.0


def test_a_sweep_here_runs_draws_and_goes_on(tmp_path, monkeypatch, capfd):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for i in range(20):
        (corpus / f"{i}.txt").write_text(f"the cat sat on mat number {i}, and the dog on the other. " * 5)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    folder = tmp_path / "sweep"
    arguments = ["sweep", "run", "parscale_scaling", "--backend", "local", *SMALL, f"data.corpus={corpus}"]
    arguments += [f"output={folder}", "parscale.parscale_n=[1,2]"]
    code, out, error = heddle(monkeypatch, capfd, *arguments)
    assert code == 0, error
    assert out.splitlines()[-1] == f"wrote {folder / 'sweep.html'}"
    assert "2/2 parscale_n=2\n" in error
    described = json.loads((folder / "sweep.json").read_text())
    for run in described["runs"]:
        assert (Path(run["folder"]) / "model" / "model.safetensors").exists()
        assert run["loss"] == sweep.final_loss(load_config(Path(run["folder"]) / "config.yaml"))
    ((curves, _, _),) = figures_in((folder / "sweep.html").read_text())
    assert (curves[0]["x"], curves[0]["y"]) == ([1, 2], [run["loss"] for run in described["runs"]])

    code, out, error = heddle(monkeypatch, capfd, *arguments, "--json")
    assert (code, json.loads(out)) == (0, described)
    assert error == "1/2 parscale_n=1: done before\n2/2 parscale_n=2: done before\n"
    code, _, error = heddle(monkeypatch, capfd, *arguments, "training.learning_rate=0.1")
    assert code == 2
    assert "parscale_n=1 failed with exit code 2; the same command goes on with it" in error
    assert "holds a run with training.learning_rate=0.0003 (not 0.1)" in error
