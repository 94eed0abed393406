"""The JAX launch lowered for CUDA on a machine without one. Not collected by name: test_triton.py runs it."""

from __future__ import annotations

import re
import zlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention_cases import segments
from heddle import Mask
from heddle.jax import triton
from heddle.kernels import plan

BATCH, SEQ, HEADS, KV_HEADS, DIM = 2, 512, 8, 2, 64
SEGMENTS = np.concatenate([segments(100, 300, 112), segments(400, 90, padding=22)])
#: The plan's own of bfloat16 on sm_90, head dimension 64; for float32 small ones, whose compilation takes less time.
TILES = {
    "bfloat16": {"forward": (128, 128), "backward_kv": (64, 128), "backward_q": (128, 128)},
    "float32": {"forward": (32, 16), "backward_kv": (16, 32), "backward_q": (16, 16)},
}


@pytest.fixture(autouse=True)
def _hopper(monkeypatch):
    monkeypatch.setattr(triton, "_gpu", lambda: (90, 132))


def calls(function, *arguments) -> dict[str, dict]:
    """By kernel: its operands' and results' types, and its launch as the plugin will read it."""
    module = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).compiler_ir()
    found = {}

    def visit(operation):
        if operation.name == "stablehlo.custom_call":
            attributes = operation.attributes
            assert attributes["call_target_name"].value == "triton_kernel_call_ffi"
            config = attributes["mhlo.backend_config"]  # the typed interface's
            name = config["name"].value
            assert name not in found, f"{name} is launched twice"
            found[name] = {
                "operands": [str(x.type).removeprefix("tensor<").rstrip(">") for x in operation.operands],
                "results": [str(x.type).removeprefix("tensor<").rstrip(">") for x in operation.results],
                "launch": read_launch(zlib.decompress(config["opaque"].value_bytes)),
            }
        return 0

    def walk(operation):
        visit(operation)
        for region in operation.regions:
            for block in region:
                for inner in block:
                    walk(inner.operation)

    walk(module.operation)
    return found


def fields(message: bytes) -> list[tuple[int, int | bytes]]:
    """The numbered fields of a protocol buffer's message."""
    found, at = [], 0

    def number() -> int:
        nonlocal at
        value, shift = 0, 0
        while True:
            byte = message[at]
            at, value, shift = at + 1, value | (byte & 127) << shift, shift + 7
            if byte < 128:
                return value

    while at < len(message):
        tag = number()
        if tag & 7 == 0:
            found.append((tag >> 3, number()))
        else:
            assert tag & 7 in (1, 2, 5), "a wire type that no message has"
            size = {1: 8, 5: 4}.get(tag & 7) or number()
            found.append((tag >> 3, message[at : at + size]))
            at += size
    return found


def read_launch(message: bytes) -> dict:
    """PTX, grid and parameters out of a serialised launch, whose schema the plugin keeps to itself."""
    (call,) = (value for _, value in fields(message) if isinstance(value, bytes) and b".visible .entry" in value)
    parts = fields(call)
    (kernel,) = (value for _, value in parts if isinstance(value, bytes) and b".visible .entry" in value)
    (ptx,) = (value.decode() for _, value in fields(kernel) if isinstance(value, bytes) and b".entry" in value)
    numbers = [value for _, value in parts if isinstance(value, int)]
    parameters = [fields(value) for _, value in parts if isinstance(value, bytes) and value is not kernel]
    return {"ptx": ptx, "grid": numbers, "parameters": parameters}


