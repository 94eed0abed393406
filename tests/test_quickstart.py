"""``heddle quickstart``: the whole tour, short; and what happens when a step fails."""

import json
import subprocess
import sys

import pytest
from pages import assets, figures_in
from PIL import Image
from rich.console import Console

from heddle import cli, quickstart
from heddle.quickstart import steps
from heddle.quickstart.display import STEPS, Display
from heddle.quickstart.report import Report
from heddle.quickstart.steps import _sparkline


@pytest.mark.slow
def test_the_whole_tour(tmp_path):
    """Runs a second time over an earlier quickstart's folder, of which only its own files are replaced."""
    folder = tmp_path / "tour"
    (folder / "training" / "checkpoints" / "7").mkdir(parents=True)
    (folder / quickstart.MARKER).touch()
    (folder / "mine.txt").write_text("kept")
    (folder / "report.html").write_text("old")
    command = [sys.executable, "-m", "heddle", "quickstart", "--fast", "--out", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    for letter, title in STEPS.items():
        assert f"✓ ({letter}) {title}" in done.stdout

    found = json.loads((folder / "report.json").read_text())
    assert "Paris" in found["answer"]["text"]
    assert 0 < found["answer"]["roofline_share"] < 1.5
    assert found["transformers"]["largest_logit_difference"] <= 2e-4  # float32, logits up to 36
    assert found["transformers"]["same_next_token"] == found["transformers"]["tokens"]
    assert found["packing"]["used"] > 0.95
    training = found["training"]
    assert training["last_loss"] < training["first_loss"] - 1
    assert training["held_out_loss"] < training["first_loss"] - 1
    assert training["sample"].startswith("def ")
    assert not (folder / "training" / "checkpoints" / "7").exists()
    twice = found["parscale"]
    assert (twice["replicas"], twice["steps"], len(twice["losses"])) == (2, 4, 4)
    assert all(0 < loss < 10 for _, loss in twice["losses"] + twice["held_out"])
    (before, first), (after, last) = twice["held_out"]
    assert (before, after) == (0, 4)
    assert last < first
    assert f"held-out loss {first:.3f} to {last:.3f} nats a token in 4 steps" in done.stdout
    assert 0 < twice["new_share"] < 0.1
    assert (folder / "mine.txt").read_text() == "kept"

    text = (folder / "report.html").read_text()
    assert assets(text).loaded == []
    assert len(figures_in(text)) == 6
    for title in list(STEPS.values())[:-1]:
        assert f"<h2>{title}</h2>" in text
    pngs = sorted(path.name for path in folder.glob("*.png"))
    assert pngs == ["decoding.png", "lengths.png", "loss.png", "mask.png", "parscale.png", "transformers.png"]
    for name in pngs:
        with Image.open(folder / name) as image:
            assert min(image.size) >= 700
    assert not list(folder.rglob("*.part"))
    assert (folder / "smollm2" / "model.safetensors").stat().st_size > 500_000_000


@pytest.fixture
def heddle(monkeypatch, capsys):
    """Run the command in this process: exit code, stdout, stderr."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["heddle", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        captured = capsys.readouterr()
        return stopped.value.code or 0, captured.out, captured.err

    return run


def stand_in(monkeypatch, **others):
    """Steps that only say that they ran, but for those given."""

    def answer(report, display, fast, summary):
        summary.append("answered")
        return "model", "tokenizer"

    for name in ("answer", "transformers", "pack", "train", "parscale"):
        default = answer if name == "answer" else lambda report, display, *rest: rest[-1].append("ran")
        monkeypatch.setattr(steps, name, others.get(name, default))


def failing(error):
    def step(*_):
        raise error

    return step


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("tensors don't\nfit"), "tensors don't fit"),
        (RuntimeError("out of memory"), "out of memory"),
        (FloatingPointError(), "FloatingPointError"),
        (
            ImportError("No module named 'torch'"),
            "No module named 'torch'; the quickstart needs heddle-",
        ),
    ],
)
def test_a_step_that_fails_is_one_line(error, message, heddle, monkeypatch, tmp_path):
    stand_in(monkeypatch, transformers=failing(error))
    code, out, err = heddle("quickstart", "--out", tmp_path / "new")
    assert code == 2
    assert err.startswith(f"heddle: quickstart stopped at (b) {STEPS['b']}: {message}")
    assert err.count("\n") == 1
    assert "✓ (a)" in out
    assert "✗ (b)" in out
    assert "(c)" not in out
    assert not (tmp_path / "new" / "report.html").exists()


def test_debug_shows_where(heddle, monkeypatch, tmp_path):
    stand_in(monkeypatch, pack=failing(RuntimeError("out of memory")))
    monkeypatch.setattr(sys, "argv", ["heddle", "--debug", "quickstart", "--out", str(tmp_path / "new")])
    with pytest.raises(ValueError, match=r"stopped at \(c\)") as caught:
        cli.main()
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_interrupt_leaves_without_a_traceback(heddle, monkeypatch, tmp_path):
    stand_in(monkeypatch, train=failing(KeyboardInterrupt()))
    code, out, err = heddle("quickstart", "--out", tmp_path / "new")
    assert code == 130  # what shells expect of a program that Ctrl-C ended
    assert "Traceback" not in out + err
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [quickstart.MARKER]


def test_folder_of_something_else_is_left_alone(heddle, monkeypatch, tmp_path):
    stand_in(monkeypatch, answer=failing(AssertionError("must not run")))
    (tmp_path / "thesis.tex").write_text("years of work")
    code, _, err = heddle("quickstart", "--out", tmp_path)
    assert code == 2
    assert err == f"heddle: --out must be new, empty or an earlier quickstart's, but {tmp_path} holds something else\n"
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    code, _, err = heddle("quickstart", "--out", tmp_path / "thesis.tex")
    assert code == 2
    assert "--out must be a folder, got the file" in err


def test_report_replaces_an_earlier_one(heddle, monkeypatch, tmp_path):
    stand_in(monkeypatch)
    for _ in range(2):
        code, out, err = heddle("quickstart", "--out", tmp_path / "new")
        assert (code, err) == (0, "")
        assert f"✓ (f) {STEPS['f']}, 0 s: {tmp_path / 'new' / 'report.html'}" in out
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        quickstart.MARKER,
        "report.html",
        "report.json",
    ]


def test_report_escapes_what_a_model_wrote(tmp_path):
    report = Report(tmp_path)
    report.figures(("<1", "a & b"))
    report.highlights.append(("</main>", "<script>"))
    text = report.write(75.2).read_text()
    assert "<b>&lt;1</b> a &amp; b" in text
    assert "<b>&lt;/main&gt;</b> &lt;script&gt;" in text
    assert "in 1 min 15 s" in text
    assert json.loads((tmp_path / "report.json").read_text())["seconds"] == 75.2


def test_display_on_a_terminal(capsys):
    console = Console(force_terminal=True, width=100, record=True)
    display = Display(console)
    with display.live():
        with display.step("a") as summary:
            display.show("half an answer")
            display.log("not shown on a terminal")
            summary.append("[done]")
        with pytest.raises(ValueError, match=r"stopped at \(b\) .*: no"), display.step("b"):
            raise OSError("no")
    final = capsys.readouterr().out.split("\x1b[2K")[-1]
    assert "✓" in final
    assert "✗" in final
    assert "[done]" in final
    assert "half an answer" not in final
    assert "not shown" not in final


def test_sparkline_is_lowest_where_the_values_are():
    assert _sparkline([3.0, 2.0, 1.0, 1.0]) == "█▅▁▁"
    assert _sparkline([1.0] * 200) == "▁" * 60
    line = _sparkline([float(x) for x in range(240, 0, -1)])
    assert (len(line), line[0], line[-1]) == (60, "█", "▁")
