"""The arithmetic of a training step, against torch's own count of the products it runs."""

import numpy as np
import pytest
import torch
from tiny_models import hugging_face
from torch.utils.flop_counter import FlopCounterMode

from heddle.config import load_config
from heddle.data.tokenizers import Tokenizer
from heddle.torch.flops import peak_flops, training_flops
from heddle.torch.run import make_model

SEGMENTS = np.repeat([[0, 1]], [5, 15], axis=1).repeat(2, axis=0)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    hugging_face("llama, bytes").save_pretrained(folder)
    Tokenizer.bytes().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("replicas", "others", "extra"),
    [
        (1, [], 0),
        (3, [], 48),
        (3, ["parscale.enable_cross_attn=true"], 48 + 2),
        (3, ["parscale.parscale_prefix_scope=all", "training.trainable=new"], 3 * 48),
    ],
)
def test_flops_are_those_of_the_matrix_products(replicas, others, extra, base):
    overrides = ["framework=torch", f"training.base_model={base}", f"parscale.parscale_n={replicas}", *others]
    model = make_model(load_config(None, overrides), Tokenizer.bytes())
    ids = torch.arange(40).reshape(2, 20)
    with FlopCounterMode(display=False) as counter:
        embedded = model.get_input_embeddings()(ids).requires_grad_()  # so that frozen layers have a gradient to give
        model(inputs_embeds=embedded, use_cache=False).logits.sum().backward()
    products = counter.get_flop_counts()["Global"]
    products = sum(n for kind, n in products.items() if str(kind) in ("aten.mm", "aten.addmm"))
    pairs = 2 * (15 + 120) + 40 * extra
    config = model.config
    attention = 12 * config.num_hidden_layers * config.hidden_size * replicas * pairs
    flops = training_flops(model)
    assert flops(SEGMENTS, 40) == pytest.approx(products + attention, rel=1e-6)
    head = model.get_output_embeddings().weight
    assert flops(SEGMENTS, 40) - flops(SEGMENTS, 30) == 10 * head.numel() * (6 if head.requires_grad else 4)


@pytest.mark.parametrize(("name", "windows"), [("mistral, window", [7, 7]), ("qwen2, window", [None, 5])])
def test_each_layer_has_its_window(name, windows):
    def seen(window):
        return 2 * sum(min(i, window or i) for length in (5, 15) for i in range(1, length + 1))

    windowed, whole = (training_flops(hugging_face(each))(SEGMENTS, 36) for each in (name, name.split(",")[0]))
    assert whole - windowed == 12 * 32 * sum(seen(None) - seen(window) for window in windows)


def test_the_peak_is_what_products_reach():
    assert 1e8 < peak_flops(torch.device("cpu"), torch.float32) < 1e15
