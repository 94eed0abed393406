"""The configuration of a run: one typed tree of options, from YAML files and dotted overrides."""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException, ValidationError
from yaml import YAMLError

from .options import (
    DataOptions,
    GRPOOptions,
    LoRAOptions,
    MeshOptions,
    ModelOptions,
    ParScaleOptions,
    SFTOptions,
    TrainingOptions,
    makes_problems,
    one_of,
)

FRAMEWORKS = ("jax", "torch")

#: Options and values that one wing alone has.
ONE_WING = {
    "training.objective=sft": "jax",
    "training.objective=grpo": "jax",
    "training.trainable=lora": "jax",
    "training.optimizer=lion": "jax",
    "training.optimizer=muon": "jax",
    "training.optimizer=adafactor": "jax",
    "training.remat=dots": "jax",
    "training.ema_decay": "jax",
    "training.keep_best": "jax",
} | {f"mesh.{option.name}": "jax" for option in dataclasses.fields(MeshOptions)}


#: Sections that one choice of an option of ``training`` alone has.
ONE_CHOICE = {"sft": ("objective", "sft"), "grpo": ("objective", "grpo"), "lora": ("trainable", "lora")}
#: How a task's problems are asked, which fine-tuning on a task's right answers needs too.
ASKING = {"grpo.task", "grpo.prompt_form", "grpo.system", "grpo.answer_form"}
#: Options that others make an effect of: which, and whether they do.
ONLY_WITH: dict[str, tuple[str, Callable[[Config], bool]]] = {
    "grpo.reference_every": ("grpo.beta above 0", lambda c: c.grpo.beta > 0),
    "grpo.reference_mix": ("grpo.reference_every above 0", lambda c: c.grpo.reference_every > 0),
    "grpo.unbiased_kl": ("grpo.beta above 0", lambda c: c.grpo.beta > 0),
    "grpo.curriculum_threshold": ("grpo.curriculum=true", lambda c: c.grpo.curriculum),
    "grpo.curriculum_prompts": ("grpo.curriculum=true", lambda c: c.grpo.curriculum),
    "training.decay_share": ("training.schedule=wsd", lambda c: c.training.schedule == "wsd"),
    "data.field": ("training.objective=lm", lambda c: c.training.objective == "lm"),
}


@dataclass
class Config:
    """A run. Everything that decides its loss curve is in here."""

    output: str = "runs/train"  #: the run's folder: config.yaml, metrics.jsonl, checkpoints/, model/
    framework: str = "jax"  #: jax, torch
    model: ModelOptions = field(default_factory=ModelOptions)
    parscale: ParScaleOptions = field(default_factory=ParScaleOptions)
    data: DataOptions = field(default_factory=DataOptions)
    sft: SFTOptions = field(default_factory=SFTOptions)
    grpo: GRPOOptions = field(default_factory=GRPOOptions)
    lora: LoRAOptions = field(default_factory=LoRAOptions)
    training: TrainingOptions = field(default_factory=TrainingOptions)
    mesh: MeshOptions = field(default_factory=MeshOptions)

    def __post_init__(self):
        if not self.output:
            raise ValueError("output must name a folder, got ''")
        one_of("framework", self.framework, FRAMEWORKS)
        for name, value in self._changed().items():
            section = name.partition(".")[0]
            only = ONE_WING.get(name) or ONE_WING.get(f"{name}={value}")
            if only is not None and only != self.framework:
                raise ValueError(f"{name}={value} is for framework={only}, but framework is {self.framework}")
            needed, effective = ONLY_WITH.get(name, ("", None))
            if effective is not None and not effective(self):
                raise ValueError(f"{name}={value} has no effect without {needed}")
            if section == "model" and self.training.base_model is not None:
                raise ValueError(
                    f"{name} is for a model from scratch, but training.base_model names "
                    f"{self.training.base_model!r}: give one"
                )
            asked = self.training.objective == "sft" and any(map(makes_problems, self.data.names))
            if asked and all(map(makes_problems, self.data.names)) and name == "sft.form":
                raise ValueError(f"sft.form={value} is for files of examples, a task has grpo.prompt_form")
            if section in ONE_CHOICE and not (asked and name in ASKING):
                needed, choice = ONE_CHOICE[section]
                chosen = getattr(self.training, needed)
                if chosen != choice:
                    raise ValueError(f"{name} is for training.{needed}={choice}, but it is {chosen}")
        trainable, base_model = self.training.trainable, self.training.base_model
        if trainable == "new" and (base_model is None or self.parscale.parscale_n == 1):
            raise ValueError(
                "training.trainable=new trains what ParScale adds to a base model: "
                "set training.base_model, and parscale.parscale_n above 1"
            )
        if trainable == "lora" and base_model is None:
            raise ValueError("training.trainable=lora trains adapters of a base model: set training.base_model")
        if self.training.objective == "grpo":
            self._check_grpo()
        if self.training.eval_every and not self.data.held_out and self.data.eval_corpus is None:
            raise ValueError(
                "training.eval_every needs something to evaluate on: "
                "set data.held_out above 0, name data.eval_corpus, or set training.eval_every=0"
            )

    def _check_grpo(self) -> None:
        if self.data.corpora is not None:
            raise ValueError(
                f"data.corpora={self.data.corpora} is for training.objective=lm and sft; grpo has one task, data.corpus"
            )
        generations, batch_size = self.grpo.num_generations, self.training.batch_size
        if batch_size % generations:
            raise ValueError(
                "training.batch_size must be a multiple of grpo.num_generations, as it is in completions; "
                f"got {batch_size} and {generations}"
            )
        if self.grpo.max_completion >= self.data.seq_len:
            raise ValueError(
                "data.seq_len must be above grpo.max_completion, to have room for a prompt; "
                f"got {self.data.seq_len} and {self.grpo.max_completion}"
            )

    def to_yaml(self) -> str:
        """As YAML that :func:`load_config` reads back to an equal tree."""
        return OmegaConf.to_yaml(OmegaConf.structured(self))

    def flat(self) -> dict[str, Any]:
        """Every option by its dotted name."""
        return dict(_leaves(dataclasses.asdict(self)))

    def _changed(self) -> dict[str, Any]:
        """The options of the sections that aren't at their defaults."""
        changed = {}
        for prefix, option in _options():
            if prefix:
                value = getattr(getattr(self, prefix[:-1]), option.name)
                default = option.default if option.default_factory is dataclasses.MISSING else option.default_factory()
                if value != default:
                    changed[prefix + option.name] = value
        return changed


