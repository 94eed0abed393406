"""Documents into rows of fixed length: best-fit packing, with segment ids, positions and next-token targets."""

from __future__ import annotations

import queue
import threading
import zlib
from bisect import bisect_left, insort
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
from jaxtyping import Int

from heddle.attention.arrays import Array
from heddle.attention.mask import PADDING_SEGMENT_ID

NO_TARGET = -1  #: the target of tokens that have none: a document's last, and padding

#: ``documents(epoch, cursor)`` yields ``(document, cursor after it)`` from ``cursor`` on; None: from the start. A
#: document is its token ids, or a :class:`Document`. A cursor is any JSON value. The order may differ by epoch, but not
#: between two calls for the same epoch.
Documents = Callable[[int, Any], Iterable[tuple[Any, Any]]]


class Document(NamedTuple):
    """A document of which only some tokens are learned: the others are context, and never a target."""

    tokens: Any  #: ids
    learned: Any  #: whether each of them is


class Batch(NamedTuple):
    """Packed rows; a pytree in JAX and in torch, on NumPy arrays as it comes out of packing.

    ``tokens[i]`` is to predict ``targets[i]``, the next token of its own document, or nothing where that is
    ``NO_TARGET``: at a document's end, and where the next token isn't learned. ``segment_ids`` are what
    :meth:`heddle.Mask.documents` takes; ``positions`` count from the start of the document, not of the row.
    """

    tokens: Int[Array, "*steps rows row_len"]
    segment_ids: Int[Array, "*steps rows row_len"]
    positions: Int[Array, "*steps rows row_len"]
    targets: Int[Array, "*steps rows row_len"]

    def used(self) -> float:
        """The share of places that hold a token rather than padding."""
        return float((self.segment_ids != PADDING_SEGMENT_ID).mean())


class _Tokens(NamedTuple):
    ids: np.ndarray
    targets: np.ndarray  #: of each token


