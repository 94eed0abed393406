"""The arithmetic of a training step: torch's count of the products of the same model, and the other wing's."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from tiny_models import hugging_face
from torch.utils.flop_counter import FlopCounterMode

import heddle.torch.flops
from heddle.jax import LongNetConfig, LongNetLM, ModelConfig, Transformer
from heddle.jax.flops import peak_flops, training_flops
from heddle.jax.lora import add_adapters
from heddle.jax.parallel import make_mesh
from heddle.jax.parscale import is_new
from heddle.torch import longnet as torch_longnet
from heddle.torch.parscale import Qwen2ParScaleForCausalLM
from heddle.torch.parscale_config import Qwen2ParScaleConfig

SEGMENTS = np.array([[0] * 5 + [1] * 15 + [-1] * 4] * 2)
SIZES = {
    "vocab_size": 31, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip


def transformer(**options):
    return Transformer(ModelConfig(**SIZES | options), rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    "name", ["llama", "llama, tied", "llama, head_dim", "mistral, window", "qwen2, window", "qwen3"]
)
def test_flops_are_those_of_the_matrix_products(name, tmp_path):
    peer = hugging_face(name)
    peer.save_pretrained(tmp_path)
    model = Transformer.from_pretrained(tmp_path)
    flops = training_flops(model)
    assert flops(SEGMENTS, 36) == heddle.torch.flops.training_flops(peer)(SEGMENTS, 36)
    with FlopCounterMode(display=False) as counter:
        embedded = peer.get_input_embeddings()(torch.zeros((2, 24), dtype=torch.int64)).requires_grad_()
        peer(inputs_embeds=embedded).logits.sum().backward()
    products = counter.get_flop_counts()["Global"]
    products = sum(n for kind, n in products.items() if str(kind) in ("aten.mm", "aten.addmm"))
    alone = np.arange(48).reshape(2, 24)  # documents of one token: a pair each
    own = 12 * 2 * model.config.num_attention_heads * model.config.head_dim * 48
    assert flops(alone, 48) == products + own


PARSCALE = {"model_type": "qwen2_parscale", "parscale_n": 3, "parscale_n_tokens": 5}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"parscale_prefix_scope": "all"},
        {"enable_cross_attn": True, "parscale_cross_attn_layers": (0, 2)},
        {"enable_cross_attn": True, "parscale_cross_attn_mode": "sublayer"},
    ],
    ids=str,
)
@pytest.mark.parametrize("new", [False, True])
def test_parscale_counts_as_in_torch(options, new):
    model = transformer(**PARSCALE, **options)
    options = {k: v for k, v in (SIZES | PARSCALE | options).items() if k != "model_type"}
    peer = Qwen2ParScaleForCausalLM(Qwen2ParScaleConfig(**options))
    for name, parameter in peer.named_parameters():
        parameter.requires_grad_(not new or name in peer.new_parameters())
    ours = training_flops(model, nnx.All(nnx.Param, is_new) if new else nnx.Param)
    assert ours(SEGMENTS, 36) == heddle.torch.flops.training_flops(peer)(SEGMENTS, 36)


def test_longnet_counts_as_in_torch():
    options = {k: v for k, v in SIZES.items() if k != "num_key_value_heads"}
    options |= {"segment_lengths": (8, 16), "dilation_rates": (1, 2)}
    model = LongNetLM(LongNetConfig(**options), rngs=nnx.Rngs(0))
    peer = torch_longnet.LongNetLM(torch_longnet.LongNetConfig(**options))
    assert training_flops(model)(SEGMENTS, 36) == heddle.torch.flops.training_flops(peer)(SEGMENTS, 36)


def test_adapters_train_what_is_beside_frozen_weights():
    model = transformer()
    whole, linear = training_flops(model), 3 * (2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * 24)
    add_adapters(model, 2, 4.0, ["q_proj"], rngs=nnx.Rngs(0))
    adapted = training_flops(model, nnx.LoRAParam)
    frozen = 2 * (linear * 40 + 31 * 16 * 36)  # no gradient of their own
    assert adapted(SEGMENTS, 36) == whole(SEGMENTS, 36) - frozen + 6 * 3 * (16 * 2 + 2 * 16) * 40


def test_another_model_has_no_count():
    assert training_flops(nnx.Linear(4, 4, rngs=nnx.Rngs(0))) is None


def test_the_peak_is_what_products_reach():
    one = peak_flops(jnp.float32)
    assert 1e8 < one < 1e15
    assert peak_flops(jnp.float32, make_mesh(fsdp=8)) == one  # which share this machine
