"""What ``heddle bench train`` measures: trainers on the same packed documents, each in a process of its own.

A trainer runs as its users run it, and stops after each step until it is told to go on.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import numpy as np

from heddle.attention.mask import PADDING_SEGMENT_ID
from heddle.data.packing import NO_TARGET, Batch, Packer
from heddle.options import TrainingOptions

from .timing import give_back, peak, reset_peak

IGNORED = -100  #: what torch's cross-entropy leaves out


@dataclass(frozen=True)
class Task:
    """What all train on.

    Args:
        folder: a Hugging Face folder: weights in float32, and the tokenizer.
        documents: token ids, none longer than a row.
        seq: tokens of a row.
        rows: of a step.
        steps: how many, each on a batch of its own.
        seed: of the order of rows.
    """

    folder: str
    documents: list[np.ndarray]
    seq: int
    rows: int
    steps: int
    seed: int = 0

    @property
    def packer(self) -> Packer:
        """All documents as one window of rows."""

        def read(epoch: int, cursor: Any) -> Iterator[tuple[np.ndarray, int]]:
            return ((document, at + 1) for at, document in enumerate(self.documents) if at >= (cursor or 0))

        window = sum(map(len, self.documents))
        return Packer(read, self.seq, self.rows, seed=self.seed, window=window)

    @property
    def batches(self) -> list[Batch]:
        """One a step."""
        return list(islice(self.packer, self.steps))

    @property
    def options(self) -> TrainingOptions:
        """AdamW in float32, nothing evaluated or saved: a step more than is run, as a run's end is saved."""
        return TrainingOptions(
            max_steps=self.steps + 1, batch_size=self.rows, eval_every=0, checkpoint_every=0, schedule="constant",
            learning_rate=3e-4, seed=self.seed,
        )  # fmt: skip


class Step(NamedTuple):
    """What a trainer says of a step."""

    loss: float  #: the mean over the targets
    cpu_seconds: float  #: of all its threads


def targets(batch: Batch) -> int:
    """How many tokens of a batch are learned."""
    return int((batch.targets != NO_TARGET).sum())


def split(batch: Batch) -> list[np.ndarray]:
    """The documents in a batch's rows, one after the other."""
    documents = []
    for tokens, segments in zip(batch.tokens, batch.segment_ids, strict=True):
        documents += [tokens[segments == i] for i in range(segments.max() + 1)]
    return documents


#: ``train(task, done)`` trains and calls ``done(loss)`` after each step; it ends by an exception of that call.
Train = Callable[[Task, Callable[[float], None]], object]


def _heddle_jax(task: Task, done: Callable[[float], None]) -> None:
    from heddle.jax import Trainer, Transformer
    from heddle.jax.lm import lm

    class StepByStep(Trainer):
        prepares_ahead = False  # each step is done before the next begins

    model = Transformer.from_pretrained(task.folder, dtype="float32")
    with tempfile.TemporaryDirectory() as output:
        StepByStep(model, lm, task.packer, task.options, output).fit(lambda record: done(record["loss"]))


def _heddle_torch(task: Task, done: Callable[[float], None]) -> None:
    import heddle.torch  # noqa: F401  # its attn_implementation
    from heddle.torch.train import Trainer

    model = _torch_model(task, "heddle")
    with tempfile.TemporaryDirectory() as output:
        Trainer(model, task.packer, task.options, output).fit(lambda record: done(record["loss"]))


