"""The metrics file survives a crash; the progress says what matters, with a terminal and without."""

import io
import sys
from types import SimpleNamespace

import pytest
from rich.console import Console

from heddle import cli
from heddle.metrics import MetricsFile, ProgressBar, check_tracker, draw, read_metrics, tracking


def write(path, steps, resumed_at=0):
    file = MetricsFile(path, resumed_at)
    for step in steps:
        file.write({"step": step, "loss": step / 3})
    file.sync()
    file.close()


def steps(path):
    return [record["step"] for record in read_metrics(path)]


def test_what_lies_after_the_resumed_step_is_written_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 8))
    with path.open("a") as file:
        file.write('{"step": 8, "lo')  # cut off
    assert steps(path) == [1, 2, 3, 4, 5, 6, 7]
    write(path, range(5, 10), resumed_at=4)
    assert steps(path) == list(range(1, 10))
    write(path, range(1, 3))
    assert steps(path) == [1, 2]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_numbers_read_back_exactly_and_what_is_not_finite_as_null(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, 0)
    record = {"step": 1, "loss": 0.1 + 0.2, "tokens": 7}
    file.write(record)
    file.write({"step": 2, "loss": float("nan"), "gradient_norm": float("inf")})
    file.close()
    assert read_metrics(path) == [record, {"step": 2, "loss": None, "gradient_norm": None}]


def test_a_broken_line_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": \n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: not a record of metrics"):
        read_metrics(path)


def shown(terminal):
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=120, color_system=None)
    with ProgressBar(40, console=console) as bar:
        for step in range(1, 41):
            bar(
                {"step": step, "loss": 5 - step / 10, "tokens_per_second": 1234.5}
                | ({"skipped": True} if step == 7 else {})
            )
            if step == 20:
                bar({"step": step, "eval_loss": 4.25})
        bar.note("[saved]")
    return out.getvalue()


def test_without_a_terminal_there_is_a_line_now_and_then():
    lines = shown(False).splitlines()
    assert len(lines) == 20 + 3
    assert lines[:4] == [
        "step 2/40  loss 4.8000  1,234 tokens/s",
        "step 4/40  loss 4.6000  1,234 tokens/s",
        "step 6/40  loss 4.4000  1,234 tokens/s",
        "step 7/40  loss or gradient not finite: step skipped",
    ]
    assert "step 20/40  held-out 4.2500" in lines
    assert lines[-2:] == ["step 40/40  loss 1.0000  1,234 tokens/s", "[saved]"]


def test_on_a_terminal_there_is_a_bar():
    text = shown(True)
    assert "40/40" in text
    assert "loss 1.0000  1,234 tokens/s  held-out 4.2500" in text
    assert "step 2/40" not in text
    assert "step 7/40  loss or gradient not finite: step skipped" in text


def test_runs_are_drawn_beside_each_other(tmp_path, monkeypatch, capsys):
    for run in ("a/one", "a/two", "b/one"):
        (tmp_path / run).mkdir(parents=True)
        write(tmp_path / run / "metrics.jsonl", range(1, 9))
    with (tmp_path / "a/two" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "eval_loss": 2.5}\n')
    page = draw([tmp_path / "a/one", tmp_path / "a/two"], tmp_path / "loss.html").read_text()
    assert all(f'"name":"{name}"' in page for name in ("one", "two", "two, held out"))
    assert '"one, held out"' not in page
    same_name = draw([tmp_path / "a/one", tmp_path / "b/one"], tmp_path / "loss.html").read_text()
    assert f'"name":"{tmp_path / "b/one"}"' in same_name

    monkeypatch.setattr(sys, "argv", ["heddle", "plot", str(tmp_path / "a/one"), "--out", str(tmp_path / "loss.png")])
    with pytest.raises(SystemExit) as exit:
        cli.main()
    assert exit.value.code == 0
    assert capsys.readouterr().out == f"wrote {tmp_path / 'loss.png'}\n"
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_rewards_are_drawn_where_there_are_some(tmp_path):
    (tmp_path / "run").mkdir()
    lines = ['{"step": 0, "eval_reward": 0.25}', '{"step": 1, "loss": 3.5, "reward": 0.5, "entropy": 2}']
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))

    def drawn(**options):
        return draw([tmp_path / "run"], tmp_path / "runs.html", **options).read_text()

    assert all(text in drawn() for text in ("mean reward", '"y":[0.25]', '"y":[0.5]'))
    assert "nats a token" in drawn(metric="loss")
    assert all(text in drawn(metric="eval_reward") for text in ("Held-out reward", "mean reward"))
    assert '"y":[2]' in drawn(metric="entropy") or '"y":[2.0]' in drawn(metric="entropy")
    with pytest.raises(ValueError, match="that tells its kl, got one with entropy, eval_reward, loss, reward"):
        drawn(metric="kl")


def test_a_run_without_a_step_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="must hold a run with at least one step done that tells its loss, got none"):
        draw([tmp_path], tmp_path / "loss.html")
    with pytest.raises(FileNotFoundError):
        draw([tmp_path / "nowhere"], tmp_path / "loss.html")


RECORDS = [
    {"step": 1, "loss": 2.5, "tokens": 7},
    {"step": 2, "loss": 1.25, "skipped": True},
    {"step": 2, "eval_loss": 3},
]


def track(name, folder, resumes=False):
    with tracking(name, folder, {"training.seed": 3, "data.corpus": None}, resumes) as write:
        for record in RECORDS:
            write(record)


def test_tensorboard_has_what_the_metrics_have(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    track("tensorboard", tmp_path)
    (file,) = (tmp_path / "heddle").glob("events*")
    events = EventAccumulator(str(file)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 2.5), (2, 1.25)]
    assert [(e.step, e.value) for e in events.Scalars("eval_loss")] == [(2, 3.0)]
    track("tensorboard", tmp_path, resumes=True)
    events = EventAccumulator(str(tmp_path / "heddle")).Reload()  # both files: steps done again stand there once
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 2.5), (2, 1.25)]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_trackers_on_the_web_are_told_the_run_and_its_records(tmp_path, monkeypatch, name):
    told = []
    fake = SimpleNamespace(
        init=lambda **options: told.append(options),
        log=lambda values, step: told.append((step, values)),
        finish=lambda: told.append("finished"),
    )
    monkeypatch.setitem(sys.modules, name, fake)
    track(name, tmp_path / "run7")
    identity = {"id": (tmp_path / "run7" / "tracker_id").read_text()} if name == "wandb" else {}
    config = {"training.seed": 3, "data.corpus": "None"}
    assert told[0] == {"project": "heddle", "name": "run7", "config": config, "resume": "never", **identity}
    assert told[1:] == [
        (1, {"loss": 2.5, "tokens": 7}), (2, {"loss": 1.25, "skipped": True}), (2, {"eval_loss": 3}), "finished",
    ]  # fmt: skip
    track(name, tmp_path / "run7", resumes=True)
    assert told[5] == told[0] | {"resume": "allow"}
    track(name, tmp_path / "run7")  # from the start again, which is another run
    assert name == "trackio" or told[10]["id"] != told[0]["id"]


def test_a_tracker_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"training\.report_to=wandb needs the wandb package: pip install wandb"):
        check_tracker("wandb")
    check_tracker("none")
