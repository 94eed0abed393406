"""Dilated attention's modules: against the oracle, each other, and torch's own modules."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import dilated_oracle as oracle
import numpy as np
import pytest
import torch
from torch import nn

from heddle.torch.dilated import (
    DilatedAttention,
    ImprovedDilatedAttention,
    ImprovedMultiheadDilatedAttention,
    MultiheadDilatedAttention,
)
from heddle.torch.dilated_distributed import DistributedDilatedAttention
from heddle.torch.dilated_layers import DilatedTransformerDecoderLayer, DilatedTransformerEncoderLayer

#: Of torch itself, where it compiles an autograd function.
WARNINGS = ["-W", "error", "-W", "ignore::DeprecationWarning"]
TESTS = Path(__file__).parents[1]
LISTS = (8, 12, 20), (1, 2, 5)
IDS = torch.tensor([[0] * 9 + [1] * 15 + [-1] * 2, [4] * 26])
PADDING = torch.arange(26)[None] >= torch.tensor([[26], [21]])
FLOAT_PADDING = torch.zeros(2, 26).masked_fill(PADDING, -torch.inf)


def arrays(*shape, dtype=torch.float64, n=3):
    return torch.randn(n, *shape, dtype=dtype, generator=torch.Generator().manual_seed(0)).requires_grad_().unbind()


@pytest.mark.parametrize("op", [None, "reference"])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("tokens", [{}, {"segment_ids": IDS, "key_padding_mask": PADDING}], ids=["plain", "packed"])
@pytest.mark.parametrize("kind", [DilatedAttention, ImprovedDilatedAttention])
def test_equals_the_oracle(kind, tokens, is_causal, op):
    """Both kinds; twelve heads over three patterns, so that no head is left out."""
    rng = np.random.default_rng(0)
    query, d_out = rng.normal(size=(2, 2, 26, 12, 4))
    key, value = rng.normal(size=(2, 2, 26, 6, 4))
    wanted = {name: x.numpy() for name, x in tokens.items()}
    zero = np.zeros(query.shape[:3])
    want = oracle.dilated(query, key, value, *LISTS, is_causal, **wanted, scale=0.3, d_out=d_out, d_lse=zero)
    inputs = [torch.from_numpy(x).requires_grad_() for x in (query, key, value)]
    out = kind(*LISTS, softmax_scale=0.3, op=op)(*inputs, is_causal, **tokens)
    grads = torch.autograd.grad(out, inputs, torch.from_numpy(d_out))
    for got, expected in zip((out, *grads), (want[0], *want[2:])):
        np.testing.assert_allclose(got.detach(), expected, rtol=0, atol=1e-10)


def test_improved_keeps_less_for_the_gradient():
    held = {}
    for kind in (DilatedAttention, ImprovedDilatedAttention):
        inputs = arrays(1, 256, 4, 16, dtype=torch.float32)
        saved: dict[int, int] = {}

        def pack(x, saved=saved):
            saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            out = kind((32, 64, 128), (1, 2, 4))(*inputs, is_causal=True)
        held[kind] = sum(saved.values())
        assert out.requires_grad
    unit = 256 * 4 * 16 * 4
    assert held[ImprovedDilatedAttention] < 5 * unit  # query, key, value, out; lse
    assert held[DilatedAttention] > 1.5 * held[ImprovedDilatedAttention]


@pytest.mark.parametrize("kind", [DilatedAttention, ImprovedDilatedAttention])
def test_dropout(kind):
    query, key, _ = arrays(1, 64, 4, 8, dtype=torch.float32)
    value = torch.ones_like(query)
    module = kind((16, 32), (1, 2), attention_dropout=0.5)
    torch.manual_seed(0)
    out = module(query, key, value)
    assert 0.9 < out.mean().item() < 1.1  # what is left is scaled up
    assert out.std().item() > 0.1
    assert torch.autograd.grad(out.sum(), key)[0].isfinite().all()
    torch.testing.assert_close(module.eval()(query, key, value), value)
    module.train()
    packed = {"segment_ids": torch.arange(64)[None] // 20, "key_padding_mask": torch.arange(64)[None] > 60}
    out = module(query, key, value, is_causal=True, **packed)
    assert out.isfinite().all()
    assert (out[:, 61:] == 0).all()


@pytest.mark.parametrize("kind", [MultiheadDilatedAttention, ImprovedMultiheadDilatedAttention])
def test_multihead_is_torchs_but_for_the_patterns(kind):
    """One pattern over the whole and no norm: nn.MultiheadAttention with the same weights."""
    ours = kind(32, 4, [1], [26], layer_norm=False)
    theirs = nn.MultiheadAttention(32, 4, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([p.weight for p in (ours.q_proj, ours.k_proj, ours.v_proj)]))
        theirs.out_proj.load_state_dict(ours.out_proj.state_dict())
    x = torch.randn(2, 26, 32)
    causal = nn.Transformer.generate_square_subsequent_mask(26)
    seen = ~PADDING
    for arguments in ({}, {"attn_mask": causal, "is_causal": True}):
        want, _ = theirs(x, x, x, need_weights=False, **arguments)
        got, weights = ours(x, x, x, need_weights=False, **arguments)
        torch.testing.assert_close(got, want)
        assert weights is None
    torch.testing.assert_close(ours(x[0], x[0], x[0])[0], theirs(x[0], x[0], x[0])[0])
    want, _ = theirs(x, x, x, PADDING)
    for padding in (PADDING, FLOAT_PADDING):
        torch.testing.assert_close(ours(x, x, x, padding)[0][seen], want[seen])


def test_lists_stand_in_the_published_order():
    """Rates first with projections, lengths first without, as in the layers."""
    multihead = MultiheadDilatedAttention(16, 2, [1, 2], [8, 12])
    layer = DilatedTransformerEncoderLayer(16, 2, [8, 12], [1, 2])
    plain = DilatedAttention([8, 12], [1, 2])
    assert multihead.attention.patterns == layer.self_attn.attention.patterns == plain.patterns == ((8, 1), (12, 2))
    assert "segment_lengths=[8, 12], dilation_rates=[1, 2]" in repr(multihead)


def test_magneto_initialization():
    torch.manual_seed(0)
    module = MultiheadDilatedAttention(256, 4, [1], [8], gamma_init=3.0)
    for projection, gain in ((module.q_proj, 1), (module.k_proj, 1), (module.v_proj, 3), (module.out_proj, 3)):
        assert projection.weight.std().item() == pytest.approx(gain * 256**-0.5, rel=0.02)
        assert not projection.bias.any()
    assert isinstance(module.norm, nn.LayerNorm)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("is_causal", [False, True])
def test_in_torchs_transformer(is_causal, padded):
    """Swapped in place of nn.MultiheadAttention, the encoder trains, and evaluates as it trains."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    layer.self_attn = ImprovedMultiheadDilatedAttention(32, 4, LISTS[1], LISTS[0])
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    x, goal = torch.randn(2, 2, 26, 32)
    mask = nn.Transformer.generate_square_subsequent_mask(26) if is_causal else None
    options = {"mask": mask, "is_causal": is_causal, "src_key_padding_mask": FLOAT_PADDING if padded else None}
    optimizer, losses = torch.optim.Adam(encoder.parameters(), 3e-3), []
    for _ in range(8):
        loss = (encoder(x, **options) - goal)[~PADDING].square().mean()
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    trained = encoder(x, **options)
    torch.testing.assert_close(encoder.eval()(x, **options)[~PADDING], trained[~PADDING])
    if is_causal:
        moved = x.clone()
        moved[:, -6:] += 1.0
        torch.testing.assert_close(encoder(moved, **options)[:, :20], encoder(x, **options)[:, :20])


