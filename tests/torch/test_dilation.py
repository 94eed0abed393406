"""Dilation as an option of transformers' models and of ParScale: against dense attention with multiplicities."""

from __future__ import annotations

import dilated_oracle as oracle
import pytest
import torch
from transformers import AttentionInterface, AutoModelForCausalLM, LlamaConfig, Qwen2Config, StaticCache
from transformers.masking_utils import AttentionMaskInterface

from heddle.torch.huggingface import dilation
from heddle.torch.parscale import Qwen2ParScaleConfig, Qwen2ParScaleForCausalLM

LISTS = (4, 6, 12), (1, 2, 5)
OPTION = {"kind": "dilated", "segment_lengths": list(LISTS[0]), "dilation_rates": list(LISTS[1])}
SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.2,
}  # fmt: skip
REPLICAS = {
    "parscale_n": 2, "parscale_n_tokens": 3, "enable_cross_attn": True, "enable_replica_rope": True,
}  # fmt: skip
SEQ = 41  # past three segments of each pattern
IDS = torch.randint(0, 64, (3, SEQ), generator=torch.Generator().manual_seed(0))
PADDED = torch.ones_like(IDS)
PADDED[1, :4] = 0
PADDED[2, 35:] = 0
LENGTHS = [15, 1, 25]
POSITIONS = torch.cat([torch.arange(n) for n in LENGTHS])[None]
DOCUMENTS = torch.repeat_interleave(torch.tensor([9, 2, 4]), torch.tensor(LENGTHS))[None]
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
COUNT: dict[str, torch.Tensor] = {}


def counted(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """Attention of keys that stand in the softmax as often as ``COUNT`` says, (batch, heads, seq, seq)."""
    group = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(group, 1) for x in (key, value))
    p = COUNT["keys"] * (query @ key.mT * scaling).exp()
    p = p / p.sum(-1, keepdim=True).clamp(min=1e-30)
    return (p @ value).transpose(1, 2).contiguous(), None


AttentionInterface.register("counted", counted)
AttentionMaskInterface.register("counted", lambda *args, **kwargs: None)


def count(documents, padding):
    rows = [oracle.places(*row) for row in zip(documents.tolist(), padding.tolist())]
    COUNT["keys"] = torch.stack([torch.from_numpy(oracle.multiplicity(row, 4, *LISTS, True)) for row in rows]).float()


def build(kind, attention="heddle", option=OPTION, **changes):
    """The same weights whatever the attention."""
    torch.manual_seed(0)
    config = kind(**SIZES, **changes, attention=option)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


def parscale(option=OPTION, **changes):
    torch.manual_seed(0)
    model = Qwen2ParScaleForCausalLM(Qwen2ParScaleConfig(**SIZES, **REPLICAS, **changes, attention=option)).eval()
    for name, parameter in model.named_parameters():
        if "cross_attn" in name or "prefix" in name:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("kind", [LlamaConfig, Qwen2Config])
def test_equals_dense_attention_with_multiplicities(kind):
    ours, want = build(kind), build(kind, "counted", None)
    padded = {"attention_mask": PADDED}, torch.zeros_like(PADDED), 1 - PADDED
    packed = {"position_ids": POSITIONS}, DOCUMENTS, torch.zeros_like(DOCUMENTS)
    told = {"position_ids": POSITIONS, "segment_ids": DOCUMENTS}, DOCUMENTS, torch.zeros_like(DOCUMENTS)
    plain = {}, torch.zeros_like(IDS), torch.zeros_like(IDS)
    for inputs, documents, padding in (plain, padded, packed, told):
        ids = IDS[: len(documents)]
        count(documents, padding)
        real = padding == 0
        logits = ours(ids, use_cache=False, **inputs).logits[real]
        wanted = want(ids, position_ids=inputs.get("position_ids"), use_cache=False).logits[real]
        torch.testing.assert_close(logits, wanted, **CLOSE)
    for model, loss in ((ours, logits.square().sum()), (want, wanted.square().sum())):
        model.zero_grad()
        loss.backward()
    for (name, got), p in zip(ours.named_parameters(), want.parameters()):
        torch.testing.assert_close(got.grad, p.grad, rtol=1e-3, atol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


@torch.no_grad()
@pytest.mark.parametrize(("kind", "static"), [("llama", True), ("parscale", False)])
def test_decoding_is_all_at_once(kind, static):
    """Over transformers' own caches, past three segments of each pattern: by parts, then token by token."""
    model = build(LlamaConfig) if kind == "llama" else parscale()
    mask = PADDED.clone()
    mask[2] = 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)  # which ParScale's prefixes tell apart
    want = model(IDS, attention_mask=mask, position_ids=positions, use_cache=False).logits
    cache = StaticCache(model.config, max_cache_len=48) if static else None
    got, past = [], 0
    for n in (7, 13, *[1] * 8, 4, *[1] * 9):
        now = slice(past, past + n)
        past += n
        settings = {"position_ids": positions[:, now], "past_key_values": cache, "use_cache": True}
        out = model(IDS[:, now], attention_mask=mask[:, :past], **settings)
        cache = out.past_key_values
        got.append(out.logits)
    torch.testing.assert_close(torch.cat(got, 1)[mask.bool()], want[mask.bool()], **CLOSE)


