"""The configuration: where values come from, and what is refused with which words."""

import dataclasses
import re

import pytest

from heddle.config import Config, DataOptions, ModelOptions, TrainingOptions, load_config


@pytest.fixture(autouse=True)
def _no_config_file(monkeypatch):
    monkeypatch.delenv("CONFIG_FILE", raising=False)


@pytest.fixture
def yaml(tmp_path):
    def write(text):
        path = tmp_path / "some.yaml"
        path.write_text(text)
        return path

    return write


def test_defaults_alone_are_a_configuration():
    assert load_config() == Config()


def test_overrides_win_over_the_file_and_the_file_over_the_defaults(yaml):
    path = yaml("training:\n  steps: 20\n  learning_rate: 1e-3\ndata: {corpus: some/folder}\nmodel:\n")
    config = load_config(path, ["training.steps=30", "--training.clip=null", "output=runs/a=b"])
    assert config == Config(
        output="runs/a=b",
        data=DataOptions(corpus="some/folder"),
        training=TrainingOptions(steps=30, learning_rate=1e-3, clip=None),
    )


def test_config_file_names_the_file_unless_another_is_given(yaml, monkeypatch, tmp_path):
    monkeypatch.setenv("CONFIG_FILE", str(yaml("training: {steps: 20}")))
    other = tmp_path / "other.yaml"
    other.write_text("training: {batch_size: 4}")
    assert load_config().training == TrainingOptions(steps=20)
    assert load_config(other).training == TrainingOptions(batch_size=4)


def test_a_configuration_reads_back_what_it_writes(yaml):
    config = load_config(
        None, ["training.learning_rate=1e-4", "training.clip=null", "model.path='a: b'", "data.window=9"]
    )
    assert load_config(yaml(config.to_yaml())) == config
    assert config.flat()["training.learning_rate"] == 1e-4
    assert list(config.flat())[:2] == ["output", "model.path"]


def test_interpolation_and_sections_on_the_command_line():
    training = load_config(
        None, ["training={steps: 40, batch_size: 2}", "training.warmup_steps=${training.steps}"]
    ).training
    assert (training.steps, training.batch_size, training.warmup_steps) == (40, 2, 40)