@pytest.mark.parametrize("memory_length", [26, 17, 40])
def test_layers(memory_length):
    torch.manual_seed(0)
    encoder = DilatedTransformerEncoderLayer(32, 4, *LISTS, dim_feedforward=48, dropout=0.0)
    decoder = DilatedTransformerDecoderLayer(32, 4, *LISTS, dim_feedforward=48, dropout=0.0)
    tgt, source = torch.randn(2, 26, 32), torch.randn(2, memory_length, 32)
    memory = encoder(source)
    out = decoder(tgt, memory, tgt_is_causal=True)
    assert out.shape == tgt.shape
    out.square().sum().backward()
    for name, parameter in [*encoder.named_parameters(), *decoder.named_parameters()]:
        assert parameter.grad is not None
        assert parameter.grad.any() or "k_proj.bias" in name  # which softmax doesn't see
    assert not isinstance(decoder.cross_attn.norm, nn.LayerNorm)
    moved = tgt.clone()
    moved[:, -1] += 1.0
    after = decoder(moved, memory, tgt_is_causal=True)
    torch.testing.assert_close(after[:, :-1], out[:, :-1])
    # The last token of the memory that the first query's segments hold moves the first output, later ones don't.
    for place, moves in ((7, True), (24, False)):
        if place < memory_length:
            changed = memory.detach().clone()
            changed[:, place] += 1.0
            moved_by = (decoder(tgt, changed, tgt_is_causal=True) - out)[:, 0].abs().max()
            assert (moved_by.item() > 1e-4) == moves


