"""The configuration: where values come from, and what is refused with which words."""

import dataclasses
import re
from pathlib import Path

import pytest

from heddle.config import Config, load_config
from heddle.options import DataOptions, ModelOptions, ParScaleOptions, TrainingOptions


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
    path = yaml("training:\n  max_steps: 20\n  learning_rate: 1e-3\ndata: {corpus: some/folder}\nmodel:\n")
    config = load_config(path, ["training.max_steps=30", "--training.clip=null", "output=runs/a=b"])
    assert config == Config(
        output="runs/a=b",
        data=DataOptions(corpus="some/folder"),
        training=TrainingOptions(max_steps=30, learning_rate=1e-3, clip=None),
    )


def test_config_file_names_the_file_unless_another_is_given(yaml, monkeypatch, tmp_path):
    monkeypatch.setenv("CONFIG_FILE", str(yaml("training: {max_steps: 20}")))
    other = tmp_path / "other.yaml"
    other.write_text("training: {batch_size: 4}")
    assert load_config().training == TrainingOptions(max_steps=20)
    assert load_config(other).training == TrainingOptions(batch_size=4)


def test_a_configuration_reads_back_what_it_writes(yaml):
    config = load_config(
        None, ["training.learning_rate=1e-4", "training.clip=null", "training.base_model='a: b'", "data.window=9"]
    )
    assert load_config(yaml(config.to_yaml())) == config
    assert config.flat()["training.learning_rate"] == 1e-4
    assert list(config.flat())[:3] == ["output", "framework", "model.hidden_size"]


def test_interpolation_and_sections_on_the_command_line():
    training = load_config(
        None, ["training={max_steps: 40, batch_size: 2}", "training.warmup_steps=${training.max_steps}"]
    ).training
    assert (training.max_steps, training.batch_size, training.warmup_steps) == (40, 2, 40)


def test_lists_and_what_parscale_adds(yaml):
    config = load_config(
        None, ["framework=torch", "--parscale.parscale_n=4", "parscale.parscale_cross_attn_layers=[0, 4, 8]"]
    )
    assert config.parscale == ParScaleOptions(parscale_n=4, parscale_cross_attn_layers=[0, 4, 8])
    assert config.flat()["parscale.parscale_cross_attn_layers"] == [0, 4, 8]
    path = yaml(config.to_yaml())
    assert load_config(path) == config
    assert load_config(path, ["parscale.parscale_cross_attn_layers=[1]"]).parscale.parscale_cross_attn_layers == [1]
    assert load_config(path, ["parscale.parscale_cross_attn_layers=null"]).parscale.parscale_cross_attn_layers is None


def test_parscales_options_are_the_models():
    """Under the same names, with the same defaults."""
    from heddle.torch.parscale_config import Qwen2ParScaleConfig

    model = Qwen2ParScaleConfig()
    for option in dataclasses.fields(ParScaleOptions):
        assert getattr(model, option.name) == option.default


CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_shipped_configurations_are_valid(path):
    load_config(path)


def test_the_papers_stage_2_is_the_default_of_continued_pretraining():
    basic, cross = (load_config(CONFIGS[0].with_name(name)) for name in ("basic.yaml", "cross_attn.yaml"))
    training, tokens = basic.training, basic.training.batch_size * basic.data.seq_len * basic.training.max_steps
    assert (basic.framework, training.base_model, training.schedule) == ("torch", "Qwen/Qwen2-1.5B", "constant")
    assert (training.learning_rate, training.warmup_steps, training.compute_dtype) == (3e-4, 2000, "bfloat16")
    assert (training.batch_size, basic.data.seq_len, training.checkpoint_every) == (8 * 4 * 4, 2048, 0)
    assert 20e9 <= tokens < 20e9 + training.batch_size * basic.data.seq_len
    before, after = basic.flat(), cross.flat()
    assert {name for name in before if before[name] != after[name]} == {"output", "parscale.enable_cross_attn"}


