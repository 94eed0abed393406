"""The plan of a run's memory in torch beside what the same step, run for real, allocates."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, LlamaConfig
from typer.testing import CliRunner

from heddle.cli import app
from heddle.options import TrainingOptions
from heddle.torch.memory import Run, plan
from heddle.torch.parscale_config import Qwen2ParScaleConfig
from heddle.torch.train import clip, make_optimizer, recompute, summed_loss

SIZES = {
    "vocab_size": 320, "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 2, "num_attention_heads": 8,
}  # fmt: skip
LLAMA = LlamaConfig(**SIZES, num_key_value_heads=4, max_position_embeddings=4096)
PARSCALE = Qwen2ParScaleConfig(
    **SIZES, num_key_value_heads=4, parscale_n=2, parscale_n_tokens=8, enable_cross_attn=True
)


def most_allocated(step) -> int:
    """Bytes that ``step`` has at once of what it allocates."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    found = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(found, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def step_of(run: Run):
    model = AutoModelForCausalLM.from_config(run.config, attn_implementation="heddle").train()
    if run.remat:
        recompute(model)
    optimizer = make_optimizer(TrainingOptions(), model.parameters())
    rows = torch.zeros(run.batch // run.accumulation, run.seq, dtype=torch.int64)
    positions = torch.arange(run.seq).expand_as(rows)

    def step():
        for _ in range(run.accumulation):
            with torch.autocast("cpu", torch.bfloat16, enabled=run.dtype == "bfloat16"):
                loss = summed_loss(model, rows, rows, positions, None)
            loss.backward()
            del loss
        clip(model.parameters(), 1.0)
        optimizer.step()

    held = sum(x.nbytes for x in [*model.parameters(), *model.buffers()])
    held += sum(x.nbytes for state in optimizer.state.values() for x in state.values()) + rows.nbytes
    return step, held


@pytest.mark.parametrize(
    "run",
    [
        Run(LLAMA, batch=4, seq=256),
        Run(LLAMA, batch=4, seq=256, remat=True),
        Run(LLAMA, batch=8, seq=128, accumulation=2),
        Run(LLAMA, batch=1, seq=16),
        Run(LLAMA, batch=4, seq=256, dtype="bfloat16"),
        Run(PARSCALE, batch=2, seq=256),
    ],
    ids=["plain", "remat", "accumulation", "few tokens", "bfloat16", "parscale"],
)
def test_training(run):
    step, held = step_of(run)
    assert plan(run).total == pytest.approx(held + most_allocated(step), rel=0.01)


def generated(run: Run) -> int:
    """What the weights are, and what reading a prompt and one more token has at once beside them."""
    model = AutoModelForCausalLM.from_config(run.config, attn_implementation="heddle").eval()
    prompt = torch.zeros(run.batch, run.seq - 1, dtype=torch.int64)
    held = sum(x.nbytes for x in [*model.parameters(), *model.buffers()]) + prompt.nbytes

    def step():
        with torch.inference_mode():
            cache = model(prompt, use_cache=True, logits_to_keep=1).past_key_values
            model(prompt[:, :1], past_key_values=cache, use_cache=True)

    return held + most_allocated(step)


@pytest.mark.parametrize("config", [LLAMA, PARSCALE], ids=["llama", "parscale"])
def test_generation(config):
    run = Run(config, "generate", batch=4, seq=200)
    assert plan(run).total == pytest.approx(generated(run), rel=0.01)


@pytest.mark.slow
def test_sharded_over_processes(tmp_path):
    """The first of two processes, with a real group: what fully_shard keeps, gathers and gives back."""
    LLAMA.save_pretrained(tmp_path / "model")
    script = Path(__file__).with_name("memory_processes.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    found = subprocess.run([*command, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stderr
    allocated = json.loads((tmp_path / "allocated.json").read_text())
    assert plan(Run(LLAMA, batch=4, seq=256, mesh={"fsdp": 2})).total == pytest.approx(allocated, rel=0.1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task": "serve"}, "--task must be one of train, generate with --framework torch; got 'serve'"),
        ({"optimizer": "lion"}, "--optimizer must be one of adamw with --framework torch; got 'lion'"),
        ({"mesh": {"tensor": 2}}, "--mesh must name fsdp alone with --framework torch, got tensor"),
        ({"task": "generate", "remat": True}, "--remat goes with --task train in torch"),
        ({"task": "generate", "seq": 5000}, "--seq must be from 2 to the model's context of 4096 tokens, got 5000"),
        ({"batch": 3, "mesh": {"fsdp": 2}}, "--batch must be a multiple of 2, got 3"),
    ],
)
def test_runs_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        Run(LLAMA, **settings)


def test_the_command(tmp_path):
    LLAMA.save_pretrained(tmp_path)
    options = ["memory", "--framework", "torch", "--model", str(tmp_path), "--seq", "64"]
    found = json.loads(CliRunner().invoke(app, [*options, "--batch", "3", "--json"]).stdout)
    assert (found["framework"], found["total"]) == ("torch", plan(Run(LLAMA, batch=3, seq=64)).total)
    largest = CliRunner().invoke(
        app, [*options, "--find", "batch", "--bytes", f"{found['total'] / 2**20} MiB", "--json"]
    )
    assert json.loads(largest.stdout)["batch"] == 3
