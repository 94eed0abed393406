"""``heddle train framework=torch``: what is trained, from which base, and that nothing that kills a run changes it."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import tiny_gguf
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from tiny_models import hugging_face
from transformers import AutoModelForCausalLM

import heddle.jax.run
import heddle.torch
from heddle import cli
from heddle.config import load_config
from heddle.data.packing import Packer
from heddle.data.tokenizers import Tokenizer
from heddle.metrics import draw, read_metrics
from heddle.options import TrainingOptions
from heddle.torch.flops import training_flops
from heddle.torch.huggingface import dilation
from heddle.torch.run import make_model, run
from heddle.torch.train import Trainer, learning_rate

SIZES = [
    "model.hidden_size=16", "model.intermediate_size=24", "model.num_hidden_layers=2", "model.num_attention_heads=2",
    "model.num_key_value_heads=1",
]  # fmt: skip
SMALL = [
    "framework=torch", "data.seq_len=64", "data.window=4096", "data.held_out=0.3", "training.batch_size=4",
    "training.max_steps=6", "training.eval_every=3", "training.eval_batches=1", "training.checkpoint_every=2",
    "training.learning_rate=0.01",
]  # fmt: skip
PARSCALE = ["parscale.parscale_n=2", "parscale.parscale_n_tokens=3", "parscale.enable_cross_attn=true"]
HEDDLE = ["-m", "heddle", "train"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(20):
        (folder / f"{i}.txt").write_text(f"the cat sat on mat number {i}, and the dog on the other. " * 5)
    return folder


@pytest.fixture(autouse=True)
def _no_accelerate_state(monkeypatch):
    """accelerate keeps one precision a process; each test is a process of its own."""
    monkeypatch.delenv("CONFIG_FILE", raising=False)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def options(corpus, tmp_path):
    return [*SMALL, f"data.corpus={corpus}", f"output={tmp_path / 'run'}"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A Llama over bytes, with its tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    hugging_face("llama, bytes").save_pretrained(folder)
    Tokenizer.bytes().save_pretrained(folder)
    return folder


def curve(folder):
    """What must not depend on how a run was carried out: everything but times."""
    times = {"seconds", "tokens_per_second", "mfu"}
    return [{k: v for k, v in record.items() if k not in times} for record in read_metrics(folder / "metrics.jsonl")]


def losses(folder):
    return [(r["step"], r.get("loss", r.get("eval_loss"))) for r in curve(folder)]


def same(one, other, rtol):
    assert [step for step, _ in one] == [step for step, _ in other]
    np.testing.assert_allclose([x for _, x in one], [x for _, x in other], rtol=rtol)


def launched(*command, **environment):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return done.stderr


# ---------------------------------------------------------------------- what comes of a run


def test_the_loss_falls_and_the_model_loads(options, tmp_path):
    records = []
    trainer = run(load_config(None, [*options, *SIZES, *PARSCALE, "training.eval_first=true"]), records.append)
    folder = tmp_path / "run"
    assert [step for step, _ in losses(folder)] == [0, 1, 2, 3, 3, 4, 5, 6, 6]
    assert losses(folder)[-1][1] < losses(folder)[4][1] < losses(folder)[0][1] == pytest.approx(np.log(257), rel=0.05)
    assert read_metrics(folder / "metrics.jsonl") == records
    assert set(records[1]) == {
        "step", "loss", "tokens", "gradient_norm", "learning_rate", "tokens_per_second", "seconds", "mfu"
    }  # fmt: skip
    assert all(r["mfu"] > 0 for r in records if "mfu" in r)
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["4", "6"]

    model, info = AutoModelForCausalLM.from_pretrained(folder / "model", output_loading_info=True)
    assert not any(info.values())
    assert (model.config.model_type, model.config.parscale_n) == ("qwen2_parscale", 2)
    ids = torch.arange(97, 117)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, trainer.model(ids).logits)
    assert Tokenizer.from_folder(folder / "model").vocab_size == 257
    assert draw([folder], tmp_path / "loss.png").stat().st_size > 5000


def test_one_replica_is_a_llama_that_both_wings_read(options, tmp_path):
    run(load_config(None, [*options, *SIZES, "training.max_steps=2", "training.compute_dtype=bfloat16"]))
    folder = tmp_path / "run" / "model"
    assert json.loads((folder / "config.json").read_text())["model_type"] == "llama"
    ids = np.arange(97, 117)[None]
    theirs = AutoModelForCausalLM.from_pretrained(folder)(torch.from_numpy(ids)).logits.detach().numpy()
    np.testing.assert_allclose(heddle.jax.Transformer.from_pretrained(folder)(ids), theirs, atol=1e-4)


DILATED = ["model.attention=dilated", "model.segment_lengths=[8,32]", "model.dilation_rates=[1,3]"]


@pytest.mark.parametrize(
    ("overrides", "model_type"),
    [
        (DILATED, "llama"),
        ([*DILATED, *PARSCALE], "qwen2_parscale"),
        (["model.attention=sliding", "model.sliding_window=6"], "mistral"),
    ],
)
def test_attention_of_a_model_from_scratch(options, tmp_path, overrides, model_type):
    """Trained on packed documents as it is saved, and loads; it computes less than a dense one."""
    settings = [*options, *SIZES, "training.max_steps=2", *overrides]
    trainer = run(load_config(None, settings))
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model", attn_implementation="heddle")
    assert saved.config.model_type == model_type
    assert dilation(saved.config) == (((8, 1), (32, 3)) if "dilated" in overrides[0] else None)
    ids = torch.arange(97, 157)[None]
    with torch.no_grad():
        logits = trainer.model.eval()(ids).logits
        torch.testing.assert_close(saved(ids).logits, logits)
        moved = saved(torch.cat([ids[:, :1] + 60, ids[:, 1:]], 1)).logits  # what the last token of 60 can't see
    assert (moved - logits)[:, 0].abs().max() > 1e-3
    assert (moved - logits)[:, -1].abs().max() < 1e-5
    segments, dense = (
        np.zeros((1, 200), int),
        make_model(load_config(None, settings[: -len(overrides)]), Tokenizer.bytes()),
    )
    if model_type == "qwen2_parscale":
        return
    pairs = training_flops(dense)(segments, 199) - training_flops(saved)(segments, 199)
    assert 0.5 < pairs / (12 * dense.config.num_hidden_layers * dense.config.hidden_size * 200 * 201 / 2) < 1


def test_the_frozen_backbone_stays_as_it_was_bit_for_bit(options, base, tmp_path):
    options = [*options, *PARSCALE, f"training.base_model={base}", "training.trainable=new"]
    trainer = run(load_config(None, [*options, "training.remat=layer"]))
    before = dict(hugging_face("llama, bytes").named_parameters())
    new = trainer.model.new_parameters()
    start = make_model(load_config(None, options), Tokenizer.bytes()).new_parameters()
    assert any("prefix_k" in name for name in new)
    for name, parameter in trainer.model.named_parameters():
        if name in new:
            assert not torch.equal(parameter, start[name]), name
        else:
            assert torch.equal(parameter, before[name]), name
    assert losses(tmp_path / "run")[-1][1] < losses(tmp_path / "run")[3][1]
    saved = json.loads((tmp_path / "run" / "checkpoints" / "6" / "state.json").read_text())["shapes"]
    assert {name.removeprefix("model.") for name in saved if name.startswith("model.")} == set(new)


def test_the_curve_is_the_jax_wings(options, base, tmp_path):
    """One configuration, one base model: the objective, the optimiser and the schedule are the same in both wings."""
    options = [*options, f"training.base_model={base}", "training.warmup_steps=2", "training.accumulation=2"]
    run(load_config(None, options))
    heddle.jax.run.run(load_config(None, [*options, "framework=jax", f"output={tmp_path / 'jax'}"]))
    ours, theirs = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("run", "jax"))
    for one, other in zip(ours, theirs, strict=True):
        for name in {"step", "loss", "tokens", "gradient_norm", "learning_rate", "eval_loss"} & set(one):
            assert one[name] == pytest.approx(other[name], rel=2e-4), (one["step"], name)


@pytest.mark.parametrize("schedule", ["constant", "cosine", "wsd"])
def test_the_learning_rate_is_the_jax_wings(schedule):
    from heddle.jax.optimizer import make_schedule

    for warmup, steps in ((0, 20), (1, 20), (7, 20), (20, 20), (30, 20)):
        options = TrainingOptions(schedule=schedule, warmup_steps=warmup, max_steps=steps, decay_share=0.3)
        theirs = make_schedule(options)
        for step in range(steps):
            assert learning_rate(options, step) == pytest.approx(float(theirs(step)), rel=1e-5), (warmup, step)


def test_parts_change_memory_not_results(options, tmp_path):
    run(load_config(None, [*options, *SIZES, *PARSCALE]))
    run(load_config(None, [*options, *SIZES, *PARSCALE, "training.accumulation=4", f"output={tmp_path / 'parts'}"]))
    apart = [x for x in losses(tmp_path / "run") if x[0] % 3]  # an evaluation batch is a part
    same(apart, [x for x in losses(tmp_path / "parts") if x[0] % 3], 1e-5)


# ---------------------------------------------------------------------- bases


@pytest.mark.parametrize("replicas", [1, 2])
def test_a_gguf_base_is_the_folders(base, tmp_path, replicas):
    tokenizer = Tokenizer.bytes()
    file = tiny_gguf.write(tmp_path / "base.gguf", hugging_face("llama, bytes"))
    overrides = ["framework=torch", f"parscale.parscale_n={replicas}", "parscale.enable_cross_attn=true"]
    one, other = (
        make_model(load_config(None, [*overrides, f"training.base_model={place}"]), tokenizer) for place in (base, file)
    )
    theirs = dict(other.named_parameters())
    for name, parameter in one.named_parameters():
        assert parameter.dtype == torch.float32
        if replicas == 1 or name not in one.new_parameters():
            assert torch.equal(parameter, theirs[name]), name
    assert theirs.keys() == dict(one.named_parameters()).keys()
    other.save_pretrained(tmp_path / "saved")
    AutoModelForCausalLM.from_pretrained(tmp_path / "saved")


def test_a_parscale_checkpoint_is_gone_on_with(options, tmp_path):
    config = load_config(None, [*options, *SIZES, *PARSCALE, "training.max_steps=2"])
    trainer = run(config)
    folder = tmp_path / "run" / "model"
    further = load_config(None, [*options, *PARSCALE, f"training.base_model={folder}"])
    model = make_model(further, Tokenizer.bytes())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, trainer.model.get_parameter(name)), name
    with pytest.raises(ValueError, match=r"parscale_n must be that of the ParScale model .*, 2; got 1"):
        make_model(load_config(None, [*options, f"training.base_model={folder}"]), Tokenizer.bytes())
    parscale = replace(further.parscale, parscale_n=3)
    with pytest.raises(ValueError, match=r"parscale_n must be that of the ParScale model .*, 2; got 3"):
        make_model(replace(further, parscale=parscale), Tokenizer.bytes())


def test_a_tokenizer_larger_than_the_base_is_refused(base):
    class Large(Tokenizer):
        vocab_size = 258

    config = load_config(None, ["framework=torch", f"training.base_model={base}"])
    with pytest.raises(ValueError, match=r"data\.tokenizer must have at most the 257 tokens of .*, got 258"):
        make_model(config, Large(Tokenizer.bytes().backend))


def test_errors_of_the_command_are_one_line(options, tmp_path, monkeypatch, capsys):
    wrong = ["parscale.parscale_n=2", "parscale.enable_cross_attn=true", "parscale.parscale_cross_attn_layers=[0,2]"]
    monkeypatch.setattr(sys, "argv", ["heddle", "train", *options, *SIZES, *wrong])
    with pytest.raises(SystemExit) as exit:
        cli.main()
    assert exit.value.code == 2
    assert capsys.readouterr().err == "heddle: parscale_cross_attn_layers must be in [0, 2), got 2\n"
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


# ---------------------------------------------------------------------- what may happen on the way


def test_kill_9_and_resume_is_the_same_curve(options, tmp_path):
    folder, whole = tmp_path / "run", tmp_path / "whole"
    options = [*options, *SIZES, *PARSCALE, "training.max_steps=60", "training.schedule=constant"]
    options += ["training.eval_every=0", "training.checkpoint_every=5"]
    process = subprocess.Popen([sys.executable, *HEDDLE, *options], stderr=subprocess.PIPE, text=True)
    while not ((folder / "metrics.jsonl").exists() and '"step": 8,' in (folder / "metrics.jsonl").read_text()):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert not (folder / "model").exists()
    resumed_at = max(int(path.name) for path in (folder / "checkpoints").iterdir() if path.name.isdigit())
    assert resumed_at >= 5
    steps = f"training.max_steps={resumed_at + 12}"

    seen = []
    run(load_config(None, [*options, steps]), seen.append)
    assert seen[0]["step"] == resumed_at + 1
    run(load_config(None, [*options, steps, f"output={whole}"]))
    assert len(curve(whole)) == resumed_at + 12
    same(losses(folder), losses(whole), 1e-6)
    assert curve(folder)[resumed_at:] == seen_curve(seen)
    with pytest.raises(ValueError, match=r"holds a run with training\.learning_rate=0\.01 \(not 0\.02\)"):
        run(load_config(None, [*options, steps, "training.learning_rate=0.02"]))


def seen_curve(records):
    return [{k: v for k, v in r.items() if k not in {"seconds", "tokens_per_second", "mfu"}} for r in records]


def test_resuming_is_exact_bit_for_bit(options, tmp_path):
    options = [*options, *SIZES, *PARSCALE, "training.schedule=constant", "training.eval_every=0"]
    run(load_config(None, [*options, "training.max_steps=3"]))
    resumed = run(load_config(None, options))
    whole = run(load_config(None, [*options, f"output={tmp_path / 'whole'}"]))
    assert curve(tmp_path / "run") == curve(tmp_path / "whole")
    for name, parameter in whole.model.named_parameters():
        assert torch.equal(parameter, resumed.model.get_parameter(name)), name


def test_sigterm_saves_and_leaves_with_its_code(options, tmp_path):
    folder = tmp_path / "run"
    options = [*options, *SIZES, "training.max_steps=4000", "training.eval_every=0", "training.checkpoint_every=0"]
    process = subprocess.Popen([sys.executable, *HEDDLE, *options], stderr=subprocess.PIPE, text=True)
    while not ((folder / "metrics.jsonl").exists() and '"step": 3,' in (folder / "metrics.jsonl").read_text()):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    errors = process.communicate()[1]
    assert process.returncode == 128 + signal.SIGTERM, errors
    (done,) = (int(path.name) for path in (folder / "checkpoints").iterdir())
    assert f"SIGTERM: saved at step {done}; the same command goes on from there" in errors
    assert len(curve(folder)) == done


def poisoned(options, monkeypatch, *steps):
    """A trainer whose loss isn't finite at some steps."""
    config = load_config(None, [*options, *SIZES, "training.max_steps=6", "training.max_nonfinite=2"])
    model = make_model(config, Tokenizer.bytes())
    documents = [[3 + i, 4 + i, 5 + i, 6 + i] for i in range(40)]
    packer = Packer(lambda epoch, cursor: ((d, i) for i, d in enumerate(documents)), 16, 4)
    trainer = Trainer(model, packer, config.training, config.output)
    loss = trainer._loss
    monkeypatch.setattr(trainer, "_loss", lambda rows: loss(rows) * (float("nan") if trainer.step + 1 in steps else 1))
    return trainer


