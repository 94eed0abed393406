"""Over 2 processes of 4 devices nothing differs from one device."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from heddle.jax import ModelConfig, Transformer
from heddle.jax.parallel import initialize
from heddle.metrics import read_metrics

HERE = Path(__file__).parent


def curve(output):
    times = {"seconds", "tokens_per_second", "mfu"}
    records = read_metrics(output / "metrics.jsonl")
    return [{name: value for name, value in record.items() if name not in times} for record in records]


def on_two_processes(command, environment) -> list[str]:
    """What each of them says; both have to end well."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    flags = environment.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
    environment = environment | {"XLA_FLAGS": flags, "JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    running = [
        subprocess.Popen(
            command, env=environment | {"JAX_PROCESS_ID": str(process)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for process in range(2)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=300)[0] for process in running]
        assert [process.returncode for process in running] == [0, 0], "\n".join(said)
        return said
    finally:
        for process in running:
            process.kill()
            process.wait()


def test_without_an_address_a_process_is_alone(monkeypatch):
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        monkeypatch.delenv(name, raising=False)
    initialize()
    assert not jax.distributed.is_initialized()
    monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
    with pytest.raises(ValueError, match="JAX_NUM_PROCESSES must be a number, got 'two'"):
        initialize("localhost:1")
    with pytest.raises(ValueError, match="process must be at least 0 and below the 2 processes, got 2"):
        initialize("localhost:1", 2, 2)


LM = ["data.seq_len=32", "data.window=4096", "training.eval_every=2", "training.eval_batches=1"]
GRPO = [
    "training.objective=grpo", "data.corpus=largest", "grpo.task=[digits=2]", "data.seq_len=8", "grpo.max_completion=4",
    "grpo.num_generations=4", "grpo.rewards=[reward_functions:low_bytes]", "training.eval_every=0", "grpo.beta=0.1",
    "grpo.num_iterations=2",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("objective", [LM, GRPO], ids=["lm", "grpo"])
def test_two_processes_train_as_one_device(tmp_path, objective):
    """`heddle train` on 2 processes of 4 devices: one curve, written once, and one model."""
    overrides = [
        "model.hidden_size=16", "model.intermediate_size=32", "model.num_hidden_layers=1",
        "model.num_attention_heads=2", "training.max_steps=4", "training.batch_size=8", "training.checkpoint_every=2",
        *objective,
    ]  # fmt: skip
    command = [sys.executable, "-m", "heddle", "train", *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    environment.pop("CONFIG_FILE", None)
    alone, spread = tmp_path / "alone", tmp_path / "spread"
    subprocess.run([*command, f"output={alone}"], env=environment, check=True, capture_output=True)
    mesh = ["mesh.data=2", "mesh.fsdp=2", "mesh.context=2"]
    said = on_two_processes([*command, f"output={spread}", *mesh], environment)
    assert "4 steps done" in said[0]
    assert "step" not in said[1]
    for one, other in zip(curve(alone), curve(spread), strict=True):
        assert other == pytest.approx(one, rel=1e-4, abs=1e-6)
    both = [Transformer.from_pretrained(folder / "model") for folder in (alone, spread)]
    for a, b in zip(*map(jax.tree.leaves, both), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-3)


@pytest.mark.slow
def test_two_processes_generate_as_one_device(tmp_path):
    config = ModelConfig(
        vocab_size=258, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256,
    )  # fmt: skip
    Transformer(config, rngs=nnx.Rngs(0)).save_pretrained(tmp_path / "model")
    command = [sys.executable, str(HERE / "generation_processes.py"), str(tmp_path / "model")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    alone, spread = tmp_path / "alone.json", tmp_path / "spread.json"
    subprocess.run([*command, str(alone)], env=environment, check=True, capture_output=True)
    on_two_processes([*command, str(spread)], environment)
    assert spread.read_text() == alone.read_text()