ERRORS = {
    # Unknown keys, with what was meant.
    "training.learnin_rate=1": "training.learnin_rate is not an option (from the command line); "
    "did you mean training.learning_rate?",
    "training.seq_len=64": "training.seq_len is not an option (from the command line); did you mean data.seq_len?",
    "steps=5": "steps is not an option (from the command line); did you mean training.steps?",
    "trainig.stepz=5": "trainig.stepz is not an option (from the command line); did you mean training.steps?",
    "training.steps.x=1": "training.steps.x is not an option (from the command line); did you mean training.steps?",
    "data.q=1": "data.q is not an option (from the command line); the options are data.corpus, data.eval_corpus, "
    "data.held_out, data.tokenizer, data.field, data.subset, data.split, data.on_error, data.seq_len, data.window",
    # Wrong types.
    "training.steps=abc": "training.steps must be an integer, got 'abc' (from the command line)",
    "training.steps=1.5": "training.steps must be an integer, got 1.5 (from the command line)",
    "training.steps=true": "training.steps must be an integer, got True (from the command line)",
    "training.steps=null": "training.steps must be an integer, got None (from the command line)",
    "training.clip=[1]": "training.clip must be a number or null, got [1] (from the command line)",
    "training=3": "training must be a mapping of options, got 3 (from the command line)",
    "model.tie_word_embeddings=perhaps": "model.tie_word_embeddings must be true or false, got 'perhaps' "
    "(from the command line)",
    # Not an override, not YAML, not there.
    "training.steps": "an override must have the form key=value, such as training.steps=10; got 'training.steps'",
    "data.corpus=a: b: c": "data.corpus=a: b: c isn't a YAML value: mapping values are not allowed here",
    "training.seed=${training.bla}": "training.seed: Interpolation key 'training.bla' not found",
    # Values out of range.
    "output=''": "output must name a folder, got ''",
    "training.steps=0": "training.steps must be at least 1, got 0",
    "training.seed=-1": "training.seed must be at least 0, got -1",
    "training.learning_rate=nan": "training.learning_rate must be finite and positive, got nan",
    "training.clip=0": "training.clip must be finite and positive, got 0.0",
    "training.weight_decay=-1": "training.weight_decay must be finite and not negative, got -1.0",
    "training.beta1=1": "training.beta1 must be at least 0 and below 1, got 1.0",
    "training.final_share=2": "training.final_share must lie between 0 and 1, got 2.0",
    "training.schedule=cosin": "training.schedule must be one of constant, cosine, wsd; got 'cosin'",
    "training.optimizer=adam": "training.optimizer must be one of adamw, lion; got 'adam'",
    "training.compute_dtype=float16": "training.compute_dtype must be one of float32, bfloat16; got 'float16'",
    "training.remat=dots": "training.remat must be true or false, got 'dots' (from the command line)",
    "data.on_error=warn": "data.on_error must be one of fail, skip; got 'warn'",
    "data.seq_len=1": "data.seq_len must be at least 2, got 1",
    "data.window=0": "data.window must be at least 1, got 0",
    "data.held_out=1": "data.held_out must be at least 0 and below 1, got 1.0",
    "model.rope_theta=0": "model.rope_theta must be finite and positive, got 0.0",
    # Combinations.
    "training.accumulation=3": "training.batch_size must be a multiple of training.accumulation, got 8 and 3",
    "training.warmup_steps=1001": "training.warmup_steps must not exceed training.steps, got 1001 and 1000",
    "model.hidden_size=30": "model.hidden_size must be a multiple of model.num_attention_heads, got 30 and 4",
    "model.num_key_value_heads=3": "model.num_attention_heads must be a multiple of model.num_key_value_heads, "
    "got 4 and 3",
    "model={path: x, num_hidden_layers: 2}": "model.num_hidden_layers is for a model from scratch, "
    "but model.path names 'x': give one",
    "data.held_out=0": "training.eval_every needs something to evaluate on: set data.held_out above 0, "
    "name data.eval_corpus, or set training.eval_every=0",
}


@pytest.mark.parametrize("override", ERRORS)
def test_what_is_refused(override):
    with pytest.raises(ValueError, match=re.escape(ERRORS[override])) as error:
        load_config(None, [override])
    assert "\n" not in str(error.value)


def test_an_error_in_a_file_names_the_file(yaml):
    path = yaml("training: {stepz: 5}")
    with pytest.raises(ValueError) as error:
        load_config(path)
    assert str(error.value) == f"training.stepz is not an option (from {path}); did you mean training.steps?"
    with pytest.raises(ValueError, match=r"some\.yaml isn't YAML: .*"):
        load_config(yaml("a: b: c"))
    with pytest.raises(ValueError, match=r"some\.yaml must hold a mapping of options, got a list"):
        load_config(yaml("- a"))
    with pytest.raises(FileNotFoundError):
        load_config(path.with_name("other.yaml"))


def test_options_are_checked_when_built_in_python_too():
    with pytest.raises(ValueError, match=r"training\.steps must be at least 1, got 0"):
        TrainingOptions(steps=0)
    with pytest.raises(ValueError, match=r"model\.hidden_size is for a model from scratch"):
        ModelOptions(path="x", hidden_size=8)


def test_every_option_says_what_it_is_in_a_word_of_its_own():
    """An option is found by its last word alone (as the nearest valid key), so none may stand in two sections."""
    names = [name.rpartition(".")[2] for name in Config().flat()]
    assert len(names) == len(set(names))
    assert all(dataclasses.is_dataclass(getattr(Config(), name)) for name in ("model", "data", "training"))
