"""The trainer: the arithmetic of its step, what it writes, and that nothing that kills it changes a run."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import islice
from operator import itemgetter
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from heddle.data.packing import NO_TARGET, Batch, Packer
from heddle.jax.flops import peak_flops, training_flops
from heddle.jax.grpo import RolloutBatch, grpo, token_weights
from heddle.jax.lm import lm
from heddle.jax.model import Transformer
from heddle.jax.model_config import ModelConfig
from heddle.jax.sft import sft
from heddle.jax.train import Trainer
from heddle.metrics import read_metrics
from heddle.options import GRPOOptions, TrainingOptions

SEQ = 16


class Bigram(nnx.Module):
    """A model of one token after another: compiles in no time, and the trainer's mechanics are the same."""

    def __init__(self, seed):
        rngs = nnx.Rngs(seed)
        self.embedding = nnx.Embed(31, 16, rngs=rngs)
        self.layer, self.head = nnx.Linear(16, 16, rngs=rngs), nnx.Linear(16, 31, rngs=rngs)
        self.config = SimpleNamespace(hidden_size=16)

    def hidden(self, tokens, positions, segment_ids, noise=0.0):
        return jnp.tanh(self.layer(self.embedding(tokens) + noise))


def transformer(seed=0, **options):
    config = ModelConfig(
        vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    return Transformer(config, rngs=nnx.Rngs(seed), **options)


def documents(epoch, cursor):
    """Counting upwards from different numbers: easy to learn."""
    random = np.random.default_rng(epoch)
    lengths, starts = random.integers(1, 30, 40), random.integers(0, 31, 40)
    for at in range(cursor or 0, 40):
        yield (starts[at] + np.arange(lengths[at])) % 31, at + 1


def packer(rows=4):
    return Packer(documents, SEQ, rows, seed=1, window=200)


def trainer(output, model=None, objective=lm, evaluation=(), **options):
    defaults = {"max_steps": 12, "batch_size": 4, "learning_rate": 1e-2, "checkpoint_every": 0, "eval_every": 0}
    options = TrainingOptions(**defaults | options)
    model = model or Bigram(options.seed)
    return Trainer(model, objective, packer(options.batch_size), options, output, evaluation)


def records(output):
    return read_metrics(output / "metrics.jsonl")


def curve(output):
    """What must not depend on how often a run was killed: everything but times."""
    times = {"seconds", "tokens_per_second", "mfu"}
    return [{name: value for name, value in record.items() if name not in times} for record in records(output)]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    trained = whole_run(tmp_path_factory.mktemp("uninterrupted"))
    trained.fit()
    return trained


# ---------------------------------------------------------------------- the step


def of_completions(rows):
    """What GRPO trains on, of rows of which one has no tokens to learn, from a policy that has moved since."""
    random = np.random.default_rng(0)
    tokens = random.integers(0, 31, (rows, SEQ)).astype(np.int32)
    place = np.broadcast_to(np.arange(SEQ, dtype=np.int32), tokens.shape)
    ends = np.arange(rows)[:, None] % 11 + 3
    targets = np.where((place >= 2) & (place < ends), np.roll(tokens, -1, axis=1), NO_TARGET).astype(np.int32)
    mask = targets != NO_TARGET
    advantages = np.repeat(random.normal(size=(rows, 1)), SEQ, 1)
    old, reference, sampled = (-3.4 + random.normal(0, 0.3, (3, *mask.shape))).astype(np.float32)
    weights = token_weights(mask, "grpo", SEQ) * mask.sum()
    return RolloutBatch(
        tokens, np.where(place <= ends, 0, -1).astype(np.int32), place, targets, advantages.astype(np.float32),
        weights.astype(np.float32), old, reference, sampled,
    )  # fmt: skip


OBJECTIVES = {
    "lm": lm,
    "sft": sft(neftune_alpha=5.0, label_smoothing=0.1),
    "grpo": grpo(GRPOOptions(loss_type="grpo", beta=0.2, importance_cap=1.1, temperature=0.7)),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_accumulation_gives_the_gradient_of_the_whole_batch(tmp_path, name):
    """1 x 16 = 4 x 4 = 16 x 1 rows, although the parts hold unequal numbers of tokens."""
    objective = OBJECTIVES[name]
    whole = trainer(tmp_path, objective=objective, batch_size=16, clip=None)
    batch = of_completions(16) if name == "grpo" else next(iter(packer(16)))
    # Some parts lose most of their targets, some all.
    batch = batch._replace(targets=np.where(np.arange(16)[:, None] < 5, NO_TARGET, batch.targets))

    def step(accumulation):
        parts = jax.tree.map(lambda field: field.reshape(accumulation, -1, SEQ), batch)
        state, record = jax.jit(whole._step)(replace(whole.state, data=None), parts)
        return state.optimizer[1][0].mu, {name: float(value) for name, value in record.items()}

    moments, record = step(1)  # the optimiser's first moment: 1 - beta1 times the gradient
    for accumulation in (4, 16):
        other_moments, other = step(accumulation)
        assert other == pytest.approx(record, rel=1e-5)
        for a, b in zip(jax.tree.leaves(moments), jax.tree.leaves(other_moments), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(a).max()))

    graph, params = nnx.split(whole.model)
    keys = jax.random.split(jax.random.fold_in(jax.random.wrap_key_data(whole.state.rng), 0), 16)
    row_by_row = jax.jit(jax.value_and_grad(lambda p, *row: objective(nnx.merge(graph, p), *row)[:2], has_aux=True))
    sums = [row_by_row(params, *jax.tree.map(itemgetter(slice(i, i + 1)), (batch, keys))) for i in range(16)]
    tokens = sum(int(count) for (_, count), _ in sums)
    assert record["tokens"] == tokens == (batch.targets != NO_TARGET).sum()
    assert record["loss"] == pytest.approx(sum(float(total) for (total, _), _ in sums) / tokens, rel=1e-5)
    gradient = jax.tree.map(lambda *parts: sum(parts) / tokens, *(gradient for _, gradient in sums))
    for a, b in zip(jax.tree.leaves(moments), jax.tree.leaves(gradient), strict=True):
        np.testing.assert_allclose(a, 0.1 * b, atol=1e-5 * float(jnp.abs(a).max()))


def test_training_learns_and_the_module_handed_in_is_the_one_trained(uninterrupted, tmp_path):
    losses = [r["loss"] for r in records(uninterrupted.output) if "loss" in r]
    assert losses[-1] < losses[0] - 0.3
    held_out = [r["eval_loss"] for r in records(uninterrupted.output) if "eval_loss" in r]
    assert len(held_out) == 4  # the first before any step
    assert held_out == sorted(held_out, reverse=True)
    assert uninterrupted.evaluate()["eval_loss"] == held_out[-1]
    same = trainer(tmp_path, uninterrupted.model, evaluation=uninterrupted._evaluation)
    assert same.evaluate()["eval_loss"] == held_out[-1]


def test_parameters_stay_float32_when_computing_in_bfloat16(tmp_path):
    mixed = trainer(tmp_path, transformer(dtype=jnp.bfloat16, param_dtype=jnp.float32, remat=True), max_steps=1)
    plain = trainer(tmp_path, transformer(), evaluation=list(islice(packer(), 1)))
    mixed.fit()
    for leaf in jax.tree.leaves((mixed.state.model, mixed.state.optimizer[1][0].mu)):
        assert leaf.dtype == jnp.float32
    (record,), expected = records(tmp_path), plain.evaluate()["eval_loss"]
    assert record["loss"] != expected
    assert record["loss"] == pytest.approx(expected, rel=1e-2)


def test_objectives_may_measure_more(tmp_path):
    def objective(model, batch, rng):
        total, count, _ = lm(model, batch, rng)
        return total, count, {"places": jnp.asarray(batch.tokens.size, jnp.float32), "noise": jax.random.normal(rng[0])}

    trained = trainer(tmp_path, objective=objective, max_steps=3, accumulation=2, evaluation=list(islice(packer(), 2)))
    trained.fit()
    first, second, third = records(tmp_path)
    assert first["places"] == pytest.approx(4 * SEQ / first["tokens"])
    # Another key each step.
    assert len({r["noise"] * r["tokens"] for r in (first, second, third)}) == 3
    assert set(trained.evaluate()) == {"eval_loss", "eval_tokens", "eval_places", "eval_noise"}


def test_mfu_is_the_models_arithmetic_over_what_the_device_could_have_done(tmp_path):
    trained = trainer(tmp_path / "transformer", transformer(), max_steps=3)
    trained.fit()
    for batch, record in zip(packer(), records(trained.output)):
        expected = training_flops(trained.model)(batch.segment_ids, record["tokens"])
        assert record["mfu"] * record["seconds"] * peak_flops(jnp.float32) == pytest.approx(expected)
    other = trainer(tmp_path / "other", max_steps=1)  # whose arithmetic isn't known
    other.fit()
    assert "mfu" not in records(other.output)[0]


def test_evaluation_may_have_its_own_objective(tmp_path):
    def doubled(model, batch, rng):
        total, count, _ = lm(model, batch, rng)
        return 2 * total, count, {}

    batches = list(islice(packer(), 1))
    options = TrainingOptions(max_steps=1, batch_size=4, eval_every=0)
    both = [Trainer(Bigram(0), doubled, packer(), options, tmp_path, batches, eval_objective=o) for o in (None, lm)]
    first, second = (t.evaluate()["eval_loss"] for t in both)
    assert first == pytest.approx(2 * second)


def test_an_average_of_the_weights_is_kept_evaluated_and_goes_on(tmp_path):
    whole = trainer(tmp_path / "whole", ema_decay=0.7, eval_every=6, evaluation=list(islice(packer(), 1)))
    expected, steps = jax.tree.map(np.array, whole.state.model), []

    def follow(record):
        steps.append(record["step"])

    whole.fit(follow)
    # By hand, from the parameters after each step.
    again = trainer(tmp_path / "by hand", max_steps=12)
    step = jax.jit(again._step)
    state = replace(again.state, data=None)
    for number, batch in enumerate(islice(packer(), 12)):
        state, _ = step(state, Batch(*(field[None] for field in batch)))
        keep = min(0.7, (1 + number) / (10 + number))
        expected = jax.tree.map(lambda a, p, keep=keep: keep * a + (1 - keep) * np.asarray(p), expected, state.model)
    for a, b in zip(jax.tree.leaves(whole.state.average), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    evaluated = [r for r in records(tmp_path / "whole") if "eval_loss" in r]
    assert all(set(r) == {"step", "eval_loss", "eval_tokens", "eval_average_loss"} for r in evaluated)
    total, count, _ = lm(whole.averaged(), whole._evaluation[0], None)
    assert evaluated[-1]["eval_average_loss"] == pytest.approx(float(total / count), rel=1e-5)
    trainer(tmp_path / "parts", ema_decay=0.7, max_steps=5, schedule="constant").fit()
    parts, other = (trainer(tmp_path / name, ema_decay=0.7, schedule="constant") for name in ("parts", "other"))
    parts.fit()
    other.fit()
    for a, b in zip(jax.tree.leaves(parts.state), jax.tree.leaves(other.state), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("remat", ["layer", "dots"])
def test_what_is_computed_again_changes_nothing(remat):
    batch = next(packer())

    def gradient(model):
        graph, params = nnx.split(model)
        return jax.jit(jax.grad(lambda p: lm(nnx.merge(graph, p), batch, None)[0])).lower(params), params

    (plain, params), (other, _) = gradient(transformer()), gradient(transformer(remat=remat))
    for a, b in zip(jax.tree.leaves(plain.compile()(params)), jax.tree.leaves(other.compile()(params)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(a).max()))
    assert other.as_text() != plain.as_text()


@pytest.mark.parametrize("optimizer", ["muon", "adafactor"])
def test_other_optimisers_learn_too_and_resume(tmp_path, optimizer):
    options = {"optimizer": optimizer, "schedule": "constant", "learning_rate": 0.05}
    whole = trainer(tmp_path / "whole", **options)
    whole.fit()
    losses = [r["loss"] for r in records(tmp_path / "whole")]
    assert losses[-1] < losses[0] - 0.1
    trainer(tmp_path / "parts", max_steps=7, **options).fit()
    parts = trainer(tmp_path / "parts", **options)
    parts.fit()
    for a, b in zip(jax.tree.leaves(parts.state), jax.tree.leaves(whole.state), strict=True):
        np.testing.assert_array_equal(a, b)


# ---------------------------------------------------------------------- what is not finite


def poisoned(bad_steps):
    """The lm objective, but not finite on the batches of some steps."""
    batches = list(islice(packer(), max(bad_steps)))
    marks = jnp.array([np.sum(batches[step - 1].tokens) for step in sorted(bad_steps)])

    def objective(model, batch, rng):
        total, count, metrics = lm(model, batch, rng)
        return jnp.where((batch.tokens.sum() == marks).any(), jnp.nan, 1.0) * total, count, metrics

    return objective


def test_a_step_that_is_not_finite_is_skipped_and_counted(tmp_path):
    trained = trainer(tmp_path, objective=poisoned({3, 4}), max_steps=6, max_nonfinite=3)
    trained.fit()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line.get("skipped")] == [3, 4]
    assert [line["loss"] is None for line in lines] == [False, False, True, True, False, False]
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(trained.state.model))
    assert int(trained.state.nonfinite) == 0
    assert int(trained.state.step) == 6
    # The two steps changed nothing: the optimiser counted four.
    assert int(trained.state.optimizer[1][0].count) == 4


def test_too_many_steps_in_a_row_that_are_not_finite_end_the_run(tmp_path):
    broken = trainer(tmp_path, objective=poisoned({2, 4, 5}), max_steps=9, max_nonfinite=2)
    with pytest.raises(FloatingPointError, match=r"2 steps in a row had no finite .* the last one step 5") as error:
        broken.fit()
    with np.load(tmp_path / "nonfinite-5.npz") as saved:
        batch = saved["tokens"]
    assert str(tmp_path / "nonfinite-5.npz") in str(error.value)
    np.testing.assert_array_equal(batch, list(islice(packer(), 5))[4].tokens)
    assert [r["step"] for r in records(tmp_path)] == [1, 2, 3, 4, 5]


# ---------------------------------------------------------------------- resume


class Crash(Exception):
    pass


def crash_at(step):
    def report(record):
        if record["step"] == step:
            raise Crash

    return report


def whole_run(output, **options):
    """The run of ``uninterrupted``, in another folder."""
    options = {"eval_every": 4, "eval_first": True, "checkpoint_every": 3, "accumulation": 2} | options
    return trainer(output, evaluation=list(islice(packer(), 2)), **options)


def test_a_run_that_crashed_goes_on_as_if_it_had_not(tmp_path, uninterrupted):
    for step in (2, 4, 8, 12):  # before the first checkpoint, right after one, at an evaluation, at the last step
        with pytest.raises(Crash):
            whole_run(tmp_path).fit(crash_at(step))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 13, "lo')  # killed while writing
    resumed = whole_run(tmp_path)
    resumed.fit()
    assert curve(tmp_path) == curve(uninterrupted.output)
    for a, b in zip(jax.tree.leaves(resumed.state), jax.tree.leaves(uninterrupted.state), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_run_that_is_done_stays_as_it_is(uninterrupted):
    before = (uninterrupted.output / "metrics.jsonl").read_text()
    seen = []
    resumed = whole_run(uninterrupted.output)
    resumed.fit(seen.append)
    assert seen == []
    assert (uninterrupted.output / "metrics.jsonl").read_text() == before
    assert resumed.evaluate() == uninterrupted.evaluate()


def test_the_last_checkpoints_are_kept(uninterrupted):
    assert sorted(p.name for p in (uninterrupted.output / "checkpoints").iterdir()) == ["12", "9"]


def test_the_best_checkpoint_is_kept_besides_and_the_last_is_resumed(tmp_path):
    """The rate is far too high at the end: an early evaluation is the best."""

    def run(steps):
        options = {"eval_every": 2, "checkpoint_every": 2, "keep": 1, "keep_best": True, "schedule": "constant"}
        evaluation = list(islice(packer(), 1))
        later = trainer(tmp_path, evaluation=evaluation, max_steps=steps, learning_rate=0.5, **options)
        later.fit()
        return later

    run(6)
    last = run(12)
    held_out = {r["step"]: r["eval_loss"] for r in records(tmp_path) if "eval_loss" in r}
    best = min(held_out, key=held_out.get)
    assert int(last.state.step) == 12
    assert best != 12
    assert {int(p.name) for p in (tmp_path / "checkpoints").iterdir()} == {best, 12}
    model, step = last.best()
    assert step == best
    again = trainer(tmp_path / "again", model, evaluation=list(islice(packer(), 1)))
    assert again.evaluate()["eval_loss"] == held_out[best]
    assert last.evaluate()["eval_loss"] == held_out[12]


def test_the_best_is_had_where_it_is_kept(tmp_path):
    with pytest.raises(ValueError, match=r"training\.keep_best must be true .*, got False"):
        trainer(tmp_path).best()
    with pytest.raises(ValueError, match="must hold a checkpoint that was evaluated, got none"):
        trainer(tmp_path, keep_best=True, eval_every=2, checkpoint_every=2).best()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_returns(tmp_path, uninterrupted, number):
    handlers = signal.getsignal(number)

    def report(record):
        if record["step"] == 4 and "loss" in record:
            signal.raise_signal(number)

    stopped = whole_run(tmp_path)
    stopped.fit(report)
    assert stopped.stopped_by == number
    assert signal.getsignal(number) is handlers
    done = int(stopped.state.step)
    assert 4 <= done <= 6
    assert (tmp_path / "checkpoints" / str(done)).is_dir()
    resumed = whole_run(tmp_path)
    resumed.fit()
    assert resumed.stopped_by is None
    assert curve(tmp_path) == curve(uninterrupted.output)


def test_a_checkpoint_of_another_model_is_refused(uninterrupted):
    other = trainer(uninterrupted.output, optimizer="lion")
    with pytest.raises(ValueError, match="holds a checkpoint of another model or optimiser: optimizer"):
        other.fit()


def test_data_must_come_in_the_batches_the_options_say(tmp_path):
    with pytest.raises(ValueError, match="data must come in batches of 8 rows, got 4"):
        Trainer(Bigram(0), lm, packer(4), TrainingOptions(batch_size=8), tmp_path)


def finite():
    return Packer(documents, SEQ, 4, seed=1, window=200, epochs=1)


@pytest.mark.parametrize("every", [0, 1, 100])  # at its end, too, a step that an evaluation was due after
def test_finite_data_end_the_run_with_an_evaluation_and_a_checkpoint(tmp_path, every):
    steps = len(list(finite()))
    short = trainer(tmp_path, max_steps=100, eval_every=every, evaluation=list(islice(packer(), 1)))
    short._data = finite()
    short.fit()
    assert int(short.state.step) == sum("loss" in record for record in records(tmp_path)) == steps
    assert (tmp_path / "checkpoints" / str(steps)).is_dir()
    if every:
        assert {"step", "eval_loss"} <= set(records(tmp_path)[-1])
        assert records(tmp_path)[-1]["step"] == steps


# ---------------------------------------------------------------------- kill -9


def start(output):
    """This run in a process of its own, with a pause after each step so that it can be killed at a chosen one."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    return subprocess.Popen([sys.executable, __file__, str(output)], env=environment, stderr=subprocess.PIPE, text=True)


def kill(process, when, patience=120.0):
    end = time.monotonic() + patience
    while not when():
        if process.poll() is not None or time.monotonic() > end:
            process.kill()
            pytest.fail(f"the run ended before it could be killed:\n{process.communicate()[1]}")
        time.sleep(0.0005)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def has_step(output, step):
    return lambda: f'"step": {step},' in (output / "metrics.jsonl").read_text() if output.exists() else False


def test_kill_9_at_any_step_changes_nothing(tmp_path, uninterrupted):
    output = tmp_path / "run"
    output.mkdir()
    (output / "metrics.jsonl").touch()
    for step in (2, 8):
        kill(start(output), has_step(output, step))
    whole_run(output).fit()
    assert curve(output) == curve(uninterrupted.output)


def test_kill_9_while_a_checkpoint_is_written_changes_nothing(tmp_path, uninterrupted):
    output = tmp_path / "run"
    checkpoints = output / "checkpoints"

    def half_written():
        return checkpoints.exists() and [p for p in checkpoints.iterdir() if not p.name.isdigit()]

    for _ in range(5):  # the kill may come just too late
        kill(start(output), half_written)
        if half_written():
            break
    assert half_written()
    whole_run(output).fit()
    assert not half_written()
    assert curve(output) == curve(uninterrupted.output)


if __name__ == "__main__":
    whole_run(Path(sys.argv[1])).fit(lambda record: time.sleep(0.05))