def _torch_model(task: Task, attention: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(task.folder, dtype=torch.float32, attn_implementation=attention)


def _hugging_face(task: Task, done: Callable[[float], None], items: list[Any], collate: Any) -> None:
    """transformers' Trainer with torch's attention and its own defaults, on one item of a data set a step."""
    import torch
    from transformers import Trainer, TrainingArguments

    class StepByStep(Trainer):
        """Takes items as they stand, and hands out each step's loss, which the logs round."""

        def _get_train_sampler(self, *args: Any) -> Any:
            return torch.utils.data.SequentialSampler(items)  # type: ignore[arg-type]

        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            self.last = super().training_step(*args, **kwargs)
            return self.last

    options, model = task.options, _torch_model(task, "sdpa")
    with tempfile.TemporaryDirectory() as output:
        arguments = TrainingArguments(
            output, max_steps=options.max_steps, per_device_train_batch_size=1, learning_rate=options.learning_rate,
            lr_scheduler_type="constant", weight_decay=options.weight_decay, adam_beta1=options.beta1,
            adam_beta2=options.beta2, adam_epsilon=options.epsilon, max_grad_norm=options.clip or 0.0,
            seed=task.seed, save_strategy="no", report_to="none", disable_tqdm=True, remove_unused_columns=False,
            dataloader_pin_memory=torch.cuda.is_available(),
        )  # fmt: skip
        trainer = StepByStep(model, arguments, collate, train_dataset=items)  # type: ignore[arg-type]
        trainer.add_callback(_after_steps(lambda: done(trainer.last.item())))
        trainer.train()


def _after_steps(call: Callable[[], None]) -> Any:
    from transformers import TrainerCallback

    class AfterSteps(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            call()

    return AfterSteps()


def _hf_packed(task: Task, done: Callable[[float], None]) -> None:
    """The same packed rows: positions that begin again tell documents, and a document's first token is no label."""
    from transformers import default_data_collator

    def row(batch: Batch, at: int) -> dict[str, np.ndarray]:
        tokens, positions = (field[at].astype(np.int64) for field in (batch.tokens, batch.positions))
        learned = (positions > 0) & (batch.segment_ids[at] != PADDING_SEGMENT_ID)
        return {"input_ids": tokens, "position_ids": positions, "labels": np.where(learned, tokens, IGNORED)}

    items = [[row(batch, at) for at in range(task.rows)] for batch in _with_one_more(task)]
    _hugging_face(task, done, items, lambda items: default_data_collator(items[0]))


def _hf_padded(task: Task, done: Callable[[float], None]) -> None:
    """The same documents, each a row, padded to the longest of the step."""
    from transformers import AutoTokenizer, DataCollatorForLanguageModeling

    tokenizer = AutoTokenizer.from_pretrained(task.folder)
    unused = set(range(len(tokenizer))).difference(*(map(int, document) for document in task.documents))
    tokenizer.pad_token_id = min(unused)  # the collator takes every token of this id for padding
    collate = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    items = [[{"input_ids": document.tolist()} for document in split(batch)] for batch in _with_one_more(task)]
    _hugging_face(task, done, items, lambda items: collate(items[0]))


def _with_one_more(task: Task) -> list[Batch]:
    """The trainer fetches a batch before it has ended the step before."""
    return [*task.batches, task.batches[0]]


OURS: dict[str, Train] = {"heddle-jax": _heddle_jax, "heddle-torch": _heddle_torch}
PEERS: dict[str, Train] = {"hf-packed": _hf_packed, "hf-padded": _hf_padded}


def places(name: str, batch: Batch) -> int:
    """The tokens, with padding, that a contender computes in a step on a batch."""
    if name != "hf-padded":
        return batch.tokens.size
    lengths = [len(document) for document in split(batch)]
    return max(lengths) * len(lengths)


# ---------------------------------------------------------------- processes


class Runner:
    """A contender's process, stopped between steps. A context manager."""

    def __init__(self, name: str, task: Task):
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(name, task, theirs), daemon=True)
        self._process.start()
        theirs.close()
        self._finished = False
        self.steps: list[Step] = []
        self.peak_bytes: int | None = None  #: the most resident memory of its process, after the first step
        self.failed: str | None = None  #: why it doesn't run any more

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *_: Any) -> None:
        if not self._finished:
            self._process.kill()
        self._process.join()

    def step(self) -> None:
        """Run one more step, and wait until it is done. Nothing, once it has failed."""
        answer = self._ask(True)
        if isinstance(answer, Step):
            self.steps.append(answer)

    def finish(self) -> None:
        """Ask for what is known at the end."""
        self.peak_bytes, self._finished = self._ask(False), self.failed is None

    def _ask(self, go_on: bool) -> Any:
        if self.failed is not None:
            return None
        try:
            self._pipe.send(go_on)
            answer = self._pipe.recv()
        except (EOFError, OSError):
            answer = "the system ended its process: more memory than there is"
        if isinstance(answer, str):
            self.failed, answer = answer, None
        return answer


class _EnoughError(Exception):
    """The last step that was asked for is done."""


class _Gate:
    """What a trainer calls after each step: it tells the other process, and waits to be told to go on."""

    def __init__(self, pipe: Connection):
        self._pipe, self._steps, self._began = pipe, 0, 0.0

    def wait(self) -> None:
        if not self._pipe.recv():
            raise _EnoughError
        self._began = _cpu_seconds()

    def __call__(self, loss: float) -> None:
        self._pipe.send(Step(loss, _cpu_seconds() - self._began))
        self._steps += 1
        give_back()  # the others need it for their steps
        if self._steps == 1 and sys.platform == "linux":  # the first compiles
            reset_peak()
        self.wait()


def _work(name: str, task: Task, pipe: Connection) -> None:
    gate = _Gate(pipe)
    try:
        gate.wait()
        (OURS | PEERS)[name](task, gate)
        pipe.send("it ended before its last step")
    except _EnoughError:
        pipe.send(peak() if sys.platform == "linux" else None)
    except (EOFError, BrokenPipeError):  # nobody listens any more
        pass
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {error}")


def _cpu_seconds() -> float:
    spent = os.times()
    return spent.user + spent.system
