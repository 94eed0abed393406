"""The pool of rewards: right answers, and no harm from functions that raise, hang or die."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import reward_functions
from reward_functions import answer, length

from heddle.metrics import read_metrics
from heddle.rewards import RewardPool, find_reward

CASES = "reward_functions"
NAN = np.nan


def fields(*answers):
    return [{"answer": text} for text in answers]


def test_every_reward_of_every_completion():
    with RewardPool([length, f"{CASES}:answer", f"{CASES}:not_for_x"], [1.0, 10.0, 0.5]) as pool:
        assert pool.names == ["length", "answer", "not_for_x"]
        texts = ["aa", "b", "", "cccc"]
        found = pool(["p", "x", "p", "x"], texts, fields("aa", "c", "", "cccc"))
        np.testing.assert_array_equal(found, [[2, 1, 0.5], [1, 0, NAN], [0, 1, 0.5], [4, 1, NAN]])
        np.testing.assert_array_equal(pool.total(found), [12.25, 1, 10.25, 14])
        np.testing.assert_array_equal(pool.total(np.array([[NAN, NAN, NAN]])), [NAN])
        # The processes stay, and serve again.
        ids = {worker.process.pid for worker in pool._workers}
        pool(["p"] * 4, texts, fields("", "", "", ""))
        assert ids == {worker.process.pid for worker in pool._workers}
        assert pool.failures == 0
    assert not any(_alive(pid) for pid in ids)


def test_a_reward_that_raises_hangs_or_dies_costs_its_sample_alone(caplog):
    names = ["raises_at_b", "hangs_at_c", "dies_at_d", "leaves_at_d"]
    with RewardPool([f"{CASES}:{name}" for name in names], timeout=3.0) as pool:
        texts = ["a", "ab", "ac", "ad", "a", "abcd"]
        found = pool([f"prompt {i}" for i in range(6)], texts, fields(*texts))
        np.testing.assert_array_equal(
            found,
            [[1, 2, 3, 3], [NAN, 2, 3, 3], [1, NAN, 3, 3], [1, 2, NAN, NAN], [1, 2, 3, 3], [NAN, NAN, NAN, NAN]],
        )
        assert pool.failures == len(caplog.messages) == 8
        [raised] = [m for m in caplog.messages if "raises_at_b" in m and "sample 1" in m]
        assert raised.endswith("""it raised KeyError: 'no b here' (prompt 'prompt 1', completion 'ab')""")
        [hung] = [m for m in caplog.messages if "hangs_at_c" in m and "sample 2" in m]
        assert "it took longer than 3 s" in hung
        [died] = [m for m in caplog.messages if "dies_at_d" in m and "sample 3" in m]
        assert "it ended its process, with exit code 7" in died


def test_what_is_not_a_number_does_not_apply(caplog):
    with RewardPool([f"{CASES}:words", f"{CASES}:infinite"], workers=1) as pool:
        assert np.isnan(pool(["p"], ["a"], [{}])).all()
    assert "raised ValueError: could not convert string to float: 'many'" in caplog.messages[0]
    assert "it returned inf" in caplog.messages[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([],), "rewards must name at least one function, got none"),
        ((["nothing"],), "a reward must be task, module:function or an entry point of heddle.rewards, got 'nothing'"),
        ((["no_such_module:f"],), "reward no_such_module:f can't be found: No module named 'no_such_module'"),
        (([f"{CASES}:no"],), "reward reward_functions:no can't be found: module 'reward_functions' has no attribute"),
        (([f"{CASES}:not_a_function"],), "must be a function, got int"),
        (([answer], [1.0, 2.0]), "weights must be one for each of 1 rewards, got 2"),
    ],
)
def test_what_is_no_reward_is_refused_at_once(arguments, message):
    with pytest.raises(ValueError, match=message):
        RewardPool(*arguments)
    with pytest.raises(ValueError, match=r"timeout must be positive, got 0\.0"):
        RewardPool([answer], timeout=0.0)
    assert find_reward(f"{CASES}:length") is reward_functions.length


INSTALLED = """
import sys
from heddle.cli import main
sys.argv = ["heddle", "train", *sys.argv[1:]]
main()
"""
TINY = [
    "training.objective=grpo", "data.corpus=largest", "grpo.task=[digits=1]", "data.seq_len=4", "model.hidden_size=8",
    "model.intermediate_size=8", "model.num_hidden_layers=1", "model.num_attention_heads=1",
    "model.num_key_value_heads=1", "training.batch_size=2", "training.max_steps=1", "training.eval_every=0",
    "grpo.num_generations=2", "grpo.max_completion=1", "data.held_out=0", "training.checkpoint_every=0",
]  # fmt: skip


def test_rewards_of_the_working_directory_and_of_packages_are_found_by_the_command(tmp_path):
    (tmp_path / "nearby.py").write_text("def half(**_):\n    return 0.5\n")
    package = tmp_path / "packages"
    (package / "registered-1.dist-info").mkdir(parents=True)
    (package / "registered-1.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: registered\nVersion: 1\n"
    )
    (package / "registered-1.dist-info" / "entry_points.txt").write_text("[heddle.rewards]\nquarter = registered:one\n")
    (package / "registered.py").write_text("def one(**_):\n    return 0.25\n")
    # As a console script is run: the directory isn't on its path.
    command = [sys.executable, "-P", "-c", INSTALLED, *TINY, "grpo.rewards=[nearby:half,quarter]", "output=run"]
    environment = {**os.environ, "PYTHONPATH": str(package)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    [record] = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert (record["reward_half"], record["reward_quarter"], record["reward"]) == (0.5, 0.25, 0.75)


PROGRAM = """
import sys, time
sys.path[:0] = {path!r}
from heddle.rewards import RewardPool
pool = RewardPool(["reward_functions:length"])
pool(["p"] * 2, ["a"] * 2, [{{}}] * 2)
print(*(worker.process.pid for worker in pool._workers), flush=True)
time.sleep(600)
"""


def test_the_processes_end_with_their_trainer_even_if_it_is_killed():
    program = PROGRAM.format(path=sys.path)
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as trainer:
        ids = list(map(int, trainer.stdout.readline().split()))
        trainer.send_signal(signal.SIGKILL)
    assert ids
    for _ in range(600):
        if not any(map(_alive, ids)):
            return
        time.sleep(0.1)
    pytest.fail(f"processes {ids} outlive their trainer")


def _alive(pid):
    try:
        os.kill(pid, 0)
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False
