"""What ``heddle bench attention`` measures: ``attend`` and its peers, each a step on one problem's inputs."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from heddle.attention import Mask, implementations
from heddle.mask_options import from_options
from heddle.mask_picture import Drawn

DTYPES = ("float32", "bfloat16", "float16")
FRAMEWORKS = ("torch", "jax")
INPUT_BYTES = 128 << 20  #: rotated inputs hold more than this, if 8 sets do: more than the caches


@dataclass(frozen=True)
class Problem:
    """One size of attention to measure: the options of ``heddle bench attention``, which explains them.

    Each sequence of the batch has documents of its own, drawn from ``seed`` and its place in the batch.
    """

    batch: int = 1
    seq: int = 4096
    heads: int = 8
    kv_heads: int = 8
    head_dim: int = 64
    documents: int = 8
    pad: int = 0
    window: int | None = None
    backward: bool = False
    dtype: str = "float32"
    seed: int = 0

    def __post_init__(self):
        for name in ("batch", "seq", "heads", "kv_heads", "head_dim", "documents"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")
        if self.heads % self.kv_heads:
            raise ValueError(f"--heads must be a multiple of --kv-heads, got {self.heads} and {self.kv_heads}")
        if not 0 <= self.pad < self.seq:
            raise ValueError(f"--pad must leave a token of --seq {self.seq}, got {self.pad}")
        if self.dtype not in DTYPES:
            raise ValueError(f"--dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.seed < 0:
            raise ValueError(f"--seed must be at least 0, got {self.seed}")

    @functools.cached_property
    def rows(self) -> list[tuple[Mask, list[int]]]:
        """Each sequence's mask and its documents' lengths."""
        rows = []
        for b in range(self.batch):
            drawn = self.drawn(b)
            assert drawn.segments is not None  # it has documents
            rows.append((drawn.mask, np.bincount(drawn.segments[drawn.segments >= 0]).tolist()))
        return rows

    def drawn(self, row: int, context_parallel: int = 1) -> Drawn:
        """A sequence's mask, as ``heddle mask`` draws it."""
        return from_options(
            seq=self.seq, documents=self.documents, window=self.window, padding=self.pad, seed=self.seed + row,
            context_parallel=context_parallel,
        )  # fmt: skip

    @functools.cached_property
    def mask(self) -> Mask:
        """``(batch, seq)``, in NumPy."""
        start, stop = (np.concatenate([getattr(mask, name) for mask, _ in self.rows]) for name in ("start", "stop"))
        return Mask(start, stop)

    @property
    def visible(self) -> int:
        """Visible pairs over the batch, exactly."""
        return self.mask.visible(self.seq)

    @property
    def flops(self) -> int:
        """Of the two products over the visible pairs; the backward pass has five, so 2.5 times as many more."""
        forward = 4 * self.head_dim * self.visible * self.heads
        return forward * 7 // 2 if self.backward else forward

    @property
    def sets(self) -> int:
        """How many sets of inputs are rotated."""
        each = (2 * self.heads + 2 * self.kv_heads) * self.batch * self.seq * self.head_dim * 4
        return min(8, max(2, -(-INPUT_BYTES // each)))

    @property
    def shapes(self) -> list[tuple[int, int, int, int]]:
        """Of query, key, value and the output's cotangent."""
        heads = (self.heads, self.kv_heads, self.kv_heads, self.heads)
        return [(self.batch, self.seq, h, self.head_dim) for h in heads]

    def arrays(self, index: int) -> list[np.ndarray]:
        """query, key, value and the output's cotangent, standard normal, float32."""
        rng = np.random.default_rng((self.seed, index))
        return [rng.standard_normal(shape, dtype=np.float32) for shape in self.shapes]


#: Computes on one set of inputs and returns the output, when it is there (with --backward the gradients too).
Step = Callable[[int], Any]


class Contender(NamedTuple):
    """Something to measure. ``unsupported`` says why a problem isn't for it, or None."""

    framework: Literal["torch", "jax"]
    unsupported: Callable[[Problem], str | None]
    prepare: Callable[[Problem], Step]


# ---------------------------------------------------------------- torch


def _torch_device() -> Any:
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@functools.lru_cache(maxsize=1)  # one copy for all contenders
def _torch_inputs(problem: Problem) -> list[list[Any]]:
    import torch

    device, dtype = _torch_device(), getattr(torch, problem.dtype)
    sets = [[torch.from_numpy(a).to(device, dtype) for a in problem.arrays(i)] for i in range(problem.sets)]
    for query, key, value, _ in sets:
        for x in (query, key, value):
            x.requires_grad_(problem.backward)
    return sets


def _torch_step(problem: Problem, function: Callable[[Any, Any, Any], Any]) -> Step:
    """``function(query, key, value)`` in (batch, seq, heads, dim), with or without its gradients."""
    import torch

    device, sets = _torch_device(), _torch_inputs(problem)

    def step(index: int) -> Any:
        *inputs, cotangent = sets[index % len(sets)]
        out = function(*inputs)
        if problem.backward:
            torch.autograd.grad(out, inputs, cotangent)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return out.detach()

    return step


def _heddle_torch(problem: Problem) -> Step:
    import torch

    from heddle import attend

    mask = problem.mask.on(torch.empty(0, device=_torch_device()))
    return _torch_step(problem, lambda q, k, v: attend(q, k, v, mask))


def _sdpa_dense(problem: Problem) -> Step:
    import torch
    import torch.nn.functional as F

    dense = problem.mask.on(torch.empty(0, device=_torch_device())).dense(problem.seq)[:, None]
    grouped = problem.heads != problem.kv_heads

    def function(q: Any, k: Any, v: Any) -> Any:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=dense, enable_gqa=grouped).transpose(1, 2)

    return _torch_step(problem, function)


def _sdpa_documents(problem: Problem) -> Step:
    import torch
    import torch.nn.functional as F

    grouped = problem.heads != problem.kv_heads

    def one(q: Any, k: Any, v: Any) -> Any:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped).transpose(1, 2)

    def function(q: Any, k: Any, v: Any) -> Any:
        sequences = []
        for b, (_, lengths) in enumerate(problem.rows):
            documents = (x[b : b + 1].split([*lengths, problem.pad], dim=1)[: len(lengths)] for x in (q, k, v))
            sequences.append(torch.cat([one(*document) for document in zip(*documents, strict=True)], dim=1))
        out = torch.cat(sequences) if len(sequences) > 1 else sequences[0]
        return F.pad(out, (0, 0, 0, 0, 0, problem.pad)) if problem.pad else out

    return _torch_step(problem, function)


def _flex(problem: Problem) -> Step:
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    device = _torch_device()
    mask = problem.mask.on(torch.empty(0, device=device))

    def visible(b: Any, h: Any, query: Any, key: Any) -> Any:
        return (mask.start[b, query] <= key) & (key < mask.stop[b, query])

    block_mask = create_block_mask(visible, problem.batch, None, problem.seq, problem.seq, device=str(device))
    compiled = torch.compile(flex_attention, dynamic=False)
    grouped = problem.heads != problem.kv_heads

    def function(q: Any, k: Any, v: Any) -> Any:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return compiled(q, k, v, block_mask=block_mask, enable_gqa=grouped).transpose(1, 2)

    return _torch_step(problem, function)


def _cudnn(problem: Problem) -> Step:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    whole = _sdpa_documents(problem)

    def step(index: int) -> Any:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return whole(index)

    return step


def _flash_attn(problem: Problem) -> Step:
    import torch
    from flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found]

    spans = [n for _, lengths in problem.rows for n in (*lengths, problem.pad) if n]  # padding is a document too
    ends = torch.tensor([0, *np.cumsum(spans)], dtype=torch.int32, device="cuda")
    left = -1 if problem.window is None else problem.window - 1

    def function(q: Any, k: Any, v: Any) -> Any:
        flat = (x.flatten(0, 1) for x in (q, k, v))
        out = flash_attn_varlen_func(
            *flat, ends, ends, max(spans), max(spans), causal=True, window_size=(left, 0 if problem.window else -1)
        )
        return out.view(q.shape)

    return _torch_step(problem, function)