ERRORS = {
    # Unknown keys, with what was meant.
    "training.learnin_rate=1": "training.learnin_rate is not an option (from the command line); "
    "did you mean training.learning_rate?",
    "training.seq_len=64": "training.seq_len is not an option (from the command line); did you mean data.seq_len?",
    "steps=5": "steps is not an option (from the command line); did you mean training.max_steps?",
    "trainig.max_step=5": "trainig.max_step is not an option (from the command line); did you mean training.max_steps?",
    "training.seed.x=1": "training.seed.x is not an option (from the command line); did you mean training.seed?",
    "data.q=1": "data.q is not an option (from the command line); the options are data.corpus, data.corpora, "
    "data.weights, data.eval_corpus, data.held_out, data.tokenizer, data.field, "
    "data.on_error, data.seq_len, data.window",
    # Wrong types.
    "training.max_steps=abc": "training.max_steps must be an integer, got 'abc' (from the command line)",
    "training.max_steps=1.5": "training.max_steps must be an integer, got 1.5 (from the command line)",
    "training.max_steps=true": "training.max_steps must be an integer, got True (from the command line)",
    "training.max_steps=null": "training.max_steps must be an integer, got None (from the command line)",
    "training.clip=[1]": "training.clip must be a number or null, got [1] (from the command line)",
    "training=3": "training must be a mapping of options, got 3 (from the command line)",
    "model.tie_word_embeddings=perhaps": "model.tie_word_embeddings must be true or false, got 'perhaps' "
    "(from the command line)",
    # Not an override, not YAML, not there.
    "training.max_steps": "an override must have the form key=value, such as training.max_steps=10; "
    "got 'training.max_steps'",
    "data.corpus=a: b: c": "data.corpus=a: b: c isn't a YAML value: mapping values are not allowed here",
    "training.seed=${training.bla}": "training.seed: Interpolation key 'training.bla' not found",
    # Values out of range.
    "output=''": "output must name a folder, got ''",
    "training.max_steps=0": "training.max_steps must be at least 1, got 0",
    "training.seed=-1": "training.seed must be at least 0, got -1",
    "training.learning_rate=nan": "training.learning_rate must be finite and positive, got nan",
    "training.clip=0": "training.clip must be finite and positive, got 0.0",
    "training.weight_decay=-1": "training.weight_decay must be finite and not negative, got -1.0",
    "training.beta1=1": "training.beta1 must be at least 0 and below 1, got 1.0",
    "training.final_share=2": "training.final_share must lie between 0 and 1, got 2.0",
    "training.schedule=cosin": "training.schedule must be one of constant, cosine, wsd; got 'cosin'",
    "training.optimizer=adam": "training.optimizer must be one of adamw, lion, muon, adafactor; got 'adam'",
    "training.compute_dtype=float16": "training.compute_dtype must be one of float32, bfloat16; got 'float16'",
    "training.remat=true": "training.remat must be one of none, layer, dots; got 'True'",
    "training.keep_best=dots": "training.keep_best must be true or false, got 'dots' (from the command line)",
    "training.keep_best=true training.eval_every=30": "training.keep_best needs an evaluation at each checkpoint: "
    "training.checkpoint_every must be a multiple of training.eval_every, got 100 and 30",
    "training.ema_decay=1": "training.ema_decay must be at least 0 and below 1, got 1.0",
    "training.objective=dpo": "training.objective must be one of lm, sft, grpo; got 'dpo'",
    "training.trainable=none": "training.trainable must be one of full, lora, new; got 'none'",
    "training.trainable=lora": "training.trainable=lora trains adapters of a base model: set training.base_model",
    "sft.neftune_alpha=5": "sft.neftune_alpha is for training.objective=sft, but it is lm",
    "sft.loss_on=prompt training.objective=sft": "sft.loss_on must be one of completion, assistant, all; got 'prompt'",
    "sft.label_smoothing=1 training.objective=sft": "sft.label_smoothing must be at least 0 and below 1, got 1.0",
    "lora.rank=8": "lora.rank is for training.trainable=lora, but it is full",
    "lora.rank=0 training.trainable=lora": "lora.rank must be at least 1, got 0",
    "lora.targets=q_proj training.trainable=lora": "lora.targets must be a list of texts or null, got 'q_proj' "
    "(from the command line)",
    "data.on_error=warn": "data.on_error must be one of fail, skip; got 'warn'",
    "data.seq_len=1": "data.seq_len must be at least 2, got 1",
    "data.window=0": "data.window must be at least 1, got 0",
    "data.held_out=1": "data.held_out must be at least 0 and below 1, got 1.0",
    "model.rope_theta=0": "model.rope_theta must be finite and positive, got 0.0",
    # Combinations.
    "training.accumulation=3": "training.batch_size must be a multiple of training.accumulation, got 8 and 3",
    "model.hidden_size=30": "model.hidden_size must be a multiple of model.num_attention_heads, got 30 and 4",
    "model.num_key_value_heads=3": "model.num_attention_heads must be a multiple of model.num_key_value_heads, "
    "got 4 and 3",
    "model.num_hidden_layers=2 training.base_model=x": "model.num_hidden_layers is for a model from scratch, "
    "but training.base_model names 'x': give one",
    "model.attention=wide": "model.attention must be one of dense, dilated, sliding; got 'wide'",
    "model.attention=sliding": "model.sliding_window goes with model.attention=sliding, "
    "but model.attention is sliding and model.sliding_window isn't given",
    "model.dilation_rates=[1]": "model.dilation_rates goes with model.attention=dilated, but model.attention is dense",
    "model.attention=dilated model.segment_lengths=[4] model.dilation_rates=[1,2]": "model."
    "segment_lengths and model.dilation_rates must be positive integers, equally many, got [4] and [1, 2]",
    "mesh.context=0": "mesh.context must be at least 1, or -1 for what is left, got 0",
    "mesh.fsdp=-1 mesh.data=-1": "one axis of the mesh may be -1, got mesh.data and mesh.fsdp",
    # What others make an effect of.
    "training.objective=grpo grpo.reference_every=2": "grpo.reference_every=2 has no effect without grpo.beta above 0",
    "training.objective=grpo grpo.curriculum_prompts=8": "grpo.curriculum_prompts=8 has no effect without "
    "grpo.curriculum=true",
    "training.decay_share=0.5": "training.decay_share=0.5 has no effect without training.schedule=wsd",
    "training.objective=sft data.field=body": "data.field=body has no effect without training.objective=lm",
    # What one wing alone has.
    "framework=tensorflow": "framework must be one of jax, torch; got 'tensorflow'",
    "framework=torch mesh.fsdp=2": "mesh.fsdp=2 is for framework=jax, but framework is torch",
    "framework=torch training.ema_decay=0.9": "training.ema_decay=0.9 is for framework=jax, but framework is torch",
    "framework=torch training.optimizer=lion": "training.optimizer=lion is for framework=jax, but framework is torch",
    # ParScale.
    "parscale.parscale_n=0": "parscale.parscale_n must be at least 1, got 0",
    "parscale.parscale_n_tokens=-1": "parscale.parscale_n_tokens must be at least 0, got -1",
    "parscale.parscale_attn_smooth=1": "parscale.parscale_attn_smooth must be at least 0 and below 1, got 1.0",
    "parscale.parscale_cross_attn_layers=[0,-1]": "parscale.parscale_cross_attn_layers must be at least 0, got -1",
    "parscale.parscale_cross_attn_layers=3": "parscale.parscale_cross_attn_layers must be a list of "
    "integers or null, got 3 (from the command line)",
    "parscale.parscale_cross_attn_mode=both": "parscale.parscale_cross_attn_mode must be one of joint, "
    "sublayer; got 'both'",
    "parscale.parscale_prefix_scope=none": "parscale.parscale_prefix_scope must be one of own, all; got 'none'",
    "parscale.parscale_m=2": "parscale.parscale_m is not an option (from the command line); "
    "did you mean parscale.parscale_n?",
    "parscale_n=2": "parscale_n is not an option (from the command line); did you mean parscale.parscale_n?",
    "training.trainable=new parscale.parscale_n=2": "training.trainable=new trains what "
    "ParScale adds to a base model: set training.base_model, and parscale.parscale_n above 1",
    "data.held_out=0": "training.eval_every needs something to evaluate on: set data.held_out above 0, "
    "name data.eval_corpus, or set training.eval_every=0",
}


