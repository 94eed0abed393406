"""Models from Hugging Face folders, Meta's and GGUF files, and into Hugging Face folders."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from heddle.data.gguf import GGUF, ROPE_FACTORS
from heddle.data.locate import locate, read_json
from heddle.data.meta import NAMES as META_NAMES
from heddle.data.meta import Meta

from .longnet import MODEL_TYPE, LongNetConfig, LongNetLM
from .model import LanguageModel, Transformer
from .model_config import PARSCALE_FIELDS, ModelConfig
from .parallel import check_parameters, dotted, place, shardings, to_host
from .parscale import hide_prefixes, is_new

logger = logging.getLogger(__name__)

#: Our name, Hugging Face's, GGUF's; {} is the layer. Matrices but the embedding are stored transposed there.
NAMES = (
    ("embedding", "model.embed_tokens.weight", "token_embd.weight"),
    ("layers.{}.attention_norm.weight", "model.layers.{}.input_layernorm.weight", "blk.{}.attn_norm.weight"),
    ("layers.{}.attention.q.weight", "model.layers.{}.self_attn.q_proj.weight", "blk.{}.attn_q.weight"),
    ("layers.{}.attention.k.weight", "model.layers.{}.self_attn.k_proj.weight", "blk.{}.attn_k.weight"),
    ("layers.{}.attention.v.weight", "model.layers.{}.self_attn.v_proj.weight", "blk.{}.attn_v.weight"),
    ("layers.{}.attention.o.weight", "model.layers.{}.self_attn.o_proj.weight", "blk.{}.attn_output.weight"),
    ("layers.{}.attention.q.bias", "model.layers.{}.self_attn.q_proj.bias", "blk.{}.attn_q.bias"),
    ("layers.{}.attention.k.bias", "model.layers.{}.self_attn.k_proj.bias", "blk.{}.attn_k.bias"),
    ("layers.{}.attention.v.bias", "model.layers.{}.self_attn.v_proj.bias", "blk.{}.attn_v.bias"),
    ("layers.{}.attention.o.bias", "model.layers.{}.self_attn.o_proj.bias", "blk.{}.attn_output.bias"),
    ("layers.{}.attention.q_norm.weight", "model.layers.{}.self_attn.q_norm.weight", "blk.{}.attn_q_norm.weight"),
    ("layers.{}.attention.k_norm.weight", "model.layers.{}.self_attn.k_norm.weight", "blk.{}.attn_k_norm.weight"),
    ("layers.{}.ffn_norm.weight", "model.layers.{}.post_attention_layernorm.weight", "blk.{}.ffn_norm.weight"),
    ("layers.{}.ffn.gate.weight", "model.layers.{}.mlp.gate_proj.weight", "blk.{}.ffn_gate.weight"),
    ("layers.{}.ffn.up.weight", "model.layers.{}.mlp.up_proj.weight", "blk.{}.ffn_up.weight"),
    ("layers.{}.ffn.down.weight", "model.layers.{}.mlp.down_proj.weight", "blk.{}.ffn_down.weight"),
    ("layers.{}.ffn.gate.bias", "model.layers.{}.mlp.gate_proj.bias", "blk.{}.ffn_gate.bias"),
    ("layers.{}.ffn.up.bias", "model.layers.{}.mlp.up_proj.bias", "blk.{}.ffn_up.bias"),
    ("layers.{}.ffn.down.bias", "model.layers.{}.mlp.down_proj.bias", "blk.{}.ffn_down.bias"),
    ("norm.weight", "model.norm.weight", "output_norm.weight"),
    ("head.weight", "lm_head.weight", "output.weight"),
)
#: ParScale's, which GGUF has no names for.
PARSCALE_NAMES = (
    ("layers.{}.attention.replicas.prefix_k", "model.layers.{}.self_attn.prefix_k"),
    ("layers.{}.attention.replicas.prefix_v", "model.layers.{}.self_attn.prefix_v"),
    ("layers.{}.attention.replicas.cross_bias", "model.layers.{}.self_attn.cross_attn_bias"),
    ("layers.{}.attention.replicas.cross_proj.weight", "model.layers.{}.self_attn.cross_attn_proj.weight"),
    ("layers.{}.cross_norm.weight", "model.layers.{}.cross_attn_layernorm.weight"),
    ("layers.{}.cross.q.weight", "model.layers.{}.cross_attn.q_proj.weight"),
    ("layers.{}.cross.k.weight", "model.layers.{}.cross_attn.k_proj.weight"),
    ("layers.{}.cross.v.weight", "model.layers.{}.cross_attn.v_proj.weight"),
    ("layers.{}.cross.o.weight", "model.layers.{}.cross_attn.o_proj.weight"),
    ("aggregate.down.weight", "model.aggregate_layer.0.weight"),
    ("aggregate.down.bias", "model.aggregate_layer.0.bias"),
    ("aggregate.up.weight", "model.aggregate_layer.2.weight"),
    ("aggregate.up.bias", "model.aggregate_layer.2.bias"),
)
#: LongNet's, beside the embedding, the final norm and the head; nor for these.
LONGNET_NAMES = (
    *(
        (f"layers.{{}}.{name}.{kind}", f"model.layers.{{}}.{name}.{kind}")
        for name in (
            "norm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.norm", "self_attn.out_proj",
            "feed_forward.norm1", "feed_forward.linear1", "feed_forward.norm2", "feed_forward.linear2",
        )
        for kind in ("weight", "bias")
    ),
    ("norm.bias", "model.norm.bias"),
)  # fmt: skip
_THEIRS = {ours: {"hugging face": hugging_face, "gguf": gguf} for ours, hugging_face, gguf in NAMES}
for _names in _THEIRS.values():
    if (_meta := META_NAMES.get(_names["hugging face"])) is not None:
        _names["meta"] = _meta
_THEIRS |= {ours: {"hugging face": hugging_face} for ours, hugging_face in (*PARSCALE_NAMES, *LONGNET_NAMES)}
#: What older checkpoints hold and nobody reads: the rotary embedding's frequencies.
_IGNORED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


@runtime_checkable
class Source(Protocol):
    """Where tensors come from, under the source's own names and torch's layout."""

    path: Path
    shapes: dict[str, tuple[int, ...]]

    def tensor(self, name: str) -> np.ndarray: ...


class Safetensors:
    """The safetensors of a folder, one file or sharded, memory-mapped."""

    def __init__(self, folder: Path):
        self.path = folder
        if (folder / INDEX).is_file():
            named = read_json(folder / INDEX).get("weight_map")
            if not isinstance(named, dict) or not named or not all(isinstance(file, str) for file in named.values()):
                raise ValueError(f"{folder / INDEX}: weight_map must name a file for each tensor")
            files = sorted(set(named.values()))
            missing = [file for file in files if not (folder / file).is_file()]
            if missing:
                raise FileNotFoundError(f"{folder}: lacks {_few(missing)}, which {INDEX} names")
        elif (folder / SINGLE).is_file():
            files = [SINGLE]
        else:
            raise FileNotFoundError(f"{folder}: holds neither {SINGLE} nor {INDEX}")
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self._files: dict[str, Any] = {}
        for file in files:
            opened = _open_safetensors(folder / file)
            for name in opened.keys():  # noqa: SIM118 (not a dict)
                stored = opened.get_slice(name)
                self.shapes[name], self.dtypes[name] = tuple(stored.get_shape()), stored.get_dtype()
                self._files[name] = opened
        odd = sorted({f"{name} is {kind}" for name, kind in self.dtypes.items() if kind not in _FLOATS})
        if odd:
            raise ValueError(f"{folder}: tensors must be {', '.join(_FLOATS)}; {_few(odd)}")

    def tensor(self, name: str) -> np.ndarray:
        return self._files[name].get_tensor(name)

    def part(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """These rows, columns, ... of a tensor; of the rest nothing is read."""
        return self._files[name].get_slice(name)[index]


_FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}


def load(
    name: str | Path | None = None,
    kind: type[LanguageModel] | None = None,
    *,
    dtype: Any = "auto",
    rngs: nnx.Rngs | None = None,
    mesh: Mesh | None = None,
    **options: Any,
) -> Any:
    """The model at a path or of a name on the hub; see :meth:`Transformer.from_pretrained`.

    Args:
        kind: :class:`Transformer` or :class:`~heddle.jax.longnet.LongNetLM`; None: what the ``config.json`` says.
    """
    parscale = {field: options.pop(field) for field in PARSCALE_FIELDS if field in options}
    path = locate(name)
    source: Source
    if path.suffix == ".gguf":
        source = GGUF.open(path)
        stored_config, convention, stored = ModelConfig.from_dict(source.config()), "gguf", "float32"
    elif Meta.is_at(path):
        source = Meta(path)
        stored_config, convention, stored = ModelConfig.from_dict(source.config()), "meta", source.dtype
    elif path.is_dir():
        if kind is None and read_json(path / "config.json").get("model_type") == MODEL_TYPE:
            kind = LongNetLM
        stored_config = (LongNetConfig if kind is LongNetLM else ModelConfig).from_json_file(path)
        source, convention = Safetensors(path), "hugging face"
        stored = _FLOATS[max(source.dtypes.values(), key=list(source.dtypes.values()).count)]
    else:
        raise ValueError(f"{path}: must be a folder with a config.json and safetensors, or Meta's, or a .gguf file")
    config: Any = stored_config
    if parscale:
        if isinstance(config, LongNetConfig):
            raise ValueError(f"{path}: a LongNet can't be replicated, got {', '.join(parscale)}")
        config = config.with_parscale(**parscale)
    dtype = resolve_dtype(dtype, stored)

    made: Any = LongNetLM if isinstance(config, LongNetConfig) else Transformer

    def build(rngs: nnx.Rngs) -> LanguageModel:
        return made(config, rngs=rngs, dtype=dtype, **options)

    abstract = nnx.eval_shape(lambda: build(nnx.Rngs(0)))
    where: dict[str, NamedSharding] = {}
    if mesh is not None:
        check_parameters(abstract, mesh)
        where = {dotted(path): s for path, s in jax.tree_util.tree_leaves_with_path(shardings(abstract, mesh))}
    leaves, treedef = jax.tree_util.tree_flatten_with_path(abstract)
    expected = {dotted(path): (leaf.shape, leaf.dtype) for path, leaf in leaves}
    new = {dotted(path) for path, _ in leaves if parscale and is_new(path)}
    new = {ours for ours in new if _theirs(ours, config, convention)[0] not in source.shapes}
    held = {ours: shape for ours, (shape, _) in expected.items() if ours not in new}
    _check(source, held, stored_config, convention)
    arrays = {
        ours: _placed(source, ours, stored_config, convention, expected[ours], where[ours]) if where else
        jnp.asarray(_read(source, ours, stored_config, convention), expected[ours][1])
        for ours in held
    }  # fmt: skip
    if new:
        arrays |= _fresh(build, new, rngs, path, {ours: where[ours] for ours in new} if where else None)
    model = jax.tree.unflatten(treedef, [arrays[ours] for ours in expected])
    if any(ours.endswith("prefix_k") for ours in new) and rngs is not None:
        hide_prefixes(model, rngs)
    return model if mesh is None else place(model, mesh)


def _placed(
    source: Source, ours: str, config: Any, convention: str, expected: tuple[tuple[int, ...], Any], sharding: Any
) -> jax.Array:
    """A parameter over a mesh: each device's part is read by itself where the source can, else out of one tensor."""
    (shape, dtype), (theirs, transposed) = expected, _theirs(ours, config, convention)
    whole = None if isinstance(source, Safetensors) else _read(source, ours, config, convention)
    read: dict[Any, np.ndarray] = {}  # devices that hold the same part share one reading

    def part(index: Any) -> np.ndarray:
        key = tuple(along.indices(size)[:2] for along, size in zip(index, shape, strict=True))
        if key not in read:
            if whole is None:
                found = source.part(theirs, index[::-1] if transposed else index)  # type: ignore[attr-defined]
                found = found.T if transposed else found
            else:
                found = whole[index]
            read[key] = found.astype(dtype)
        return read[key]

    return jax.make_array_from_callback(shape, sharding, part)


