"""GRPO's quantities: TRL's, by its own loss on the same inputs, and the formulas by hand."""

import itertools
from collections import defaultdict
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from tiny_models import hugging_face, tokens

from heddle.data.packing import NO_TARGET
from heddle.jax import grpo as objective
from heddle.jax.answer import TokenLogprobs
from heddle.jax.checkpoint import hugging_face_name
from heddle.jax.generation import Completion
from heddle.jax.grpo import RolloutBatch, clipped_surrogate, group_advantages, grpo, log_ratios, token_weights
from heddle.jax.grpo_rollouts import rollout_batch
from heddle.jax.model import Transformer
from heddle.jax.model_config import ModelConfig
from heddle.jax.parallel import dotted
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
    advantages = np.array([-1.3, 0.7, 0.0, -2.1, 0.4, 1.9])
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
        args=SimpleNamespace(
            delta=options.delta, use_bias_correction_kl=options.unbiased_kl, steps_per_generation=1
        ),
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
CASES += [
    {"loss_type": "dapo", "ratio_level": level, "old": old, "beta": 0.2, "unbiased_kl": False}
    for level in ("token", "sequence")
    for old in (True, False)
]


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
    for name, clipped in clipped_sequences(options, **how).items():
        found, expected = float(measured[f"clip_{name}"]), metrics[f"clip_ratio/{name}_mean"][0]
        if options.ratio_level == "token":
            assert found == pytest.approx(expected, abs=1e-6)
        else:  # theirs counts sequences, masked ones too, ours their tokens
            lengths = inputs(how["masked"])[1].sum(axis=1)
            assert expected == pytest.approx(clipped.mean(), abs=1e-6)
            assert found == pytest.approx((clipped * lengths).sum() / max(lengths.sum(), 1), abs=1e-6)
    if how["old"] and not how["masked"]:
        assert measured["clip_low"] > 0
        assert measured["clip_high"] > 0


def clipped_sequences(options, *, old, masked):
    """Which completions' ratios are clipped from below and from above, by hand."""
    (new, before, _, _, advantages), mask = inputs(masked)
    means = np.where(mask, new - before, 0.0).sum(axis=1) / np.maximum(mask.sum(axis=1), 1)
    ratio = np.exp(means) if old else np.ones(ROWS)
    return {
        "low": (ratio < 1 - options.clip_low) & (advantages < 0),
        "high": (ratio > 1 + options.clip_high) & (advantages > 0),
    }


