"""A training run out of its configuration: what ``heddle train`` does."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

from flax import nnx

from heddle.attention.rope import Rope
from heddle.config import Config, ModelOptions, load_config
from heddle.data.corpora import Reader, open_corpus, tokenized
from heddle.data.packing import Packer
from heddle.data.tokenizers import BYTES, Tokenizer, load_tokenizer

from .lm import lm
from .metrics import ProgressBar, Record
from .model import Transformer
from .model_config import ModelConfig
from .train import Trainer

#: What a run may change on the way: how long, how often and with how much memory it learns, but not what.
CHANGEABLE = {"output"} | {
    f"training.{name}"
    for name in (
        "steps", "accumulation", "remat", "max_nonfinite", "eval_every", "eval_batches", "checkpoint_every", "keep"
    )
}  # fmt: skip


EMBEDDED = "embedded"  #: names the small model that a package carries, where None means none


def run(config: Config, report: Callable[[Record], None] = lambda record: None) -> Trainer:
    """Language modelling of a corpus, from the start or from where this run stands.

    ``config.output`` gets the resolved ``config.yaml``, what :class:`Trainer` writes, and once all steps are done
    ``model/``, a Hugging Face folder.

    Args:
        config: the run.
        report: called with each record of metrics.

    Returns:
        The trainer; ``trainer.model`` is the trained model.

    Raises:
        ValueError: a corpus, tokenizer or model that can't be read; nothing to evaluate on; a folder that holds
            another run. All before the first step.
        FloatingPointError: see :meth:`Trainer.fit`.
    """
    _check_folder(config)
    trainer, tokenizer = prepare(config)
    _write_config(config)
    trainer.fit(report)
    if trainer.stopped_by is None:
        trainer.model.save_pretrained(trainer.output / "model", tokenizer)
    return trainer


def show(config: Config) -> int:
    """:func:`run` with its progress on the terminal; returns the exit code, 128 + n if signal n ended it early."""
    with ProgressBar(config.training.steps) as bar:
        try:
            trainer = run(config, bar)
        except FloatingPointError as error:
            raise ValueError(str(error)) from error
        done = int(trainer.state.step)
        if trainer.stopped_by is not None:
            bar.note(f"{trainer.stopped_by.name}: saved at step {done}; the same command goes on from there")
            return 128 + trainer.stopped_by
        bar.note(f"{done} steps done: {trainer.output / 'model'}")
    return 0


def prepare(config: Config) -> tuple[Trainer, Tokenizer]:
    """The trainer of a configuration, ready to fit, and its tokenizer. Writes nothing."""
    data, training = config.data, config.training
    tokenizer = load_tokenizer(_place(data.tokenizer or config.model.path or BYTES))

    def corpus(name: str, part: str, seed: int | None) -> Reader:
        return open_corpus(
            name, part=part, held_out=data.held_out, seed=seed,
            on_error=data.on_error, field=data.field, subset=data.subset, split=data.split,
        )  # fmt: skip

    separate = data.eval_corpus is not None
    reader = corpus(data.corpus, "all" if separate else "train", training.seed)
    if next(reader(0, None), None) is None:
        rest = "" if separate else f" that data.held_out={data.held_out} leaves over"
        raise ValueError(f"data.corpus={data.corpus} must hold text to train on{rest}, got none")
    documents = tokenized(reader, tokenizer)
    packer = Packer(documents, data.seq_len, training.batch_size, seed=training.seed, window=data.window)

    evaluation = []
    if training.eval_every:
        reader = corpus(data.eval_corpus or data.corpus, "all" if separate else "held_out", None)
        if next(reader(0, None), None) is None:
            raise ValueError(
                f"data.eval_corpus={data.eval_corpus} holds no text to evaluate on" if separate else
                f"data.held_out={data.held_out} of data.corpus={data.corpus} is no text at all: raise it, "
                "name data.eval_corpus, or set training.eval_every=0"
            )  # fmt: skip
        rows = training.batch_size // training.accumulation
        packed = Packer(tokenized(reader, tokenizer), data.seq_len, rows, window=data.window, epochs=1)
        evaluation = list(islice(packed, training.eval_batches))
    model = make_model(config.model, tokenizer, data.seq_len, training.seed, training.compute_dtype, training.remat)
    return Trainer(model, lm, packer, training, config.output, evaluation), tokenizer


def make_model(
    options: ModelOptions, tokenizer: Tokenizer, seq_len: int, seed: int, dtype: str = "float32", remat: bool = False
) -> Transformer:
    """The pretrained model that ``options.path`` names, or a new Llama of these sizes for the tokenizer's vocabulary.

    Weights are float32, whatever ``dtype`` it computes in. ``seq_len`` becomes a new model's context length.

    Raises:
        ValueError: a tokenizer with ids that the pretrained model has no embedding for.
    """
    settings: dict[str, Any] = {"dtype": dtype, "param_dtype": "float32", "remat": remat}
    if options.path is not None:
        model = Transformer.from_pretrained(_place(options.path), **settings)
        if tokenizer.vocab_size > model.config.vocab_size:
            raise ValueError(
                f"data.tokenizer must have at most the {model.config.vocab_size} tokens of {options.path}, "
                f"got {tokenizer.vocab_size}"
            )
        return model
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=options.hidden_size,
        intermediate_size=options.intermediate_size,
        num_hidden_layers=options.num_hidden_layers,
        num_attention_heads=options.num_attention_heads,
        num_key_value_heads=options.num_key_value_heads,
        tie_word_embeddings=options.tie_word_embeddings,
        max_position_embeddings=seq_len,
        rope=Rope(options.hidden_size // options.num_attention_heads, options.rope_theta, max_position=seq_len),
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_id,
        pad_token_id=tokenizer.pad_id,
    )
    return Transformer(config, rngs=nnx.Rngs(seed), **settings)


def _place(name: str) -> str | None:
    return None if name == EMBEDDED else name


def _check_folder(config: Config) -> None:
    """Refuse to go on with a run that was configured to learn something else."""
    output = Path(config.output)
    path, checkpoints = output / "config.yaml", output / "checkpoints"
    if not path.exists() or not any(checkpoint.name.isdigit() for checkpoint in checkpoints.glob("*")):
        return
    before, now = load_config(path).flat(), config.flat()
    changed = [name for name in now if name not in CHANGEABLE and now[name] != before[name]]
    if changed:
        what = ", ".join(f"{name}={before[name]} (not {now[name]})" for name in changed)
        raise ValueError(f"output {config.output} holds a run with {what}: go on with that, or name another folder")


def _write_config(config: Config) -> None:
    path = Path(config.output) / "config.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    written = path.with_name(path.name + ".new")
    written.write_text(config.to_yaml())
    written.replace(path)
