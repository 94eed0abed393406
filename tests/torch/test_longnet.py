"""LongNet: the language model against its formulas, decoding against the whole, and transformers' ways with it."""

from __future__ import annotations

import copy
import math

import dilated_oracle as oracle
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from heddle.attention.dilated_patterns import cache_length
from heddle.torch.longnet import LongNet, LongNetConfig, LongNetLM
from heddle.torch.longnet_cache import LongNetCache

LISTS = (4, 6, 12), (1, 2, 5)
SIZES = {
    "vocab_size": 50, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 6,
    "segment_lengths": LISTS[0], "dilation_rates": LISTS[1], "xpos_scale_base": 8.0,
}  # fmt: skip
SEQ = 52  # past four segments of each pattern
IDS = torch.randint(3, 50, (3, SEQ), generator=torch.Generator().manual_seed(0))
LEFT = torch.ones_like(IDS)
LEFT[1, :7], LEFT[2, :30] = 0, 0
GREEDY = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}


def build(**changes) -> LongNetLM:
    torch.manual_seed(0)
    model = LongNetLM(LongNetConfig(**(SIZES | changes))).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name:
            parameter.data += 0.2 * torch.randn_like(parameter)
    return model


MODEL = build()


def formula(model: LongNetLM, ids, documents=None):
    """Logits of one row by the papers' formulas, dense, in float64, positions from the row's start on."""
    config, w = model.config, {name: x.double() for name, x in model.state_dict().items()}
    heads, size = config.num_attention_heads, config.head_dim
    tokens = oracle.places([0] * len(ids) if documents is None else documents, [False] * len(ids))
    count = torch.from_numpy(oracle.multiplicity(tokens, heads, *LISTS, True))
    n = torch.arange(len(ids), dtype=torch.float64)
    i = torch.arange(size // 2, dtype=torch.float64)
    angle = n[:, None] * config.rope_theta ** (-2 * i / size)
    zeta = (2 * i / size + 0.4) / 1.4 if config.position == "xpos" else torch.ones_like(i)

    def turn(x, sign):  # (seq, heads, size)
        a, b = x[..., : size // 2], x[..., size // 2 :]
        cos, sin = ((zeta ** (sign * n[:, None] / config.xpos_scale_base)) * f(angle) for f in (torch.cos, torch.sin))
        cos, sin = cos[:, None], sin[:, None]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], config.layer_norm_eps)

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    x = w["model.embed_tokens.weight"][ids] * config.hidden_size**0.5
    for layer in (f"model.layers.{i}" for i in range(config.num_hidden_layers)):
        y, attention = norm(x, f"{layer}.norm"), f"{layer}.self_attn"
        q, k, v = (linear(y, f"{attention}.{p}_proj").view(-1, heads, size) for p in "qkv")
        scores = torch.einsum("qhd,khd->hqk", turn(q, 1), turn(k, -1)) * size**-0.5
        p = count * torch.where(count > 0, scores, 0.0).exp()
        p = p / p.sum(-1, keepdim=True).clamp(min=1e-300)
        y = torch.einsum("hqk,khd->qhd", p, v).flatten(1)
        x = x + linear(norm(y, f"{attention}.norm"), f"{attention}.out_proj")
        ffn = f"{layer}.feed_forward"
        y = F.gelu(linear(norm(x, f"{ffn}.norm1"), f"{ffn}.linear1"))
        x = x + linear(norm(y, f"{ffn}.norm2"), f"{ffn}.linear2")
    return norm(x, "model.norm") @ w["lm_head.weight"].T


@torch.no_grad()
@pytest.mark.parametrize("position", ["xpos", "rope"])
def test_logits_are_the_papers(position):
    model = build(position=position).double()
    want = formula(model, IDS[0])
    torch.testing.assert_close(model(IDS[:1]).logits[0], want, rtol=0, atol=1e-5)  # position tables are float32
    documents = torch.tensor([0] * 17 + [1] * 20 + [2] * 15)
    want = formula(model, IDS[0], documents.tolist())
    positions = torch.cat([torch.arange(n) for n in (17, 20, 15)])[None]
    for told in ({"segment_ids": documents[None]}, {"position_ids": positions}):
        torch.testing.assert_close(model(IDS[:1], **told).logits[0], want, rtol=0, atol=1e-5)


