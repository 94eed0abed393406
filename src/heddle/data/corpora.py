"""Corpora as streams of texts that can be entered anywhere: the standard library, text files, JSONL, Parquet, the hub.

A reader is ``read(epoch, cursor)``, which yields ``(key, text, cursor after it)`` from ``cursor`` on (None: the start).
Cursors are JSON values, and reading on from one gives what would have come. The key tells held-out texts from training
texts: a file's name relative to its corpus, or the text itself where texts have no name.
"""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import logging
import os
import sysconfig
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from heddle.options import ON_ERROR

from .packing import Documents

log = logging.getLogger(__name__)

Reader = Callable[[int, Any], Iterator[tuple[str, Any, Any]]]  #: of texts; of examples, of whatever is taken of them
PARTS = ("all", "train", "held_out")

STDLIB = "stdlib"
HUB = "hub:"
_JSONL_SUFFIXES = (".jsonl", ".jsonl.gz", ".ndjson", ".ndjson.gz")
_NOT_LIBRARY = {"test", "tests", "idle_test", "lib2to3", "site-packages", "dist-packages", "__pycache__"}


@runtime_checkable
class Take(Protocol):
    """What is read of a record, a JSON object or a row.

    The call returns the record's key and what was taken of it, or raises a ValueError that says in one clause what is
    wrong with the record.
    """

    @property
    def fields(self) -> tuple[str, ...]:
        """Those that are read, of which a record has some."""
        ...

    def __call__(self, record: Any) -> tuple[str, Any]: ...


@dataclass(frozen=True)
class TakeText:
    """The text in a field."""

    field: str = "text"

    @property
    def fields(self) -> tuple[str, ...]:
        return (self.field,)

    def __call__(self, record: Any) -> tuple[str, str]:
        text = record_text(record, self.field)
        return text, text


