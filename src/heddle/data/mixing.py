"""Several streams of documents as one, each with its share of the tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from heddle.options import check_weights

from .packing import Document, Documents


def mixed(sources: Sequence[Documents], weights: Sequence[float | int], *, once: bool = False) -> Documents:
    """Several streams of documents as one stream, for :class:`heddle.data.packing.Packer`.

    The next document is always one of the source that is furthest behind its share of the tokens so far. So the order
    follows from the documents alone, the shares hold over any long stretch and not only on average, and a stream that
    goes on from a cursor is the one that would have come. A source that ends begins its next epoch.

    Args:
        sources: see :data:`heddle.data.packing.Documents`.
        weights: of each; the shares of the tokens are in their proportion.
        once: the stream ends where a source would begin its second epoch. Otherwise it never does, and is all in its
            first epoch; whoever reads it is told nothing of its sources' epochs.

    Raises:
        ValueError: no sources, not a positive finite weight for each; while iterating, a source that holds no token.
    """
    check_weights("weights", weights, len(sources))

    def documents(epoch: int, cursor: Any) -> Iterator[tuple[Any, Any]]:
        # Of each source its epoch, the cursor within it, and the tokens that it has given.
        places: list[list[Any]] = [list(place) for place in cursor or [(0, None, 0)] * len(sources)]
        streams = [iter(source(*place[:2])) for source, place in zip(sources, places, strict=True)]
        # What it had given when its epoch began; -1 where that is not known, as the reading began within the epoch.
        before = [given if within is None else -1 for _, within, given in places]
        while True:
            at = min(range(len(sources)), key=lambda i: places[i][2] / weights[i])
            place = places[at]
            item = next(streams[at], None)
            if item is not None:
                document, place[1] = item
                place[2] += len(document.tokens if isinstance(document, Document) else document)
                yield document, [list(place) for place in places]
            elif place[2] == before[at]:
                raise ValueError(f"sources must hold at least one token each, got none of source {at}")
            elif once:
                return
            else:
                place[0], place[1], before[at] = place[0] + 1, None, place[2]
                streams[at] = iter(sources[at](*place[:2]))

    return documents