REWARDS = np.array([
    [0.0, 1.0, 1.0, 0.25], [2.0, 2.0, 2.0, 2.0], [np.nan, 1.0, 0.0, np.nan], [np.nan] * 4,
    [np.nan, 3.0, np.nan, np.nan], [-1.5, 0.1, 7.0, 0.1],
])  # fmt: skip


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
def test_a_whole_batch_is_trls(tmp_path, monkeypatch):
    """Advantages, masks, log-probabilities, entropy, the correction for the engine, the loss by each normalisation and
    its gradient by all weights, by their trainer over the same model."""
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
    told = [
        [-float(x) for x in random.exponential(3, len(ids))] for ids in ended
    ]  # by an engine that computes otherwise
    monkeypatch.setattr(trainer, "_generate", lambda _: (each, ended, None, ["x"] * len(ended), told, {}, None, None))
    monkeypatch.setattr(trainer, "_calculate_rewards", lambda *_: torch.from_numpy(rewards)[:, None].float())
    trainer.current_gradient_accumulation_steps = 1
    trainer.vllm_importance_sampling_mode, trainer.vllm_importance_sampling_clip_max = "token_truncate", 1.5
    cases = [("grpo", cap, unbiased) for cap in (None, 1.5) for unbiased in (True, False)]
    cases += [(loss_type, None, True) for loss_type in GRPO_LOSSES if loss_type != "grpo"]
    expected = {}
    with torch.no_grad():  # the reference is the policy before it moved
        batches = {}
        for cap in (None, 1.5):
            trainer.use_vllm = cap is not None
            batches[cap] = trainer._generate_and_score_completions([{"prompt": "w3"}] * len(ended))
        for parameter in policy.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.manual_seed(1)) * 0.01)
    measured_there = trainer._metrics["train" if trainer.model.training else "eval"]
    for loss_type, cap, unbiased in cases:
        trainer.use_vllm, trainer.args.use_bias_correction_kl = cap is not None, unbiased
        trainer.loss_type = loss_type
        policy.zero_grad()
        loss = trainer._compute_loss(trainer.model, batches[cap])
        loss.backward()
        gradient = {name: parameter.grad.numpy().copy() for name, parameter in policy.named_parameters()}
        expected[loss_type, cap, unbiased] = loss.item(), gradient, measured_there["entropy"][-1]
    trainer.use_vllm, batch = False, batches[None]
    policy.save_pretrained(tmp_path / "moved")
    for scale in ("group", "batch", "none"):
        trainer.scale_rewards = scale
        with torch.no_grad():
            scored = trainer._generate_and_score_completions([{"prompt": "w3"}] * len(ended))
        np.testing.assert_allclose(group_advantages(REWARDS, scale)[0].reshape(-1), scored["advantages"], atol=1e-5)

    completions = [
        Completion(
            "", tuple(ids), "stop" if ids[-1] == 2 else "length", len(p), tuple(TokenLogprobs(x, ()) for x in own)
        )
        for p, ids, own in zip(each, ended, told)
    ]
    advantages, flat = group_advantages(REWARDS, "group")
    assert float(flat.mean()) == pytest.approx(0.5)
    # Theirs doesn't count groups that have fewer than two rewards, from which as little is learned.
    several = (~np.isnan(REWARDS)).sum(axis=1) > 1
    assert measured_there["frac_reward_zero_std"][0] == pytest.approx(float((flat & several).mean())) == 1 / 6

    def options(loss_type="grpo", cap=None, unbiased=True):
        return GRPOOptions(
            max_completion=length, temperature=0.7, beta=0.3, loss_type=loss_type, mask_truncated=True,
            num_generations=group, importance_cap=cap, unbiased_kl=unbiased,
        )  # fmt: skip

    ours = rollout_batch(each, completions, advantages.reshape(-1), options(), 13)
    before, after = (Transformer.from_pretrained(tmp_path / name) for name in ("model", "moved"))
    reference = objective.completion_log_probabilities(before, ours, 0.7)[0]
    for row, (prompt, ids) in enumerate(zip(each, ended)):
        if ids[-1] == 2:
            np.testing.assert_allclose(
                reference[row, len(prompt) - 1 : len(prompt) + len(ids) - 1],
                batch["ref_per_token_logps"][row, : len(ids)], atol=1e-4,
            )  # fmt: skip
    graph, weights = nnx.split(after)
    for loss_type, cap, unbiased in cases:
        how = options(loss_type, cap, unbiased)
        ours = rollout_batch(each, completions, advantages.reshape(-1), how, 13)
        ours = ours._replace(reference=reference, old=None if cap is None else reference)

        def loss(weights, how=how, batch=ours):
            total, count, sums = grpo(how)(nnx.merge(graph, weights), batch, KEY)
            return total / count, {name: value / count for name, value in sums.items()}

        (value, measured), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(weights)
        theirs_value, theirs_gradient, theirs_entropy = expected[loss_type, cap, unbiased]
        assert float(value) == pytest.approx(theirs_value, abs=1e-5), loss_type
        assert float(measured["entropy"]) == pytest.approx(theirs_entropy, rel=1e-5)
        if cap is not None:
            kept = batches[cap]["completion_mask"].bool()
            ratio = batches[cap]["importance_sampling_ratio"][kept]
            assert 0.1 < float((ratio == cap).float().mean()) < 0.9  # some are truncated
            assert float(measured["correction"]) == pytest.approx(float(ratio.mean()), rel=1e-4)
        for name, found in gradients_by_name(gradient, after.config).items():
            want = theirs_gradient[name].T if found.ndim == 2 and "embed" not in name else theirs_gradient[name]
            np.testing.assert_allclose(found, want, rtol=0, atol=1e-4 * float(np.abs(want).max()), err_msg=name)
    # The ratio is 1 where the policy hasn't moved, and changes the gradient all the same.
    one, other = (expected["grpo", None, unbiased][1]["lm_head.weight"] for unbiased in (True, False))
    assert np.abs(one - other).max() > 0.1 * np.abs(one).max()