@pytest.mark.parametrize(("kind", "options"), [("llama", {"num_beams": 2}), ("parscale", {})])
def test_generate(kind, options):
    """With a cache what it is without, padded on the left."""
    model = build(LlamaConfig) if kind == "llama" else parscale()
    settings = {"attention_mask": PADDED[:2, :9], "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0} | options
    got = model.generate(IDS[:2, :9], **settings)
    assert torch.equal(got, model.generate(IDS[:2, :9], use_cache=False, **settings))


@torch.no_grad()
def test_parscale_merges_prefix_and_replicas():
    """One pattern over all is plain attention; with documents each is as alone."""
    one = {"kind": "dilated", "segment_lengths": [1000], "dilation_rates": [1]}
    for changes in ({}, {"parscale_cross_attn_mode": "sublayer"}, {"parscale_prefix_scope": "all"}):
        dilated, plain = parscale(one, **changes), parscale(None, **changes)
        for inputs in ({}, {"attention_mask": PADDED}, {"position_ids": POSITIONS, "use_cache": False}):
            ids = IDS if "position_ids" not in inputs else IDS[:1]
            real = inputs.get("attention_mask", torch.ones_like(ids)).bool()
            want = plain(ids, **inputs).logits[real]
            torch.testing.assert_close(dilated(ids, **inputs).logits[real], want, **CLOSE)
    model = parscale()
    packed = model(IDS[:1], position_ids=POSITIONS, use_cache=False).logits
    torch.testing.assert_close(packed[:, 16:], model(IDS[:1, 16:]).logits, **CLOSE)
    assert (packed - plain(IDS[:1], position_ids=POSITIONS, use_cache=False).logits).abs().max() > 0.01
    single = Qwen2ParScaleForCausalLM(Qwen2ParScaleConfig(**SIZES, attention=OPTION)).eval()
    qwen = AutoModelForCausalLM.from_config(Qwen2Config(**SIZES, attention=OPTION), attn_implementation="heddle").eval()
    qwen.load_state_dict(single.state_dict())
    assert torch.equal(single(IDS).logits, qwen(IDS).logits)


def test_saved_with_the_model(tmp_path):
    model = build(LlamaConfig)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="heddle")
    assert dilation(again.config) == ((4, 1), (6, 2), (12, 5))
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_refusals(unhooked):
    llama, changes = build(LlamaConfig), {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 0}
    cache = llama(IDS[:1, :5]).past_key_values
    wide = OPTION | {"segment_lengths": [4]}
    for error, call, message in [
        (ValueError, lambda: build(LlamaConfig, option={"kind": "wide"})(IDS), "attention must be .*, got {'kind': 'w"),
        (ValueError, lambda: build(LlamaConfig, option={**OPTION, "w": 1})(IDS), "attention must be"),
        (ValueError, lambda: build(LlamaConfig, option=wide)(IDS), "of one length, got 1 and 3"),
        (ValueError, lambda: parscale(wide), "of one length, got 1 and 3"),
        (
            ValueError,
            lambda: Qwen2ParScaleForCausalLM._from_config(
                Qwen2ParScaleConfig(**SIZES, attention=OPTION), attn_implementation="sdpa"
            ),
            "attn_implementation must be 'heddle' with dilation, got 'sdpa'",
        ),
        (
            NotImplementedError,
            lambda: build(Qwen2Config, **changes)(IDS),
            "no dilated attention within sliding windows",
        ),
        (
            ValueError,
            lambda: llama(IDS[:1, :6], past_key_values=cache, position_ids=torch.tensor([[5, 6, 0, 1, 2, 3]])),
            "of one document a row where there is a cache",
        ),
    ]:
        with pytest.raises(error, match=message):
            call()
