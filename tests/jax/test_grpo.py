"""GRPO's quantities: TRL's, by its own loss on the same inputs, and the formulas by hand."""

import itertools
from collections import defaultdict
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from compile_once import compile_once  # noqa: F401
from tiny_models import hugging_face, tokens

from heddle.data.packing import NO_TARGET
from heddle.jax import grpo as objective
from heddle.jax.generation import Completion
from heddle.jax.grpo import RolloutBatch, clipped_surrogate, group_advantages, grpo, log_ratios, token_weights
from heddle.jax.grpo_rollouts import rollout_batch
from heddle.jax.model import Transformer
from heddle.options import GRPO_LOSSES, GRPOOptions

ROWS, SEQ, MOST = 6, 7, 9  #: completions, places, and the most tokens that a completion may have
KEY = jax.random.key(0)
LENGTHS = (7, 1, 4, 7, 3, 5)


def inputs(masked=()):
    """Log-probabilities and advantages of completions of different lengths, far enough apart to be clipped."""
    random = np.random.default_rng(0)
    mask = np.arange(SEQ) < np.array(LENGTHS)[:, None]
    mask[list(masked)] = False
    new = -random.exponential(1.5, (ROWS, SEQ))
    old, reference, sampled = (new + random.normal(0, size, (ROWS, SEQ)) for size in (0.4, 0.6, 0.3))
    advantages = np.array([1.3, -0.7, 0.0, -2.1, 0.4, 1.9])
    return tuple(x.astype(np.float32) for x in (new, old, reference, sampled, advantages)), mask


# ---------------------------------------------------------------------- TRL


def theirs(options: GRPOOptions, *, old: bool, masked=()):
    """TRL's loss, its gradient in the log-probabilities, and its metrics, of :func:`inputs`.

    The trainer's own function, on a trainer that is no more than what that function asks of it.
    """
    from trl import GRPOTrainer

    (new, before, reference, sampled, advantages), mask = (
        tuple(map(torch.from_numpy, each)) if isinstance(each, tuple) else torch.from_numpy(each).float()
        for each in inputs(masked)
    )
    new = new.clone().requires_grad_()
    metrics = {"train": defaultdict(list)}
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (new, torch.ones_like(new), None),
        aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None, _entropy_bonus_enabled=False,
        importance_sampling_level=options.ratio_level, beta=options.beta, loss_type=options.loss_type,
        epsilon_low=options.clip_low, epsilon_high=options.clip_high, max_completion_length=MOST,
        use_vllm=options.importance_cap is not None, vllm_importance_sampling_correction=True,
        current_gradient_accumulation_steps=1, model=SimpleNamespace(training=True), _metrics=metrics,
        args=SimpleNamespace(delta=options.delta, use_bias_correction_kl=False, steps_per_generation=1),
        accelerator=SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x),
    )  # fmt: skip
    nothing = torch.zeros(ROWS, 1, dtype=torch.long)
    batch = {
        "prompt_ids": nothing, "prompt_mask": nothing, "completion_ids": torch.zeros(ROWS, SEQ, dtype=torch.long),
        "completion_mask": mask, "advantages": advantages, "num_items_in_batch": mask.sum(),
        "ref_per_token_logps": reference,
    } | ({"old_per_token_logps": before} if old else {})  # fmt: skip
    if options.importance_cap is not None:
        ratio = torch.exp(((before if old else new.detach()) - sampled) * mask)
        batch["importance_sampling_ratio"] = torch.clamp(ratio, max=options.importance_cap)
    loss = GRPOTrainer._compute_loss(trainer, None, batch)
    loss.backward()
    return loss.item(), new.grad.numpy(), metrics["train"]