# ---------------------------------------------------------------- JAX


def _kvax(problem: Problem) -> Step:
    import jax
    import jax.numpy as jnp
    from kvax.ops import create_attention_mask, flash_attention  # type: ignore[import-not-found]
    from kvax.utils import attention_specs  # type: ignore[import-not-found]

    positions = jnp.broadcast_to(jnp.arange(problem.seq, dtype=jnp.int32), (problem.batch, problem.seq))
    drawn = [problem.drawn(b).segments for b in range(problem.batch)]
    segments = jnp.asarray(np.concatenate([s for s in drawn if s is not None]))
    where = (positions, segments, positions, segments)
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = ("data", None, None, None)

    def function(q: Any, k: Any, v: Any, mask: Any) -> Any:
        return flash_attention(q, k, v, *where, mask, scale=problem.head_dim**-0.5, assume_sequential_positions=True)

    with mesh, attention_specs(query_specs=specs, kv_specs=specs):
        return _jax_step(problem, function, create_attention_mask(*where, calc_bwd_mask=problem.backward))


@functools.lru_cache(maxsize=1)
def _jax_inputs(problem: Problem) -> list[list[Any]]:
    import jax.numpy as jnp

    return [[jnp.asarray(a, problem.dtype) for a in problem.arrays(i)] for i in range(problem.sets)]