def shapes(dtype: str) -> list[jax.ShapeDtypeStruct]:
    sizes = [(BATCH, SEQ, HEADS, DIM), (BATCH, SEQ, KV_HEADS, DIM), (BATCH, SEQ, KV_HEADS, DIM)]
    return [jax.ShapeDtypeStruct(size, dtype) for size in sizes]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_forward_and_backward(dtype):
    def both(query, key, value, segments, d_out, d_lse):
        mask = Mask.documents(segments)
        _, pull = jax.vjp(lambda *arrays: triton.flash(*arrays, mask, 0.125), query, key, value)
        return pull((d_out, d_lse))

    query, key, value = shapes(dtype)
    d_lse = jax.ShapeDtypeStruct(query.shape[:3], "float32")
    small = {name: plan.Tile(*tile, 4, 1) for name, tile in TILES["float32"].items()} if dtype == "float32" else {}
    with plan.override(**small):
        found = calls(both, query, key, value, jax.ShapeDtypeStruct(SEGMENTS.shape, "int32"), query, d_lse)
    short = {"bfloat16": "bf16", "float32": "f32"}[dtype]
    q, k = f"2x512x8x64x{short}", f"2x512x2x64x{short}"
    rows, bounds = "2x512x8xf32", ["2x512xi32"] * 2
    tiles = {name: SEQ // tile[name == "backward_kv"] for name, tile in TILES[dtype].items()}

    def schedule(kernel):
        return f"5x2x{tiles[kernel]}xi32"

    expected = {
        "forward": ([q, k, k, *bounds, schedule("forward")], [q, rows]),
        "delta": ([q, q, rows], [rows]),
        "backward_kv": ([q, k, k, *bounds, schedule("backward_kv"), q, rows, rows], [k, k]),
        "backward_q": ([q, k, k, *bounds, schedule("backward_q"), q, rows, rows], [q]),
    }
    assert {name: (call["operands"], call["results"]) for name, call in found.items()} == expected
    strides = [SEQ * HEADS * DIM, HEADS * DIM, DIM, *[SEQ * KV_HEADS * DIM, KV_HEADS * DIM, DIM] * 2]
    for name, call in found.items():
        numbers = [BATCH * SEQ * HEADS] if name == "delta" else [SEQ, SEQ, BATCH, tiles[name], *strides]
        check_parameters(name, call, numbers)
    assert found["forward"]["launch"]["grid"] == [tiles["forward"], HEADS, BATCH]
    assert found["backward_kv"]["launch"]["grid"] == [tiles["backward_kv"], KV_HEADS, BATCH]
    assert found["backward_q"]["launch"]["grid"] == [tiles["backward_q"], HEADS, BATCH]


def test_decode():
    def decode(query, key, value, lengths):
        return triton.flash(query, key, value, Mask.lengths(lengths, 1), 0.125)

    query = jax.ShapeDtypeStruct((BATCH, 1, HEADS, DIM), "bfloat16")
    found = calls(decode, query, *shapes("bfloat16")[1:], jax.ShapeDtypeStruct((BATCH,), "int32"))
    splits = SEQ // 64  # 64 keys of a tile: fewer than what the processors could take
    part = f"{splits}x2x1x8"
    kv = "2x512x2x64xbf16"
    assert {name: (call["operands"], call["results"]) for name, call in found.items()} == {
        "decode": (["2x1x8x64xbf16", kv, kv, "2x1xi32", "2x1xi32"], [f"{part}x64xf32", f"{part}xf32"]),
        "combine": ([f"{part}x64xf32", f"{part}xf32"], ["2x1x8x64xbf16", "2x1x8xf32"]),
    }
    strides = [HEADS * DIM, HEADS * DIM, DIM, *[SEQ * KV_HEADS * DIM, KV_HEADS * DIM, DIM] * 2]
    check_parameters("decode", found["decode"], [SEQ, BATCH, 64, *strides])  # q_len is 1, and so a constant
    check_parameters("combine", found["combine"], [BATCH * HEADS, splits])


def check_parameters(name: str, call: dict, numbers: list[int]) -> None:
    """The launch hands over what the machine code declares: arrays where it has pointers, then these numbers."""
    entry = re.search(r"\.visible \.entry (\w+)\((.*?)\)", call["launch"]["ptx"], re.DOTALL)
    assert entry is not None
    assert entry[1] == name
    declared = [line.strip(" ,\n") for line in entry[2].strip().split("\n")]
    pointers = [".ptr" in line for line in declared]
    given = call["launch"]["parameters"]
    # An array's parameter is a message of its own, with the alignment of 16 that the code counts on.
    arrays = [any(isinstance(value, bytes) and (2, 16) in safe_fields(value) for _, value in p) for p in given]
    assert sum(arrays) == len(call["operands"]) + len(call["results"])
    assert pointers[: len(arrays)] == arrays
    # Triton's own two, for scratch memory, which the plugin adds.
    assert len(declared) == len(given) + 2
    assert [value for p in given[sum(arrays) :] for _, value in p if isinstance(value, int)] == numbers
    assert "sm_90a" in call["launch"]["ptx"]


def safe_fields(message: bytes) -> list:
    try:
        return fields(message)
    except (AssertionError, IndexError):
        return []


def test_repeated_layers_are_compiled_once(monkeypatch):
    compiled = []
    compile_kernel = triton._kernel_call.__wrapped__
    counted = lambda *arguments: compiled.append(arguments) or compile_kernel(*arguments)  # noqa: E731
    import functools

    monkeypatch.setattr(triton, "_kernel_call", functools.cache(counted))

    def layers(query, key, value):
        mask = Mask.causal(SEQ)
        for _ in range(3):
            query, _ = triton.flash(query, key, value, mask, 0.125)
        return query

    jax.jit(layers).trace(*shapes("bfloat16"))
    assert len(compiled) == 1


def test_tiles_are_those_of_the_override():
    def run(query, key, value):
        return triton.flash(query, key, value, Mask.causal(SEQ), 0.125)[0]

    before = calls(run, *shapes("bfloat16"))["forward"]
    with plan.override(forward=plan.Tile(64, 32, 4, 2)):
        overridden = calls(lambda *arrays: run(*arrays), *shapes("bfloat16"))["forward"]
    assert before["operands"][-1] == "5x1x4xi32"
    assert overridden["operands"][-1] == "5x1x8xi32"
    assert (before["launch"]["grid"], overridden["launch"]["grid"]) == ([4, 8, 2], [8, 8, 2])


def test_vmap_joins_the_batch():
    mapped = jax.vmap(partial(run_causal), in_axes=(0, None, 0))
    query, key, value = (jax.ShapeDtypeStruct((3, *x.shape), x.dtype) for x in shapes("bfloat16"))
    key = jax.ShapeDtypeStruct(key.shape[1:], key.dtype)
    found = calls(mapped, query, key, value)
    assert found["forward"]["operands"][:3] == ["6x512x8x64xbf16", "6x512x2x64xbf16", "6x512x2x64xbf16"]
    assert found["forward"]["launch"]["grid"] == [4, 8, 6]


def run_causal(query, key, value):
    return triton.flash(query, key, value, Mask.causal(SEQ, like=query), 0.125)[0].astype(jnp.float32)
