"""GRPO runs: rollouts are what `generate` says, steps don't depend on parts, and a run goes on exactly."""

import json
import sys
from operator import itemgetter

import jax
import numpy as np
import pytest
from flax import nnx

from heddle import cli
from heddle.config import load_config
from heddle.data.packing import NO_TARGET
from heddle.jax import sampler
from heddle.jax.generation import generate
from heddle.jax.grpo import completion_log_probabilities, importance_correction
from heddle.jax.run import make_model, prepare, run
from heddle.metrics import read_metrics

SMALL = [
    "training.objective=grpo", "data.corpus=largest", "data.held_out=0.2", "grpo.task=[digits=2]", "data.seq_len=12",
    "model.hidden_size=16", "model.intermediate_size=24", "model.num_hidden_layers=1", "model.num_attention_heads=2",
    "model.num_key_value_heads=1", "training.batch_size=8", "training.max_steps=5", "training.eval_every=0",
    "training.learning_rate=0.01", "training.schedule=constant", "training.checkpoint_every=1",
    "grpo.rewards=[reward_functions:low_bytes]", "grpo.num_generations=4", "grpo.max_completion=5",
]  # fmt: skip
ENDS = list(range(0, 257, 5))
FREE = f"grpo.stop_ids={ENDS}"


@pytest.fixture
def options(tmp_path):
    return [*SMALL, f"output={tmp_path / 'run'}"]


def curve(folder):
    """What must not depend on how often a run was killed: everything but times."""
    times = {"seconds", "tokens_per_second", "mfu"}
    return [{k: v for k, v in r.items() if k not in times} for r in read_metrics(folder / "metrics.jsonl")]


@pytest.mark.parametrize(
    ("temperature", "more"), [(1.0, {}), (0.7, {}), (1.6, {"top_k": 40, "top_p": 0.9})], ids=["1", "0.7", "truncated"]
)
def test_rollouts_are_what_generate_says_with_the_weights_of_the_moment(options, temperature, more):
    how = [f"grpo.temperature={temperature}", *(f"grpo.{name}={value}" for name, value in more.items())]
    config = load_config(None, [*options, "grpo.importance_cap=2", FREE, *how])
    trainer, tokenizer = prepare(config)
    rollouts = trainer._rollouts
    other = make_model(load_config(None, [*options, "training.seed=1"]), tokenizer)
    seen = []
    with rollouts.rewards:
        for model in (trainer.model, other):
            at = rollouts.state()
            batch, measured = rollouts.roll(model)
            seeds = [rollouts._seed_of(at["count"], number) for number in range(2)]
            seen += seeds
            rollouts.problems.next = at["next"]
            truncated = []
            for number, seed in enumerate(seeds):
                prompt = rollouts.problems.take(2).prompt
                for sample in range(4):
                    row = 4 * number + sample
                    [alone] = generate(
                        model, tokenizer, [prompt], max_tokens=5, sampler=sampler(temperature, **more),
                        seed=seed + sample, stop_ids=ENDS, logprobs=0, logprobs_temperature=temperature,
                    )  # fmt: skip
                    learned = batch.targets[row] != NO_TARGET
                    assert batch.targets[row][learned].tolist() == list(alone.tokens)
                    told = [token.chosen for token in alone.logprobs]
                    np.testing.assert_allclose(batch.sampled[row][learned], told, atol=1e-4)
                    assert batch.tokens[row, : len(prompt)].tolist() == list(prompt.encode())
                    truncated.append(alone.finish_reason == "length")
            # The engine's own log-probabilities are the trainer's, but for rounding: of all tokens, also where few are
            # sampled from, and there is nothing to correct.
            found = completion_log_probabilities(model, batch, temperature)[0]
            np.testing.assert_allclose(found, batch.sampled, atol=1e-4)
            np.testing.assert_allclose(importance_correction(found, batch.sampled, 2.0), 1, atol=1e-4)
            assert measured["truncated"] == np.mean(truncated)
            assert measured["completion_tokens"] == (batch.targets != NO_TARGET).sum() / 8
            groups = batch.advantages[:, 0].reshape(2, 4)
            np.testing.assert_allclose(groups.mean(axis=1), 0, atol=1e-6)
    assert len(set(seen)) == 4
    rollouts.restore({**rollouts.state(), "count": 0, "next": 0})
    with rollouts.rewards:
        first = rollouts.roll(trainer.model).batch
        rollouts.restore({**rollouts.state(), "count": 0, "next": 0})
        again = rollouts.roll(trainer.model).batch
    for one, other in zip(first, again):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