def gradients_by_name(gradient, config):
    """By the names of the Hugging Face model."""
    leaves = jax.tree_util.tree_leaves_with_path(gradient)
    return {hugging_face_name(dotted(path), config): np.asarray(leaf) for path, leaf in leaves}


def test_the_gradient_by_the_weights_is_that_of_finite_differences():
    """Of the whole loss in float64, along random directions; π_old, π_ref and what the engine said are numbers."""
    random = np.random.default_rng(0)
    config = ModelConfig(
        vocab_size=19, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, initializer_range=0.5,
    )  # fmt: skip
    with jax.enable_x64(True):
        model = Transformer(config, rngs=nnx.Rngs(0), dtype=jnp.float64, param_dtype=jnp.float64)
        graph, weights = nnx.split(model)
        flat, unravel = jax.flatten_util.ravel_pytree(weights)
        assert flat.dtype == jnp.float64
        lengths = np.array(LENGTHS)[:, None]
        place = np.broadcast_to(np.arange(SEQ), (ROWS, SEQ))
        ids = random.integers(0, 19, (ROWS, SEQ)).astype(np.int32)
        segments = np.where(place < lengths, 0, -1).astype(np.int32)
        targets = np.where((place >= 1) & (place < lengths - 1), np.roll(ids, -1, axis=1), NO_TARGET).astype(np.int32)
        mask = targets != NO_TARGET
        advantages = np.repeat(random.normal(size=(ROWS, 1)), SEQ, 1)
        bare = RolloutBatch(ids, segments, place.astype(np.int32), targets, advantages, np.where(mask, 1.0, 0.0))
        new = np.asarray(objective.completion_log_probabilities(model, bare, 0.7)[0])
        assert new.dtype == np.float64
        others = [np.where(mask, new + random.normal(0, size, new.shape), 0.0) for size in (0.3, 0.6, 0.3)]
        before, reference, sampled = others
        for loss_type, level in zip(GRPO_LOSSES, itertools.cycle(["token", "sequence"])):
            options = GRPOOptions(
                max_completion=MOST, loss_type=loss_type, ratio_level=level, temperature=0.7, beta=0.3, delta=1.6,
                importance_cap=1.2, unbiased_kl=loss_type != "dapo",
            )  # fmt: skip
            batch = bare._replace(
                weights=token_weights(mask, loss_type, MOST) * mask.sum(), reference=reference, sampled=sampled
            )

            def loss(flat, old, options=options, batch=batch):
                total, count, _ = grpo(options)(nnx.merge(graph, unravel(flat)), batch._replace(old=old), KEY)
                return total / count

            both = jax.jit(jax.value_and_grad(loss))
            gradient = both(flat, before)[1]
            for _ in range(3):
                along, step = random.normal(size=flat.shape), 1e-6
                slope = (both(flat + step * along, before)[0] - both(flat - step * along, before)[0]) / (2 * step)
                assert float(gradient @ along) == pytest.approx(float(slope), rel=1e-6, abs=1e-8), (loss_type, level)
        # Where π_old is the policy of the moment, the gradient is the same whether it is told or not; but for the
        # rotation's float32.
        told, untold = both(flat, new)[1], both(flat, None)[1]
        np.testing.assert_allclose(untold, told, rtol=0, atol=1e-5 * float(abs(told).max()))


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
