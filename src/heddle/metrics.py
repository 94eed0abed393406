"""The metrics of a run: a line of JSON each on disk, that survive a crash, and their progress on the terminal."""

from __future__ import annotations

import importlib
import json
import math
import os
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Record = dict[str, Any]  #: "step" and what was measured at it

_HELD_OUT = {"eval_loss": "", "eval_reward": "reward "}  #: what was measured on held-out data, and how it is shown
_UNITS = {"loss": "nats a token", "reward": "mean reward"}
PROJECT = "heddle"  #: what trackers file runs under
NO_TRACKER = "none"


class MetricsFile:
    """A JSONL file of records, appended to; on resuming, what lies after the resumed step is taken away first.

    So after a crash each step stands in the file once: those after the last checkpoint are trained, and written, again.

    Args:
        path: of the file.
        step: the step that the run goes on from; 0: the file starts afresh.
    """

    def __init__(self, path: str | Path, step: int):
        path = Path(path)
        kept = [r for r in read_metrics(path) if r["step"] <= step] if step and path.exists() else []
        rewritten = path.with_name(path.name + ".new")
        rewritten.write_text("".join(map(_line, kept)))
        rewritten.replace(path)
        self._file: TextIO = path.open("a")

    def write(self, record: Record) -> None:
        self._file.write(_line(record))
        self._file.flush()

    def sync(self) -> None:
        """See to it that all that is written is on disk, before a checkpoint says that these steps are done."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def read_metrics(path: str | Path) -> list[Record]:
    """The records of a run's ``metrics.jsonl``, in order. A last line that was cut off (a crash) is left out.

    Raises:
        ValueError: a broken line elsewhere, with its number.
    """
    lines = Path(path).read_text().split("\n")
    records = []
    for number, line in enumerate(lines[:-1], 1):  # a whole line ends with a newline: what follows the last is cut off
        try:
            records.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path}:{number}: not a record of metrics ({error})") from None
    return records


def draw(runs: Sequence[str | Path], out: str | Path, metric: str | None = None) -> Path:
    """A metric of runs, given by their folders, beside each other in one picture: a page, or a PNG by its suffix.

    What was measured of it on held-out data is drawn dashed.

    Args:
        runs: their folders.
        out: the page or picture to write.
        metric: a field of their records; None: the reward, if all have one, or else the loss.

    Raises:
        ValueError: a run with no such metric yet.
    """
    from heddle import plot

    folders = [Path(run) for run in runs]
    records = [read_metrics(folder / "metrics.jsonl") for folder in folders]
    if metric is None:
        metric = "reward" if all(any("reward" in record for record in run) for run in records) else "loss"
    alike = len({folder.name for folder in folders}) < len(folders)
    curves, dashed = {}, []
    for folder, run in zip(folders, records, strict=True):
        name = str(folder) if alike else folder.name
        for field, label in ((metric, name), (f"eval_{metric}", f"{name}, held out")):
            points = [(record["step"], record[field]) for record in run if field in record]
            if points:
                curves[label] = tuple(zip(*points, strict=True))
                dashed += [] if field == metric else [label]
            elif field == metric:
                known = sorted({name for record in run for name in record} - {"step"})
                raise ValueError(
                    f"{folder} must hold a run with at least one step done that tells its {metric}, got "
                    + (f"one with {', '.join(known)}" if known else "none")
                )
    plain = metric.removeprefix("eval_")
    title = ("" if plain == metric else "held-out ") + plain.replace("_", " ")
    unit = _UNITS.get(plain, metric)
    picture = plot.lines(curves, title=title[0].upper() + title[1:], x="step", y=unit, dashed=dashed)
    return picture.png(out) if str(out).endswith(".png") else picture.html(out)


# ---------------------------------------------------------------------- trackers


def check_tracker(name: str) -> None:
    """
    Raises:
        ValueError: ``training.report_to`` names a package that isn't installed.
    """
    if name != NO_TRACKER:
        try:
            importlib.import_module(name)
        except ImportError:
            raise ValueError(f"training.report_to={name} needs the {name} package: pip install {name}") from None


@contextmanager
def tracking(
    name: str, folder: str | Path, options: dict[str, Any], resumes: bool = False
) -> Iterator[Callable[[Record], None]]:
    """What to call with each record, so that the tracker has it too.

    Args:
        name: as ``training.report_to``: tensorboard (in the run's folder), trackio, wandb; none: nothing is done.
        folder: the run's.
        options: of the run, by their dotted names.
        resumes: the run goes on from a checkpoint, and so does the tracker's.

    Raises:
        ValueError: see :func:`check_tracker`.
    """
    check_tracker(name)
    if name == NO_TRACKER:
        yield lambda record: None
    elif name == "tensorboard":
        with closing(_TensorBoard(Path(folder) / PROJECT)) as board:
            yield board.write
    else:
        tracker = importlib.import_module(name)
        values = {k: v if isinstance(v, (int, float, str)) else str(v) for k, v in options.items()}
        identity = {"id": _identity(Path(folder), resumes)} if name == "wandb" else {}  # trackio goes by names
        resume = "allow" if resumes else "never"
        tracker.init(project=PROJECT, name=Path(folder).name, config=values, resume=resume, **identity)
        try:
            yield lambda record: tracker.log(_numbers(record), step=record["step"])
        finally:
            tracker.finish()


def _identity(folder: Path, resumes: bool) -> str:
    """Of a run on a tracker, kept in its folder."""
    path = folder / "tracker_id"
    if not (resumes and path.is_file()):
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(secrets.token_hex(8))
    return path.read_text().strip()


class _TensorBoard:
    """TensorBoard's own writer of events: that of torch would need torch."""

    def __init__(self, folder: Path):
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._writer = EventFileWriter(str(folder))
        self._begun = False

    def write(self, record: Record) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # type: ignore[attr-defined]
        from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[attr-defined]

        if not self._begun:  # what stands there of this step and later ones was done after the checkpoint
            self._begun = True
            start = SessionLog(status=SessionLog.START)
            self._writer.add_event(Event(wall_time=time.time(), step=record["step"], session_log=start))
        values = [Summary.Value(tag=name, simple_value=value) for name, value in _numbers(record).items()]
        self._writer.add_event(Event(wall_time=time.time(), step=record["step"], summary=Summary(value=values)))

    def close(self) -> None:
        self._writer.close()


def _numbers(record: Record) -> Record:
    return {name: value for name, value in record.items() if name != "step" and isinstance(value, (int, float))}


def _line(record: Record) -> str:
    """JSON knows no NaN and no infinity: they become null."""
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    return json.dumps(finite) + "\n"


class ProgressBar:
    """Shows the records of a run: a bar with the loss and tokens/s; a line now and then where there is no terminal.

    A context manager; called with each record.
    """

    def __init__(self, steps: int, console: Console | None = None):
        self._console = console or Console(stderr=True)
        self._steps = steps
        self._training = self._evaluation = ""
        self._every = max(1, steps // 20)
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("compiling", total=steps)
        self._begun = False

    def __enter__(self) -> ProgressBar:
        self._bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._bar.stop()

    def __call__(self, record: Record) -> None:
        step, plain = record["step"], not self._console.is_terminal
        if not self._begun:  # a resumed run's first step isn't the first: don't estimate its speed from nothing
            self._begun = True
            self._bar.reset(self._task, completed=max(step - 1, 0))
        held_out = next((name for name in _HELD_OUT if name in record), None)
        if held_out is not None:
            self._evaluation = f"held-out {_HELD_OUT[held_out]}{record[held_out]:.4f}"
            self._step(step, self._evaluation, plain)
        else:
            reward = f"reward {record['reward']:.3f}  " if "reward" in record else ""
            self._training = f"{reward}loss {record['loss']:.4f}  {record['tokens_per_second']:,.0f} tokens/s"
            if "mfu" in record:
                self._training += f"  MFU {record['mfu']:.1%}"
            if record.get("skipped"):
                self._step(step, "loss or gradient not finite: step skipped", True)
            self._step(step, self._training, plain and (step % self._every == 0 or step == self._steps))
        self._bar.update(self._task, completed=step, description=f"{self._training}  {self._evaluation}")

    def note(self, text: str) -> None:
        """A line that stays, above the bar."""
        self._bar.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _step(self, step: int, text: str, really: bool) -> None:
        if really:
            self.note(f"step {step}/{self._steps}  {text}")
