"""Rollouts: groups of completions of a task's prompts, sampled by the engine and rewarded, as rows to train on."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np

from heddle.attention.mask import PADDING_SEGMENT_ID
from heddle.data.packing import NO_TARGET
from heddle.data.tasks import Problem, Stream
from heddle.data.tokenizers import Tokenizer
from heddle.metrics import Record
from heddle.options import GRPOOptions
from heddle.rewards import RewardPool

from .answer import TokenLogprobs
from .engine import Engine, Request, unsupported
from .generation import Completion, generate
from .grpo import RolloutBatch, group_advantages, token_weights
from .parallel import copies, of_all_processes
from .sampling import sampler

LENGTH = "length"  #: why a completion ended that was cut
ROLLOUT_BLOCK = 32  #: tokens of a block of the cache that completions are sampled with


class Rollout(NamedTuple):
    """Completions of one moment's policy, and what was measured of them."""

    batch: RolloutBatch
    measured: Record


class Batches:
    """Answers requests as an engine does, in batches that are done when their longest answer is: for models that an
    engine can't serve, such as those of dilated attention.

    Args:
        model: any language model.
        tokenizer: of the model.
        rows: answers at once, at most.
    """

    def __init__(self, model: Any, tokenizer: Tokenizer, rows: int):
        self.model, self.tokenizer, self.rows = model, tokenizer, rows

    def update(self, model: Any) -> None:
        """Go on with other weights."""
        self.model = model

    def run(self, requests: Sequence[Request]) -> list[list[Completion]]:
        """As :meth:`Engine.run`; of all requests the sampler, the ends and what is told are the first's."""
        each = [(request.prompt, request.seed + at) for request in requests for at in range(request.n)]
        answers: list[Completion] = []
        for at in range(0, len(each), self.rows):
            prompts, seeds = zip(*each[at : at + self.rows], strict=True)
            first = requests[0]
            answers += generate(
                self.model, self.tokenizer, prompts, max_tokens=first.max_tokens, sampler=first.sampler,
                seed=[seed % 2**32 for seed in seeds], stop_ids=first.stop_ids, logprobs=first.logprobs,
                logprobs_temperature=first.logprobs_temperature,
            )  # fmt: skip
        rest = iter(answers)
        return [[next(rest) for _ in range(request.n)] for request in requests]