def _fresh(
    build: Callable[[nnx.Rngs], LanguageModel], new: set[str], rngs: nnx.Rngs | None, path: Path, where: Any
) -> dict[str, jax.Array]:
    """The initial values of these parameters alone, ``where`` they belong: of the others nothing is drawn."""
    if rngs is None:
        raise ValueError(f"rngs must be given, as in rngs=nnx.Rngs(0): {path} lacks {_few(_by_layer(new), 4)}")

    @partial(jax.jit, out_shardings=where)
    def fresh(key):
        leaves, _ = jax.tree_util.tree_flatten_with_path(build(nnx.Rngs(key)))
        return {dotted(where): leaf for where, leaf in leaves if dotted(where) in new}

    logger.warning("%s: new parameters, to be trained: %s", path, ", ".join(_by_layer(new)))
    return fresh(rngs.params())


def _by_layer(names: set[str]) -> list[str]:
    """Names, those of layers with * for the number."""
    return sorted({re.sub(r"^layers\.\d+", "layers.*", name) for name in names})


def resolve_dtype(dtype: Any, stored: str = "float32") -> jnp.dtype:
    """A dtype of that name; ``"auto"``: float32 on a CPU, elsewhere ``stored`` (with float16 as bfloat16)."""
    if isinstance(dtype, str) and dtype == "auto":
        dtype = "float32" if jax.default_backend() == "cpu" or stored in ("float32", "float64") else "bfloat16"
    for allowed in ("float32", "bfloat16", "float16"):
        if dtype == allowed or dtype == jnp.dtype(allowed):
            return jnp.dtype(allowed)
    raise ValueError(f"dtype must be auto, float32, bfloat16 or float16; got {dtype}")