@runtime_checkable
class Encoder(Protocol):
    """The part of a tokenizer that training needs."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def eos_id(self) -> int | None: ...
    def encode(self, text: str) -> list[int]: ...


def open_corpus(
    name: str,
    *,
    part: str = "all",
    held_out: float = 0.02,
    seed: int | None = None,
    on_error: str = "fail",
    field: str = "text",
) -> Reader:
    """The texts of a corpus.

    Args:
        name: ``"stdlib"``, the running interpreter's own library; a file, a folder or a pattern (``"logs/**/*.jsonl"``)
            of JSONL (plain or gzip), Parquet, or anything else as plain text, a document a file; ``"hub:NAME"``,
            ``"hub:NAME:SUBSET"`` or ``"hub:NAME:SUBSET:SPLIT"``, a dataset streamed from the Hugging Face hub (or a
            folder in its layout), of which the split is ``train`` unless given and an empty subset is the default one.
        part: ``"train"`` and ``"held_out"`` are disjoint and together ``"all"``. A text belongs to one of them by
            the hash of its name (of itself where it has none), whatever else the corpus holds.
        held_out: the share of texts that are held out, about.
        seed: another order of files in each epoch; None: sorted by name, in every epoch. Lines, rows and the hub's
            records keep their order (packing shuffles its windows).
        on_error: a broken line (or text file that isn't UTF-8) is a ValueError with file and line number, or with
            ``"skip"`` logged as a warning that says the same, and skipped.
        field: of a JSONL object, Parquet row or hub record that holds the text.

    Raises:
        ValueError: a name that stands for no file, files of several kinds, impossible options.
    """
    check_choices(part, held_out, on_error)
    if name == STDLIB:
        reader = stdlib(seed)
    else:
        reader = open_records(name, TakeText(field), seed=seed, on_error=on_error)
        if reader is None:
            root, paths, _ = _find(name, STDLIB)
            reader = text_files(paths, root, seed, on_error)
    return part_of(reader, part, held_out)


def check_choices(part: str, held_out: float, on_error: str) -> None:
    """
    Raises:
        ValueError: options of a corpus that it can't have.
    """
    for option, value, choices in (("part", part, PARTS), ("on_error", on_error, ON_ERROR)):
        if value not in choices:
            raise ValueError(f"{option} must be one of {', '.join(choices)}; got {value!r}")
    if not 0 <= held_out < 1:
        raise ValueError(f"held_out must be at least 0 and below 1, got {held_out}")


def open_records(name: str, take: Take, *, seed: int | None, on_error: str, builtin: str = STDLIB) -> Reader | None:
    """What ``take`` takes of each record of a corpus of records; None: the corpus is of plain texts.

    Args:
        name, seed, on_error: as of :func:`open_corpus`.
        builtin: the corpus that needs no files, for the message where there are none.
    """
    if name.startswith(HUB):
        return hub(*_parts_of_hub(name), take, on_error)
    _, paths, kind = _find(name, builtin)
    if kind == "JSONL":
        return json_lines(paths, seed, on_error, take)
    return parquet(paths, seed, on_error, take) if kind == "Parquet" else None


def tokenized(reader: Reader, tokenizer: Encoder) -> Documents:
    """The documents of a corpus as token ids for packing, each closed by the tokenizer's end of text if it has one.

    Empty texts are passed over.
    """

    end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]

    def documents(epoch: int, cursor: Any) -> Iterator[tuple[np.ndarray, Any]]:
        for _, text, after in reader(epoch, cursor):
            if text:
                ids = tokenizer.encode(text)
                yield np.asarray(ids if ids[-1:] == end else ids + end, np.int32), after

    return documents


def stdlib(seed: int | None = None) -> Reader:
    """The running interpreter's library sources, without its tests and lib2to3; files that aren't UTF-8 are left out.

    661 documents, 11.8 MB, half of them below 9.4 kB and a tenth above 39.5 kB (Python 3.11).
    """
    root = Path(sysconfig.get_path("stdlib"))
    paths = []
    for folder, folders, files in os.walk(root):
        folders[:] = set(folders) - _NOT_LIBRARY
        paths += [path for name in files if name.endswith(".py") and _is_utf8(path := Path(folder, name))]
    return text_files(paths, root, seed)


def text_files(paths: list[Path], root: Path, seed: int | None = None, on_error: str = "fail") -> Reader:
    """Plain UTF-8 text, a document a file; named by their paths relative to ``root``."""

    def read(epoch: int, cursor: Any) -> Iterator[tuple[str, str, Any]]:
        ordered = ordered_files(paths, seed, epoch)
        for at in range(cursor or 0, len(ordered)):
            path = ordered[at]
            data = path.read_bytes()
            try:
                text = data.decode()
            except UnicodeDecodeError as error:
                line = data.count(b"\n", 0, error.start) + 1
                report_broken(f"{path}:{line}", f"not UTF-8: byte 0x{data[error.start]:02x}", on_error)
                continue
            yield path.relative_to(root).as_posix(), text, at + 1

    return read


def json_lines(
    paths: list[Path],
    seed: int | None = None,
    on_error: str = "fail",
    take: Take = TakeText(),
) -> Reader:
    """JSONL: an object a line. Blank lines are passed over."""

    def read(epoch: int, cursor: Any) -> Iterator[tuple[str, str, Any]]:
        ordered = ordered_files(paths, seed, epoch)
        first, offset, number = cursor or (0, 0, 0)
        for at in range(first, len(ordered)):
            path = ordered[at]
            with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as lines:
                for line in _lines(lines, offset, path):
                    number += 1
                    offset += len(line)
                    if not line.strip():
                        continue
                    try:
                        key, value = take(_json(line))
                    except ValueError as error:
                        report_broken(f"{path}:{number}", str(error), on_error)
                        continue
                    yield key, value, [at, offset, number]
            offset = number = 0

    return read


def parquet(
    paths: list[Path],
    seed: int | None = None,
    on_error: str = "fail",
    take: Take = TakeText(),
) -> Reader:
    """Parquet: a row a document. Needs ``pyarrow``."""
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise ValueError("reading Parquet needs pyarrow: pip install pyarrow") from None

    def read(epoch: int, cursor: Any) -> Iterator[tuple[str, str, Any]]:
        ordered = ordered_files(paths, seed, epoch)
        first, done = cursor or (0, 0)
        for at in range(first, len(ordered)):
            path, row = ordered[at], 0
            try:
                file = ParquetFile(path)
            except ValueError as error:
                raise ValueError(f"{path} isn't Parquet: {error}") from None
            with file:
                columns = [name for name in take.fields if name in file.schema_arrow.names]
                if not columns:
                    wanted = " or ".join(map(repr, take.fields))
                    raise ValueError(f"{path} has no column {wanted}; it has {', '.join(file.schema_arrow.names)}")
                for group in range(file.num_row_groups):
                    size = file.metadata.row_group(group).num_rows
                    if row + size <= done:
                        row += size
                        continue
                    for batch in file.iter_batches(batch_size=1024, row_groups=[group], columns=columns):
                        for record in batch.to_pylist():
                            row += 1
                            if row <= done:
                                continue
                            try:
                                key, value = take(record)
                            except ValueError as error:
                                report_broken(f"{path}:{row}", str(error), on_error)
                                continue
                            yield key, value, [at, row]
            done = 0

    return read


def hub(
    name: str,
    subset: str | None = None,
    split: str = "train",
    take: Take = TakeText(),
    on_error: str = "fail",
) -> Reader:
    """A dataset of the Hugging Face hub, streamed: nothing is downloaded before it is needed. Needs ``datasets``."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise ValueError(
            "reading a hub dataset needs the datasets package: pip install 'heddle-attention[train]'"
        ) from None

    def read(epoch: int, cursor: Any) -> Iterator[tuple[str, str, Any]]:
        dataset = load_dataset(name, subset, split=split, streaming=True)
        row = 0
        if cursor is not None:
            row = cursor["row"]
            dataset.load_state_dict(cursor["state"])
        for record in dataset:
            row += 1
            try:
                key, value = take(record)
            except ValueError as error:
                report_broken(f"{HUB}{name}:{row}", str(error), on_error)
                continue
            yield key, value, {"row": row, "state": dataset.state_dict()}

    return read


