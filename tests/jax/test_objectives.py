"""Each objective of each family of models, all of its weights or adapters alone: on a mesh as on one device."""

import json

import jax
import numpy as np
import pytest
from flax import nnx
from mesh_cases import SIZES, curve

from heddle.config import load_config
from heddle.data.tokenizers import Tokenizer
from heddle.jax.longnet import LongNetConfig, LongNetLM
from heddle.jax.model import Transformer
from heddle.jax.model_config import ModelConfig
from heddle.jax.run import run

VOCAB = 264  #: room for all bytes, and even
MESH = ["mesh.fsdp=2", "mesh.tensor=2", "mesh.context=2"]
COMMON = [
    # Else adamw's first step is the gradient's sign, also where that is rounding alone: adapters' second step shows it.
    "training.epsilon=0.001",
    "training.max_steps=2", "training.eval_every=0", "training.checkpoint_every=0", "training.schedule=constant",
    "training.learning_rate=0.001", "training.clip=null",
]  # fmt: skip


def model(kind):
    sizes = SIZES | {"vocab_size": VOCAB, "num_hidden_layers": 1, "eos_token_id": 256, "pad_token_id": 256}
    if kind == "longnet":
        shared = {name: sizes[name] for name in sizes if name not in ("num_key_value_heads", "initializer_range")}
        return LongNetLM(LongNetConfig(**shared, segment_lengths=(4, 16), dilation_rates=(1, 2)), rngs=nnx.Rngs(0))
    if kind == "parscale":
        made = ModelConfig(**sizes, model_type="qwen2").with_parscale(
            parscale_n=2, parscale_n_tokens=4, enable_cross_attn=True, parscale_cross_attn_mode="joint"
        )
    else:
        made = ModelConfig(**sizes, model_type=kind)
    return Transformer(made, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base model of each family, and what is learned from."""
    root = tmp_path_factory.mktemp("objectives")
    for kind in ("llama", "qwen2", "parscale", "longnet"):
        model(kind).save_pretrained(root / kind, Tokenizer.bytes())
    (root / "corpus").mkdir()
    for i in range(8):
        (root / "corpus" / f"{i}.txt").write_text(f"the cat sat on mat {i}, the dog on the other; " * (1 + i))
    examples = [{"prompt": f"{i} and one is ", "completion": f"{i + 1}."} for i in range(40)]
    (root / "examples.jsonl").write_text("".join(json.dumps(example) + "\n" for example in examples))
    return root


OBJECTIVES = {
    "lm": ["data.corpus={root}/corpus", "data.seq_len=32", "data.window=1024", "training.batch_size=8"],
    "sft": [
        "training.objective=sft", "data.corpus={root}/examples.jsonl", "data.seq_len=32", "data.window=1024",
        "training.batch_size=8", "sft.neftune_alpha=5", "sft.label_smoothing=0.1", "training.accumulation=2",
    ],
    "grpo": [
        "training.objective=grpo", "data.corpus=largest", "grpo.task=[digits=2]", "data.seq_len=12",
        "training.batch_size=8", "grpo.rewards=[reward_functions:low_bytes]", "grpo.num_generations=4",
        "grpo.max_completion=5", "grpo.beta=0.1", "grpo.importance_cap=2", "grpo.temperature=0.7",
        "grpo.num_iterations=2", "grpo.stop_ids=[0, 5, 10, 15, 200]",
    ],
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("objective", "kind", "trainable"),
    [
        ("lm", "llama", "lora"), ("lm", "qwen2", "full"), ("lm", "parscale", "lora"), ("lm", "longnet", "full"),
        ("lm", "parscale", "new"),
        ("sft", "llama", "full"), ("sft", "qwen2", "lora"), ("sft", "parscale", "full"), ("sft", "longnet", "lora"),
        ("grpo", "llama", "lora"), ("grpo", "qwen2", "full"), ("grpo", "parscale", "full"), ("grpo", "longnet", "lora"),
    ],
)  # fmt: skip
def test_a_mesh_changes_nothing(folders, tmp_path, objective, kind, trainable):
    options = [*COMMON, *(option.format(root=folders) for option in OBJECTIVES[objective])]
    options += [f"training.base_model={folders / kind}", f"training.trainable={trainable}"]
    options += ["parscale.parscale_n=2"] if kind == "parscale" else []
    trainers = {
        name: run(load_config(None, [*options, *mesh, f"output={tmp_path / name}"]))
        for name, mesh in (("alone", []), ("spread", MESH))
    }
    alone, spread = curve(tmp_path / "alone"), curve(tmp_path / "spread")
    assert len(alone) == len(spread) == 2
    for one, other in zip(spread, alone, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=0, abs=1e-5)
        assert one == pytest.approx(other, rel=1e-4, abs=1e-5)
    # The first moments, that is: both steps' gradients.
    (got, want) = (trainers[name].state.optimizer[1][0].mu for name in ("spread", "alone"))
    largest = max(float(abs(leaf).max()) for leaf in jax.tree.leaves(want))
    assert largest > 1e-5
    for (path, one), other in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
        scale = max(float(abs(other).max()), 1e-3 * largest)
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-4 * scale, err_msg=jax.tree_util.keystr(path))
