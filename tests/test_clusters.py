"""The files in configs/clusters: what they start is heddle, with options that it has and sizes that go together."""

import math
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml
from test_house import ROOT, check_heddle

from heddle.config import Config, load_config

CLUSTERS = ROOT / "configs" / "clusters"
SLURM, SKYPILOT = CLUSTERS / "slurm.sbatch", CLUSTERS / "skypilot.yaml"


def config_of(words: list[str]) -> Config:
    """Of a command ``heddle train ...``, whose options and overrides have to exist."""
    assert words[:2] == ["heddle", "train"]
    check_heddle(shlex.join(words))
    path, overrides = None, []
    rest = iter(words[2:])
    for word in rest:
        if word.partition("=")[0] == "--config":
            path = ROOT / (word.partition("=")[2] or next(rest))
        else:
            overrides.append(word)
    return load_config(path, overrides)


def check_sizes(config: Config, hosts: int, devices: int) -> None:
    """Whether so many hosts with so many devices each can share the run."""
    training, mesh = config.training, config.mesh
    shares = hosts * devices
    if config.framework == "jax":
        assert math.prod([mesh.data, mesh.fsdp, mesh.tensor, mesh.context]) == shares
        shares = mesh.data * mesh.fsdp
    assert training.batch_size % (training.accumulation * shares) == 0


def usage(path: Path, program: str) -> list[list[str]]:
    """The commands in a file's comments that call ``program``."""
    text = "\n".join(re.findall(r"^# ?(.*)$", path.read_text(), re.MULTILINE))
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    return [shlex.split(line) for line in lines if line.split()[:1] == [program]]


def test_every_file_is_tested():
    names = {path.name for path in CLUSTERS.iterdir()}
    assert names == {"Dockerfile", "kubernetes-jax.yaml", "kubernetes-torch.yaml", "skypilot.yaml", "slurm.sbatch"}


# ---------------------------------------------------------------------- Slurm


def test_slurm_starts_what_its_comments_say():
    commands = usage(SLURM, "sbatch")
    assert len(commands) == 2
    for words in commands:
        at = words.index("configs/clusters/slurm.sbatch")
        given = dict(word.removeprefix("--").split("=") for word in words[1:at])
        config = config_of(["heddle", "train", *words[at + 1 :]])
        assert (config.framework == "torch") == ("ntasks-per-node" in given)
        assert given.get("ntasks-per-node", given["gpus-per-node"]) == given["gpus-per-node"]
        check_sizes(config, int(given["nodes"]), int(given["gpus-per-node"]))