def _jax_step(problem: Problem, function: Callable[[Any, Any, Any, Any], Any], mask: Any) -> Step:
    """``function(query, key, value, mask)`` in (batch, seq, heads, dim), compiled, with or without its gradients."""
    import jax

    sets = _jax_inputs(problem)

    @jax.jit
    def whole(q: Any, k: Any, v: Any, cotangent: Any, mask: Any) -> Any:
        if not problem.backward:
            return function(q, k, v, mask), ()
        out, pull_back = jax.vjp(lambda q, k, v: function(q, k, v, mask), q, k, v)
        return out, pull_back(cotangent)

    compiled = whole.lower(*sets[0], mask).compile()

    def step(index: int) -> Any:
        return jax.block_until_ready(compiled(*sets[index % len(sets)], mask))[0]

    return step


def _heddle_jax(problem: Problem) -> Step:
    import jax.numpy as jnp

    from heddle import attend

    return _jax_step(problem, attend, problem.mask.on(jnp.empty(0)))


def _jax_dense(problem: Problem) -> Step:
    import jax
    import jax.numpy as jnp

    dense = problem.mask.on(jnp.empty(0)).dense(problem.seq)[:, None]
    return _jax_step(problem, lambda q, k, v, mask: jax.nn.dot_product_attention(q, k, v, mask=mask), dense)


def _jax_causal(problem: Problem) -> Step:
    import jax

    return _jax_step(problem, lambda q, k, v, _: jax.nn.dot_product_attention(q, k, v, is_causal=True), ())


# ---------------------------------------------------------------- who runs


def _any(problem: Problem) -> None:
    return None


def _no_window(problem: Problem) -> str | None:
    return "is_causal can't say a window" if problem.window else None


def _causal_alone(problem: Problem) -> str | None:
    return (
        "is_causal can't say documents, padding or a window"
        if problem.documents > 1 or problem.pad or problem.window
        else None
    )


def _flex_unsupported(problem: Problem) -> str | None:
    return "it has no backward pass on CPU" if problem.backward and _torch_device().type == "cpu" else None


def _on_cuda(package: str | None, window: bool) -> Callable[[Problem], str | None]:
    """Why a peer that needs a CUDA device, and perhaps a package, can't serve a problem."""

    def unsupported(problem: Problem) -> str | None:
        if _torch_device().type != "cuda":
            return "it needs a CUDA device"
        if package is not None and importlib.util.find_spec(package) is None:
            return f"{package} is not installed"
        if problem.dtype == "float32":
            return "it takes bfloat16 and float16"
        return "it can't say a window" if problem.window and not window else None

    return unsupported


OURS = {
    "heddle-torch": Contender("torch", _any, _heddle_torch),
    "heddle-jax": Contender("jax", _any, _heddle_jax),
}
PEERS = {
    "sdpa-dense": Contender("torch", _any, _sdpa_dense),
    "sdpa-documents": Contender("torch", _no_window, _sdpa_documents),
    "flex": Contender("torch", _flex_unsupported, _flex),
    "cudnn": Contender("torch", _on_cuda(None, window=False), _cudnn),
    "flash-attn": Contender("torch", _on_cuda("flash_attn", window=True), _flash_attn),
    "jax-dense": Contender("jax", _any, _jax_dense),
    "jax-causal": Contender("jax", _causal_alone, _jax_causal),
    "kvax": Contender("jax", _on_cuda("kvax", window=False), _kvax),
}


def choose(problem: Problem, framework: str, peers: str) -> tuple[dict[str, Contender], dict[str, str]]:
    """The contenders that run, ours first, and why those of ``peers="all"`` that don't, don't.

    Raises:
        ValueError: an unknown name; a peer asked for by name that can't serve; a framework that isn't installed.
    """
    if framework not in (*FRAMEWORKS, "both"):
        raise ValueError(f"--framework must be torch, jax or both, got {framework!r}")
    frameworks = FRAMEWORKS if framework == "both" else (framework,)
    for name in frameworks:
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"--framework {framework} needs {name}: pip install heddle-attention[{name}]")
    asked = [] if peers == "none" else list(PEERS) if peers == "all" else peers.split(",")
    chosen = {name: ours for name, ours in OURS.items() if ours.framework in frameworks}
    absent = {}
    for name in asked:
        if name not in PEERS:
            raise ValueError(f"--peers must be all, none or of {', '.join(PEERS)}, got {name!r}")
        peer = PEERS[name]
        why = peer.unsupported(problem) if peer.framework in frameworks else f"it runs in {peer.framework}"
        if why is None:
            chosen[name] = peer
        elif peers != "all":
            raise ValueError(f"--peers {name} can't serve this: {why}")
        elif peer.framework in frameworks:
            absent[name] = why
    return chosen, absent


def implementation(problem: Problem, framework: str) -> str:
    """The implementation ``attend`` takes by itself."""
    shapes = problem.shapes[:3]
    if framework == "torch":
        import torch

        arrays = [torch.empty(s, dtype=getattr(torch, problem.dtype), device=_torch_device()) for s in shapes]
    else:
        import jax.numpy as jnp

        arrays = [jnp.empty(s, problem.dtype) for s in shapes]
    query, key, value = arrays
    return next(name for name, why in implementations(query, key, value, problem.mask).items() if why is None)