def ours(options: GRPOOptions, monkeypatch, *, old: bool, masked=()):
    """The same of ours: the objective, with log-probabilities in place of a model."""
    (new, before, reference, sampled, advantages), mask = inputs(masked)
    ids = np.zeros((ROWS, SEQ), np.int32)
    batch = RolloutBatch(
        ids, ids, ids, np.where(mask, 0, NO_TARGET), np.repeat(advantages[:, None], SEQ, 1),
        (token_weights(mask, options.loss_type, MOST) * mask.sum()).astype(np.float32), before if old else None,
        reference if options.beta else None, None if options.importance_cap is None else sampled,
    )  # fmt: skip
    monkeypatch.setattr(objective, "completion_log_probabilities", lambda model, *_: (model, jnp.ones_like(model)))

    def loss(new):
        total, count, sums = grpo(options)(new, batch, KEY)
        count = jnp.maximum(count, 1)
        return total / count, {name: value / count for name, value in sums.items()}

    (value, measured), gradient = jax.value_and_grad(loss, has_aux=True)(jnp.asarray(new))
    return float(value), np.asarray(gradient), measured


CASES = [
    {"loss_type": loss_type, "ratio_level": level, "old": old, **more}
    for (loss_type, level, old), more in zip(
        itertools.product(GRPO_LOSSES, ("token", "sequence"), (True, False)),
        itertools.cycle([{}, {"beta": 0.07}, {"clip_high": 0.28, "delta": 1.4, "masked": (0, 4)},
                         {"importance_cap": 1.1, "beta": 0.2, "masked": (1,)}, {"delta": 1.3}]),
    )
]  # fmt: skip
CASES += [{"loss_type": loss_type, "old": True, "masked": range(ROWS), "beta": 0.1} for loss_type in GRPO_LOSSES]


@pytest.mark.parametrize("case", CASES, ids=lambda case: ",".join(f"{k}={v}" for k, v in case.items()))
def test_loss_gradient_and_metrics_are_trls(case, monkeypatch):
    case = dict(case)
    how = {"old": case.pop("old"), "masked": case.pop("masked", ())}
    options = GRPOOptions(max_completion=MOST, **case)
    loss, gradient, metrics = theirs(options, **how)
    value, derivative, measured = ours(options, monkeypatch, **how)
    assert value == pytest.approx(loss, abs=1e-5)
    np.testing.assert_allclose(derivative, gradient, atol=1e-5)
    if len(how["masked"]) < ROWS:
        # Also where the policy is the one that sampled: the ratio isn't the constant 1.
        assert np.abs(derivative).max() > 1e-3
    if options.beta:
        assert float(measured["kl"]) == pytest.approx(metrics["kl"][0], abs=1e-5)
    if options.ratio_level == "token":  # theirs counts sequences, ours their tokens
        for name in ("low", "high"):
            assert float(measured[f"clip_{name}"]) == pytest.approx(metrics[f"clip_ratio/{name}_mean"][0], abs=1e-6)
        if how["old"] and not how["masked"]:
            assert measured["clip_low"] > 0
            assert measured["clip_high"] > 0


