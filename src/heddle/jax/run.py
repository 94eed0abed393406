"""A training run out of its configuration: what ``heddle train`` does."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from heddle.attention.rope import Rope
from heddle.config import Config
from heddle.data.locate import locate, read_json
from heddle.data.tokenizers import Tokenizer
from heddle.metrics import NO_TRACKER, ProgressBar, Record, check_tracker, tracking
from heddle.rewards import RewardPool
from heddle.run import (
    check_folder,
    check_replicas,
    check_vocabulary,
    place,
    resumes,
    task_data,
    training_data,
    write_config,
)

from .checkpoint import load
from .grpo_rollouts import Rollouts
from .grpo_trainer import GRPOTrainer
from .lm import lm
from .lora import add_adapters, merge_adapters, save_adapter
from .model import LanguageModel, Transformer
from .model_config import PARSCALE, Dilation, ModelConfig
from .parallel import create, initialize, make_mesh
from .parallel import place as place_on_mesh
from .parscale import is_new
from .sft import sft
from .train import Trainer

#: Which parameters are trained, by ``training.trainable``.
TRAINABLE: dict[str, Any] = {"full": nnx.Param, "lora": nnx.LoRAParam, "new": nnx.All(nnx.Param, is_new)}


def run(config: Config, report: Callable[[Record], object] = lambda record: None) -> Trainer:
    """Language modelling of a corpus, fine-tuning on examples or learning from rewards, from the start or from where
    this run stands.

    Of several processes, where the environment says so (:func:`heddle.jax.parallel.initialize`), the first writes.
    ``config.output`` gets the resolved ``config.yaml``, what :class:`Trainer` writes, and once all steps are done
    ``model/``, a Hugging Face folder; of adapters merged into it, and ``adapter/``, PEFT's folder, beside. With an
    average of the weights ``model-average/`` holds that, and with ``training.keep_best`` ``model-best/`` the checkpoint
    of the lowest held-out loss, or the highest reward.

    Args:
        config: the run.
        report: called with each record of metrics.

    Returns:
        The trainer; ``trainer.model`` is the trained model.

    Raises:
        ValueError: a corpus, tokenizer or model that can't be read; nothing to evaluate on; a folder that holds
            another run; a tracker that isn't installed. All before the first step.
        FloatingPointError: see :meth:`Trainer.fit`.
    """
    initialize()
    check_tracker(config.training.report_to)
    check_folder(config)
    trainer, tokenizer = prepare(config)
    if not jax.process_index():
        write_config(config)
    reports_to = NO_TRACKER if jax.process_index() else config.training.report_to
    with tracking(reports_to, config.output, config.flat(), resumes(config.output)) as track:
        trainer.fit(lambda record: (report(record), track(record)))
    if trainer.stopped_by is None:
        _save(trainer, config, tokenizer)
    return trainer


def show(config: Config) -> int:
    """:func:`run` with its progress on the terminal; returns the exit code, 128 + n if signal n ended it early."""
    with ProgressBar(config.training.max_steps) as bar:
        try:
            trainer = run(config, bar)
        except FloatingPointError as error:
            raise ValueError(str(error)) from error
        done, first = int(trainer.state.step), not jax.process_index()
        if trainer.stopped_by is not None:
            if first:
                bar.note(f"{trainer.stopped_by.name}: saved at step {done}; the same command goes on from there")
            return 128 + trainer.stopped_by
        if first:
            bar.note(f"{done} steps done: {trainer.output / 'model'}")
    return 0


def prepare(config: Config) -> tuple[Trainer, Tokenizer]:
    """The trainer of a configuration, ready to fit, and its tokenizer. Writes nothing."""
    if config.training.objective == "grpo":
        return _prepare_grpo(config)
    tokenizer, packer, evaluation = training_data(config)
    model = _to_train(config, tokenizer)
    objective = lm
    if config.training.objective == "sft":
        objective = sft(neftune_alpha=config.sft.neftune_alpha, label_smoothing=config.sft.label_smoothing)
    trainer = Trainer(
        model, objective, packer, config.training, config.output, evaluation,
        trainable=TRAINABLE[config.training.trainable], eval_objective=lm,
    )  # fmt: skip
    return trainer, tokenizer


def _prepare_grpo(config: Config) -> tuple[GRPOTrainer, Tokenizer]:
    options, training = config.grpo, config.training
    tokenizer, problems, encode, evaluation = task_data(config)
    rewards = RewardPool(
        options.rewards, options.reward_weights, workers=options.reward_workers, timeout=options.reward_timeout
    )
    rollouts = Rollouts(
        problems, encode, rewards, tokenizer, options, rows=training.batch_size, row_len=config.data.seq_len,
        seed=training.seed, max_unrewarded=training.max_nonfinite,
    )  # fmt: skip
    model = _to_train(config, tokenizer)
    trainer = GRPOTrainer(
        model, rollouts, training, config.output, options, evaluation, trainable=TRAINABLE[training.trainable]
    )
    return trainer, tokenizer


def _to_train(config: Config, tokenizer: Tokenizer) -> LanguageModel:
    model = make_model(config, tokenizer, mesh_of(config))
    if config.training.trainable == "lora":
        lora = config.lora
        add_adapters(model, lora.rank, lora.alpha, lora.targets, rngs=nnx.Rngs(config.training.seed))
        model = model if model.mesh is None else place_on_mesh(model, model.mesh)
    return model


def _save(trainer: Trainer, config: Config, tokenizer: Tokenizer) -> None:
    models = {"": trainer.model}
    if config.training.ema_decay is not None:
        models["-average"] = trainer.averaged()
    if config.training.keep_best:
        models["-best"] = trainer.best()[0]
    for suffix, model in models.items():
        if config.training.trainable == "lora":
            save_adapter(model, trainer.output / f"adapter{suffix}", config.training.base_model)
            merge_adapters(model)
        model.save_pretrained(trainer.output / f"model{suffix}", tokenizer)


def mesh_of(config: Config) -> Mesh | None:
    """The mesh of a configuration; None: one device.

    Raises:
        ValueError: sizes that don't come to the number of devices.
    """
    sizes = dataclasses.asdict(config.mesh)
    return None if set(sizes.values()) == {1} and jax.process_count() == 1 else make_mesh(**sizes)


def make_model(config: Config, tokenizer: Tokenizer, mesh: Mesh | None = None) -> LanguageModel:
    """The pretrained model that ``training.base_model`` names, or a new Llama of the sizes in ``model``; on the mesh.

    With ``model.attention=dilated`` the new model's configuration says so; with ``sliding`` it is a Mistral.

    With ``parscale.parscale_n`` above 1 as many replicas of it, of model type ``qwen2_parscale``; a ParScale checkpoint
    keeps its own shape. What is new is random by ``training.seed``. Weights are float32, whatever it computes in.
    ``data.seq_len`` becomes a new model's context length.

    Raises:
        ValueError: a tokenizer with ids that the pretrained model has no embedding for; a base model that ParScale
            can't start from, or that has another number of replicas; replicas of another model of which nothing is
            trained, as adapters are alone.
    """
    training = config.training
    parscale = dataclasses.asdict(config.parscale) if config.parscale.parscale_n > 1 else {}
    settings: dict[str, Any] = {
        "dtype": training.compute_dtype, "param_dtype": "float32",
        "remat": training.remat != "none" and training.remat,
    }  # fmt: skip
    if training.base_model is not None:
        path = locate(place(training.base_model))
        there = read_json(path / "config.json") if (path / "config.json").is_file() else {}
        if there.get("model_type") == PARSCALE:
            check_replicas(config, there.get("parscale_n", 1))
            parscale = {}  # it keeps its own shape
        elif parscale:
            _check_trained(config)
        model = load(path, rngs=nnx.Rngs(training.seed), mesh=mesh, **parscale, **settings)
        check_vocabulary(tokenizer, model.config.vocab_size, training.base_model)
        return model
    sizes = model_config(config, tokenizer)
    return create(lambda: Transformer(sizes, rngs=nnx.Rngs(training.seed), **settings), mesh)


def _check_trained(config: Config) -> None:
    """Refuse replicas that nothing would be learned of."""
    if config.training.trainable == "lora":
        raise ValueError(
            "training.trainable=lora would leave what ParScale adds untrained: training.base_model must be a ParScale "
            f"model, or parscale.parscale_n 1; got {config.training.base_model} and {config.parscale.parscale_n}"
        )


def model_config(config: Config, tokenizer: Tokenizer) -> ModelConfig:
    """What :func:`make_model` makes, without its weights; refuses what that refuses."""
    options, training, seq_len = config.model, config.training, config.data.seq_len
    parscale = dataclasses.asdict(config.parscale) if config.parscale.parscale_n > 1 else {}
    if training.base_model is not None:
        base = ModelConfig.from_pretrained(place(training.base_model))
        check_vocabulary(tokenizer, base.vocab_size, training.base_model)
        if base.model_type == PARSCALE:
            check_replicas(config, base.parscale_n)
            return base
        if parscale:
            _check_trained(config)
        return base.with_parscale(**parscale) if parscale else base
    dilation = None
    if options.segment_lengths is not None and options.dilation_rates is not None:
        dilation = Dilation(tuple(options.segment_lengths), tuple(options.dilation_rates))
    sizes = ModelConfig(
        attention=dilation,
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
    if parscale:
        sizes = sizes.with_parscale(**parscale)
    if options.sliding_window is not None:
        kind = sizes.model_type if parscale else "mistral"
        sizes = dataclasses.replace(sizes, model_type=kind, sliding_window=options.sliding_window, layer_types=None)
    return sizes
