"""A training run in PyTorch out of its configuration: what ``heddle train framework=torch`` does."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, MistralConfig
from transformers.utils import logging

from heddle.config import Config
from heddle.data.gguf import GGUF
from heddle.data.locate import locate
from heddle.data.tokenizers import Tokenizer
from heddle.metrics import NO_TRACKER, ProgressBar, Record, check_tracker, tracking
from heddle.run import check_folder, check_replicas, check_vocabulary, place, resumes, training_data, write_config

from . import longnet  # noqa: F401  # its models are then Auto classes' too
from .memory import read_config
from .parscale import Qwen2ParScaleForCausalLM
from .parscale_config import Qwen2ParScaleConfig
from .train import Trainer, processes

ATTENTION = "heddle"  #: whose masks know packed documents


def run(config: Config, report: Callable[[Record], object] = lambda record: None) -> Trainer:
    """Language modelling of a corpus, from the start or from where this run stands; on as many processes as there are.

    ``config.output`` gets the resolved ``config.yaml``, what :class:`Trainer` writes, and once all steps are done
    ``model/``, a Hugging Face folder with its tokenizer.

    Args:
        config: the run.
        report: called with each record of metrics, in the main process.

    Returns:
        The trainer; ``trainer.model`` is the trained model.

    Raises:
        ValueError: a corpus, tokenizer or model that can't be read; nothing to evaluate on; a folder that holds
            another run; processes that can't share a batch; a tracker that isn't installed. All before the first step.
        FloatingPointError: see :meth:`Trainer.fit`.
    """
    state = processes()
    check_tracker(config.training.report_to)
    check_folder(config)
    tokenizer, packer, evaluation = training_data(config)
    model = make_model(config, tokenizer)
    trainer = Trainer(model, packer, config.training, config.output, evaluation)
    if state.is_main_process:
        write_config(config)
    state.wait_for_everyone()
    reports_to = config.training.report_to if trainer.is_main else NO_TRACKER
    with tracking(reports_to, config.output, config.flat(), resumes(config.output)) as track:
        trainer.fit(lambda record: (report(record), track(record)))
    if trainer.stopped_by is None:
        folder = trainer.output / "model"
        trainer.save_pretrained(folder)
        if trainer.is_main:
            tokenizer.save_pretrained(folder)
    return trainer


def show(config: Config) -> int:
    """:func:`run` with its progress on the terminal; returns the exit code, 128 + n if signal n ended it early."""
    state = processes()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with ProgressBar(config.training.max_steps, Console(stderr=True, quiet=not state.is_main_process)) as bar:
        try:
            trainer = run(config, bar)
        except FloatingPointError as error:
            raise ValueError(str(error)) from error
        state.destroy_process_group()
        if trainer.stopped_by is not None:
            bar.note(f"{trainer.stopped_by.name}: saved at step {trainer.step}; the same command goes on from there")
            return 128 + trainer.stopped_by
        bar.note(f"{trainer.step} steps done: {trainer.output / 'model'}")
    return 0


def make_model(config: Config, tokenizer: Tokenizer) -> Any:
    """The pretrained model that ``training.base_model`` names, or a new Llama of the sizes in ``model``, in float32.

    With ``model.attention=dilated`` the new model's configuration says so, as :mod:`heddle.torch.huggingface` reads it;
    with ``sliding`` it is a Mistral.

    With ``parscale.parscale_n`` above 1 as many replicas of it, of model type ``qwen2_parscale``; a ParScale checkpoint
    keeps its own shape. With ``training.trainable=new`` only what ParScale adds requires gradients. What is new is
    random by ``training.seed``.

    Raises:
        ValueError: a tokenizer with ids that the pretrained model has no embedding for; a base model that ParScale
            can't start from, or that has another number of replicas.
    """
    training, replicas = config.training, config.parscale.parscale_n
    parscale = dataclasses.asdict(config.parscale)
    with torch.random.fork_rng():
        torch.manual_seed(training.seed)
        sizes = model_config(config, tokenizer)
        if training.base_model is None:
            return AutoModelForCausalLM.from_config(sizes, attn_implementation=ATTENTION)
        model = _pretrained(training.base_model, replicas, parscale)
    if training.trainable == "new":
        new = model.new_parameters()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in new)
    return model


def model_config(config: Config, tokenizer: Tokenizer) -> Any:
    """What :func:`make_model` makes, without its weights; refuses what that refuses."""
    base, replicas, parscale = (
        config.training.base_model,
        config.parscale.parscale_n,
        dataclasses.asdict(config.parscale),
    )
    if base is not None:
        there = read_config(place(base))
        check_vocabulary(tokenizer, there.vocab_size, base)
        if isinstance(there, Qwen2ParScaleConfig):
            check_replicas(config, there.parscale_n)
            return there
        return there if replicas == 1 else Qwen2ParScaleConfig.from_base(there.to_dict(), **parscale)
    sizes, window = _sizes(config, tokenizer), config.model.sliding_window
    if replicas == 1:
        return LlamaConfig(**sizes) if window is None else MistralConfig(**sizes, sliding_window=window)
    if window is not None:
        sizes |= {"use_sliding_window": True, "sliding_window": window, "max_window_layers": 0}
    return Qwen2ParScaleConfig(**sizes, attention_bias=False, **parscale)


def _sizes(config: Config, tokenizer: Tokenizer) -> dict[str, Any]:
    """What a model from scratch is, as Llama's and Qwen2's configurations call it."""
    options = dataclasses.asdict(config.model)
    lists = {name: options.pop(name) for name in ("segment_lengths", "dilation_rates")}
    del options["sliding_window"]
    if (kind := options.pop("attention")) == "dilated":
        options["attention"] = {"kind": kind, **lists}
    return options | {
        "vocab_size": tokenizer.vocab_size,
        "max_position_embeddings": config.data.seq_len,
        "rope_parameters": {"rope_type": "default", "rope_theta": options.pop("rope_theta")},
        "rms_norm_eps": 1e-5,
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
    }


def _pretrained(name: str, replicas: int, parscale: dict[str, Any]) -> Any:
    path = locate(place(name))
    settings: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": ATTENTION}
    if path.suffix == ".gguf":
        config = AutoConfig.for_model(**GGUF.open(path).config())  # more than transformers reads of the file
        read = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, config=config, **settings)
        # Made anew, since transformers takes what it read for a quantised model and refuses to save it.
        kind, config = type(read), AutoConfig.for_model(**GGUF.open(path).config())
        if replicas > 1:
            kind, config = Qwen2ParScaleForCausalLM, Qwen2ParScaleConfig.from_base(config.to_dict(), **parscale)
        return kind.from_pretrained(None, config=config, state_dict=read.state_dict(), **settings)
    if replicas == 1:
        return AutoModelForCausalLM.from_pretrained(path, **settings)
    return Qwen2ParScaleForCausalLM.from_pretrained(path, **parscale, **settings)
