"""What one srun started is one run, in either wing. The environments are those that Slurm 22.05 gave its tasks."""

import os
import socket
import subprocess
import sys

import pytest

from heddle import slurm

JAX = pytest.importorskip("heddle.jax.parallel")
TORCH = pytest.importorskip("heddle.torch.train")


def environment(process: int, tasks: str = "1(x2)", nodes: str = "node[1-2]", **others: str) -> dict[str, str]:
    """Of a task, of step 0 of job 5."""
    here = slurm._tasks(tasks)
    node = next(node for node in range(len(here)) if process < sum(here[: node + 1]))
    return {
        "SLURM_JOB_ID": "5", "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": nodes, "SLURM_STEP_TASKS_PER_NODE": tasks,
        "SLURM_STEP_NUM_TASKS": str(sum(here)), "SLURM_PROCID": str(process), "SLURM_NODEID": str(node),
        "SLURM_LOCALID": str(process - sum(here[:node])), **others,
    }  # fmt: skip


@pytest.fixture
def task(monkeypatch):
    """Make this process one: called with :func:`environment`'s arguments. Nothing of it outlives the test."""
    names = (
        "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "JAX_LOCAL_DEVICE_IDS", "RANK", "WORLD_SIZE",
        "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMPI_COMM_WORLD_SIZE",
    )  # fmt: skip
    clean = {name: value for name, value in os.environ.items() if name not in names and not name.startswith("SLURM")}
    monkeypatch.setattr(os, "environ", clean)
    return lambda *args, **kwargs: clean.update(environment(*args, **kwargs))


@pytest.mark.parametrize(
    ("tasks", "nodes", "process", "expected"),
    [
        ("1(x2)", "node[1-2]", 1, (2, 1, 1, 0, "node1:61480")),
        ("8(x2),4", "gpu-a[007,9-12],gpu-b1", 17, (20, 17, 4, 1, "gpu-a007:61480")),
        ("2", "login", 1, (2, 1, 2, 1, "login:61480")),
        ("1(x4)", "rack[3-4]n[08-09]", 2, (4, 2, 1, 0, "rack3n08:61480")),
        ("1,2", "b,a", 2, (3, 2, 2, 1, "b:61480")),
    ],
)
def test_a_task_knows_the_others(task, tasks, nodes, process, expected):
    task(process, tasks, nodes)
    assert slurm.step() == slurm.Step(*expected)


def test_steps_meet_at_ports_of_their_own(task):
    ports = set()
    for job in ("5", "6", "5000"):
        for step in ("0", "1"):
            task(0, SLURM_JOB_ID=job, SLURM_STEP_ID=step)
            ports.add(int(slurm.step().address.split(":")[1]))
    assert len(ports) == 6
    assert all(61440 <= port < 65536 for port in ports)


def test_a_batch_script_and_a_single_task_are_alone(task):
    os.environ |= {"SLURM_JOB_ID": "5", "SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    assert slurm.step() is None
    task(0, "1", "node1")
    assert slurm.step() is None


# ---------------------------------------------------------------------- what the wings make of it


def joined(monkeypatch) -> tuple:
    """What JAX is told: address, processes, process, devices, where else to look."""
    told = []
    monkeypatch.setattr(JAX.jax.distributed, "initialize", lambda *arguments, **waits: told.append(arguments))
    JAX.initialize()
    return told[0] if told else ()


def test_jax_takes_all_devices_of_a_host_of_its_own(task, monkeypatch):
    task(1)
    assert joined(monkeypatch) == ("node1:61480", 2, 1, None, "deactivate")


def test_jax_takes_one_device_of_a_shared_host(task, monkeypatch):
    task(5, "4(x2)")
    assert joined(monkeypatch) == ("node1:61480", 8, 5, [1], "deactivate")
    os.environ["JAX_LOCAL_DEVICE_IDS"] = "0,1"
    assert joined(monkeypatch) == ("node1:61480", 8, 5, None, "deactivate")


def test_what_jax_is_told_comes_first(task, monkeypatch):
    task(1, JAX_COORDINATOR_ADDRESS="other:1", JAX_NUM_PROCESSES="3", JAX_PROCESS_ID="2")
    assert joined(monkeypatch) == ("other:1", 3, 2, None, "deactivate")


def test_jax_looks_for_itself_where_only_the_address_is_told(task, monkeypatch):
    os.environ["JAX_COORDINATOR_ADDRESS"] = "other:1"
    assert joined(monkeypatch) == ("other:1", None, None, None, None)


@pytest.mark.parametrize("name", ["WORLD_SIZE", "JAX_NUM_PROCESSES", "OMPI_COMM_WORLD_SIZE"])
def test_jax_is_not_alone_by_mistake(name, task, monkeypatch):
    os.environ[name] = "1"
    assert joined(monkeypatch) == ()
    os.environ[name] = "2"
    with pytest.raises(ValueError, match=f"JAX_COORDINATOR_ADDRESS must be .* as {name}=2 says, got none; torchrun"):
        JAX.initialize()


def test_torchrun_has_to_know_of_all_tasks(task):
    task(0, WORLD_SIZE="1", RANK="0")
    with pytest.raises(ValueError, match=r"WORLD_SIZE must be at least the 2 tasks .*, got 1: .* --nnodes=2"):
        TORCH.processes()


PROGRAMS = {
    "jax": "import jax, heddle.jax.parallel as p; p.initialize(); print(jax.process_index(), jax.process_count())",
    "torch": "from heddle.torch.train import processes as p; s = p(); print(s.process_index, s.num_processes); "
    "s.destroy_process_group()",
}


@pytest.mark.slow
@pytest.mark.parametrize("wing", PROGRAMS)
def test_two_tasks_find_each_other(wing, task):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    where = {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAMS[wing]], stdout=subprocess.PIPE, text=True,
            env=os.environ | environment(process, OMP_NUM_THREADS="1", **where),
        )
        for process in range(2)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=120)[0].split() for process in running]
    finally:
        for process in running:
            process.kill()
    assert said == [["0", "2"], ["1", "2"]]