@pytest.mark.parametrize("override", ERRORS)
def test_what_is_refused(override):
    with pytest.raises(ValueError, match=re.escape(ERRORS[override])) as error:
        load_config(None, [override] if override == "data.corpus=a: b: c" else override.split())
    assert "\n" not in str(error.value)


def test_an_error_in_a_file_names_the_file(yaml):
    path = yaml("training: {max_stepz: 5}")
    with pytest.raises(ValueError) as error:
        load_config(path)
    assert str(error.value) == f"training.max_stepz is not an option (from {path}); did you mean training.max_steps?"
    with pytest.raises(ValueError, match=r"some\.yaml isn't YAML: .*"):
        load_config(yaml("a: b: c"))
    with pytest.raises(ValueError, match=r"some\.yaml must hold a mapping of options, got a list"):
        load_config(yaml("- a"))
    with pytest.raises(FileNotFoundError):
        load_config(path.with_name("other.yaml"))


def test_options_are_checked_when_built_in_python_too():
    with pytest.raises(ValueError, match=r"training\.max_steps must be at least 1, got 0"):
        TrainingOptions(max_steps=0)
    with pytest.raises(ValueError, match=r"model\.hidden_size is for a model from scratch"):
        Config(model=ModelOptions(hidden_size=8), training=TrainingOptions(base_model="x"))


def test_every_option_says_what_it_is_in_a_word_of_its_own():
    """An option is found by its last word alone (as the nearest valid key), so none may stand in two sections."""
    names = [name.rpartition(".")[2] for name in Config().flat()]
    assert len(names) == len(set(names))
    assert all(dataclasses.is_dataclass(getattr(Config(), name)) for name in ("model", "parscale", "data", "training"))