class Rollouts:
    """Makes rollouts of a task, and knows where it stands.

    A completion's random choices follow from ``seed``, the number of the rollout and of its prompt within it, and its
    own number in the group: they are the same whatever else is sampled, and after a resume.

    Args:
        problems: of the task, to train on.
        encode: makes a prompt into token ids.
        rewards: of completions.
        tokenizer: of the model.
        options: of the objective.
        rows: completions of a rollout, a multiple of ``options.num_generations``.
        row_len: tokens of a prompt and its completion, at most.
        seed: of the random choices.
        max_unrewarded: rollouts in a row without a reward that applies to any completion, which end the run.
    """

    def __init__(
        self,
        problems: Stream,
        encode: Callable[[Any], list[int]],
        rewards: RewardPool,
        tokenizer: Tokenizer,
        options: GRPOOptions,
        *,
        rows: int,
        row_len: int,
        seed: int,
        max_unrewarded: int = 5,
    ):
        self.rows, self.row_len = rows, row_len
        self.problems, self.rewards = problems, rewards
        self._encode, self._tokenizer, self._options, self._seed = encode, tokenizer, options, seed
        self._count, self._engines = 0, []
        self._unrewarded, self._max_unrewarded = 0, max_unrewarded
        self._level = 1 if options.curriculum else problems.task.levels
        self._recent: deque[float] = deque(maxlen=options.curriculum_prompts)

    def state(self) -> dict[str, Any]:
        """Where it stands, as JSON has it: the next rollout follows from this, the seed and the weights."""
        return {
            "next": self.problems.next, "count": self._count, "level": self._level, "recent": [*self._recent],
            "unrewarded": self._unrewarded,
        }  # fmt: skip

    def restore(self, state: dict[str, Any]) -> None:
        """Stand where :meth:`state` said."""
        self.problems.next, self._count, self._level = state["next"], state["count"], state["level"]
        self._unrewarded = state["unrewarded"]
        self._recent.clear()
        self._recent.extend(state["recent"])

    def roll(self, model: Any) -> Rollout:
        """Sample the next prompts' completions with ``model``, and reward them.

        Raises:
            ValueError: a problem that can't be asked, see :meth:`heddle.data.tasks.Stream.take`.
            FloatingPointError: so many rollouts in a row had no reward that applies.
        """
        options, group = self._options, self._options.num_generations
        random = np.random.default_rng([self._seed, self._count])
        easiest = 1 if options.curriculum else self._level
        levels = random.integers(easiest, self._level, self.rows // group, endpoint=True).tolist()
        skipped = self.problems.skipped
        problems = [self.problems.take(level) for level in levels]
        prompts = [self._encode(problem.prompt) for problem in problems]
        completions, each = self._answer(model, problems, prompts, group, self._count)
        total = self.rewards.total(each)
        self._unrewarded = self._unrewarded + 1 if np.isnan(total).all() else 0
        if self._unrewarded >= self._max_unrewarded:
            raise FloatingPointError(
                f"{self._unrewarded} rollouts in a row had no completion that a reward applies to, of "
                f"{', '.join(self.rewards.names)}; the log says why"
            )
        advantages, flat = group_advantages(total.reshape(-1, group), options.scale_rewards)
        batch = rollout_batch(
            [prompt for prompt in prompts for _ in range(group)], completions, advantages.reshape(-1), options,
            self.row_len,
        )  # fmt: skip
        measured = _measured(total, each, self.rewards.names, completions, flat)
        measured |= {"skipped_problems": self.problems.skipped - skipped, "level": self._level}
        self._count += 1
        self._climb(levels, total.reshape(-1, group))
        return Rollout(batch, measured)

    def evaluate(self, model: Any, problems: Sequence[Problem]) -> Record:
        """The mean reward of one completion of each of ``problems``, sampled as in training, always the same way."""
        prompts = [self._encode(problem.prompt) for problem in problems]
        completions, each = self._answer(model, problems, prompts, 1, count=-1)
        total = self.rewards.total(each)
        lengths = [len(completion.tokens) for completion in completions]
        return {"eval_reward": _mean(total), "eval_completion_tokens": float(np.mean(lengths))}

    def _answer(
        self, model: Any, problems: Sequence[Problem], prompts: Sequence[list[int]], group: int, count: int
    ) -> tuple[list[Completion], np.ndarray]:
        """The completions of all prompts and their rewards. Each process samples and rewards its share."""
        longest, room = max(map(len, prompts)), self.row_len - self._options.max_completion
        if longest > room:
            raise ValueError(
                f"data.seq_len must have room for a prompt of {longest} tokens and grpo.max_completion more, "
                f"{longest + self._options.max_completion}; got {self.row_len}"
            )
        first, step = jax.process_index(), jax.process_count()
        groups = self._sample(model, prompts[first::step], range(first, len(prompts), step), group, count)
        mine = [completion for completions in groups for completion in completions]
        asked = [problem for problem in problems[first::step] for _ in range(group)]
        rewards = self._reward(asked, mine) if mine else np.zeros((0, len(self.rewards.names)))
        if step == 1:
            return mine, rewards
        completions: list[Any] = [None] * (len(prompts) * group)
        each = np.zeros((len(completions), len(self.rewards.names)))
        told = of_all_processes({"completions": [dataclasses.asdict(c) for c in mine], "rewards": rewards.tolist()})
        for process, share in enumerate(told):
            numbers = [n * group + i for n in range(process, len(prompts), step) for i in range(group)]
            for number, fields, row in zip(numbers, share["completions"], share["rewards"], strict=True):
                completions[number], each[number] = _completion(fields), row
        return completions, each

    def _reward(self, problems: Sequence[Problem], completions: Sequence[Completion]) -> np.ndarray:
        texts = [completion.text for completion in completions]
        return self.rewards([p.prompt for p in problems], texts, [p.fields for p in problems])

    def _sample(
        self, model: Any, prompts: Sequence[list[int]], numbers: Sequence[int], group: int, count: int
    ) -> list[list[Completion]]:
        """A group for each prompt, whose numbers among all say what is random; dealt over the engines there are."""
        options, engines = self._options, self._with(model)
        choice = sampler(options.temperature, options.top_k, options.top_p)
        requests = [
            Request(
                prompt, options.max_completion, choice, seed=self._seed_of(count, number), n=group,
                stop_ids=options.stop_ids, logprobs=None if options.importance_cap is None else 0,
                logprobs_temperature=options.temperature,
            )
            for number, prompt in zip(numbers, prompts, strict=True)
        ]  # fmt: skip
        if len(engines) == 1:
            return engines[0].run(requests)
        groups: list[Any] = [None] * len(requests)
        with ThreadPoolExecutor(len(engines)) as pool:
            shares = [requests[at :: len(engines)] for at in range(len(engines))]
            for at, answers in enumerate(pool.map(lambda engine, share: engine.run(share), engines, shares)):
                groups[at :: len(engines)] = answers
        return groups

    def _seed_of(self, count: int, number: int) -> int:
        """Of the first completion of a prompt; the others of its group take the numbers after it."""
        return int(np.random.SeedSequence([self._seed, count + 1, number]).generate_state(1)[0])

    def _with(self, model: Any) -> list[Engine | Batches]:
        """The engines, with these weights: one for each whole copy of the model that the devices hold."""
        models = copies(model)
        if not self._engines:
            size, rows = ROLLOUT_BLOCK, -(-self.rows // (len(models) * jax.process_count()))
            rows = max(rows, self._options.num_generations)
            blocks = rows * -(-self.row_len // size)
            self._engines = [
                Engine(each, self._tokenizer, max_batch=rows, blocks=blocks, block_size=size)
                if unsupported(each) is None
                else Batches(each, self._tokenizer, rows)
                for each in models
            ]
        else:
            for engine, each in zip(self._engines, models, strict=True):
                engine.update(each)
        return self._engines

    def _climb(self, levels: list[int], rewards: np.ndarray) -> None:
        """Mix the next level in once the highest one is mastered."""
        options = self._options
        if not options.curriculum or self._level == self.problems.task.levels:
            return
        means = [_mean(row) for level, row in zip(levels, rewards, strict=True) if level == self._level]
        self._recent.extend(mean for mean in means if not np.isnan(mean))
        enough = len(self._recent) == options.curriculum_prompts
        if enough and _mean(np.array(self._recent)) >= options.curriculum_threshold:
            self._level += 1
            self._recent.clear()


def rollout_batch(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Completion],
    advantages: np.ndarray,
    options: GRPOOptions,
    row_len: int,
) -> RolloutBatch:
    """Completions behind their prompts, a row each.

    Of a completion all tokens are learned, the one that ends it too. With ``options.mask_truncated`` nothing is of one
    that was cut, which counts as a completion all the same.

    Args:
        prompts: ids, of each completion.
        completions: as the engine answers, with log-probabilities if ``options.importance_cap`` is given.
        advantages: of each completion.
        options: of the objective.
        row_len: tokens in a row.
    """
    shape = len(completions), row_len
    tokens, segment_ids, positions, targets = (
        np.full(shape, fill, np.int32) for fill in (0, PADDING_SEGMENT_ID, 0, NO_TARGET)
    )
    sampled = np.zeros(shape, np.float32)
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        ids = [*prompt, *completion.tokens]
        first, last = len(prompt) - 1, len(ids) - 1  # the places that predict the completion
        tokens[row, : len(ids)], segment_ids[row, : len(ids)], positions[row, : len(ids)] = ids, 0, np.arange(len(ids))
        if not (options.mask_truncated and completion.finish_reason == LENGTH):
            targets[row, first:last] = completion.tokens
        if completion.logprobs is not None:
            sampled[row, first:last] = [told.chosen for told in completion.logprobs]
    mask = targets != NO_TARGET
    weights = token_weights(mask, options.loss_type, options.max_completion) * mask.sum()
    return RolloutBatch(
        tokens, segment_ids, positions, targets,
        np.broadcast_to(advantages[:, None], shape).astype(np.float32), weights.astype(np.float32),
        sampled=None if options.importance_cap is None else sampled,
    )  # fmt: skip


def _measured(
    total: np.ndarray, each: np.ndarray, names: Sequence[str], completions: Sequence[Completion], flat: np.ndarray
) -> Record:
    """What is worth knowing of a rollout. Rewards that don't apply are left out of means."""
    lengths = np.array([len(completion.tokens) for completion in completions])
    applies = total[~np.isnan(total)]
    apart = {f"reward_{name}": _mean(column) for name, column in zip(names, each.T, strict=True)}
    return {
        "reward": _mean(total),
        "reward_std": float(applies.std(ddof=1)) if len(applies) > 1 else 0.0,
        **(apart if len(names) > 1 else {}),
        "zero_spread": float(flat.mean()),
        "not_applicable": float(np.isnan(total).mean()),
        "completion_tokens": float(lengths.mean()),
        "longest_completion": int(lengths.max()),
        "truncated": float(np.mean([completion.finish_reason == LENGTH for completion in completions])),
    }


def _completion(fields: dict[str, Any]) -> Completion:
    """A completion of its fields, when JSON has been in between."""
    told = fields["logprobs"]
    logprobs = None if told is None else tuple(TokenLogprobs(chosen, tuple(map(tuple, top))) for chosen, top in told)
    return Completion(**fields | {"tokens": tuple(fields["tokens"]), "logprobs": logprobs})


def _mean(values: np.ndarray) -> float:
    applies = values[~np.isnan(values)]
    return float(applies.mean()) if len(applies) else float("nan")
