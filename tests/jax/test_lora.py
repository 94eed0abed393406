"""Adapters: PEFT computes the same with them, merging changes nothing, and nothing else is trained."""

import json
import shutil
from functools import partial

import jax
import numpy as np
import optax
import pytest
import torch
from flax import nnx
from mesh_cases import (
    MESHES,
    assert_close,
    assert_gradients_close,
    build,
    curve,
    loss_and_gradients,
    packed,
    trainer,
)
from tiny_models import hugging_face, tokens
from transformers import AutoModelForCausalLM

from heddle.config import load_config
from heddle.data.tokenizers import Tokenizer
from heddle.jax.lora import add_adapters, linear_layers, load_adapter, merge_adapters, save_adapter
from heddle.jax.model import Transformer
from heddle.jax.model_config import ModelConfig
from heddle.jax.parallel import create, dotted, make_mesh, shardings
from heddle.jax.run import run
from heddle.metrics import read_metrics

IDS = tokens(2, 9)
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT's use of what transformers has renamed


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    hugging_face("llama").save_pretrained(path)
    return path


@pytest.fixture
def model(folder):
    return Transformer.from_pretrained(folder)


def disturb(model):
    """As if trained: no adapter is zero."""
    for i, layer in enumerate(linear_layers(model).values()):
        if layer.adapter is not None:
            b = layer.adapter.b
            b[...] = jax.device_put(0.1 * jax.random.normal(jax.random.key(i), b.shape), b[...].sharding)


def theirs(folder):
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")


def logits(model):
    with torch.inference_mode():
        return model(torch.from_numpy(IDS).long()).logits.numpy()


@pytest.mark.parametrize("targets", [None, ["q_proj", "mlp.down_proj"], ["layers.1.self_attn.v_proj", "lm_head"]])
def test_peft_loads_what_is_saved_and_computes_the_same(model, folder, tmp_path, targets):
    import peft

    before = np.asarray(model(IDS))
    names = add_adapters(model, 3, 5.0, targets, rngs=nnx.Rngs(0))
    assert len(names) == {None: 14, "q_proj": 4, "layers.1.self_attn.v_proj": 2}[targets and targets[0]]
    np.testing.assert_array_equal(model(IDS), before)  # nothing before it is trained
    disturb(model)
    ours = np.asarray(model(IDS))
    assert np.abs(ours - before).max() > 0.1

    save_adapter(model, tmp_path / "adapter", str(folder))
    adapted = peft.PeftModel.from_pretrained(theirs(folder), tmp_path / "adapter")
    np.testing.assert_allclose(ours, logits(adapted), atol=2e-4)
    assert sum("lora_A" in name for name, _ in adapted.named_parameters()) == len(names)

    with pytest.raises(ValueError, match="model must have no adapters left to be saved"):
        model.save_pretrained(tmp_path / "model")
    again = Transformer.from_pretrained(folder)
    assert load_adapter(again, tmp_path / "adapter") == sorted(names)
    np.testing.assert_array_equal(again(IDS), ours)

    merge_adapters(model)
    np.testing.assert_allclose(model(IDS), ours, atol=1e-4)
    model.save_pretrained(tmp_path / "model")
    np.testing.assert_allclose(logits(theirs(tmp_path / "model")), ours, atol=2e-4)
    np.testing.assert_allclose(logits(adapted.merge_and_unload()), ours, atol=2e-4)


def test_an_adapter_of_peft_is_read(model, folder, tmp_path):
    import peft

    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=2, lora_alpha=3, target_modules=["k_proj", "up_proj"], init_lora_weights=False
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        adapted = peft.get_peft_model(theirs(folder), config).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    load_adapter(model, tmp_path / "adapter")
    np.testing.assert_allclose(model(IDS), logits(adapted), atol=2e-4)