REWARDS = np.array([
    [0.0, 1.0, 1.0, 0.25], [2.0, 2.0, 2.0, 2.0], [np.nan, 1.0, 0.0, np.nan], [np.nan] * 4,
    [np.nan, 3.0, np.nan, np.nan], [-1.5, 0.1, 7.0, 0.1],
])  # fmt: skip


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
def test_a_whole_batch_is_trls(tmp_path, monkeypatch):
    """Advantages, masks, log-probabilities and the loss, by their trainer over the same model."""
    import datasets
    import trl
    from tokenizers import Tokenizer as Backend
    from tokenizers import models
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    hugging_face("llama").save_pretrained(tmp_path / "model")
    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "model", attn_implementation="eager")
    words = {f"w{i}": i for i in range(199)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Backend(models.WordLevel(words, unk_token="w0")), eos_token="w2", pad_token="w0"
    )
    group, length = 4, 6
    prompts = [tokens(n, seed=n).tolist() for n in (3, 5, 1, 4, 2, 6)]
    random = np.random.default_rng(3)
    answers = [random.integers(3, 199, random.integers(1, length + 1)).tolist() for _ in range(len(prompts) * group)]
    ended = [[*ids[:-1], 2] if at % 3 else ids for at, ids in enumerate(answers)]
    rewards = REWARDS.reshape(-1)
    config = trl.GRPOConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=len(ended), num_generations=group, report_to=[],
        use_cpu=True, bf16=False, max_completion_length=length, temperature=0.7, beta=0.3, loss_type="grpo",
        mask_truncated_completions=True, disable_tqdm=True, gradient_checkpointing=False, scale_rewards="group",
    )  # fmt: skip
    trainer = trl.GRPOTrainer(
        policy, lambda **_: [0.0], config, train_dataset=datasets.Dataset.from_list([{"prompt": "w3"}] * 24),
        processing_class=tokenizer,
    )  # fmt: skip
    each = [prompt for prompt in prompts for _ in range(group)]
    monkeypatch.setattr(trainer, "_generate", lambda _: (each, ended, None, ["x"] * len(ended), None, {}, None, None))
    monkeypatch.setattr(trainer, "_calculate_rewards", lambda *_: torch.from_numpy(rewards)[:, None].float())
    trainer.current_gradient_accumulation_steps = 1
    with torch.no_grad():  # the reference is the policy before it moved
        batch = trainer._generate_and_score_completions([{"prompt": "w3"}] * len(ended))
        for parameter in policy.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.manual_seed(1)) * 0.01)
    with torch.no_grad():
        loss = trainer._compute_loss(trainer.model, batch)
    policy.save_pretrained(tmp_path / "moved")

    options = GRPOOptions(
        max_completion=length, temperature=0.7, beta=0.3, loss_type="grpo", mask_truncated=True, num_generations=group
    )
    for scale in ("group", "batch", "none"):
        trainer.scale_rewards = scale
        with torch.no_grad():
            scored = trainer._generate_and_score_completions([{"prompt": "w3"}] * len(ended))
        np.testing.assert_allclose(group_advantages(REWARDS, scale)[0].reshape(-1), scored["advantages"], atol=1e-5)

    completions = [
        Completion("", tuple(ids), "stop" if ids[-1] == 2 else "length", len(p)) for p, ids in zip(each, ended)
    ]
    advantages, flat = group_advantages(REWARDS, "group")
    assert float(flat.mean()) == pytest.approx(0.5)
    ours = rollout_batch(each, completions, advantages.reshape(-1), options, 13)
    before, after = (Transformer.from_pretrained(tmp_path / name) for name in ("model", "moved"))
    reference = objective.completion_log_probabilities(before, ours, 0.7)[0]
    for row, (prompt, ids) in enumerate(zip(each, ended)):
        if ids[-1] == 2:
            np.testing.assert_allclose(
                reference[row, len(prompt) - 1 : len(prompt) + len(ids) - 1],
                batch["ref_per_token_logps"][row, : len(ids)], atol=1e-4,
            )  # fmt: skip
    ours = ours._replace(reference=reference)

    total, count, _ = grpo(options)(after, ours, KEY)
    assert float(total / count) == pytest.approx(float(loss), abs=1e-5)


# ---------------------------------------------------------------------- by hand


def test_advantages_by_hand():
    advantages, flat = group_advantages(REWARDS, "group")
    assert flat.tolist() == [False, True, False, True, True, False]
    for row, rewards, is_flat in zip(advantages, REWARDS, flat):
        valid = rewards[~np.isnan(rewards)]
        for advantage, reward in zip(row, rewards):
            if np.isnan(reward) or is_flat:
                assert advantage == 0
            else:
                assert advantage == pytest.approx((reward - valid.mean()) / (valid.std(ddof=1) + 1e-4), abs=1e-12)
    none, batch = group_advantages(REWARDS, "none")[0], group_advantages(REWARDS, "batch")[0]
    np.testing.assert_allclose(batch * (np.nanstd(REWARDS, ddof=1) + 1e-4), none, atol=1e-12)
    np.testing.assert_allclose(none[0], REWARDS[0] - REWARDS[0].mean())
    with pytest.raises(ValueError, match="scale must be one of group, batch, none; got 'all'"):
        group_advantages(REWARDS, "all")