def test_a_step_that_is_not_finite_changes_nothing(options, monkeypatch, tmp_path):
    trainer = poisoned(options, monkeypatch, 3, 5)
    seen = {}
    trainer.fit(lambda record: seen.setdefault(record["step"], trainer.model.lm_head.weight.detach().clone()))
    assert [r["step"] for r in curve(tmp_path / "run") if r.get("skipped")] == [3, 5]
    assert torch.equal(seen[3], seen[2])
    assert not torch.equal(seen[4], seen[3])
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
    assert {state["step"].item() for state in trainer._optimizer.state.values()} == {4}


def test_too_many_of_them_end_the_run(options, monkeypatch, tmp_path):
    trainer = poisoned(options, monkeypatch, 2, 4, 5)
    with pytest.raises(FloatingPointError, match=r"2 steps in a row had no .* the last one step 5; .*nonfinite-5"):
        trainer.fit()
    with np.load(tmp_path / "run" / "nonfinite-5.npz") as saved:
        assert saved["tokens"].shape == (4, 16)


def test_a_batch_that_processes_cannot_share(options, monkeypatch):
    monkeypatch.setattr(Accelerator, "num_processes", 3)
    with pytest.raises(ValueError, match=r"must be a multiple of .*accumulation times the processes.* 4, 1 and 3"):
        run(load_config(None, [*options, *SIZES]))