def test_what_is_refused(model, tmp_path):
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        add_adapters(model, 0, 1.0, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"targets must name linear layers .* such as down_proj, gate_proj, .*'query'"):
        add_adapters(model, 1, 1.0, ["query"], rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="model must have adapters, got none"):
        save_adapter(model, tmp_path / "adapter")
    tied = Transformer(
        ModelConfig(
            vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
            tie_word_embeddings=True,
        ),
        rngs=nnx.Rngs(0),
    )  # fmt: skip
    with pytest.raises(ValueError, match="targets must leave out the head of a model whose head is its embedding"):
        add_adapters(tied, 1, 1.0, ["lm_head"], rngs=nnx.Rngs(0))
    add_adapters(tied, 1, 1.0, ["q_proj"], rngs=nnx.Rngs(0))
    save_adapter(tied, tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"is an adapter of another model: this one has no layer model\.layers\.0"):
        load_adapter(model, tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_dora": True}))
    with pytest.raises(ValueError, match="must be a plain LoRA adapter, got one with use_dora=True"):
        load_adapter(tied, tmp_path / "adapter")


def test_a_run_trains_adapters_alone_and_resumes(tmp_path):
    import peft

    corpus, base = tmp_path / "corpus", tmp_path / "base"
    corpus.mkdir()
    for i in range(20):
        (corpus / f"{i}.txt").write_text(f"the cat sat on mat number {i}, and the dog on the other. " * 5)
    config = ModelConfig(
        vocab_size=257, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=True, initializer_range=0.3, eos_token_id=256, pad_token_id=256,
    )  # fmt: skip
    Transformer(config, rngs=nnx.Rngs(0)).save_pretrained(base, Tokenizer.bytes())
    options = [
        f"training.base_model={base}", f"data.corpus={corpus}", "data.seq_len=64", "data.window=4096",
        "data.held_out=0.3", "training.batch_size=2", "training.eval_every=3", "training.eval_batches=1",
        "training.checkpoint_every=2", "training.learning_rate=0.02", "training.schedule=constant",
        "training.trainable=lora", "lora.rank=4", "training.ema_decay=0.9",
    ]  # fmt: skip

    def trained(name, steps):
        return run(load_config(None, [*options, f"training.max_steps={steps}", f"output={tmp_path / name}"]))

    whole = trained("whole", 6)
    trained("parts", 4)
    parts = trained("parts", 6)
    curves = [
        [(r["step"], r.get("loss"), r.get("eval_loss"), r.get("eval_average_loss")) for r in
         read_metrics(tmp_path / name / "metrics.jsonl") if "loss" in r]
        for name in ("whole", "parts")
    ]  # fmt: skip
    assert curves[0] == curves[1]
    assert curves[0][-1][1] < curves[0][0][1]
    for a, b in zip(jax.tree.leaves(whole.state.model), jax.tree.leaves(parts.state.model), strict=True):
        np.testing.assert_array_equal(a, b)
    # Nothing but adapters has changed, is in the optimiser or in a checkpoint.
    before = {
        name: np.asarray(layer.weight[...]) for name, layer in linear_layers(Transformer.from_pretrained(base)).items()
    }
    _, others = nnx.split_state(whole.state.model, nnx.LoRAParam, ...)
    for path, leaf in jax.tree_util.tree_leaves_with_path(others):
        if "embedding" not in jax.tree_util.keystr(path) and leaf.ndim == 2:
            assert any(np.array_equal(leaf, weight) for weight in before.values())
    named = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(whole._learned())]
    assert named
    assert all("adapter" in name for name in named if "model" in name or "mu" in name)

    ours = np.asarray(Transformer.from_pretrained(tmp_path / "whole" / "model")(IDS))
    adapted = peft.PeftModel.from_pretrained(theirs(base), tmp_path / "whole" / "adapter")
    np.testing.assert_allclose(logits(adapted), ours, atol=2e-4)
    average = np.asarray(Transformer.from_pretrained(tmp_path / "whole" / "model-average")(IDS))
    assert np.abs(average - ours).max() > 1e-4


# ---------------------------------------------------------------------- on a mesh


def on_mesh(kind, mesh):
    """A model with adapters, alone and on the mesh."""
    models = build(kind), create(partial(build, kind), make_mesh(**MESHES[mesh]))
    for model in models:
        tied = getattr(model.config, "tie_word_embeddings", False)
        targets = None if tied or kind == "longnet" else ["lm_head", "q_proj", "k_proj", "o_proj", "down_proj"]
        add_adapters(model, 3, 5.0, targets, rngs=nnx.Rngs(2))
        disturb(model)
    return models


