"""Over 2 processes of 4 devices nothing differs from one device."""

import os
import shutil
import socket
import subprocess
import sys
import time
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


def start(command, environment) -> list[subprocess.Popen]:
    """Both processes, on their way."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    flags = environment.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
    environment = environment | {"XLA_FLAGS": flags, "JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    return [
        subprocess.Popen(
            command, env=environment | {"JAX_PROCESS_ID": str(process)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for process in range(2)
    ]  # fmt: skip


def end(running) -> None:
    for process in running:
        process.kill()
        process.wait()
        process.stdout.close()


def on_two_processes(command, environment) -> list[str]:
    """What each of them says; both have to end well."""
    running = start(command, environment)
    try:
        said = [process.communicate(timeout=300)[0] for process in running]
        assert [process.returncode for process in running] == [0, 0], "\n".join(said)
        return said
    finally:
        end(running)


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
    with pytest.raises(ValueError, match="heartbeat must be at least 1 second, got 0"):
        initialize("localhost:1", 2, 1, heartbeat=0)
    monkeypatch.setenv("HEDDLE_HEARTBEAT_SECONDS", "soon")
    with pytest.raises(ValueError, match="HEDDLE_HEARTBEAT_SECONDS must be a number, got 'soon'"):
        initialize("localhost:1", 2, 1)


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


# ---------------------------------------------------------------------- kill -9

SMALL = [
    "model.hidden_size=16", "model.intermediate_size=32", "model.num_hidden_layers=1", "model.num_attention_heads=2",
    "training.max_steps=6", "training.batch_size=8",
]  # fmt: skip
MESH = ["mesh.data=2", "mesh.fsdp=2", "mesh.context=2"]
RUNS = {
    "lm": [
        *SMALL, "data.seq_len=32", "data.window=1024", "data.held_out=0.3", "training.checkpoint_every=2",
        "training.eval_every=3", "training.eval_batches=2",
    ],
    "grpo": [*GRPO, *SMALL, "training.checkpoint_every=1", "grpo.stop_ids=[0, 5, 10, 15, 200]"],
}  # fmt: skip
SILENCE = 40  #: seconds after which a process counts as dead, where one is to be found so


@pytest.fixture(scope="module")
def faults(tmp_path_factory):
    """The command of a run into a folder, and its environment."""
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "XLA_FLAGS": "--xla_backend_optimization_level=0",
        "PYTHONPATH": str(HERE.parent),
    }  # fmt: skip
    environment.pop("CONFIG_FILE", None)
    corpus = tmp_path_factory.mktemp("corpus")
    for i in range(30):
        (corpus / f"{i}.txt").write_text(f"the cat sat on mat number {i}, and the dog on the other. " * 4)

    def command(name, output):
        more = [f"data.corpus={corpus}"] if name == "lm" else []
        return [sys.executable, str(HERE / "train_processes.py"), *RUNS[name], *more, f"output={output}"]

    return command, environment


def finish(faults, name, output):
    command, environment = faults
    on_two_processes([*command(name, output), *MESH], environment)
    return curve(output)


def killed(faults, name, output, place, step, holds, whom=(0, 1), saved=()):
    """Kill processes ``whom`` when process ``holds`` is at a place, and these checkpoints, and no others, are whole;
    what the other processes say, once they have ended."""
    (command, environment), mark = faults, output.parent / f"{place} {step}"
    hold = {"HOLD": f"{place},{step},{holds},{mark}"}
    hold |= {"HEDDLE_HEARTBEAT_SECONDS": str(SILENCE)} if len(whom) == 1 else {}
    running = start([*command(name, output), *MESH], environment | hold)
    try:
        waited = 0  # for as long as the machine ran
        while not mark.exists() or checkpoints(output)[0] != list(saved):
            waited += 1
            assert waited < 40_000
            for process in running:
                assert process.poll() is None, process.communicate()[0]
            time.sleep(0.01)
        for number in whom:
            running[number].kill()
        others = [process for number, process in enumerate(running) if number not in whom]
        said = [process.communicate(timeout=SILENCE + 120)[0] for process in others]  # raises if it goes on
        assert all(process.returncode for process in others)
        return said
    finally:
        end(running)


def checkpoints(output):
    """Those that are whole, and how many aren't."""
    names = [path.name for path in (output / "checkpoints").iterdir()]
    whole = sorted(int(name) for name in names if name.isdigit())
    return whole, len(names) - len(whole)


@pytest.mark.slow
def test_kill_9_of_one_process_or_all_changes_nothing(faults, tmp_path):
    """While a checkpoint is written, at a step and during an evaluation. Where one is killed the other ends too."""
    whole = finish(faults, "lm", tmp_path / "whole")
    assert [record["step"] for record in whole] == [1, 2, 3, 3, 4, 5, 6, 6]
    output = tmp_path / "run"
    [said] = killed(faults, "lm", output, "write", 2, holds=1, whom=[1])
    assert "another task died" in said
    assert checkpoints(output) == ([], 1)  # which is no checkpoint
    killed(faults, "lm", output, "step", 3, holds=0, saved=[2])
    assert checkpoints(output) == ([2], 0)
    [said] = killed(faults, "lm", output, "evaluation", 3, holds=1, whom=[1], saved=[2])
    assert "another task died" in said
    killed(faults, "lm", output, "write", 4, holds=1, saved=[2])
    assert checkpoints(output) == ([2], 1)
    shutil.copytree(output, tmp_path / "other")
    [said] = killed(faults, "lm", output, "step", 5, holds=0, whom=[0], saved=[2, 4])
    assert "another task died" in said
    assert finish(faults, "lm", output) == whole
    assert checkpoints(output) == ([4, 6], 0)

    command, environment = faults  # on another mesh, of one process
    flags = environment["XLA_FLAGS"] + " --xla_force_host_platform_device_count=8"
    other = [*command("lm", tmp_path / "other"), "mesh.fsdp=8"]
    subprocess.run(other, env=environment | {"XLA_FLAGS": flags}, check=True, capture_output=True)
    there = curve(tmp_path / "other")
    assert there[:2] == whole[:2]  # before the checkpoint
    assert there[2:] != whole[2:]
    for one, uninterrupted in zip(there, whole, strict=True):
        for name in {"loss", "eval_loss"} & set(uninterrupted):
            assert one[name] == pytest.approx(uninterrupted[name], rel=0, abs=1e-5)
        assert one == pytest.approx(uninterrupted, rel=1e-4, abs=1e-6)


@pytest.mark.slow
def test_kill_9_of_grpo_on_a_mesh_changes_nothing(faults, tmp_path):
    """During a rollout, and between two steps on the same one."""
    whole = finish(faults, "grpo", tmp_path / "whole")
    assert ["reward" in record for record in whole] == [True, False] * 3
    output = tmp_path / "run"
    killed(faults, "grpo", output, "rollout", 1, holds=1, saved=[1, 2])
    killed(faults, "grpo", output, "step", 4, holds=0, saved=[2, 3])  # 3 is the first of two steps on a rollout
    assert finish(faults, "grpo", output) == whole
