"""Fine-tuning: the loss is that of each example alone, TRL's, and a run on examples learns and resumes."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from chat_templates import CHATML
from flax import nnx
from tiny_models import SIZES, hugging_face
from tokenizers import Tokenizer as Backend
from tokenizers import models

from heddle.config import load_config
from heddle.data.packing import NO_TARGET, Document, pack
from heddle.data.tokenizers import Tokenizer
from heddle.jax.lm import lm
from heddle.jax.model import Transformer
from heddle.jax.run import prepare, run
from heddle.jax.sft import neftune_noise, sft
from heddle.metrics import read_metrics

KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    hugging_face("llama").save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def model(folder):
    return Transformer.from_pretrained(folder)


def examples():
    """Of different lengths, with prompts of different lengths; the last learns everything but its first token."""
    random = np.random.default_rng(0)
    lengths, prompts = (11, 5, 16, 9, 3, 7), (6, 1, 12, 2, 2, 0)
    return [
        Document(random.integers(3, SIZES["vocab_size"], n), np.arange(n) >= p)
        for n, p in zip(lengths, prompts, strict=True)
    ]


def loss_and_gradient(model, batch):
    graph, params = nnx.split(model)

    def loss(params, batch):
        total, count, _ = sft()(nnx.merge(graph, params), batch, KEY)
        return total, count

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(params, batch)


def close(a, b, tolerance=1e-5):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * float(np.abs(y).max()))


def test_packed_examples_have_the_loss_and_gradient_of_each_alone(model):
    packed = pack(examples(), 16)
    assert len(packed.tokens) < len(examples())
    (total, count), gradient = loss_and_gradient(model, packed)
    alone = [pack([example], 16) for example in examples()]
    parts = [loss_and_gradient(model, one) for one in alone]
    assert int(count) == sum(int(c) for (_, c), _ in parts) == sum(int(e.learned[1:].sum()) for e in examples())
    assert float(total) == pytest.approx(sum(float(t) for (t, _), _ in parts), rel=1e-5)
    close(gradient, jax.tree.map(lambda *g: sum(g), *(g for _, g in parts)))
    # Token for token too.
    hidden = jax.jit(lambda b: jax.nn.log_softmax(model(b.tokens, b.positions, b.segment_ids)))

    def losses(batch):
        log = hidden(batch)
        picked = np.take_along_axis(np.asarray(log), np.maximum(batch.targets, 0)[..., None], -1)[..., 0]
        return np.sort(picked[batch.targets != NO_TARGET])

    np.testing.assert_allclose(losses(packed), np.sort(np.concatenate([losses(b) for b in alone])), atol=1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_loss_and_gradient_are_trls(model, folder, tmp_path):
    import datasets
    import trl
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    theirs = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    words = {f"w{i}": i for i in range(SIZES["vocab_size"])}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Backend(models.WordLevel(words, unk_token="w0")), eos_token="w2", pad_token="w0"
    )
    rows = [{"input_ids": e.tokens.tolist(), "completion_mask": e.learned.astype(int).tolist()} for e in examples()]
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=len(rows), report_to=[], use_cpu=True, bf16=False,
        completion_only_loss=True, packing=False, max_length=None, disable_tqdm=True, gradient_checkpointing=False,
    )  # fmt: skip
    trainer = trl.SFTTrainer(
        theirs, arguments, train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
    )  # fmt: skip
    batch = next(iter(trainer.get_train_dataloader()))
    assert (batch["labels"] != -100).sum() == sum(e.learned.sum() for e in examples())
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()

    (total, count), gradient = loss_and_gradient(model, pack(examples(), 16))
    # A document's first token is no target of ours or theirs, learned or not.
    assert int(count) == sum(int(e.learned[1:].sum()) for e in examples())
    assert float(total / count) == pytest.approx(float(loss), abs=1e-4)
    ours = gradient["layers"][1]["ffn"]["down"]["weight"][...] / count
    expected = theirs.model.layers[1].mlp.down_proj.weight.grad.T
    np.testing.assert_allclose(ours, expected, atol=1e-4 * float(expected.abs().max()))
    ours, expected = gradient["embedding"][...] / count, theirs.model.embed_tokens.weight.grad
    np.testing.assert_allclose(ours, expected, atol=1e-4 * float(expected.abs().max()))


def test_noise_has_neftunes_size_whatever_the_packing(model):
    packed, width, alpha = pack(examples(), 16), SIZES["hidden_size"], 5.0
    keys = jax.random.split(KEY, len(packed.tokens))
    noise = np.asarray(neftune_noise(keys, packed, width, alpha))
    for row, segments in enumerate(packed.segment_ids):
        assert (noise[row, segments < 0] == 0).all()
        for segment in np.unique(segments[segments >= 0]):
            of = noise[row, segments == segment]
            bound = alpha / np.sqrt(len(of) * width)  # the paper's, of an example's own length
            assert 0.8 * bound < np.abs(of).max() <= bound
    noisy, again, other = (float(sft(neftune_alpha=alpha)(model, packed, key)[0]) for key in (keys, keys, keys[::-1]))
    assert noisy == again != other
    assert noisy != float(lm(model, packed, KEY)[0])
    # It is added to the embeddings.
    one = pack(examples()[2:3], 16)
    noise = np.array(neftune_noise(keys[:1], one, width, alpha))
    theirs = hugging_face("llama")
    with torch.no_grad():
        embedded = theirs.model.embed_tokens(torch.from_numpy(one.tokens).long())
        expected = theirs(inputs_embeds=embedded + torch.from_numpy(noise)).logits
    hidden = model.hidden(one.tokens, one.positions, one.segment_ids, noise=jnp.asarray(noise))
    np.testing.assert_allclose(model.head(hidden), expected, atol=1e-4)


def test_noise_of_one_example_is_transformers_noise():
    """Where an example fills its row. In a padded batch theirs follows the batch's length, ours each example's own."""
    from transformers.integrations.neftune import neftune_post_forward_hook

    length, width, alpha = 96, 128, 7.0
    one = pack([Document(np.arange(length), np.ones(length, bool))], length)
    ours = np.asarray(neftune_noise(jax.random.split(KEY, 1), one, width, alpha))
    torch.manual_seed(0)
    module = torch.nn.Identity()
    module.neftune_noise_alpha = alpha
    theirs = neftune_post_forward_hook(module, None, torch.zeros(1, length, width)).numpy()
    for quantile in (0, 0.1, 0.25, 0.5, 0.75, 0.9, 1):  # of 12,288 values each
        found, expected = (np.quantile(noise, quantile) for noise in (ours, theirs))
        assert found == pytest.approx(expected, abs=0.04 * float(np.abs(theirs).max()))
    short = pack([Document(np.arange(length // 4), np.ones(length // 4, bool))], length)
    own = np.asarray(neftune_noise(jax.random.split(KEY, 1), short, width, alpha))
    assert float(np.abs(own).max()) == pytest.approx(2 * float(np.abs(theirs).max()), rel=0.02)


def test_smoothing_and_noise_must_make_sense():
    with pytest.raises(ValueError, match=r"neftune_alpha must not be negative, got -1\.0"):
        sft(neftune_alpha=-1.0)
    with pytest.raises(ValueError, match=r"label_smoothing must be at least 0 and below 1, got 1\.0"):
        sft(label_smoothing=1.0)


# ---------------------------------------------------------------------- runs

SMALL = [
    "training.objective=sft", "model.hidden_size=16", "model.intermediate_size=24", "model.num_hidden_layers=1",
    "model.num_attention_heads=2", "model.num_key_value_heads=1", "data.seq_len=64", "data.window=1024",
    "data.held_out=0.2", "training.batch_size=2", "training.max_steps=6", "training.eval_every=3",
    "training.eval_batches=1", "training.checkpoint_every=2", "training.learning_rate=0.02",
    "sft.neftune_alpha=5", "sft.label_smoothing=0.1",
]  # fmt: skip


@pytest.fixture
def options(tmp_path):
    path = tmp_path / "examples.jsonl"
    records = [{"prompt": f"{i} plus one is ", "completion": str(i + 1)} for i in range(60)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return [*SMALL, f"data.corpus={path}", f"output={tmp_path / 'run'}"]


def losses(path):
    return [(r["step"], r.get("loss"), r.get("eval_loss")) for r in read_metrics(path / "metrics.jsonl")]


def test_a_run_learns_and_goes_on_where_it_was(options, tmp_path):
    trainer = run(load_config(None, options))
    held_out = [loss for *_, loss in losses(tmp_path / "run") if loss is not None]
    assert held_out[-1] < held_out[0] < np.log(257)
    # Evaluated without noise and smoothing.
    batch = trainer._evaluation[0]
    total, count, _ = lm(trainer.model, batch, KEY)
    assert held_out[-1] == pytest.approx(float(total / count), rel=1e-5)
    for steps in (3, 6):
        run(load_config(None, [*options, f"output={tmp_path / 'again'}", f"training.max_steps={steps}",
                               "training.schedule=constant"]))  # fmt: skip
    whole = [*options, f"output={tmp_path / 'whole'}", "training.schedule=constant"]
    run(load_config(None, whole))
    again = [x for x in losses(tmp_path / "again") if x[1] is not None]
    assert again == [x for x in losses(tmp_path / "whole") if x[1] is not None]


def test_configuration_says_what_examples_are(options, tmp_path):
    with pytest.raises(ValueError, match="corpus must be stdlib-docstrings, hub:NAME, or a file"):
        prepare(load_config(None, [*options, "data.corpus=stdlib"]))
    with pytest.raises(ValueError, match="form=chat needs a tokenizer with a chat template"):
        prepare(load_config(None, [*options, "sft.form=chat"]))
    task = [*options, "data.corpus=largest", "grpo.task=[digits=2]", "data.seq_len=5"]
    rows = next(prepare(load_config(None, task))[0]._data)
    largest, answer = chr(max(rows.tokens[0][:2])), chr(rows.tokens[0][3])
    assert (largest, chr(rows.tokens[0][2]), rows.targets[0].tolist()) == (answer, ">", [-1, -1, ord(answer), 256, -1])
    with pytest.raises(ValueError, match=r"grpo\.num_generations is for training\.objective=grpo, but it is sft"):
        load_config(None, [*task, "grpo.num_generations=4"])
    with pytest.raises(ValueError, match=r"sft\.form=text is for files of examples, a task has grpo\.prompt_form"):
        load_config(None, [*task, "sft.form=text"])
    with pytest.raises(ValueError, match=r"grpo\.task is for training\.objective=grpo, but it is sft"):
        load_config(None, [*options, "grpo.task=[digits=2]"])
    tokenizer = Tokenizer.bytes()
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    chat = prepare(load_config(None, [*options, f"data.tokenizer={tmp_path / 'tokenizer'}", "data.seq_len=128"]))[0]
    text = tokenizer.decode(next(chat._data).tokens[0].tolist())
    assert text.startswith("<|im_start|>user\n")
    assert load_config(Path(__file__).parents[2] / "configs" / "sft.yaml").training.objective == "sft"