def _parts_of_hub(name: str) -> tuple[str, str | None, str]:
    """Name, subset and split of a dataset of the hub."""
    dataset, *rest = name.removeprefix(HUB).split(":")
    if not dataset or len(rest) > 2:
        raise ValueError(
            f"a corpus of the hub must be {HUB}NAME, {HUB}NAME:SUBSET or {HUB}NAME:SUBSET:SPLIT, got {name!r}"
        )
    subset, split = (*rest, "", "")[:2]
    return dataset, subset or None, split or "train"


def is_held_out(key: str, share: float) -> bool:
    """Whether the text of this key is held out: its hash, as a fraction of all, is below ``share``."""
    digest = hashlib.blake2b(key.encode(errors="surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest) < share * 2**64


def part_of(reader: Reader, part: str, share: float) -> Reader:
    """``"train"``, ``"held_out"`` or ``"all"`` of what a reader reads."""
    if part == "all":
        return reader

    def read(epoch: int, cursor: Any) -> Iterator[tuple[str, Any, Any]]:
        return (item for item in reader(epoch, cursor) if is_held_out(item[0], share) == (part == "held_out"))

    return read


def _find(name: str, builtin: str) -> tuple[Path, list[Path], str]:
    """The files of a corpus, of one kind, with what their names are relative to."""
    path = Path(name).expanduser()
    if path.is_file():
        root, paths = path.parent, [path]
    elif path.is_dir():
        root, paths = path, [p for p in path.rglob("*") if p.is_file() and not _hidden(p.relative_to(path))]
    else:
        fixed = list(itertools.takewhile(lambda part: not set(part) & set("*?["), path.parts))
        root, pattern = Path(*fixed), "/".join(path.parts[len(fixed) :])
        paths = [p for p in root.glob(pattern) if p.is_file()] if pattern else []
    if not paths:
        raise ValueError(
            f"corpus must be {builtin}, {HUB}NAME, or a file, a folder or a pattern that holds files; got {name!r}"
        )
    kinds = {_file_kind(p) for p in paths}
    if len(kinds) > 1:
        raise ValueError(
            f"corpus must hold files of one kind, {name!r} holds {' and '.join(sorted(kinds))}: "
            "give a pattern, such as 'folder/*.txt'"
        )
    return root, paths, kinds.pop()


def _file_kind(path: Path) -> str:
    if path.name.endswith(_JSONL_SUFFIXES):
        return "JSONL"
    return "Parquet" if path.suffix == ".parquet" else "text"


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def ordered_files(paths: list[Path], seed: int | None, epoch: int) -> list[Path]:
    ordered = sorted(paths)
    if seed is None:
        return ordered
    return [ordered[i] for i in np.random.default_rng([seed, epoch]).permutation(len(ordered))]


def record_text(record: Any, field: str) -> str:
    """The text in a field of a record.

    Raises:
        ValueError: what is wrong with it, in one clause.
    """
    if not isinstance(record, dict):
        raise ValueError(f"{kind_of(record)}, not an object")
    if field not in record:
        raise ValueError(f"no field {field!r}; it has {', '.join(map(str, record)) or 'none'}")
    text = record[field]
    if not isinstance(text, str):
        raise ValueError(f"{field!r} is {kind_of(text)}, not text")
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can spell half of a surrogate pair; no tokenizer can encode it
        raise ValueError(f"{field!r} holds a lone surrogate") from None
    return text


def _json(line: bytes) -> Any:
    try:
        return json.loads(line)
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: byte 0x{line[error.start]:02x}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise ValueError("not JSON: nested too deeply") from None


def _lines(file: Any, offset: int, path: Path) -> Iterator[bytes]:
    try:
        file.seek(offset)
        yield from file
    except (EOFError, zlib.error) as error:
        raise ValueError(f"{path} is a damaged gzip file: {error}") from None


def kind_of(value: Any) -> str:
    return "null" if value is None else type(value).__name__


def report_broken(place: str, what: str, on_error: str) -> None:
    if on_error == "fail":
        raise ValueError(f"{place}: {what}")
    log.warning("%s: %s; skipped", place, what)


def _is_utf8(path: Path) -> bool:
    try:
        path.read_bytes().decode()
    except UnicodeDecodeError:
        return False
    return True