def test_parts_of_a_batch_add_up_to_it(options, loss_type):
    trainer, _ = prepare(load_config(None, [*options, f"grpo.loss_type={loss_type}", FREE]))
    with trainer._rollouts.rewards:
        batch = trainer._rollouts.roll(trainer.model).batch
    assert len(set((batch.targets != NO_TARGET).sum(axis=1))) > 1
    graph, params = nnx.split(trainer.model)

    @jax.jit
    def compiled(params, part):
        def loss(params):
            total, count, _ = trainer._objective(nnx.merge(graph, params), part, jax.random.key(0))
            return total, count

        return jax.value_and_grad(loss, has_aux=True)(params)

    def gradient(parts):
        each = [compiled(params, jax.tree.map(itemgetter(i), batch)) for i in parts]
        count = sum(int(n) for (_, n), _ in each)
        return jax.tree.map(lambda *g: sum(g) / count, *(g for _, g in each)), sum(float(t) for (t, _), _ in each)

    whole, value = gradient([slice(0, 8)])
    assert max(float(abs(g).max()) for g in jax.tree.leaves(whole)) > 1e-3
    for size in (4, 2):
        parts, same = gradient([slice(at, at + size) for at in range(0, 8, size)])
        assert same == pytest.approx(value, abs=1e-5)
        for a, b in zip(jax.tree.leaves(parts), jax.tree.leaves(whole), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5 * float(abs(b).max()) + 1e-8)


class Crash(Exception):
    pass


HARD = [
    "grpo.num_iterations=2", "grpo.beta=0.1", "grpo.reference_every=3", "grpo.reference_mix=0.5", FREE,
    "grpo.curriculum=true", "grpo.curriculum_threshold=0.01", "grpo.curriculum_prompts=3", "training.eval_every=2",
    "grpo.eval_prompts=3", "grpo.importance_cap=2",
]  # fmt: skip


def test_a_run_that_crashed_goes_on_as_if_it_had_not(options, tmp_path):
    run(load_config(None, [*options, *HARD]))
    whole = curve(tmp_path / "run")
    steps = [record for record in whole if "loss" in record]
    assert [record["step"] for record in steps] == [1, 2, 3, 4, 5]
    assert ["reward" in record for record in steps] == [True, False, True, False, True]  # two steps on each rollout
    assert [record["level"] for record in steps if "level" in record] == [1, 1, 2]
    assert steps[0]["kl"] == pytest.approx(0, abs=1e-9)
    assert steps[1]["kl"] > 1e-8
    assert len([record for record in whole if "eval_reward" in record]) == 3

    again = [*options, *HARD, f"output={tmp_path / 'again'}"]
    for last in (1, 2, 4):  # in the middle of a rollout, and at its end

        def crash(record, last=last):
            if record["step"] > last:
                raise Crash

        with pytest.raises(Crash):
            run(load_config(None, again), crash)
    trainer = run(load_config(None, again))
    assert curve(tmp_path / "again") == whole
    assert trainer.state.reference is not None