@pytest.fixture
def stand_ins(tmp_path):
    """Run a script with programs that note how they were called, and exit or print as they are told."""

    def run(script: Path, *arguments: str, programs: dict[str, str], **environment: str) -> tuple[int, list[str]]:
        for name, body in programs.items():
            path = tmp_path / "bin" / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(f'#!/bin/bash\necho {name} "$@" >> {tmp_path}/calls\n{body}\n')
            path.chmod(0o755)
        environment |= {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
        done = subprocess.run(["bash", str(script), *arguments], env=environment, cwd=tmp_path, capture_output=True)
        calls = (tmp_path / "calls").read_text().splitlines()
        (tmp_path / "calls").unlink()
        return done.returncode, calls

    return run


@pytest.mark.parametrize(
    ("status", "state", "requeued"),
    [
        (143, "RUNNING", True),  # preempted, or out of time
        (143, "COMPLETING", False),  # cancelled
        (0, "RUNNING", False),
        (2, "RUNNING", False),
        (137, "RUNNING", False),
    ],
)
def test_slurm_requeues_what_was_told_to_stop(status, state, requeued, stand_ins):
    programs = {"srun": f"exit {status}", "squeue": f"echo {state}", "scontrol": ""}
    code, calls = stand_ins(SLURM, "a=b c", "d=e", programs=programs, SLURM_JOB_ID="7")
    assert code == status
    assert calls[0] == "srun heddle train a=b c d=e"
    assert ("scontrol requeue 7" in calls) == requeued


def test_slurm_script_waits_when_it_is_told_to_stop_itself(stand_ins):
    """Its parent's SIGTERM, as at a preemption; what it then waits for is still under way."""
    programs = {"srun": "kill -TERM $PPID; sleep 0.2; exit 143", "squeue": "echo RUNNING", "scontrol": ""}
    code, calls = stand_ins(SLURM, programs=programs, SLURM_JOB_ID="7")
    assert code == 143
    assert calls[-1] == "scontrol requeue 7"


# ---------------------------------------------------------------------- Kubernetes


@pytest.mark.parametrize("wing", ["jax", "torch"])
def test_kubernetes_pods_find_each_other(wing):
    service, job = yaml.safe_load_all((CLUSTERS / f"kubernetes-{wing}.yaml").read_text())
    name, spec = job["metadata"]["name"], job["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["publishNotReadyAddresses"]  # a process looks for the first before that is ready
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": name}
    assert pod["subdomain"] == service["metadata"]["name"]
    assert spec["completionMode"] == "Indexed"
    assert pod["restartPolicy"] == "Never"  # as podFailurePolicy requires
    hosts, gpus = spec["completions"], container["resources"]["limits"]["nvidia.com/gpu"]
    assert spec["parallelism"] == hosts
    first, index = f"{name}-0.{pod['subdomain']}", "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    variables = {entry["name"]: entry.get("value") for entry in container["env"]}
    indexed = [entry["name"] for entry in container["env"] if "valueFrom" in entry]
    assert [e["valueFrom"]["fieldRef"]["fieldPath"] for e in container["env"] if "valueFrom" in e] == [index]
    for rule in spec["podFailurePolicy"]["rules"]:
        assert rule.get("onExitCodes", {}).get("containerName", container["name"]) == container["name"]
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}

    if wing == "jax":
        assert indexed == ["JAX_PROCESS_ID"]
        assert variables["JAX_COORDINATOR_ADDRESS"].split(":")[0] == first
        assert variables["JAX_NUM_PROCESSES"] == str(hosts)
        config = config_of([*container["command"], *container["args"]])
    else:
        words = [word.replace(f"$({indexed[0]})", "1") for word in container["command"]]
        config = check_torchrun([*words, *container["args"]], hosts, gpus, rank=1, first=first)
        waits = int(re.search(r"--shutdown-timeout=(\d+)", " ".join(words)).group(1))
        assert pod["terminationGracePeriodSeconds"] > waits
    assert config.framework == wing
    assert config.output.startswith("/shared/")
    check_sizes(config, hosts, gpus)


def check_torchrun(words: list[str], hosts: int, gpus: int, rank: int, first: str) -> Config:
    parser = pytest.importorskip("torch.distributed.run").get_args_parser()
    assert words[0] == "torchrun"
    found = parser.parse_args(words[1:])
    assert (found.nnodes, found.nproc_per_node, found.node_rank) == (str(hosts), str(gpus), rank)
    assert (found.master_addr, found.module) == (first, True)
    return config_of([found.training_script, *found.training_script_args])


# ---------------------------------------------------------------------- SkyPilot


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("wing", ["jax", "torch"])
def test_skypilot_starts_each_host(wing, rank, stand_ins, tmp_path):
    task = yaml.safe_load(SKYPILOT.read_text())
    hosts, gpus = task["num_nodes"], int(task["resources"]["accelerators"].split(":")[1])
    commands = usage(SKYPILOT, "sky")
    assert all(words[:4] == ["sky", "jobs", "launch", "configs/clusters/skypilot.yaml"] for words in commands)
    given = next((words for words in commands if f"FRAMEWORK={wing}" in words), commands[0])
    envs = task["envs"] | dict(word.split("=", 1) for word in given if re.match("[A-Z]+=", word))
    assert envs["FRAMEWORK"] == wing
    script = tmp_path / "run.sh"
    script.write_text(task["run"])
    programs = {"torchrun": "", "heddle": f"env | grep ^JAX_ | sort >> {tmp_path}/calls"}
    code, calls = stand_ins(
        script, programs=programs, **envs, SKYPILOT_NODE_IPS="10.0.0.1\n10.0.0.2", SKYPILOT_NUM_NODES=str(hosts),
        SKYPILOT_NODE_RANK=str(rank), SKYPILOT_NUM_GPUS_PER_NODE=str(gpus),
    )  # fmt: skip
    assert code == 0
    if wing == "jax":
        told = ["JAX_COORDINATOR_ADDRESS=10.0.0.1:1234", f"JAX_NUM_PROCESSES={hosts}", f"JAX_PROCESS_ID={rank}"]
        assert calls[1:] == told
        config = config_of(shlex.split(calls[0]))
    else:
        config = check_torchrun(shlex.split(calls[0]), hosts, gpus, rank, "10.0.0.1")
    assert config.framework == wing
    check_sizes(config, hosts, gpus)
    assert any(config.output.startswith(f"{volume}/") for volume in task["volumes"])


# ---------------------------------------------------------------------- the image


def test_the_image_copies_what_is_there():
    text = (CLUSTERS / "Dockerfile").read_text()
    for line in re.findall(r"^COPY (.*)$", text, re.MULTILINE):
        assert all((ROOT / source).exists() for source in line.split()[:-1]), line
    extras = re.search(r"\.\[([\w,]+)\]", text).group(1).split(",")
    project = (ROOT / "pyproject.toml").read_text()
    assert all(re.search(rf"^{extra} = \[", project, re.MULTILINE) for extra in extras)
