"""ParScale models under transformers' ``generate``, against decoding one token after another without a cache."""

from __future__ import annotations

import functools

import pytest
import torch
from tiny_models import SIZES, tokens
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from heddle.torch.parscale import ParscaleCache, Qwen2ParScaleConfig, Qwen2ParScaleForCausalLM

pytestmark = pytest.mark.filterwarnings("ignore:The `generation_flags`")

NEW = 6
IDS = torch.from_numpy(tokens(2, 5, seed=3)).long()
LEFT = torch.ones_like(IDS)
LEFT[1, :2] = 0
VARIANTS = {
    "prefix": {},
    "joint": {"enable_cross_attn": True, "enable_replica_rope": True},
    "sublayer": {"enable_cross_attn": True, "parscale_cross_attn_mode": "sublayer"},
}


@functools.cache
def model(variant: str, replicas: int = 2, attention: str = "heddle") -> Qwen2ParScaleForCausalLM:
    config = Qwen2ParScaleConfig(
        **SIZES | {"parscale_n": replicas, "parscale_n_tokens": 3, "eos_token_id": None}, **VARIANTS[variant]
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        built = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
        for name, parameter in built.named_parameters():
            parameter.data.normal_(1.0 if "norm" in name else 0.0, 0.2)
    return built


@torch.no_grad()
def greedy(model, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Row by row, without padding and without a cache."""
    rows = []
    for row, visible in zip(ids, torch.ones_like(ids) if mask is None else mask):
        found = row[visible.bool()][None]
        for _ in range(NEW):
            found = torch.cat([found, model(found, use_cache=False).logits[:, -1:].argmax(-1)], 1)
        rows.append(found[0, -NEW:])
    return torch.stack(rows)


def generate(model, ids=IDS, **kwargs) -> torch.Tensor:
    kwargs = {"do_sample": False, "max_new_tokens": NEW, "pad_token_id": 0} | kwargs
    return model.generate(ids, **kwargs)[:, ids.shape[-1] :]


@pytest.mark.parametrize(
    ("variant", "cache", "attention"),
    [
        ("prefix", None, "heddle"),
        *(("joint", cache, "heddle") for cache in ("dynamic", "static")),
        *(("joint", "dynamic", attention) for attention in ("sdpa", "eager")),
        *(("sublayer", cache, "heddle") for cache in ("dynamic", "static")),
    ],
)
def test_greedy_with_left_padding(variant, cache, attention):
    it = model(variant, attention=attention)
    got = generate(it, attention_mask=LEFT, cache_implementation=cache, disable_compile=True)
    assert torch.equal(got, greedy(it, IDS, LEFT))


@pytest.mark.parametrize("variant", ["joint"])
def test_a_cache_of_the_users_own(variant):
    it = model(variant)
    want = greedy(it, IDS)
    for cache in (
        DynamicCache(),
        DynamicCache(config=it.config),
        ParscaleCache(it.config),
        StaticCache(it.config, max_cache_len=20),
    ):
        assert torch.equal(generate(it, past_key_values=cache, disable_compile=True), want)
    cache = DynamicCache()  # of a conversation's first part
    it(IDS[:, :3], past_key_values=cache)
    assert torch.equal(generate(it, past_key_values=cache), want)


@torch.no_grad()
def beams(model, ids, width):
    """The likeliest of beam search, by whole sequences."""
    found, scores = ids, torch.zeros(1)
    for _ in range(NEW):
        log = model(found, use_cache=False).logits[:, -1].log_softmax(-1)
        scores, best = (scores[:, None] + log).flatten().topk(width)
        found = torch.cat([found[best // log.shape[1]], best[:, None] % log.shape[1]], 1)
    return found[:, ids.shape[1] :]


@pytest.mark.parametrize(
    ("variant", "cache"),
    [("prefix", "dynamic"), ("sublayer", "dynamic"), *(("joint", c) for c in ("dynamic", "static", "ParscaleCache"))],
)
def test_beams(variant, cache):
    it = model(variant, replicas=3)
    kwargs = {"cache_implementation": cache}
    if cache == "ParscaleCache":
        kwargs = {"past_key_values": ParscaleCache(it.config)}
    got = generate(
        it, num_beams=3, num_return_sequences=3, length_penalty=0.0, early_stopping=False, disable_compile=True,
        **kwargs,
    ).unflatten(0, (2, 3))  # fmt: skip
    for row, ids in zip(got, IDS):
        assert torch.equal(row, beams(it, ids[None], 3))


@pytest.mark.parametrize("variant", ["joint", "sublayer"])
def test_sampling(variant):
    """As with whole sequences and no cache, from the same random numbers."""
    found = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        found.append(generate(model(variant), do_sample=True, num_return_sequences=4, use_cache=use_cache))
    assert torch.equal(*found)
    assert found[0].shape == (8, NEW)
    assert len(set(map(tuple, found[0].tolist()))) > 2


@pytest.mark.parametrize("variant", ["joint"])
def test_assisted_decoding(variant):
    it = model(variant)
    for assistant in (model("prefix", replicas=3), model("prefix", replicas=1)):
        got = generate(it, IDS[:1], assistant_model=assistant)
        assert torch.equal(got, greedy(it, IDS[:1]))
    assert torch.equal(generate(it, IDS[:1], prompt_lookup_num_tokens=2), greedy(it, IDS[:1]))


@pytest.mark.parametrize(("variant", "cache"), [("joint", "dynamic"), ("joint", "static"), ("sublayer", "dynamic")])
@torch.no_grad()
def test_a_prompt_for_each_replica(variant, cache):
    it = model(variant, replicas=3)
    ids = torch.from_numpy(tokens(2, 3, 5, seed=4)).long()
    mask = torch.ones_like(ids)
    mask[0, 1, :2] = mask[1, 0, :3] = mask[1, 2, :1] = 0
    got = it.generate(
        ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, cache_implementation=cache, disable_compile=True
    )
    assert torch.equal(got[:, :5], ids[:, 0])
    whole, seen = ids, mask
    for _ in range(NEW):
        new = it(whole, attention_mask=seen, use_cache=False).logits[:, -1].argmax(-1)
        whole = torch.cat([whole, new[:, None, None].expand(-1, 3, -1)], 2)
        seen = torch.nn.functional.pad(seen, (0, 1), value=1)
    assert torch.equal(got[:, 5:], whole[:, 0, 5:])
    if cache == "dynamic":
        again = it.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, use_cache=False)
        assert torch.equal(again, got)
    two = it.generate(
        ids, attention_mask=mask, max_new_tokens=NEW, num_beams=2, do_sample=False, cache_implementation=cache,
        disable_compile=True,
    )  # fmt: skip
    assert two.shape == (2, 5 + NEW)
    with pytest.raises(ValueError, match="attention_mask must have the prompts' shape"):
        it.generate(ids, attention_mask=mask[:, 0])