@pytest.mark.parametrize(
    ("kind", "mesh"),
    [
        ("llama", "fsdp, tensor"), ("tied, biases", "context, tensor"), ("joint", "context, tensor"),
        pytest.param("dilated", "context, tensor", marks=pytest.mark.slow),
        pytest.param("longnet", "fsdp, tensor", marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_adapters_are_cut_as_their_layers_and_compute_what_one_devices_do(kind, mesh, tmp_path):
    alone, spread = on_mesh(kind, mesh)
    for name, layer in linear_layers(spread).items():
        if layer.adapter is None:
            continue
        (inputs, outputs), a, b = (
            x[...].sharding.shard_shape(x.shape) for x in (layer.weight, layer.adapter.a, layer.adapter.b)
        )
        assert (a, b) == ((inputs, 3), (3, outputs)), name
        assert inputs * outputs < layer.weight.size or mesh == "context", name
    batch = packed()
    (want, expected), (loss, gradients) = (loss_and_gradients(model, batch, nnx.LoRAParam) for model in (alone, spread))
    assert float(loss) == pytest.approx(float(want), rel=1e-6)
    assert_gradients_close(gradients, expected)
    moved = [float(abs(leaf).max()) for leaf in jax.tree.leaves(expected)]
    assert min(moved) > 1e-4

    for model, name in ((alone, "alone"), (spread, "spread")):
        save_adapter(model, tmp_path / name, "base")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "spread" / file).read_bytes() == (tmp_path / "alone" / file).read_bytes()
    loaded = create(partial(build, kind), spread.mesh)
    load_adapter(loaded, tmp_path / "spread")
    for one, other in zip(*map(jax.tree.leaves, (loaded, spread)), strict=True):
        np.testing.assert_array_equal(one, other)
        assert one.sharding.is_equivalent_to(other.sharding, one.ndim)

    for model in (alone, spread):
        merge_adapters(model)
    for one, other in zip(*map(jax.tree.leaves, (spread, alone)), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-6)
    for one, where in zip(jax.tree.leaves(spread), jax.tree.leaves(shardings(spread, spread.mesh)), strict=True):
        assert one.sharding.is_equivalent_to(where, one.ndim)


@pytest.mark.slow
def test_a_run_of_adapters_on_a_mesh_is_one_devices_and_goes_on_on_another(tmp_path):
    """Gradients and optimiser state are cut too; on the same mesh a run goes on bit for bit."""
    trainer(tmp_path / "one", rank=3).fit()
    sizes = {"fsdp": 4, "tensor": 2}
    whole = trainer(tmp_path / "whole", sizes, rank=3)
    parts, inner = {}, whole._optimizer

    def update(gradient, *rest):
        for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):

            def note(where, name=path, shape=leaf.shape):
                parts[dotted(name)] = where.shard_shape(shape)

            jax.debug.inspect_array_sharding(leaf, callback=note)
        return inner.update(gradient, *rest)

    whole._optimizer = optax.GradientTransformation(inner.init, update)
    whole.fit()
    moments = whole.state.optimizer[1][0].mu
    layers = "layers", 0
    for (layer, of), a, b in (
        (("attention", "q"), (32 // 4, 3), (3, 32 // 2)),
        (("attention", "o"), (32 // 2, 3), (3, 32 // 4)),
        (("ffn", "gate"), (32 // 4, 3), (3, 16 // 2)),
        (("ffn", "down"), (16 // 2, 3), (3, 32 // 4)),
    ):
        for name, shape in (("a", a), ("b", b)):
            path = *layers, layer, of, "adapter", name
            assert parts[".".join(map(str, path))] == shape
            for tree in (moments, nnx.filter_state(whole.state.model, nnx.LoRAParam)):
                for key in path:
                    tree = tree[key]
                assert {shard.data.shape for shard in tree.get_value().addressable_shards} == {shape}
    assert_close(curve(tmp_path / "whole"), curve(tmp_path / "one"))

    def stop(record):
        if record["step"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path / "cut", sizes, rank=3, checkpoint_every=1).fit(stop)
    for number, other in enumerate((sizes, {"data": 2, "fsdp": 2, "context": 2}, None)):
        folder = tmp_path / str(number)
        shutil.copytree(tmp_path / "cut", folder)
        on, steps = trainer(folder, other, rank=3), []
        on.fit(steps.append)
        assert steps[0]["step"] == 3
        if other == sizes:
            assert curve(folder) == curve(tmp_path / "whole")
        else:
            assert_close(curve(folder), curve(tmp_path / "whole"))
