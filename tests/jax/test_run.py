"""``heddle train``: from a configuration to a model in a folder."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from flax import nnx
from transformers import AutoModelForCausalLM

import heddle.torch.parscale
from heddle import cli
from heddle.config import load_config
from heddle.data.tokenizers import Tokenizer
from heddle.jax.engine import Engine
from heddle.jax.generation import generate
from heddle.jax.longnet import LongNetConfig, LongNetLM
from heddle.jax.model import Transformer
from heddle.jax.model_config import ModelConfig
from heddle.jax.parscale import is_new
from heddle.jax.run import make_model, model_config, prepare, run
from heddle.metrics import read_metrics

SMALL = [
    "model.hidden_size=16", "model.intermediate_size=24", "model.num_hidden_layers=1", "model.num_attention_heads=2",
    "model.num_key_value_heads=1", "data.seq_len=64", "data.window=4096", "data.held_out=0.3", "training.batch_size=2",
    "training.max_steps=6", "training.eval_every=3", "training.eval_batches=1", "training.checkpoint_every=2",
    "training.warmup_steps=0", "training.learning_rate=0.01",
]  # fmt: skip


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(20):
        (folder / f"{i}.txt").write_text(f"the cat sat on mat number {i}, and the dog on the other. " * 5)
    return folder


@pytest.fixture
def options(corpus, tmp_path):
    return [*SMALL, f"data.corpus={corpus}", f"output={tmp_path / 'run'}"]


def heddle(monkeypatch, capsys, *arguments):
    """Exit code, stdout and stderr of the command, in this process."""
    monkeypatch.setattr(sys, "argv", ["heddle", *arguments])
    with pytest.raises(SystemExit) as exit:
        cli.main()
    captured = capsys.readouterr()
    return exit.value.code, captured.out, captured.err


def losses(folder):
    return [(r["step"], r.get("loss"), r.get("eval_loss")) for r in read_metrics(folder / "metrics.jsonl")]


def test_the_quickstart_configuration_is_valid_and_small():
    path = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
    config = load_config(path)
    model = nnx.eval_shape(lambda: make_model(config, Tokenizer.bytes()))
    size = sum(x.size for x in jax.tree.leaves(nnx.state(model)))
    assert 1e6 < size < 5e6


def test_the_best_checkpoints_model_is_saved_beside_the_last(options, tmp_path):
    """At a rate that is far too high, an early step is the best."""
    high = ["training.learning_rate=1", "training.schedule=constant", "training.keep=1", "training.keep_best=true"]
    trainer = run(load_config(None, [*options, *high, "training.eval_every=1", "training.checkpoint_every=1"]))
    held_out = {step: loss for step, _, loss in losses(tmp_path / "run") if loss is not None}
    best, step = trainer.best()
    assert step == min(held_out, key=held_out.get) < 6
    for folder, model in (("model", trainer.model), ("model-best", best)):
        saved = Transformer.from_pretrained(tmp_path / "run" / folder)
        for a, b in zip(*(jax.tree.leaves(nnx.state(each)) for each in (saved, model)), strict=True):
            np.testing.assert_array_equal(a, b)


def test_a_run_ends_in_a_model_that_loads_and_can_be_trained_further(options, tmp_path):
    trainer = run(load_config(None, options))
    folder = tmp_path / "run"
    assert load_config(folder / "config.yaml") == load_config(None, options)
    assert [step for step, _, _ in losses(folder)] == [1, 2, 3, 3, 4, 5, 6, 6]
    assert losses(folder)[-1][2] < losses(folder)[3][2] < np.log(257)

    loaded = Transformer.from_pretrained(folder / "model")
    tokens = np.arange(12)[None] + 97
    np.testing.assert_allclose(loaded(tokens), trainer.model(tokens), atol=1e-6)
    assert loaded.config.max_position_embeddings == 64

    # Further, from its weights: what it is evaluated at before a step is where the first run ended.
    further = [o for o in options if not o.startswith(("model.", "output"))]
    config = load_config(None, [*further, f"training.base_model={folder / 'model'}", f"output={tmp_path / 'further'}"])
    trainer, tokenizer = prepare(config)
    assert tokenizer.vocab_size == 257
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses(folder)[-1][2], rel=1e-5)


def test_a_run_goes_on_with_more_steps_but_not_as_another_run(options, tmp_path, monkeypatch, capsys):
    constant = [*options, "training.schedule=constant"]
    run(load_config(None, [*constant, "training.max_steps=4", "training.eval_every=0"]))
    code, _, error = heddle(monkeypatch, capsys, "train", *constant, "training.learning_rate=0.02", "data.seq_len=32")
    assert code == 2
    assert error == (
        f"heddle: output {tmp_path / 'run'} holds a run with data.seq_len=64 (not 32), "
        "training.learning_rate=0.01 (not 0.02): go on with that, or name another folder\n"
    )
    code, _, error = heddle(monkeypatch, capsys, "train", *constant, "training.eval_every=0")
    assert code == 0
    assert "6 steps done" in error
    whole = tmp_path / "whole"
    run(load_config(None, [*constant, "training.eval_every=0", f"output={whole}"]))
    assert losses(whole) == losses(tmp_path / "run")
    assert len(losses(whole)) == 6


def test_a_run_goes_on_with_the_documents_it_began_with_or_not_at_all(options, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "documents"
    folder.mkdir()
    for i in range(9):
        (folder / f"{i}.txt").write_text(f"number {i} sat on the mat. " * 9)
    options = [*options, f"data.corpus={folder}", "training.schedule=constant", "training.eval_every=0"]
    run(load_config(None, [*options, "training.max_steps=3"]))
    before = losses(tmp_path / "run")
    (folder / "10.txt").write_text("a file that was not there before")
    code, _, error = heddle(monkeypatch, capsys, "train", *options)
    assert (code, error.count("\n")) == (2, 1)
    assert "documents must be those of the state to go on from, but those of its window 0 have changed" in error
    assert losses(tmp_path / "run") == before
    (folder / "10.txt").unlink()
    assert heddle(monkeypatch, capsys, "train", *options)[0] == 0
    assert len(losses(tmp_path / "run")) == 6


def test_sigterm_saves_and_leaves_with_its_code(options, tmp_path):
    """In a process of its own, as a cluster would do it; then the same command goes on to the same curve."""
    folder = tmp_path / "run"
    options = [*options, "training.max_steps=400", "training.eval_every=0", "training.checkpoint_every=0"]
    command = [sys.executable, "-m", "heddle", "train", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ)
    while '"step": 3,' not in ((folder / "metrics.jsonl").read_text() if (folder / "metrics.jsonl").exists() else ""):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM, errors
    (done,) = (int(p.name) for p in (folder / "checkpoints").iterdir())
    assert f"SIGTERM: saved at step {done}; the same command goes on from there" in errors
    assert [step for step, _, _ in losses(folder)] == list(range(1, done + 1))
    assert not (folder / "model").exists()


ERRORS = {
    "data.corpus=no/such/place": "corpus must be stdlib, hub:NAME, or a file, a folder or a pattern that holds files; "
    "got 'no/such/place'",
    "training.base_model=no/such/model.gguf": "no/such/model.gguf: no such file or folder",
    "training.stps=3": "training.stps is not an option (from the command line); did you mean training.max_steps?",
    "data.held_out=1e-9": "data.held_out=1e-09 of data.corpus={corpus} is no text at all: raise it, "
    "name data.eval_corpus, or set training.eval_every=0",
    "data.held_out=0.999999": "data.corpus={corpus} must hold text to train on that data.held_out=0.999999 "
    "leaves over, got none",
    "data.eval_corpus={corpus}/nothing": "corpus must be stdlib, hub:NAME, or a file, a folder or a pattern that "
    "holds files; got '{corpus}/nothing'",
}


@pytest.mark.parametrize("wrong", ERRORS)
def test_what_cannot_be_run_is_one_line(options, corpus, tmp_path, monkeypatch, capsys, wrong):
    if wrong.startswith("training.base_model"):
        options = [o for o in options if not o.startswith("model.")]
    code, out, error = heddle(monkeypatch, capsys, "train", *options, wrong.format(corpus=corpus))
    assert (code, out, error) == (2, "", f"heddle: {ERRORS[wrong].format(corpus=corpus)}\n")
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_larger_than_the_model_is_refused(options, tmp_path):
    config = load_config(None, options)

    class Large(Tokenizer):
        vocab_size = 258

    model = make_model(config, Tokenizer.bytes())
    model.save_pretrained(tmp_path / "model", Tokenizer.bytes())
    pretrained = load_config(None, [f"training.base_model={tmp_path / 'model'}"])
    with pytest.raises(ValueError, match=r"data\.tokenizer must have at most the 257 tokens of .*, got 258"):
        make_model(pretrained, Large(Tokenizer.bytes().backend))


def test_broken_lines_of_a_corpus_end_a_run_unless_they_are_to_be_skipped(options, tmp_path, caplog):
    path = tmp_path / "corpus.jsonl"
    lines = [f'{{"text": "line {i}, good as the others"}}\n' for i in range(50)]
    path.write_text("".join([lines[0], "bad\n", *lines[1:]]))
    broken = [*options, f"data.corpus={path}", "training.eval_every=0", "training.max_steps=2"]
    with pytest.raises(ValueError, match=r"corpus\.jsonl:2: not JSON"):
        run(load_config(None, broken))
    run(load_config(None, [*broken, "data.on_error=skip"]))
    assert f"{path}:2: not JSON: Expecting value at column 1; skipped" in caplog.messages


def test_print_config_shows_what_would_run_and_runs_nothing(options, tmp_path, monkeypatch, capsys):
    code, out, error = heddle(monkeypatch, capsys, "train", *options, "--training.max_steps=9", "--print-config")
    assert (code, error) == (0, "")
    (tmp_path / "printed.yaml").write_text(out)
    assert load_config(tmp_path / "printed.yaml") == load_config(None, [*options, "training.max_steps=9"])
    assert not (tmp_path / "run").exists()


ATTENTIONS = {
    "dilated": ["model.attention=dilated", "model.segment_lengths=[8,32]", "model.dilation_rates=[1,2]"],
    "sliding": ["model.attention=sliding", "model.sliding_window=6"],
}


@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("kind", ATTENTIONS)
def test_attention_of_another_kind_is_trained_and_both_wings_read_it(options, tmp_path, kind, replicas):
    replicated = [f"parscale.parscale_n={replicas}", "parscale.parscale_n_tokens=3"]
    trainer = run(load_config(None, [*options, *ATTENTIONS[kind], *replicated, "training.max_steps=2"]))
    folder, tokens = tmp_path / "run" / "model", np.arange(40)[None] + 97
    logits = trainer.model(tokens)
    np.testing.assert_allclose(Transformer.from_pretrained(folder)(tokens), logits, atol=1e-6)
    theirs = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="heddle")
    np.testing.assert_allclose(theirs(torch.from_numpy(tokens)).logits.detach(), logits, atol=1e-4)
    dense = prepare(load_config(None, [*options, *replicated]))[0].model  # the same weights at first
    other = prepare(load_config(None, [*options, *ATTENTIONS[kind], *replicated]))[0].model
    assert np.abs(dense(tokens) - other(tokens))[:, 8:].max() > 1e-4


# ---------------------------------------------------------------------- ParScale

PARSCALE = ["parscale.parscale_n=2", "parscale.parscale_n_tokens=3", "parscale.enable_cross_attn=true"]


@pytest.mark.parametrize("mode", ["joint", "sublayer"])
def test_parscale_is_trained_from_scratch_and_loads_in_transformers(options, tmp_path, mode):
    from heddle.torch.parscale import Qwen2ParScaleForCausalLM

    trainer = run(load_config(None, [*options, *PARSCALE, f"parscale.parscale_cross_attn_mode={mode}"]))
    evaluated = [e for _, _, e in losses(tmp_path / "run") if e is not None]
    assert evaluated[-1] < evaluated[0] < np.log(257)
    theirs = Qwen2ParScaleForCausalLM.from_pretrained(tmp_path / "run" / "model")
    tokens = np.arange(12)[None] + 97
    logits = theirs(torch.from_numpy(tokens)).logits.detach()
    np.testing.assert_allclose(trainer.model(tokens), logits, atol=1e-4)


def test_a_frozen_base_stays_as_it_was_and_the_rest_learns(options, tmp_path):
    base = tmp_path / "base"
    run(load_config(None, [*options, f"output={base}"]))
    further = [o for o in options if not o.startswith("model.")]
    config = load_config(
        None,
        [*further, *PARSCALE, f"training.base_model={base / 'model'}", "training.trainable=new"],
    )
    before = nnx.to_pure_dict(nnx.state(prepare(config)[0].model))
    trainer = run(config)
    after = nnx.to_pure_dict(nnx.state(trainer.model))
    learned = 0
    for (path, old), (_, new) in zip(
        jax.tree_util.tree_leaves_with_path(before), jax.tree_util.tree_leaves_with_path(after), strict=True
    ):
        if is_new(path):
            learned += not np.array_equal(old, new)
        else:
            np.testing.assert_array_equal(old, new)
    assert learned >= 5  # prefixes, attention between replicas, their sum
    # Nor does the optimiser hold anything of the base.
    moments = {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(trainer.state.optimizer)}
    assert any("replicas" in name for name in moments)
    assert not any("ffn" in name for name in moments)
    evaluated = [e for _, _, e in losses(tmp_path / "run") if e is not None]
    assert evaluated[-1] < evaluated[0]


def test_a_parscale_checkpoint_is_gone_on_with(options, tmp_path):
    trainer = run(load_config(None, [*options, *PARSCALE, "training.max_steps=2"]))
    folder = tmp_path / "run" / "model"
    further = [o for o in options if not o.startswith("model.")] + [f"training.base_model={folder}"]
    model = make_model(load_config(None, [*further, *PARSCALE]), Tokenizer.bytes())
    jax.tree.map(np.testing.assert_array_equal, nnx.state(model), nnx.state(trainer.model))
    for replicas in (1, 3):
        config = load_config(None, [*further, *PARSCALE, f"parscale.parscale_n={replicas}"])
        with pytest.raises(ValueError, match=rf"parscale_n must be that of the ParScale model .*, 2; got {replicas}"):
            make_model(config, Tokenizer.bytes())
    base = tmp_path / "base"
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    Transformer(ModelConfig(vocab_size=257, **sizes), rngs=nnx.Rngs(0)).save_pretrained(base)
    config = load_config(None, [*further, *PARSCALE, f"training.base_model={base}", "training.trainable=lora"])
    for make in (make_model, model_config):  # adapters are for replicas that have learned
        with pytest.raises(ValueError, match=r"trainable=lora would leave what ParScale adds untrained: .* and 2"):
            make(config, Tokenizer.bytes())


def test_generate_continues_with_a_parscale_folder(options, tmp_path, monkeypatch, capsys):
    run(load_config(None, [*options, *PARSCALE, "training.max_steps=2"]))
    model = str(tmp_path / "run" / "model")
    arguments = "--prompt", "the cat", "--raw", "--max-tokens", "5", "--json"
    code, out, _ = heddle(monkeypatch, capsys, "generate", "--model", model, *arguments)
    assert code == 0
    expected = generate(Transformer.from_pretrained(model), Tokenizer.bytes(), "the cat", max_tokens=5)[0]
    assert json.loads(out)["text"] == expected.text


def test_a_longnet_folder_is_trained_further_evaluated_and_generates(options, corpus, tmp_path, monkeypatch, capsys):
    sizes = {"vocab_size": 257, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    config = LongNetConfig(**sizes, num_attention_heads=2, segment_lengths=(16, 64), dilation_rates=(1, 4))
    LongNetLM(config, rngs=nnx.Rngs(0)).save_pretrained(tmp_path / "start", Tokenizer.bytes())
    further = [o for o in options if not o.startswith("model.")] + [f"training.base_model={tmp_path / 'start'}"]
    trainer = run(load_config(None, [*further, "data.tokenizer=bytes"]))
    assert isinstance(trainer.model, LongNetLM)
    evaluated = [e for _, _, e in losses(tmp_path / "run") if e is not None]
    assert evaluated[-1] < evaluated[0]

    model = str(tmp_path / "run" / "model")
    code, out, _ = heddle(monkeypatch, capsys, "generate", "--model", model, "--prompt", "the cat", "--raw",
                          "--max-tokens", "5", "--json")  # fmt: skip
    expected = generate(LongNetLM.from_pretrained(model), Tokenizer.bytes(), "the cat", max_tokens=5)[0]
    assert (code, json.loads(out)["text"]) == (0, expected.text)
    arguments = "--corpus", str(corpus), "--held-out", "0.3", "--seq-len", "32", "--json"
    code, out, _ = heddle(monkeypatch, capsys, "evaluate", "--model", model, *arguments)
    assert code == 0
    assert json.loads(out)["models"]["run"][-1]["bits_per_byte"] < 8
    with pytest.raises(ValueError, match="model must keep every key to be served"):
        Engine(LongNetLM.from_pretrained(model), Tokenizer.bytes())
