"""The options of a run, section by section, each checked when it is made.

Separate from :mod:`heddle.config`, which puts them into one tree and reads that: whoever takes a section needs no more.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

SCHEDULES = ("constant", "cosine", "wsd")
OPTIMIZERS = ("adamw", "lion", "muon", "adafactor")
OBJECTIVES = ("lm", "sft", "grpo")
TRAINABLE = ("full", "lora", "new")
REMAT = ("none", "layer", "dots")
SFT_LOSSES = ("completion", "assistant", "all")
SFT_FORMS = ("auto", "chat", "text")
GRPO_LOSSES = ("grpo", "bnpo", "dapo", "dr_grpo")
SCALE_REWARDS = ("group", "batch", "none")
ANSWER_FORMS = ("auto", "tags", "whole")
RATIO_LEVELS = ("token", "sequence")
OVERLONG = ("truncate", "refuse")
COMPUTE_DTYPES = ("float32", "bfloat16")
CROSS_ATTN_MODES = ("joint", "sublayer")
PREFIX_SCOPES = ("own", "all")
ATTENTIONS = ("dense", "dilated", "sliding")
TRACKERS = ("none", "tensorboard", "trackio", "wandb")
LARGEST, GYM = "largest", "reasoning-gym:"  #: tasks that make their problems up; of the second any
ON_ERROR = ("fail", "skip")  #: what a broken line of a corpus does: end the run, or be reported and skipped


@dataclass
class ModelOptions:
    """The sizes of a Llama to train from scratch, where ``training.base_model`` names no other (as in config.json).

    Its vocabulary is the tokenizer's.
    """

    hidden_size: int = 256
    intermediate_size: int = 704
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    rope_theta: float = 10_000.0
    tie_word_embeddings: bool = True
    attention: str = "dense"  #: dense; dilated, LongNet's (arXiv 2307.02486); sliding, a window of the last tokens
    segment_lengths: list[int] | None = None  #: w of each pattern, of dilated attention alone
    dilation_rates: list[int] | None = None  #: r of each pattern, of dilated attention alone
    sliding_window: int | None = None  #: the tokens a query sees, itself included, of sliding attention alone

    def __post_init__(self):
        for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
            _at_least(f"model.{name}", getattr(self, name), 1)
        _at_least("model.num_key_value_heads", self.num_key_value_heads, 1)
        _positive("model.rope_theta", self.rope_theta)
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"model.hidden_size must be a multiple of model.num_attention_heads, "
                f"got {self.hidden_size} and {self.num_attention_heads}"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"model.num_attention_heads must be a multiple of model.num_key_value_heads, "
                f"got {self.num_attention_heads} and {self.num_key_value_heads}"
            )
        one_of("model.attention", self.attention, ATTENTIONS)
        needed = {"dilated": ("segment_lengths", "dilation_rates"), "sliding": ("sliding_window",)}
        for kind, names in needed.items():
            for name in names:
                given = getattr(self, name) is not None
                if given != (kind == self.attention):
                    raise ValueError(
                        f"model.{name} goes with model.attention={kind}, "
                        f"but model.attention is {self.attention}" + ("" if given else f" and model.{name} isn't given")
                    )
        if self.segment_lengths is not None and self.dilation_rates is not None:
            lengths, rates = self.segment_lengths, self.dilation_rates
            if not lengths or len(lengths) != len(rates) or min(*lengths, *rates) < 1:
                raise ValueError(
                    "model.segment_lengths and model.dilation_rates must be positive integers, equally many, "
                    f"got {lengths} and {rates}"
                )
        if self.sliding_window is not None:
            _at_least("model.sliding_window", self.sliding_window, 1)


@dataclass
class DataOptions:
    """What to train on, and how it is packed; see :func:`heddle.data.corpora.open_corpus`."""

    #: stdlib, hub:NAME[:SUBSET[:SPLIT]], or a file, folder or pattern of text, JSONL or Parquet; of examples
    #: stdlib-docstrings
    corpus: str = "stdlib"
    corpora: list[str] | None = None  #: several instead of the one, mixed
    weights: list[float] | None = None  #: of ``corpora``, whose shares of the tokens are so; None: all the same
    eval_corpus: str | None = None  #: what to evaluate on; None: the held-out part of what is trained on
    held_out: float = 0.02  #: the share of a corpus that is held out for evaluation; 0 with an ``eval_corpus``
    tokenizer: str | None = None  #: bytes, or a model's path; None: that of training.base_model, or bytes
    field: str = "text"  #: of a JSONL object, Parquet row or hub record
    on_error: str = "fail"  #: what a broken line does: fail, or skip (and report it)
    seq_len: int = 512  #: tokens in a packed row
    window: int | None = None  #: tokens packed together; None: 2**20, or 256 rows if that is more

    def __post_init__(self):
        if not 0 <= self.held_out < 1:
            raise ValueError(f"data.held_out must be at least 0 and below 1, got {self.held_out}")
        if self.corpora is not None:
            if self.corpus != DataOptions.corpus:
                raise ValueError(
                    f"data.corpus={self.corpus} and data.corpora={self.corpora} exclude each other: give one"
                )
            if not self.corpora:
                raise ValueError("data.corpora must name at least one corpus, got none")
            check_weights("data.weights", self.shares, len(self.corpora))
        elif self.weights is not None:
            raise ValueError(f"data.weights={self.weights} has no effect without data.corpora")
        one_of("data.on_error", self.on_error, ON_ERROR)
        _at_least("data.seq_len", self.seq_len, 2)
        if self.window is not None:
            _at_least("data.window", self.window, 1)

    @property
    def names(self) -> list[str]:
        """Of what is trained on, one corpus or several."""
        return [self.corpus] if self.corpora is None else self.corpora

    @property
    def shares(self) -> list[float]:
        """The weights of :attr:`names`."""
        return [1.0] * len(self.names) if self.weights is None else self.weights


@dataclass
class ParScaleOptions:
    """How many replicas of the model run in parallel, and how they look at each other (arXiv 2505.10475)."""

    parscale_n: int = 1  #: P, the number of replicas; 1: the model as it is, and nothing below has an effect
    parscale_n_tokens: int = 48  #: learned prefix keys of each replica in each layer
    parscale_attn_smooth: float = 0.01  #: ε of the replicas' weights ``(1 - ε) w + ε / P``
    enable_cross_attn: bool = False  #: replicas look at each other, at the same position
    parscale_cross_attn_layers: list[int] | None = None  #: in which layers; None: all
    enable_replica_rope: bool = False  #: turn queries and keys between replicas by the replica's index
    parscale_cross_attn_mode: str = "joint"  #: joint: in self-attention's own softmax; sublayer: before self-attention
    parscale_prefix_scope: str = "own"  #: own, or all: a replica sees all replicas' prefixes

    def __post_init__(self):
        _at_least("parscale.parscale_n", self.parscale_n, 1)
        _at_least("parscale.parscale_n_tokens", self.parscale_n_tokens, 0)
        if not 0 <= self.parscale_attn_smooth < 1:
            raise ValueError(
                f"parscale.parscale_attn_smooth must be at least 0 and below 1, got {self.parscale_attn_smooth}"
            )
        for layer in self.parscale_cross_attn_layers or ():
            _at_least("parscale.parscale_cross_attn_layers", layer, 0)
        one_of("parscale.parscale_cross_attn_mode", self.parscale_cross_attn_mode, CROSS_ATTN_MODES)
        one_of("parscale.parscale_prefix_scope", self.parscale_prefix_scope, PREFIX_SCOPES)


@dataclass
class MeshOptions:
    """How many devices along each axis of the mesh, see :mod:`heddle.jax.parallel`; all 1: one device.

    One axis may be -1: what is left. The product is the number of devices, over all processes.
    """

    data: int = 1  #: rows of the batch are dealt, parameters copied
    fsdp: int = 1  #: rows of the batch are dealt, parameters and optimiser too
    tensor: int = 1  #: heads, feed-forward units and vocabulary are dealt
    context: int = 1  #: the tokens of each row are dealt

    def __post_init__(self):
        sizes = dataclasses.asdict(self)
        for name, size in sizes.items():
            if size < 1 and size != -1:
                raise ValueError(f"mesh.{name} must be at least 1, or -1 for what is left, got {size}")
        free = [f"mesh.{name}" for name, size in sizes.items() if size == -1]
        if len(free) > 1:
            raise ValueError(f"one axis of the mesh may be -1, got {' and '.join(free)}")


@dataclass
class SFTOptions:
    """Supervised fine-tuning, ``training.objective=sft``; see :mod:`heddle.data.examples`."""

    loss_on: str = "completion"  #: what is learned: completion, the last answer; assistant, all it says; all
    form: str = "auto"  #: how prompts of text are written: chat, text; auto: a chat if there's a template
    overlong: str = "truncate"  #: an example longer than a row: truncate, or refuse (as a broken line)
    neftune_alpha: float = 0.0  #: of the noise on the embeddings (arXiv 2310.05914), 5 to 15; 0: none
    label_smoothing: float = 0.0  #: the share of a target's weight that all tokens get

    def __post_init__(self):
        one_of("sft.loss_on", self.loss_on, SFT_LOSSES)
        one_of("sft.form", self.form, SFT_FORMS)
        one_of("sft.overlong", self.overlong, OVERLONG)
        if not (math.isfinite(self.neftune_alpha) and self.neftune_alpha >= 0):
            raise ValueError(f"sft.neftune_alpha must be finite and not negative, got {self.neftune_alpha}")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"sft.label_smoothing must be at least 0 and below 1, got {self.label_smoothing}")


@dataclass
class GRPOOptions:
    """Group relative policy optimisation, ``training.objective=grpo``; formulas in :mod:`heddle.jax.grpo`.

    ``data.corpus`` names the task (see :mod:`heddle.data.tasks`), ``training.batch_size`` is in completions.
    """

    task: list[str] | None = None  #: settings of a reasoning-gym task, such as [min_terms=2, max_digits=1]
    prompt_form: str = "auto"  #: how prompts are written: chat, text; auto: a chat if there's a template
    system: str | None = None  #: the system message of a chat; None: how the task's answers are to be written
    answer_form: str = "auto"  #: how answers are written: tags, <answer>...</answer>; whole; auto: as the task has it
    rewards: list[str] = field(default_factory=lambda: ["task"])  #: task, the task's own score; module:function
    reward_weights: list[float] | None = None  #: of the rewards in their sum; None: 1 each
    reward_threshold: float = 1.0  #: the task's score from which on an answer is right, which is worth 1, and else 0
    reward_timeout: float = 10.0  #: seconds after which a reward is given up
    reward_workers: int = 2  #: processes that compute rewards
    num_generations: int = 8  #: G, completions of a prompt
    max_completion: int = 256  #: tokens of a completion, at most
    num_iterations: int = 1  #: μ, optimiser steps on the same completions
    temperature: float = 1.0  #: of sampling, and of all log-probabilities
    top_k: int | None = None  #: sample among so many likeliest; log-probabilities stay those of the full vocabulary
    top_p: float | None = None  #: sample among the likeliest of this probability together; as top_k
    stop_ids: list[int] | None = None  #: tokens that end a completion; None: the tokenizer's and the model's
    scale_rewards: str = "group"  #: what advantages are divided by: the std of the group, of the batch; none
    loss_type: str = "dapo"  #: what token losses are divided by: grpo, bnpo, dapo, dr_grpo
    ratio_level: str = "token"  #: what a ratio is of: token; sequence (GSPO)
    clip_low: float = 0.2  #: ε_low
    clip_high: float = 0.2  #: ε_high; .28 is DAPO's
    delta: float | None = None  #: the largest ratio; None: no bound
    beta: float = 0.0  #: β, of the divergence from the reference; 0: there is no reference
    unbiased_kl: bool = True  #: weigh the divergence by the ratio too, whose gradient is else that of KL(π_ref || π)
    reference_every: int = 0  #: steps after which the reference moves towards the policy; 0: never
    reference_mix: float = 1.0  #: how far: 1 makes it the policy; small, and every step, an average (arXiv 2404.09656)
    mask_truncated: bool = False  #: leave completions out of the loss that max_completion cut
    importance_cap: float | None = None  #: of the correction for the engine's numerics; None: no correction
    curriculum: bool = False  #: begin with the task's easiest level
    curriculum_threshold: float = 0.8  #: the mean reward from which on the next level is mixed in
    curriculum_prompts: int = 64  #: of the highest level, that this mean is over
    eval_prompts: int = 64  #: held-out prompts of an evaluation, each with one completion

    def __post_init__(self):
        one_of("grpo.prompt_form", self.prompt_form, SFT_FORMS)
        one_of("grpo.answer_form", self.answer_form, ANSWER_FORMS)
        one_of("grpo.scale_rewards", self.scale_rewards, SCALE_REWARDS)
        one_of("grpo.loss_type", self.loss_type, GRPO_LOSSES)
        one_of("grpo.ratio_level", self.ratio_level, RATIO_LEVELS)
        _at_least("grpo.num_generations", self.num_generations, 2)
        for name in ("reward_workers", "max_completion", "num_iterations", "curriculum_prompts", "eval_prompts"):
            _at_least(f"grpo.{name}", getattr(self, name), 1)
        _at_least("grpo.reference_every", self.reference_every, 0)
        if self.top_k is not None:
            _at_least("grpo.top_k", self.top_k, 1)
        for name in ("reward_timeout", "temperature"):
            _positive(f"grpo.{name}", getattr(self, name))
        for name in ("importance_cap", "delta"):
            if getattr(self, name) is not None:
                _positive(f"grpo.{name}", getattr(self, name))
        for name in ("clip_low", "clip_high", "beta"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ValueError(f"grpo.{name} must be finite and not negative, got {getattr(self, name)}")
        if self.clip_low > 1:
            raise ValueError(f"grpo.clip_low must be at most 1, got {self.clip_low}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"grpo.top_p must be above 0 and at most 1, got {self.top_p}")
        if not 0 < self.reference_mix <= 1:
            raise ValueError(f"grpo.reference_mix must be above 0 and at most 1, got {self.reference_mix}")
        if self.delta is not None and self.delta <= 1 + self.clip_high:
            raise ValueError(
                f"grpo.delta must be above 1 + grpo.clip_high, {1 + self.clip_high}, to have an effect of its own; "
                f"got {self.delta}"
            )
        if not self.rewards:
            raise ValueError("grpo.rewards must name at least one reward, got []")
        if self.reward_weights is not None and len(self.reward_weights) != len(self.rewards):
            raise ValueError(
                f"grpo.reward_weights must be one for each of grpo.rewards, "
                f"got {len(self.reward_weights)} for {len(self.rewards)}"
            )
        for setting in self.task or ():
            if not all(setting.partition("=")):
                raise ValueError(f"grpo.task must be a list of name=value, got {setting!r}")


@dataclass
class LoRAOptions:
    """Low-rank adapters (arXiv 2106.09685) on linear layers, ``training.trainable=lora``."""

    rank: int = 16
    alpha: float = 32.0  #: an adapter is scaled by alpha / rank
    #: linear layers by the end of their Hugging Face name, such as q_proj, mlp.up_proj; null: all but the head
    targets: list[str] | None = None

    def __post_init__(self):
        _at_least("lora.rank", self.rank, 1)
        _positive("lora.alpha", self.alpha)
        if self.targets is not None and not self.targets:
            raise ValueError("lora.targets must name at least one linear layer, or be null for all; got []")


@dataclass
class TrainingOptions:
    """How to train."""

    objective: str = "lm"  #: lm, of documents; sft, fine-tuning on examples; grpo, learning from rewards
    base_model: str | None = None  #: a Hugging Face folder, a .gguf file, a hub name, or embedded; None: from scratch
    trainable: str = "full"  #: full; lora, adapters alone; new, only what ParScale adds to the base model
    max_steps: int = 1000  #: optimiser steps of the whole run
    batch_size: int = 8  #: rows of ``data.seq_len`` tokens in an optimiser step, over all processes
    accumulation: int = 1  #: parts the batch is computed in, one after the other: less memory, the same gradients
    seed: int = 0  #: of the initial weights, the order of the data, and whatever else is random
    optimizer: str = "adamw"  #: adamw, lion, muon (adamw for what isn't a layer's matrix), adafactor
    learning_rate: float = 3e-4  #: at its highest
    schedule: str = "cosine"  #: constant, cosine, wsd (warm-up, stable, decay); all after the warm-up
    warmup_steps: int = 0  #: over which the learning rate rises linearly; a run may end before
    decay_share: float = 0.2  #: of all steps, at the end, over which wsd falls linearly
    final_share: float = 0.1  #: of ``learning_rate``, where cosine and wsd end
    beta1: float = 0.9  #: of adamw and lion, and of muon's adamw
    beta2: float = 0.95  #: of adamw and lion, and of muon's adamw
    epsilon: float = 1e-8  #: of adamw, and of muon
    weight_decay: float = 0.1  #: of weight matrices only, never of norms and biases
    clip: float | None = 1.0  #: the largest global norm of the gradient; None: not clipped
    ema_decay: float | None = None  #: of an average of the weights, evaluated and saved too; None: none is kept
    compute_dtype: str = "float32"  #: bfloat16: forward and backward in it, master weights and optimiser in float32
    remat: str = "none"  #: what the backward pass computes again: none; layer, all; dots, all but matrix products
    max_nonfinite: int = 5  #: steps in a row of non-finite loss or gradient, or rollouts without reward, that end it
    eval_every: int = 100  #: steps between evaluations; 0: never
    eval_first: bool = False  #: evaluate before the first step too, as step 0
    eval_batches: int = 4  #: batches of ``batch_size`` rows of an evaluation, always the same
    checkpoint_every: int = 100  #: steps between checkpoints, besides the one at the end; 0: none between
    keep: int = 2  #: checkpoints kept, the latest ones
    keep_best: bool = False  #: keep the one of the lowest held-out loss besides
    report_to: str = "none"  #: besides metrics.jsonl: tensorboard, trackio, wandb

    def __post_init__(self):
        for name in ("max_steps", "batch_size", "accumulation", "max_nonfinite", "eval_batches", "keep"):
            _at_least(f"training.{name}", getattr(self, name), 1)
        for name in ("seed", "warmup_steps", "eval_every", "checkpoint_every"):
            _at_least(f"training.{name}", getattr(self, name), 0)
        for name in ("learning_rate", "epsilon"):
            _positive(f"training.{name}", getattr(self, name))
        if self.clip is not None:
            _positive("training.clip", self.clip)
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise ValueError(f"training.weight_decay must be finite and not negative, got {self.weight_decay}")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"training.{name} must be at least 0 and below 1, got {getattr(self, name)}")
        for name in ("decay_share", "final_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"training.{name} must lie between 0 and 1, got {getattr(self, name)}")
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise ValueError(f"training.ema_decay must be at least 0 and below 1, got {self.ema_decay}")
        if self.keep_best and not (
            self.eval_every and self.checkpoint_every and self.checkpoint_every % self.eval_every == 0
        ):
            raise ValueError(
                "training.keep_best needs an evaluation at each checkpoint: training.checkpoint_every must be a "
                f"multiple of training.eval_every, got {self.checkpoint_every} and {self.eval_every}"
            )
        one_of("training.objective", self.objective, OBJECTIVES)
        one_of("training.trainable", self.trainable, TRAINABLE)
        one_of("training.remat", self.remat, REMAT)
        one_of("training.schedule", self.schedule, SCHEDULES)
        one_of("training.optimizer", self.optimizer, OPTIMIZERS)
        one_of("training.compute_dtype", self.compute_dtype, COMPUTE_DTYPES)
        one_of("training.report_to", self.report_to, TRACKERS)
        if self.batch_size % self.accumulation:
            raise ValueError(
                f"training.batch_size must be a multiple of training.accumulation, "
                f"got {self.batch_size} and {self.accumulation}"
            )


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def _positive(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be finite and positive, got {value}")


def one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}")


def check_weights(name: str, weights: Sequence[float | int], count: int) -> None:
    """
    Raises:
        ValueError: not a positive finite number for each of ``count`` sources, of which there is at least one.
    """
    if not count or len(weights) != count or not all(0 < weight < math.inf for weight in weights):
        raise ValueError(f"{name} must be a positive number for each of {count} corpora, got {list(weights)}")


def makes_problems(corpus: str) -> bool:
    """Whether ``data.corpus`` names a task that makes its problems up, and no file."""
    return corpus == LARGEST or corpus.startswith(GYM)