def test_weights_by_hand():
    _, mask = inputs(masked=(2,))
    lengths, losses = mask.sum(axis=1), np.random.default_rng(1).normal(size=mask.shape)
    means = [losses[i, :n].mean() if n else 0.0 for i, n in enumerate(lengths)]
    flat = losses[mask]
    expected = {"grpo": np.mean(means), "bnpo": flat.mean(), "dapo": flat.mean(), "dr_grpo": flat.sum() / (ROWS * MOST)}
    for name in GRPO_LOSSES:
        assert (token_weights(mask, name, MOST) * losses).sum() == pytest.approx(expected[name])
        nothing = token_weights(np.zeros_like(mask), name, MOST)
        assert np.isfinite(nothing).all()
        assert (nothing == 0).all()
    with pytest.raises(ValueError, match="loss_type must be one of grpo, bnpo, dapo, dr_grpo; got 'ppo'"):
        token_weights(mask, "ppo", MOST)


def test_ratios_and_clipping_by_hand():
    (new, old, *_), mask = inputs()
    token, sequence = (np.exp(log_ratios(new, old, mask, level)) for level in ("token", "sequence"))
    for i, n in enumerate(LENGTHS):
        np.testing.assert_allclose(token[i, :n], np.exp(new[i, :n] - old[i, :n]), rtol=1e-5)
        assert sequence[i, 0] == pytest.approx((np.exp(new[i, :n].sum() - old[i, :n].sum())) ** (1 / n), rel=1e-5)
    cases = [  # ratio, advantage, expected
        (1.0, 2.0, -2.0), (1.5, 2.0, -2.0 * 1.28), (1.5, -2.0, 3.0), (0.5, 2.0, -1.0), (0.5, -2.0, 1.6),
        (9.0, -2.0, 2.0 * 3.0),
    ]  # fmt: skip
    for ratio, advantage, expected in cases:
        found = clipped_surrogate(jnp.full((1, 1), ratio), jnp.full((1, 1), advantage), 0.2, 0.28, 3.0)
        assert float(found[0, 0]) == pytest.approx(expected, rel=1e-6)
    with pytest.raises(ValueError, match="level must be one of token, sequence; got 'word'"):
        log_ratios(new, old, mask, "word")


def test_rows_hold_prompts_completions_and_nothing_after_their_end():
    completions = [
        Completion("ab", (7, 8, 2), "stop", 2), Completion("abc", (5, 5, 5, 5), "length", 1),
        Completion("", (2,), "stop", 3),
    ]  # fmt: skip
    prompts, advantages = [[3, 4], [9], [6, 6, 6]], np.array([1.0, -1.0, 0.5])
    for mask_truncated in (False, True):
        options = GRPOOptions(max_completion=4, loss_type="grpo", mask_truncated=mask_truncated)
        batch = rollout_batch(prompts, completions, advantages, options, 6)
        assert batch.tokens.tolist() == [[3, 4, 7, 8, 2, 0], [9, 5, 5, 5, 5, 0], [6, 6, 6, 2, 0, 0]]
        assert batch.segment_ids.tolist() == [[0] * 5 + [-1], [0] * 5 + [-1], [0] * 4 + [-1] * 2]
        second = [-1] * 6 if mask_truncated else [5, 5, 5, 5, -1, -1]
        assert batch.targets.tolist() == [[-1, 7, 8, 2, -1, -1], second, [-1, -1, 2, -1, -1, -1]]
        count = 4 if mask_truncated else 8
        np.testing.assert_allclose(batch.weights.sum(axis=1) / count, [1 / 3, 0 if mask_truncated else 1 / 3, 1 / 3])
    assert batch.sampled is None