def test_the_reference_moves_as_it_is_set(options):
    """By hand: r ← (1 - α) r + α π after each n steps, as TRL's sync_ref_model has it."""
    how = ["grpo.beta=0.1", "grpo.reference_every=2", "grpo.reference_mix=0.25"]
    trainer, _ = prepare(load_config(None, [*options, *how]))

    def arrays(variables):
        return [np.array(x) for x in jax.tree.leaves(variables)]

    expected, policies = arrays(trainer.state.reference), []
    for before, initial in zip(expected, arrays(trainer.state.model), strict=True):
        np.testing.assert_array_equal(before, initial)
    step = trainer._step

    def noting(state, parts):
        state, measured = step(state, parts)
        jax.debug.callback(lambda *x: policies.append([np.array(each) for each in x]), *jax.tree.leaves(state.model))
        return state, measured

    trainer._step = noting
    trainer.fit()
    jax.effects_barrier()
    assert len(policies) == 5
    for policy in (policies[1], policies[3]):
        expected = [0.75 * r + 0.25 * p for r, p in zip(expected, policy, strict=True)]
    for found, by_hand in zip(arrays(trainer.state.reference), expected, strict=True):
        np.testing.assert_allclose(found, by_hand, rtol=1e-6, atol=1e-7)
    assert any(np.abs(a - b).max() > 1e-3 for a, b in zip(expected, policies[0], strict=True))


# ---------------------------------------------------------------------- problems and rewards that are of no use


def jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return [f"data.corpus={path}", "grpo.task=null"]


def test_prompts_that_are_too_long_are_found_before_the_run_or_skipped(options, tmp_path, caplog):
    records = [{"prompt": "a" * (i % 7 + 1), "answer": "a"} for i in range(70)]
    records[40]["prompt"] = "b" * 8  # and 5 of a completion
    corpus = jsonl(tmp_path / "prompts.jsonl", records)
    with pytest.raises(ValueError, match=r"prompts\.jsonl:41: data\.seq_len must have room for a prompt of 8 tokens"):
        prepare(load_config(None, [*options, *corpus]))
    skipping = [*options, *corpus, "data.on_error=skip"]
    trainer, _ = prepare(load_config(None, skipping))
    assert "prompts.jsonl:41: data.seq_len must have room" in caplog.text
    assert not any(set(trainer._rollouts.problems.take(1).prompt) == {"b"} for _ in range(140))
    # Of a task without an end they are met on the way.
    sums = "grpo.task=[min_terms=2,max_terms=3,min_digits=1,max_digits=1]"
    endless = [*options, "data.corpus=reasoning-gym:chain_sum", sums, "grpo.system=''", "grpo.max_completion=1"]
    endless += ["data.seq_len=68", "training.batch_size=32"]  # two terms are 67 bytes, three are 71
    with pytest.raises(
        ValueError, match=r"reasoning-gym:chain_sum:\d+: data\.seq_len must have room for a prompt of 71"
    ):
        roll(endless)
    measured, stream = roll([*endless, "data.on_error=skip"])
    assert measured["skipped_problems"] == stream.skipped > 0


def roll(options):
    trainer, _ = prepare(load_config(None, options))
    with trainer._rollouts.rewards:
        return trainer._rollouts.roll(trainer.model).measured, trainer._rollouts.problems


def test_a_task_without_answers_is_refused_where_they_are_compared(options, tmp_path):
    corpus = jsonl(tmp_path / "prompts.jsonl", [{"prompt": "a", "answer": "a"}, {"prompt": "b"}, {"prompt": "c"}])
    with pytest.raises(ValueError, match=r"prompts\.jsonl:2: no 'answer', which the reward 'task' compares with"):
        prepare(load_config(None, [*options, *corpus, "grpo.rewards=[task]"]))
    prepare(load_config(None, [*options, *corpus]))