def test_a_documents_output_does_not_depend_on_its_neighbours():
    layer = DilatedTransformerEncoderLayer(32, 4, *LISTS, dropout=0.0)
    x = torch.randn(2, 26, 32)
    packed = layer(x, segment_ids=IDS)
    torch.testing.assert_close(packed[0, 9:24], layer(x[:1, 9:24])[0], rtol=1e-5, atol=1e-5)


def test_refusals(unhooked):
    x = torch.zeros(1, 8, 16)
    module = MultiheadDilatedAttention(16, 2, [1], [4])
    for call, message in [
        (lambda: MultiheadDilatedAttention(16, 3, [1], [4]), "embed_dim must be a multiple of num_heads, got 16 and 3"),
        (lambda: MultiheadDilatedAttention(16, 2, [1, 2], [4]), "of one length, got 1 and 2"),
        (lambda: DilatedAttention([4], [1], attention_dropout=1.0), "attention_dropout must be at least 0 and less"),
        (lambda: module(x, x, x, need_weights=True), "need_weights must be False, got True"),
        (lambda: module(x, x, x, attn_mask=torch.zeros(8, 8)), "attn_mask must be None"),
        (lambda: module(x, x[:, :6], x[:, :6]), "query and key must have one length, got 8 and 6"),
        (lambda: DistributedDilatedAttention([4], [1]), "group must be given, or torch.distributed be initialized"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.slow
def test_improved_compiles_and_equals_plain():
    program = """if True:
        import torch
        from heddle.torch.dilated import DilatedAttention, ImprovedDilatedAttention

        torch.manual_seed(0)
        arrays = [torch.randn(s, requires_grad=True) for s in [(2, 22, 4, 8), (2, 22, 2, 8), (2, 22, 2, 8)]]
        lists = (4, 9, 12), (1, 2, 5)
        want = DilatedAttention(*lists)(*arrays, is_causal=True)
        grads = torch.autograd.grad(want.square().sum(), arrays)
        got = torch.compile(ImprovedDilatedAttention(*lists), fullgraph=True, backend="aot_eager")(
            *arrays, is_causal=True)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
        for a, b in zip(torch.autograd.grad(got.square().sum(), arrays), grads):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        print("same")
    """
    done = subprocess.run([sys.executable, *WARNINGS, "-c", program], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "same\n"


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_distributed_equals_one_process(processes):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS)}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    done = subprocess.run(
        [*torchrun, TESTS / "torch" / "dilated_cases.py"],
        env=environment, capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-6000:]
    assert done.stdout.count("same") == processes