def save(model: LanguageModel, folder: str | Path, tokenizer: Any = None, *, max_shard_bytes: int = 5 * 10**9) -> None:
    """Write a folder that transformers loads: config, generation config, safetensors, and the tokenizer's files.

    Written beside its place and renamed into it, so that the folder is all there or not at all. A saved model that
    stands there is replaced. Of a model over several processes all have to call it; process 0 writes.

    Raises:
        ValueError: a folder that holds anything but a saved model; a shard size that isn't positive; a model with
            adapters.
    """
    folder = Path(folder)
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes must be at least 1, got {max_shard_bytes}")
    leaves, _ = jax.tree_util.tree_flatten_with_path(model)
    if any(".adapter." in dotted(path) for path, _ in leaves):
        raise ValueError("model must have no adapters left to be saved: call heddle.jax.lora.merge_adapters first")
    if jax.process_index():  # process 0 writes; the others hand over the parts they hold
        for _, leaf in leaves:
            to_host(leaf)
        return
    with replacing(folder, _SAVED) as unfinished:
        config = model.config.to_dict() | {"dtype": str(leaves[0][1].dtype)}
        write_json(unfinished / "config.json", config)
        ids = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        if tokenizer is not None and len(tokenizer.stop_ids) > 1:
            ids["eos_token_id"] = list(tokenizer.stop_ids)
        write_json(unfinished / "generation_config.json", ids)
        _write_safetensors(unfinished, {dotted(path): leaf for path, leaf in leaves}, model.config, max_shard_bytes)
        if tokenizer is not None:
            tokenizer.save_pretrained(unfinished)


