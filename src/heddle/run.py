"""What a training run is in either wing: its folder, its data, and how it is told to stop."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from heddle.config import Config, load_config
from heddle.data.asking import answered, asking, prompt_encoder, usable
from heddle.data.corpora import Reader, open_corpus, part_of, tokenized
from heddle.data.examples import TakeExample, documents, open_examples
from heddle.data.mixing import mixed
from heddle.data.packing import Batch, Documents, Packer
from heddle.data.tasks import Problem, Stream, Task, answer_form_of, open_task, parse_settings
from heddle.data.tokenizers import BYTES, Tokenizer, load_tokenizer
from heddle.options import MeshOptions, makes_problems

#: What a run may change on the way: how long, how often and with how much memory it learns, but not what.
CHANGEABLE = {
    "output", "grpo.reward_timeout", "grpo.reward_workers", "grpo.eval_prompts",
    *(f"mesh.{option.name}" for option in fields(MeshOptions)),
    *(
        f"training.{name}"
        for name in (
            "max_steps", "accumulation", "remat", "max_nonfinite", "eval_every", "eval_first", "eval_batches",
            "checkpoint_every", "keep", "keep_best", "report_to",
        )
    ),
}  # fmt: skip

log = logging.getLogger(__name__)

EMBEDDED = "embedded"  #: names the small model that a package carries, where None means none


class Data(NamedTuple):
    """What a run learns from, and what it is evaluated on."""

    tokenizer: Tokenizer
    packer: Packer
    evaluation: list[Batch]  #: of ``batch_size // accumulation`` rows each; none if the run doesn't evaluate


def training_data(config: Config) -> Data:
    """The data of a configuration. Reads as much as it takes to know that there is something to train on.

    Raises:
        ValueError: a corpus or tokenizer that can't be read; nothing to train or to evaluate on.
    """
    data, training = config.data, config.training
    tokenizer = tokenizer_of(config)

    def corpus(name: str, part: str, seed: int | None) -> Reader:
        options: dict[str, Any] = {
            "part": part, "held_out": data.held_out, "seed": seed, "on_error": data.on_error,
        }  # fmt: skip
        if training.objective == "lm":
            return open_corpus(name, field=data.field, **options)
        sft, grpo = config.sft, config.grpo
        if makes_problems(name):
            form = _answer_form(config, name)
            ask = asking(tokenizer, form, form=grpo.prompt_form, system=grpo.system)
            take = TakeExample(tokenizer, data.seq_len, sft.loss_on, "text", sft.overlong)
            reader = answered(_task(config, name), take, ask, form, name=name, on_error=data.on_error)
            return part_of(reader, part, data.held_out)
        return open_examples(name, TakeExample(tokenizer, data.seq_len, sft.loss_on, sft.form, sft.overlong), **options)

    def tokens(names: list[str], part: str, seed: int | None, nothing: str, *, once: bool) -> Documents:
        streams = []
        for name in names:
            reader = corpus(name, part, seed)
            if next(reader(0, None), None) is None:
                raise ValueError(nothing.format(name))
            streams.append(tokenized(reader, tokenizer) if training.objective == "lm" else documents(reader))
        return streams[0] if len(streams) == 1 else mixed(streams, data.shares, once=once)

    separate, what = data.eval_corpus is not None, "text" if training.objective == "lm" else "examples"
    rest = "" if separate else f" that data.held_out={data.held_out} leaves over"
    nothing = f"data.corpus={{}} must hold {what} to train on{rest}, got none"
    stream = tokens(data.names, "all" if separate else "train", training.seed, nothing, once=False)
    packer = Packer(stream, data.seq_len, training.batch_size, seed=training.seed, window=data.window)

    evaluation = []
    if training.eval_every:
        rows = training.batch_size // training.accumulation
        if data.eval_corpus is not None:
            nothing = f"data.eval_corpus={{}} holds no {what} to evaluate on"
            stream = tokens([data.eval_corpus], "all", None, nothing, once=True)
        else:
            nothing = (
                f"data.held_out={data.held_out} of data.corpus={{}} is no {what} at all: raise it, "
                "name data.eval_corpus, or set training.eval_every=0"
            )
            stream = tokens(data.names, "held_out", None, nothing, once=True)
        packed = Packer(stream, data.seq_len, rows, window=data.window, epochs=1)
        evaluation = list(islice(packed, training.eval_batches * training.accumulation))
    return Data(tokenizer, packer, evaluation)


def tokenizer_of(config: Config) -> Tokenizer:
    """The tokenizer that ``data.tokenizer`` names, or else that of the base model, or else bytes."""
    return load_tokenizer(place(config.data.tokenizer or config.training.base_model or BYTES))


class TaskData(NamedTuple):
    """What a run learns from by its rewards, and what it is evaluated on."""

    tokenizer: Tokenizer
    problems: Stream
    encode: Callable[[Any], list[int]]  #: makes a prompt into token ids
    evaluation: list[Problem]  #: held out, of the highest level; none if the run doesn't evaluate


def task_data(config: Config) -> TaskData:
    """The task of a configuration, ``data.corpus``, and what it is evaluated on.

    Raises:
        ValueError: a task or tokenizer that can't be read; nothing to train or to evaluate on.
        ImportError: a task of a package that isn't installed.
    """
    data, options, training = config.data, config.grpo, config.training
    tokenizer = tokenizer_of(config)
    encode = prompt_encoder(
        tokenizer, _answer_form(config, data.corpus), form=options.prompt_form, system=options.system
    )
    check = usable(encode, data.seq_len, options.max_completion, answers="task" in options.rewards)
    separate = data.eval_corpus is not None

    def stream(name: str, part: str, task: Task) -> Stream:
        fields = {"answer_form": _answer_form(config, name), "threshold": options.reward_threshold}
        share = 0 if separate else data.held_out
        return Stream(task, part, share, fields, check=check, name=name, on_error=data.on_error)

    task = _task(config, data.corpus, check)
    if options.curriculum and task.levels == 1:
        raise ValueError(
            f"grpo.curriculum must be false where the task has one level of difficulty, as data.corpus={data.corpus} "
            "has: of records each needs a 'level', a task of reasoning-gym must be set harder than its easiest"
        )
    for level in range(1, task.levels + 1) if options.curriculum else [task.levels]:
        stream(data.corpus, "train", task).take(level)
    evaluation = []
    if training.eval_every:
        name = data.eval_corpus or data.corpus
        other = task if data.eval_corpus is None else _task(config, data.eval_corpus, check)
        held_out = stream(name, "train" if separate else "held_out", other)
        evaluation = [held_out.take(other.levels) for _ in range(options.eval_prompts)]
    return TaskData(tokenizer, stream(data.corpus, "train", task), encode, evaluation)


def _task(config: Config, name: str, check: Callable[[Problem], object] = lambda problem: None) -> Task:
    """The task of this name as the configuration has it."""
    data = config.data
    return open_task(
        name, parse_settings(config.grpo.task), seed=config.training.seed, on_error=data.on_error, check=check,
    )  # fmt: skip


def _answer_form(config: Config, name: str) -> str:
    """How the answers of the task of this name are written."""
    return answer_form_of(name) if config.grpo.answer_form == "auto" else config.grpo.answer_form


def place(name: str) -> str | None:
    """What :func:`heddle.data.locate.locate` calls a model that is named so in a configuration."""
    return None if name == EMBEDDED else name


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int, base_model: str) -> None:
    """Refuse a tokenizer with ids that the pretrained model has no embedding for."""
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"data.tokenizer must have at most the {vocab_size} tokens of {base_model}, got {tokenizer.vocab_size}"
        )


def check_replicas(config: Config, replicas: int) -> None:
    """Refuse another number of replicas than the ParScale checkpoint ``training.base_model`` has."""
    if replicas != config.parscale.parscale_n:
        raise ValueError(
            f"parscale.parscale_n must be that of the ParScale model {config.training.base_model}, {replicas}; "
            f"got {config.parscale.parscale_n}"
        )


# ---------------------------------------------------------------------- its folder


def resumes(output: str | Path) -> bool:
    """Whether a run in this folder goes on from a checkpoint."""
    return any(checkpoint.name.isdigit() for checkpoint in (Path(output) / "checkpoints").glob("*"))


def check_folder(config: Config) -> None:
    """Refuse to go on with a run that was configured to learn something else."""
    path = Path(config.output) / "config.yaml"
    if not path.exists() or not resumes(config.output):
        return
    before, now = load_config(path).flat(), config.flat()
    changed = [name for name in now if name not in CHANGEABLE and now[name] != before[name]]
    if changed:
        what = ", ".join(f"{name}={before[name]} (not {now[name]})" for name in changed)
        raise ValueError(f"output {config.output} holds a run with {what}: go on with that, or name another folder")
    steps, schedule = "training.max_steps", config.training.schedule
    if now[steps] != before[steps] and schedule != "constant":
        log.warning(
            "%s=%d was %d: the learning rate of training.schedule=%s follows it, and jumps where the run goes on",
            steps, now[steps], before[steps], schedule,
        )  # fmt: skip


def write_config(config: Config) -> None:
    """The resolved configuration, beside what the run will write."""
    path = Path(config.output) / "config.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    written = path.with_name(path.name + ".new")
    written.write_text(config.to_yaml())
    written.replace(path)


# ---------------------------------------------------------------------- when to stop, and what is due


class Stop:
    """Which signal has come, if any."""

    signal: signal.Signals | None = None


@contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """Notes SIGTERM and SIGINT instead of dying of them.

    After either a Ctrl-C ends at once. Another SIGTERM changes nothing: a scheduler sends it to all processes of a run,
    and launchers among them (torchrun) pass theirs on.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():  # only the main thread may handle signals
        yield stop
        return

    def note(number: int, frame: FrameType | None) -> None:
        stop.signal = stop.signal or signal.Signals(number)
        signal.signal(signal.SIGINT, before[signal.SIGINT])

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def due(step: int, every: int, ended: bool = False) -> bool:
    """Whether what happens ``every`` so many steps (0: never), and at the end, happens at this one."""
    return bool(every) and (ended or step % every == 0)