def test_a_run_whose_rewards_never_apply_ends(options, tmp_path):
    never = [*options, "grpo.rewards=[reward_functions:words]", "training.max_nonfinite=3"]
    with pytest.raises(
        FloatingPointError, match="3 rollouts in a row had no completion that a reward applies to, of words"
    ):
        run(load_config(None, never))
    assert [record["not_applicable"] for record in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [1, 1]


def test_a_curriculum_needs_levels(options, tmp_path):
    curriculum = [*options, "grpo.curriculum=true"]
    alike = jsonl(tmp_path / "prompts.jsonl", [{"prompt": str(i), "answer": i} for i in range(9)])
    terms = "grpo.task=[min_terms=2,max_terms=2,min_digits=1,max_digits=1]"
    for how in (alike, ["data.corpus=reasoning-gym:chain_sum", terms, "data.seq_len=600"], ["grpo.task=[digits=1]"]):
        with pytest.raises(
            ValueError, match=r"grpo\.curriculum must be false where the task has one level of difficulty"
        ):
            prepare(load_config(None, [*curriculum, *how]))
    apart = jsonl(tmp_path / "prompts.jsonl", [{"prompt": str(i), "answer": i, "level": i % 2 + 1} for i in range(9)])
    prepare(load_config(None, [*curriculum, *apart]))


def test_an_evaluation_asks_as_many_problems_as_it_is_to_and_none_that_is_trained_on(options):
    trainer, _ = prepare(load_config(None, [*options, "training.eval_every=5", "grpo.eval_prompts=64"]))
    asked = [problem.prompt for problem in trainer._evaluation]
    assert len(asked) == 64
    assert not {*asked} & {trainer._rollouts.problems.take(2).prompt for _ in range(500)}


# ---------------------------------------------------------------------- the command


def heddle(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["heddle", *arguments])
    with pytest.raises(SystemExit) as exit:
        cli.main()
    captured = capsys.readouterr()
    return exit.value.code, captured.out, captured.err


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("training.batch_size=6", "training.batch_size must be a multiple of grpo.num_generations"),
        ("grpo.max_completion=12", "data.seq_len must be above grpo.max_completion"),
        ("framework=torch", "is for framework=jax, but framework is torch"),
        ("grpo.delta=1.1", "grpo.delta must be above 1 + grpo.clip_high"),
        ("grpo.task=[digits]", "grpo.task must be a list of name=value, got 'digits'"),
        ("grpo.reward_weights=[1, 2]", "grpo.reward_weights must be one for each of grpo.rewards, got 2 for 1"),
        ("grpo.rewards=[nothing:here]", "reward nothing:here can't be found: No module named 'nothing'"),
        ("data.corpus=stdlib", "settings are for largest, reasoning-gym:NAME alone"),
        (
            "data.seq_len=7",
            "data.seq_len must have room for a prompt of 3 tokens and grpo.max_completion more, 8; got 7",
        ),
        ("grpo.los_type=dapo", "grpo.los_type is not an option"),
    ],
)
def test_what_cannot_be_run_is_one_line(options, monkeypatch, capsys, wrong, message):
    code, _, err = heddle(monkeypatch, capsys, "train", *options, wrong)
    assert code == 2
    assert message in err
    assert len(err.splitlines()) == 1


@pytest.mark.slow
def test_a_mesh_changes_nothing(options, tmp_path):
    """Each whole copy of the model samples its share, and steps are computed over all devices."""
    if len(jax.devices()) < 8:
        pytest.skip("needs 8 devices")
    more = ["grpo.beta=0.1", "grpo.num_iterations=2", "grpo.importance_cap=2", "training.max_steps=4", FREE]
    mesh = ["mesh.data=2", "mesh.fsdp=2", "mesh.context=2"]
    folders = [tmp_path / "alone", tmp_path / "spread"]
    for folder, sizes in zip(folders, ([], mesh), strict=True):
        run(load_config(None, [*options, *more, *sizes, f"output={folder}"]))
    alone, spread = map(curve, folders)
    assert len(alone) == 4
    for one, other in zip(alone, spread, strict=True):
        assert other == pytest.approx(one, rel=1e-3, abs=1e-4)


def test_a_dilated_model_from_scratch_is_sampled_as_it_is_trained(options, tmp_path):
    """In batches, since the engine can't serve it; the correction is the ratio of both probabilities."""
    dilated = ["model.attention=dilated", "model.segment_lengths=[4, 16]", "model.dilation_rates=[1, 2]"]
    run(load_config(None, [*options, *dilated, "grpo.importance_cap=2", "training.max_steps=2", FREE]))
    assert [record["correction"] for record in curve(tmp_path / "run")] == pytest.approx([1.0, 1.0], abs=1e-4)