class _Piece(NamedTuple):
    document: _Tokens
    start: int
    stop: int


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing: items by falling length, each into the fullest row that still takes it.

    Args:
        lengths: of the items, each between 1 and ``capacity``.
        capacity: of every row.

    Returns:
        The rows, each a list of indices into ``lengths``. O(n log n) for n items.
    """
    rows: list[list[int]] = []
    spaces: list[tuple[int, int]] = []  # (free places, row) of the rows that aren't full, ascending
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[item]
        if not 1 <= length <= capacity:
            raise ValueError(f"lengths must lie between 1 and capacity {capacity}, got {length}")
        at = bisect_left(spaces, (length, 0))
        if at < len(spaces):
            space, row = spaces.pop(at)
        else:
            space, row = capacity, len(rows)
            rows.append([])
        rows[row].append(item)
        if space > length:
            insort(spaces, (space - length, row))
    return rows


def pack(documents: Iterable[Any], row_len: int) -> Batch:
    """All of ``documents`` (token ids, or :class:`Document`) in as few rows as best fit finds, in no particular order.

    For a stream, and for training, see :class:`Packer`.
    """
    _check_count("row_len", row_len)
    return _batch(_pack([_tokens(document) for document in documents], row_len), row_len)


class Packer(Iterator[Batch]):
    """A stream of documents as a stream of batches of packed rows.

    Documents are read until a window of tokens is full, its documents are packed by best-fit decreasing ("Fewer
    Truncations Improve Language Modeling", arXiv 2404.10830) and its rows shuffled. Documents longer than a row are cut
    into rows and a remainder. A cut loses no training signal and counts none twice: positions go on, and the last token
    before the cut keeps the token after it as its target, so a document of ``n`` tokens always gives ``n - 1`` targets.
    What a cut does lose is context, since the remainder is a segment of its own and does not see the tokens before.

    Everything follows from ``documents``, ``seed`` and the sizes. :meth:`state` says in a few numbers where the stream
    stands, and a packer that is handed them goes on with exactly the rows that would have come. It reads the window
    that was under way again, and fails if that isn't what it was.

    Args:
        documents: ``documents(epoch, cursor)``, see :data:`Documents`. Empty documents are passed over.
        row_len: tokens in a row.
        rows: rows in a batch.
        seed: of the order of rows within a window.
        window: tokens packed together; a larger one fills rows better and mixes more documents, and costs 8 bytes a
            token. Default: 2**20, or 256 rows if that is more.
        epochs: how often to go through the documents; None: without end. The last batch of a finite stream is filled up
            with rows of padding.

    Raises:
        ValueError: sizes below 1; while iterating, documents that hold no token at all, or that aren't those of the
            state that was restored.
    """

    def __init__(
        self,
        documents: Documents,
        row_len: int,
        rows: int,
        *,
        seed: int = 0,
        window: int | None = None,
        epochs: int | None = None,
    ):
        for name, value in (("row_len", row_len), ("rows", rows), ("window", window), ("epochs", epochs)):
            if value is not None:
                _check_count(name, value)
        if seed < 0:
            raise ValueError(f"seed must not be negative, got {seed}")
        self.row_len, self.rows = row_len, rows
        self._documents, self._seed, self._epochs = documents, seed, epochs
        self._window_tokens = window if window is not None else max(2**20, 256 * row_len)
        self.restore({"epoch": 0, "cursor": None, "window": 0, "row": 0, "checksum": None})

    @property
    def ahead(self) -> int:
        """Batches to make before they are asked for: with a window's, the next is packed while these are trained on."""
        return 2 + self._window_tokens // (self.rows * self.row_len)

    def state(self) -> dict[str, Any]:
        """Where the next batch begins, as a JSON value: the place where its window does, and the row within it.

        With it goes a checksum of the window's documents; None if they aren't read yet.
        """
        return {**self._place, "row": self._row, "checksum": self._checksum}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from where a packer of the same documents, seed and sizes stood (``rows`` may differ).

        The window that was being handed out is read and packed again; nothing before it is.
        """
        self._place = {name: state[name] for name in ("epoch", "cursor", "window")}
        self._row: int = state["row"]
        self._checksum: int | None = state["checksum"]
        self._packed: list[list[_Piece]] | None = None
        self._stream: Iterator[tuple[_Tokens, int, Any]] | None = None

    def __next__(self) -> Batch:
        before = self.state()
        try:
            rows = self._take(self.rows)
        except BaseException:
            self.restore(before)  # so that trying again begins where this began
            raise
        if not rows:
            raise StopIteration
        return _batch(rows, self.row_len, self.rows)

    def _take(self, count: int) -> list[list[_Piece]]:
        """The next ``count`` rows, out of as many windows as that takes; fewer at the end."""
        taken: list[list[_Piece]] = []
        while len(taken) < count:
            if self._packed is None:
                self._packed, self._following = self._pack_window()
                if not self._packed:
                    break
            more = self._packed[self._row : self._row + count - len(taken)]
            taken += more
            self._row += len(more)
            if self._row == len(self._packed):
                self._place, self._row, self._checksum, self._packed = self._following, 0, None, None
        return taken

    def _pack_window(self) -> tuple[list[list[_Piece]], dict[str, Any]]:
        """The rows of the window at ``self._place``, and the place of the window after it."""
        epoch, cursor, window = self._place.values()
        self._stream = self._stream or self._read(epoch, cursor)
        documents, size = [], 0
        for tokens, *after in self._stream:
            documents.append(tokens)
            size += len(tokens.ids)
            epoch, cursor = after
            if size >= self._window_tokens:
                break
        checksum = 0
        for tokens in documents:
            checksum = zlib.crc32(tokens.targets, zlib.crc32(tokens.ids, checksum))
        if self._checksum not in (None, checksum):
            raise ValueError(
                f"documents must be those of the state to go on from, but those of its window {window} have changed: "
                "bring back the corpus, its files' names and the tokenizer as they were, or begin a new run"
            )
        self._checksum = checksum
        rows = _pack(documents, self.row_len)
        order = np.random.default_rng([self._seed, window]).permutation(len(rows))
        return [rows[i] for i in order], {"epoch": epoch, "cursor": cursor, "window": window + 1}

    def _read(self, epoch: int, cursor: Any) -> Iterator[tuple[_Tokens, int, Any]]:
        """Documents from there on, epoch after epoch, each with its epoch and the cursor after it."""
        while self._epochs is None or epoch < self._epochs:
            empty = cursor is None  # only an epoch read from its start can prove that there is nothing to read
            for document, after in self._documents(epoch, cursor):
                tokens = _tokens(document)
                empty = empty and not len(tokens.ids)
                yield tokens, epoch, after
            if empty:
                raise ValueError("documents must hold at least one token, got none")
            epoch, cursor = epoch + 1, None


def prepared(packer: Any) -> Generator[tuple[Batch, Any, bool]]:
    """A packer's batches, made ahead; with each the packer's state after it, and whether it is the last.

    Args:
        packer: a :class:`Packer`; or another iterator of batches with its ``ahead`` and ``state``.
    """

    def batches() -> Iterator[tuple[Batch, Any, bool]]:
        before = None
        for batch in packer:
            if before is not None:
                yield *before, False
            before = batch, packer.state()
        if before is not None:
            yield *before, True

    return ahead(batches, depth=packer.ahead)


Item = TypeVar("Item")


def ahead(items: Callable[[], Iterator[Item]], depth: int) -> Generator[Item]:
    """The items of an iterator that a background thread makes, up to ``depth`` of them before they are asked for.

    ``items`` is called in that thread. An exception there is raised here, at the item it stood for. Closing the
    generator stops the thread, and waits for it.
    """
    ready: queue.Queue[tuple[bool, Any]] = queue.Queue(maxsize=depth)
    stop = threading.Event()

    def put(is_item: bool, value: Any) -> bool:
        while not stop.is_set():
            try:
                ready.put((is_item, value), timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for item in items():
                if not put(True, item):
                    return
            put(False, None)
        except BaseException as error:
            put(False, error)

    thread = threading.Thread(target=work, name="heddle-data", daemon=True)
    thread.start()
    try:
        while True:
            is_item, value = ready.get()
            if is_item:
                yield value
            elif value is None:
                return
            else:
                raise value
    finally:
        stop.set()
        thread.join()


def _pack(documents: list[_Tokens], row_len: int) -> list[list[_Piece]]:
    pieces = [
        _Piece(document, start, min(start + row_len, len(document.ids)))
        for document in documents
        for start in range(0, len(document.ids), row_len)
    ]
    return [[pieces[i] for i in row] for row in best_fit([p.stop - p.start for p in pieces], row_len)]


def _batch(rows: list[list[_Piece]], row_len: int, count: int | None = None) -> Batch:
    """``rows`` as arrays, filled up with rows of padding to ``count``."""
    shape = (len(rows) if count is None else count, row_len)
    batch = Batch(*(np.full(shape, fill, np.int32) for fill in (0, PADDING_SEGMENT_ID, 0, NO_TARGET)))
    for row, pieces in enumerate(rows):
        at = 0
        for segment, (document, start, stop) in enumerate(pieces):
            here = np.s_[row, at : at + stop - start]
            batch.tokens[here] = document.ids[start:stop]
            batch.segment_ids[here] = segment
            batch.positions[here] = np.arange(start, stop)
            batch.targets[here] = document.targets[start:stop]
            at += stop - start
    return batch


def _tokens(document: Any) -> _Tokens:
    learned = None
    if isinstance(document, Document):
        document, learned = document.tokens, np.asarray(document.learned)
    tokens = np.asarray(document)
    if tokens.ndim != 1 or (tokens.size and not np.issubdtype(tokens.dtype, np.integer)):
        raise ValueError(f"a document must be a sequence of token ids, got {tokens.dtype} of shape {tokens.shape}")
    if learned is not None and (learned.dtype != bool or learned.shape != tokens.shape):
        raise ValueError(
            f"learned must be a bool for each of the {len(tokens)} tokens, got {learned.dtype} of shape {learned.shape}"
        )
    ids = tokens.astype(np.int32)
    targets = np.full_like(ids, NO_TARGET)
    targets[:-1] = ids[1:] if learned is None else np.where(learned[1:], ids[1:], NO_TARGET)
    return _Tokens(ids, targets)


def _check_count(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