def _write_safetensors(folder: Path, parameters: dict[str, jax.Array], config: Any, max_shard_bytes: int) -> None:
    from safetensors.numpy import save_file

    shards: list[list[str]] = []
    room = 0
    for name, parameter in parameters.items():
        if parameter.nbytes > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(name)
        room -= parameter.nbytes
    where = {}
    for number, names in enumerate(shards, start=1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {}
        for ours in names:
            theirs, transposed = _theirs(ours, config, "hugging face")
            host = to_host(parameters[ours])
            tensors[theirs] = np.ascontiguousarray(host.T if transposed else host)
            where[theirs] = file
        save_file(tensors, folder / file, metadata={"format": "pt"})
    if len(shards) > 1:
        total = sum(parameter.nbytes for parameter in parameters.values())
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": where})


# ---------------------------------------------------------------------- names and layouts


def hugging_face_name(ours: str, config: Any) -> str:
    """Of a parameter by its dotted path."""
    return _theirs(ours, config, "hugging face")[0]


def _theirs(ours: str, config: Any, convention: str) -> tuple[str, bool]:
    """A parameter's name in a convention, and whether it lies transposed there."""
    if ours == "head.weight" and config.tie_word_embeddings:
        return _THEIRS["embedding"][convention], True
    layer = re.search(r"\d+", ours)
    name = _THEIRS[re.sub(r"\d+", "{}", ours, count=1)].get(convention, ours)  # not all have names in all conventions
    matrix = ours.endswith(".weight") and "norm" not in ours
    return name.format(layer.group() if layer else ""), matrix


def _read(source: Source, ours: str, config: Any, convention: str) -> np.ndarray:
    theirs, transposed = _theirs(ours, config, convention)
    tensor = source.tensor(theirs)
    apart = convention == "meta" or (convention == "gguf" and config.model_type in ("llama", "mistral"))
    if apart and re.search(r"attention\.[qk]\.", ours):
        tensor = _half_split(tensor, config.dim)
    return tensor.T if transposed else tensor


def _half_split(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows of q or k, whose rotated pairs lie next to each other in Meta's files and GGUF's, as halves of each head."""
    pairs = rows.reshape(-1, head_dim // 2, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def _check(source: Source, expected: dict[str, tuple[int, ...]], config: Any, convention: str) -> None:
    """One error for all that is missing, superfluous or of another shape."""
    wanted = {}
    for ours, shape in expected.items():
        theirs, transposed = _theirs(ours, config, convention)
        wanted[theirs] = shape[::-1] if transposed else shape
    unread = {_THEIRS["head.weight"][convention]} if config.tie_word_embeddings else set()
    if convention == "gguf" and config.rotary.rule == "llama3":
        unread.add(ROPE_FACTORS)
        plain = config.rotary.theta ** -(np.arange(0, config.dim, 2) / config.dim)
        _, sin = config.rotary.tables(np.ones((1, 1), np.int32))  # at position 1: the sine of the frequencies
        implied = plain / np.arcsin(np.asarray(sin, np.float64).reshape(-1))
        if not np.allclose(implied, source.tensor(ROPE_FACTORS), rtol=1e-3):
            raise ValueError(f"{source.path}: {ROPE_FACTORS} isn't what Llama 3's rule gives")
    found = {name for name in source.shapes if name not in unread and not _IGNORED.fullmatch(name)}
    misshapen = [
        f"{name} {source.shapes[name]} instead of {shape}"
        for name, shape in wanted.items()
        if name in found and source.shapes[name] != shape
    ]
    faults = {"missing": wanted.keys() - found, "not expected": found - wanted.keys(), "of another shape": misshapen}
    if any(faults.values()):
        listed = "; ".join(f"{fault}: {_few(sorted(names))}" for fault, names in faults.items() if names)
        raise ValueError(f"{source.path}: tensors don't fit the configuration: {listed}")


def _few(names: list[str], limit: int = 20) -> str:
    more = f", and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


# ---------------------------------------------------------------------- files


def _open_safetensors(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        return safe_open(path, framework="numpy")
    except SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file: {error}") from None


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


_SAVED = re.compile(
    r"(generation_)?config\.json|model(-\d+-of-\d+)?\.safetensors(\.index\.json)?|tokenizer(_config)?\.json"
    r"|special_tokens_map\.json|chat_template\.jinja"
)


@contextlib.contextmanager
def replacing(folder: Path, files: re.Pattern[str]) -> Iterator[Path]:
    """A new folder beside ``folder``, which takes its place if nothing fails and is removed if something does."""
    if folder.exists():
        if not folder.is_dir():
            raise ValueError(f"{folder}: must be a folder, got a file")
        other = sorted(path.name for path in folder.iterdir() if not files.fullmatch(path.name))
        if other:
            raise ValueError(f"{folder}: must be new, empty or a saved model, but it holds {_few(other, 3)}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        yield unfinished
        unfinished.chmod(0o777 & ~_umask())
        if folder.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old.", dir=folder.parent))
            os.replace(folder, old / folder.name)
            os.replace(unfinished, folder)
            shutil.rmtree(old)
        else:
            os.replace(unfinished, folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