@torch.no_grad()
def test_padding_is_as_if_it_were_not_there():
    holes = LEFT.clone()
    holes[0, 5:9] = 0
    for mask in (LEFT, LEFT.flip(1), holes):
        out = MODEL(IDS, attention_mask=mask, output_hidden_states=True)
        for row in range(3):
            real = mask[row].bool()
            alone = MODEL(IDS[row : row + 1, real], output_hidden_states=True)
            torch.testing.assert_close(out.logits[row, real], alone.logits[0], rtol=1e-4, atol=1e-5)
            for got, want in zip(out.hidden_states, alone.hidden_states):
                torch.testing.assert_close(got[row, real], want[0], rtol=1e-4, atol=1e-5)
    positions = (LEFT.cumsum(1) - 1).clamp(min=0)  # as generate gives them
    again = MODEL(IDS, attention_mask=LEFT, position_ids=positions).logits
    torch.testing.assert_close(again, MODEL(IDS, attention_mask=LEFT).logits)
    packed = torch.tensor([0] * 20 + [1] * 32)[None].expand(3, -1)
    masked = MODEL(IDS, attention_mask=LEFT.flip(1), segment_ids=packed).logits
    torch.testing.assert_close(masked[2, 20:22], MODEL(IDS[2:, 20:22]).logits[0], rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("parts", [[1] * SEQ, [9, 20, 1, 1, 13, *[1] * 8]], ids=["tokens", "parts"])
def test_step_by_step_is_all_at_once(parts):
    """Past four segments of every pattern, rows ragged by padding on the left; the cache doesn't grow."""
    want, got, cache, past = MODEL(IDS, attention_mask=LEFT).logits, [], LongNetCache(MODEL.config), 0
    for n in parts:
        now = slice(past, past + n)
        past += n
        out = MODEL(IDS[:, now], attention_mask=LEFT[:, :past], past_key_values=cache)
        got.append(out.logits)
        assert cache.get_seq_length() == past
    torch.testing.assert_close(torch.cat(got, 1)[LEFT.bool()], want[LEFT.bool()], rtol=1e-4, atol=1e-5)
    assert cache.lengths(IDS).tolist() == LEFT.sum(1).tolist()
    heads, size = MODEL.config.num_attention_heads, MODEL.config.head_dim
    assert cache.nbytes() == 2 * 2 * 3 * heads * cache_length(*LISTS) * size * 4


def test_generate():
    """Greedy, beams and sampling: with the cache what it is without; rows padded on the left what they are alone."""
    ids, mask = IDS[:, :11], LEFT[:, :11].clone()
    mask[2] = torch.tensor([0] * 8 + [1] * 3)
    greedy = MODEL.generate(ids, attention_mask=mask, **GREEDY)
    assert torch.equal(greedy, MODEL.generate(ids, attention_mask=mask, use_cache=False, **GREEDY))
    assert torch.equal(greedy, MODEL.generate(ids, attention_mask=mask, prefill_chunk_size=4, **GREEDY))
    alone = MODEL.generate(ids[1:2, 7:], **GREEDY)
    assert torch.equal(greedy[1, 7:], alone[0])
    for options in ({"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}):
        got = []
        for use_cache in (True, False):
            torch.manual_seed(1)
            settings = GREEDY | options | {"max_new_tokens": 8, "use_cache": use_cache}
            got.append(MODEL.generate(ids[:2], attention_mask=mask[:2], **settings))
        assert torch.equal(*got)
    cache = LongNetCache(MODEL.config)  # a conversation: what was read isn't read again
    first = MODEL.generate(ids[:1], past_key_values=cache, **GREEDY)
    longer = torch.cat([first, IDS[:1, :5]], 1)
    assert torch.equal(MODEL.generate(longer, past_key_values=cache, **GREEDY), MODEL.generate(longer, **GREEDY))


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable:FutureWarning")  # its new name is newer than 5.17
def test_training():
    """Packed documents train as each alone, with and without checkpointing; the loss is transformers'."""
    model, ids = copy.deepcopy(MODEL).train(), IDS[:1]
    documents = torch.tensor([0] * 17 + [1] * 35)[None]
    labels = ids.clone()
    labels[0, 17] = -100  # what follows another document

    def grads(loss):
        model.zero_grad()
        loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    alone = [model(part, labels=part, num_items_in_batch=50).loss for part in (ids[:, :17], ids[:, 17:])]
    want = sum(alone)
    logits = model(ids[:, :17]).logits[0, :-1]
    torch.testing.assert_close(alone[0], F.cross_entropy(logits, ids[0, 1:17], reduction="sum") / 50)
    want_grads = grads(want)
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        out = model(ids, segment_ids=documents, labels=labels)
        assert out.past_key_values is None
        torch.testing.assert_close(out.loss, want)
        for name, grad in grads(out.loss).items():
            torch.testing.assert_close(grad, want_grads[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_saved_and_loaded(tmp_path):
    model = build(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, LongNetConfig)
    assert config.segment_lengths == list(LISTS[0])
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)
        eager = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
        torch.testing.assert_close(eager(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-5)


def test_initialization():
    """MAGNETO's: values, outputs and feed-forward by sqrt(ln 2M)."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 2}
    model = LongNetLM(LongNetConfig(**(SIZES | sizes | {"vocab_size": 500})))
    gain = math.sqrt(math.log(6))
    layer = model.model.layers[1]
    stds = {"q_proj": 1, "k_proj": 1, "v_proj": gain, "out_proj": gain}
    for name, want in stds.items():
        assert getattr(layer.self_attn, name).weight.std().item() == pytest.approx(want / 16, rel=0.03)
    for linear in (layer.feed_forward.linear1, layer.feed_forward.linear2):
        assert linear.weight.std().item() == pytest.approx(gain * math.sqrt(2 / 768), rel=0.03)
        assert not linear.bias.any()
    for embedding in (model.lm_head, model.model.embed_tokens):
        assert embedding.weight.std().item() == pytest.approx(1 / 16, rel=0.03)
    defaults = LongNetConfig()
    assert (defaults.num_hidden_layers, defaults.hidden_size, defaults.num_attention_heads) == (12, 768, 12)
    assert (defaults.intermediate_size, defaults.position) == (3072, "xpos")
    assert (defaults.segment_lengths, defaults.dilation_rates) == (
        [2048, 4096, 8192, 16384, 32768],
        [1, 2, 4, 6, 12],
    )


def test_encoder_decoder():
    torch.manual_seed(0)
    model = LongNet(32, 4, 2, 3, 48, *LISTS, activation="gelu")
    x, tgt = torch.randn(2, 2, 26, 32)
    for name, module, gain in (
        ("encoder", model.encoder, math.sqrt(math.log(9) * math.log(4) / 3)),
        ("decoder", model.decoder, math.sqrt(math.log(9))),
    ):
        assert module[0].self_attn.gamma_init == pytest.approx(gain), name
        assert not torch.equal(module[0].self_attn.q_proj.weight, module[1].self_attn.q_proj.weight)
    for options in ({}, {"tgt": tgt}, {"tgt": tgt[:, :9]}):
        out = model(x, **options)
        assert out.shape == options.get("tgt", x).shape
        moved = x.clone()
        moved[:, 8] += torch.randn(32)
        after = model(moved, **options)
        torch.testing.assert_close(after[:, :8], out[:, :8])  # nothing looks ahead, from either side
        assert (after - out)[:, 8].abs().max() > 1e-4
    model(x, is_causal=False).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert (model(x, is_causal=False) - model(x)).abs().max() > 1e-3


def test_refusals(unhooked):
    assisted = {"assistant_model": MODEL, "max_new_tokens": 3, "do_sample": False}
    cache = LongNetCache(MODEL.config)
    MODEL(IDS, past_key_values=cache)
    for call, message in [
        (lambda: LongNetConfig(hidden_size=20, num_attention_heads=4), "multiple of twice num_attention_heads, got 20"),
        (lambda: LongNetConfig(segment_lengths=[4], dilation_rates=[1, 2]), "of one length, got 1 and 2"),
        (lambda: LongNetConfig(position="alibi"), "position must be one of rope, xpos, got 'alibi'"),
        (lambda: LongNetConfig(xpos_scale_base=100.0), "xpos_scale_base must be at least a 64th .* 32768, got 100.0"),
        (lambda: LongNetConfig(dropout=1.0), "dropout must be at least 0 and less than 1, got 1.0"),
        (lambda: LongNetConfig(num_hidden_layers=0), "num_hidden_layers must be at least 1, got 0"),
        (
            lambda: LongNetLM._from_config(MODEL.config, attn_implementation="flash"),
            "must be one of heddle, sdpa, eager",
        ),
        (lambda: MODEL(IDS, inputs_embeds=torch.zeros(1, 2, 24)), "input_ids or inputs_embeds must be given"),
        (lambda: MODEL(IDS, past_key_values=DynamicCache()), "must be a LongNetCache, got a DynamicCache"),
        (lambda: MODEL(IDS, attention_mask=LEFT[:, :5]), r"attention_mask must have shape \(3, 52\), got \(3, 5\)"),
        (lambda: MODEL(IDS, segment_ids=LEFT.long(), use_cache=True), "packed documents take no cache"),
        (
            lambda: MODEL.generate(IDS, cache_implementation="static", max_new_tokens=2),
            "cache_implementation must be left out",
        ),
        (lambda: MODEL.generate(IDS[:1], **assisted), "assisted generation is not supported"),
        (lambda: LongNet(num_encoder_layers=0), "num_encoder_layers must be at least 1, got 0"),
        (lambda: LongNet(32, 4, 1, 1, activation="swish"), "activation must be a function or one of relu, gelu"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(NotImplementedError, match="can't be cropped"):
        cache.crop(-1)