def test_trackers(options, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(load_config(None, [*options, *SIZES, "training.max_steps=3", "training.report_to=tensorboard"]))
    (file,) = (tmp_path / "run" / "heddle").glob("events*")
    events = EventAccumulator(str(file)).Reload()
    tracked = [event.value for event in events.Scalars("loss")]
    np.testing.assert_allclose(tracked, [r["loss"] for r in curve(tmp_path / "run") if "loss" in r], rtol=1e-6)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"training\.report_to=wandb needs the wandb package: pip install wandb"):
        run(load_config(None, [*options, *SIZES, "training.report_to=wandb", f"output={tmp_path / 'other'}"]))


# ---------------------------------------------------------------------- many processes


@pytest.mark.slow
def test_two_processes_sharded_are_one(options, base, tmp_path):
    """FSDP2 by torchrun: the same curve, checkpoints that one process goes on from, and the same model."""
    options = [*options, *PARSCALE, f"training.base_model={base}", "training.schedule=constant"]
    two = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    launched(*two, *HEDDLE, *options, "training.accumulation=2", "training.max_steps=5", f"output={tmp_path / 'two'}")
    trainer = run(load_config(None, [*options, "training.accumulation=2"]))
    same(losses(tmp_path / "two")[:-1], losses(tmp_path / "run")[: len(losses(tmp_path / "two")) - 1], 1e-5)
    resumed = run(load_config(None, [*options, "training.accumulation=2", f"output={tmp_path / 'two'}"]))
    for name, parameter in resumed.model.named_parameters():
        torch.testing.assert_close(parameter, trainer.model.get_parameter(name), rtol=1e-3, atol=2e-5)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "two" / "model")
    assert saved.config.parscale_n == 2


@pytest.mark.slow
def test_accelerate_launch(options, tmp_path):
    path = tmp_path / "some.yaml"
    path.write_text(load_config(None, [*options, *SIZES]).to_yaml())
    launch = ["-m", "accelerate.commands.launch", "--num_processes=1", "--cpu"]
    errors = launched(*launch, *HEDDLE, "--parscale.parscale_n=2", "training.max_steps=2", CONFIG_FILE=str(path))
    assert "2 steps done" in errors
    assert load_config(tmp_path / "run" / "config.yaml").parscale.parscale_n == 2
