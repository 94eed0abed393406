"""transformers' models with ``attn_implementation="heddle"`` against its own sdpa, and against documents one by one."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from heddle import Mask
from heddle.torch import huggingface

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "qwen2": Qwen2Config(**SIZES),
    "qwen2 with windows": Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=4, max_window_layers=1),
}
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}
IDS = torch.randint(0, 64, (3, 12), generator=torch.Generator().manual_seed(0))
PADDED = torch.ones_like(IDS)
PADDED[1, :4] = 0
PADDED[2, 9:] = 0
LENGTHS = [5, 1, 6]
POSITIONS = torch.cat([torch.arange(n) for n in LENGTHS])[None]
SEGMENTS = torch.repeat_interleave(torch.tensor([9, 2, 4]), torch.tensor(LENGTHS))[None]


def build(config, attention: str):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation=attention).eval()


@pytest.fixture(params=CONFIGS, ids=lambda name: name.replace(" ", "-"))
def models(request):
    """One model twice: with heddle's attention, and with transformers' sdpa."""
    return build(CONFIGS[request.param], "heddle"), build(CONFIGS[request.param], "sdpa")


@torch.no_grad()
def test_padded_batches(models, monkeypatch):
    calls = []
    attend = huggingface.attend
    monkeypatch.setattr(huggingface, "attend", lambda *a, **k: calls.append(a[3]) or attend(*a, **k))
    ours, theirs = (model(IDS, attention_mask=PADDED).logits for model in models)
    assert len(calls) == 2  # one a layer
    torch.testing.assert_close(ours[PADDED.bool()], theirs[PADDED.bool()], **TOLERANCE)


@torch.no_grad()
def test_the_layers_share_one_mask(monkeypatch):
    masks = []
    attend = huggingface.attend
    monkeypatch.setattr(huggingface, "attend", lambda *a, **k: masks.append(a[3]) or attend(*a, **k))
    build(CONFIGS["llama"], "heddle")(IDS)
    assert isinstance(masks[0], Mask)
    assert masks[0] is masks[1]


@torch.no_grad()
def test_unpadded(models):
    ours, theirs = (model(IDS).logits for model in models)
    torch.testing.assert_close(ours, theirs, **TOLERANCE)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable:FutureWarning")  # its new name is newer than 5.17
@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("told_by", ["positions", "segments"])
def test_packed_documents_equal_each_alone(models, told_by, checkpointing, use_cache):
    packed, alone = (m.train() for m in models)
    if checkpointing:
        packed.gradient_checkpointing_enable({"use_reentrant": False})
        use_cache = False
    ids = IDS[:1]
    kwargs = {"position_ids": POSITIONS, "use_cache": use_cache}
    if told_by == "segments":
        kwargs["segment_ids"] = SEGMENTS
    labels = ids.flatten().roll(3).split(LENGTHS)

    def loss(logits, labels):
        return torch.nn.functional.cross_entropy(logits[0], labels, reduction="sum")

    got = loss(packed(ids, **kwargs).logits, ids.flatten().roll(3))
    want = sum(loss(alone(d).logits, label) for d, label in zip(ids.split(LENGTHS, 1), labels))
    torch.testing.assert_close(got, want, **TOLERANCE)
    got.backward()
    want.backward()
    for (name, a), b in zip(packed.named_parameters(), alone.parameters()):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_is_token_for_token_the_same(models, cache):
    left = torch.ones_like(IDS)
    left[1, :4] = 0
    ours, theirs = (
        model.generate(
            IDS, attention_mask=left, max_new_tokens=10, do_sample=False, pad_token_id=0,
            cache_implementation=cache, disable_compile=True,
        )
        for model in models
    )  # fmt: skip
    assert ours.shape == (3, 22)
    assert torch.equal(ours, theirs)


def test_from_pretrained(tmp_path):
    build(CONFIGS["llama"], "sdpa").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="heddle")
    assert model.config._attn_implementation == "heddle"
    assert model(IDS).logits.isfinite().all()


def test_what_an_interval_cannot_say_is_refused():
    model, holes = build(CONFIGS["llama"], "heddle"), torch.ones_like(IDS)
    holes[0, 5] = 0
    with pytest.raises(ValueError, match="attention_mask must be padded on the left, on the right or on both"):
        model(IDS, attention_mask=holes)
    with pytest.raises(ValueError, match=r"attention_mask must have shape \(batch, seq\)"):
        model(IDS, attention_mask=torch.ones(3, 1, 12, 12, dtype=torch.bool))
    with pytest.raises(ValueError, match="segment_ids must be of all 12 keys"):
        model(IDS[:1], segment_ids=SEGMENTS[:, :5])
    dropping = build(LlamaConfig(**SIZES, attention_dropout=0.5), "heddle").train()
    with pytest.raises(NotImplementedError, match="computes no dropout"):
        dropping(IDS)


def test_every_pattern_by_bisection():
    """Intervals of any shape around each query's own place, as bisection finds them."""
    generator = torch.Generator().manual_seed(0)
    for keys in (1, 2, 7, 33):
        low = (torch.rand(2, keys, generator=generator) * torch.arange(1, keys + 1)).long()
        high = torch.arange(keys) + (torch.rand(2, keys, generator=generator) * torch.arange(keys, 0, -1)).long()

        def sees(batch, head, query, key, low=low, high=high):
            return (low[batch, query] <= key) & (key <= high[batch, query])

        start, stop, place = huggingface.make_mask(2, keys, keys, mask_function=sees)[..., 0].unbind(1)
        assert torch.equal(start.long(), low)
        assert torch.equal(stop.long(), high + 1)
        assert torch.equal(place[0].long(), torch.arange(keys))


def in_a_new_process(program: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("first", ["heddle.torch", "transformers"])
def test_registered_whichever_is_imported_first(first):
    second = {"heddle.torch": "transformers", "transformers": "heddle.torch"}[first]
    program = (
        f"import {first}, {second}; from transformers import AttentionInterface, AttentionMaskInterface as Masks;"
        "print('heddle' in AttentionInterface(), 'heddle' in Masks())"
    )
    assert in_a_new_process(program) == "True True\n"


def test_importing_the_wing_leaves_transformers_alone():
    assert in_a_new_process("import heddle.torch, sys; print('transformers' in sys.modules)") == "False\n"


@pytest.mark.slow
def test_compiled():
    program = """if True:
        import copy, torch, heddle.torch
        from transformers import AutoModelForCausalLM, LlamaConfig
        config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                             num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="heddle")
        ids, padded = torch.randint(0, 64, (2, 12)), torch.ones(2, 12, dtype=torch.long)
        padded[1, :4] = 0
        positions = torch.cat([torch.arange(n) for n in (5, 7)])[None].expand(2, -1)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        for kwargs in ({"attention_mask": padded}, {"position_ids": positions}):
            got, want = (m(ids, use_cache=False, **kwargs).logits for m in (compiled, model))
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
        print("same")
    """
    assert in_a_new_process(program) == "same\n"