def load_config(path: str | Path | None = None, overrides: Iterable[str] = ()) -> Config:
    """The configuration of a YAML file, over the defaults, under dotted overrides.

    Args:
        path: a YAML file; None: the one the environment variable ``CONFIG_FILE`` names, if it does.
        overrides: ``"training.max_steps=10"`` or ``"--training.max_steps=10"``; values are YAML.

    Raises:
        ValueError: an unknown key (with the nearest valid one), a value of the wrong type, options that can't go
            together, a file that isn't YAML. One line that says which option, where it came from, and what it must be.
        OSError: the file can't be read.
    """
    tree = OmegaConf.structured(Config)
    path = path or os.environ.get("CONFIG_FILE") or None
    if path is not None:
        for key, value in _leaves(_read_yaml(path)):
            _set(tree, key, value, str(path))
    for override in overrides:
        key, equals, text = override.removeprefix("--").partition("=")
        if not (key and equals):
            raise ValueError(
                f"an override must have the form key=value, such as training.max_steps=10; got {override!r}"
            )
        try:
            value = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))["value"]  # type: ignore[index]
        except (YAMLError, OmegaConfBaseException) as error:
            raise ValueError(f"{key}={text} isn't a YAML value: {_one_line(error)}") from None
        for name, leaf in _leaves({key: value}):
            _set(tree, name, leaf, "the command line")
    try:
        return OmegaConf.to_object(tree)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise ValueError(f"{error.full_key}: {str(error).splitlines()[0]}") from None


def _read_yaml(path: str | Path) -> dict[str, Any]:
    try:
        loaded = OmegaConf.load(path)
    except (YAMLError, UnicodeDecodeError, OmegaConfBaseException) as error:
        raise ValueError(f"{path} isn't YAML: {_one_line(error)}") from None
    if not isinstance(loaded, DictConfig):
        raise ValueError(f"{path} must hold a mapping of options, got a list")
    return OmegaConf.to_container(loaded)  # type: ignore[return-value]


def _leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values of a nested mapping with their dotted names."""
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _set(tree: Any, key: str, value: Any, origin: str) -> None:
    options = {f"{prefix}{option.name}": str(option.type) for prefix, option in _options()}
    if key not in options:
        sections = {name.rpartition(".")[0] for name in options} - {""}
        if key in sections:
            if value in (None, {}):  # a section with nothing in it
                return
            raise ValueError(f"{key} must be a mapping of options, got {value!r} (from {origin})")
        raise ValueError(f"{key} is not an option (from {origin}); {_nearest(key, options)}")
    try:
        OmegaConf.update(tree, key, value)
    except ValidationError:
        raise ValueError(f"{key} must be {_TYPES[options[key]]}, got {value!r} (from {origin})") from None


_TYPES = {
    "int": "an integer",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "int | None": "an integer or null",
    "float | None": "a number or null",
    "str | None": "text or null",
    "list[int] | None": "a list of integers or null",
    "list[str]": "a list of texts",
    "list[str] | None": "a list of texts or null",
    "list[float] | None": "a list of numbers or null",
}


def _options() -> Iterator[tuple[str, dataclasses.Field]]:
    for option in dataclasses.fields(Config):
        if dataclasses.is_dataclass(option.default_factory):
            for inner in dataclasses.fields(option.default_factory):
                yield f"{option.name}.", inner
        else:
            yield "", option


def _nearest(key: str, options: Iterable[str]) -> str:
    """The valid option that a wrong one was most likely meant to be, or all that it could have been."""
    section, _, name = key.rpartition(".")
    by_section = {option: option.rpartition(".") for option in options}
    names = {parts[2]: option for option, parts in by_section.items()}  # no two options have one name
    here = [option for option, parts in by_section.items() if parts[0] == section]
    if name in names:
        close = [names[name]]
    elif section:
        close = [f"{section}.{match}" for match in _close(name, [by_section[option][2] for option in here])]
        close = close or ([] if here else _close(key, list(by_section)))
    else:
        close = [names[match] for match in _close(name, list(names))]
    return f"did you mean {close[0]}?" if close else f"the options are {', '.join(here or by_section)}"


def _close(name: str, names: list[str]) -> list[str]:
    return difflib.get_close_matches(name, names, 1)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
