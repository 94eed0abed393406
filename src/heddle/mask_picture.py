"""Pictures of masks: tiles, documents, and the ranks of context parallelism."""

from __future__ import annotations

import colorsys
import itertools
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from heddle import plot
from heddle.attention import Mask, balance
from heddle.attention.arrays import to_numpy
from heddle.attention.mask import PADDING_SEGMENT_ID

#: What a tile is and its colour, by code. The last is a tile that a kernel visits though nothing in it is visible.
TILES = (("empty", "#E9ECF0"), ("partial", "#7DBBE6"), ("full", "#0072B2"), ("empty, yet visited", "#F0C9A0"))
MOST_TILES = 512  # a side
MOST_ROWS = 9


class Ranks(NamedTuple):
    """Who holds which queries: ``order`` as :mod:`heddle.attention.balance` gives it, for ``ranks`` ranks."""

    order: Int[np.ndarray, " q_len"]
    ranks: int
    balance: str


class Drawn(NamedTuple):
    """A mask and what its picture shows beside it."""

    mask: Mask
    kv_len: int
    name: str
    segments: Int[np.ndarray, "rows q_len"] | None = None
    ranks: Ranks | None = None


def figures(drawn: Drawn, block_q: int | None = None, block_k: int | None = None) -> dict[str, Any]:
    """The numbers of a picture, exactly: visible pairs, tiles by what they are, each rank's visible pairs."""
    mask, kv_len = drawn.mask, drawn.kv_len
    block_q, block_k = _blocks(mask, kv_len, block_q, block_k)
    codes, untested = _codes(mask, kv_len, block_q, block_k)
    visible = mask.visible(kv_len)
    rows, q_len = mask.start.shape
    numbers: dict[str, Any] = {
        "mask": drawn.name,
        "rows": rows,
        "q_len": q_len,
        "kv_len": kv_len,
        "visible_pairs": visible,
        "density": visible / (rows * q_len * kv_len),
        "block_q": block_q,
        "block_k": block_k,
        "tiles": {
            "total": codes.size,
            "visited": int((codes > 0).sum()),
            "without_test": int(untested.sum()),
            "empty": int(np.isin(codes, (0, 3)).sum()),
            "partial": int((codes == 1).sum()),
            "full": int((codes == 2).sum()),
        },
    }
    if drawn.segments is not None:
        numbers["documents"] = [[stop - start for start, stop in _spans(row)] for row in drawn.segments]
    if drawn.ranks is not None:
        shares = balance.areas(mask, drawn.ranks.order, drawn.ranks.ranks)
        numbers["context_parallel"] = {
            "ranks": drawn.ranks.ranks,
            "balance": drawn.ranks.balance,
            "visible_pairs": [round(share * visible / drawn.ranks.ranks) for share in shares.tolist()],
            "max_over_mean": float(shares.max()),
        }
    return numbers


def summary(numbers: dict[str, Any]) -> list[str]:
    """What :func:`figures` found, in a few lines for people."""
    tiles, pairs = numbers["tiles"], numbers["rows"] * numbers["q_len"] * numbers["kv_len"]
    lines = [
        f"{numbers['visible_pairs']:,} of {pairs:,} pairs visible ({numbers['density']:.1%})",
        f"tiles of {numbers['block_q']} × {numbers['block_k']}: {tiles['visited']:,} of {tiles['total']:,} visited, "
        f"{tiles['without_test']:,} of them without a test",
    ]
    if parallel := numbers.get("context_parallel"):
        lines.append(
            f"{parallel['ranks']} ranks, balance {parallel['balance']}: "
            f"visible pairs max/mean {parallel['max_over_mean']:.3f}"
        )
    return lines


def write(drawn: Drawn, out: str | Path, block_q: int | None = None, block_k: int | None = None) -> list[Path]:
    """Write the picture: into a directory as ``mask.png`` and ``mask.html``, or to ``out`` with those endings.

    ``out`` that ends in ``.png`` or ``.html`` names the one file wanted.
    """
    drawing, path = picture(drawn, block_q, block_k), Path(out)
    if path.suffix in (".png", ".html"):
        return [drawing.png(path) if path.suffix == ".png" else drawing.html(path)]
    if path.is_dir() or str(out).endswith("/"):
        path = path / "mask"
    return [drawing.png(path.with_name(path.name + ".png")), drawing.html(path.with_name(path.name + ".html"))]


def show(
    drawn: Drawn, out: str | None = None, block_q: int | None = None, block_k: int | None = None, as_json: bool = False
) -> None:
    """Print a mask's figures, and the mask itself as text unless it is written to ``out``."""
    numbers = figures(drawn, block_q, block_k)
    files = write(drawn, out, block_q, block_k) if out else []
    if as_json:
        print(json.dumps(numbers | {"files": [str(file) for file in files]}))
        return
    if not files:
        rows = range(drawn.mask.start.shape[0])
        print("\n\n".join(drawn.mask.show(drawn.kv_len, row=row) for row in rows), end="\n\n")
    print("\n".join([drawn.name, *summary(numbers), *(f"wrote {file}" for file in files)]))


def picture(drawn: Drawn, block_q: int | None = None, block_k: int | None = None) -> plot.Picture:
    """Draw a mask, one panel for each of its rows: queries downwards, keys to the right.

    Tiles are empty, partial or full; one that a kernel visits in vain is marked. Documents are outlined. Under context
    parallelism a band along the queries shows who holds them, and the legend each rank's visible pairs.

    Args:
        block_q, block_k: the tiles' sizes; by default the smallest power of two that gives at most 64 a side.

    Raises:
        ValueError: more than 512 tiles a side, or more than 9 rows.
    """
    mask, kv_len = drawn.mask, drawn.kv_len
    rows, q_len = mask.start.shape
    block_q, block_k = _blocks(mask, kv_len, block_q, block_k)
    if rows > MOST_ROWS:
        raise ValueError(f"a picture holds at most {MOST_ROWS} rows of a mask, got {rows}: draw some of them")
    numbers = figures(drawn, block_q, block_k)
    codes, _ = _codes(mask, kv_len, block_q, block_k)
    band, labels = _band(drawn.ranks, numbers)
    scene = _Scene(
        drawn.name,
        summary(numbers),
        codes,
        mask.coverage(block_q, block_k, kv_len),
        [*range(0, q_len, block_q), q_len],
        [*range(0, kv_len, block_k), kv_len],
        [_outline(row) for row in drawn.segments] if drawn.segments is not None else None,
        band,
        [(TILES[code][0] + " tile" * (code < 3), code) for code in range(4) if code < 3 or (codes == code).any()],
        labels,
    )
    # One panel is 5.2 inches wide; several share 8.
    columns = rows if rows <= 3 else int(np.ceil(np.sqrt(rows)))
    wide = 5.2 if rows == 1 else 8.0 / columns
    tall = wide * min(1.0, max(0.3, q_len / kv_len))
    left = 0.85 if band is None else 1.15
    panels = [(left + r % columns * (wide + 0.8), 1.35 + r // columns * (tall + 0.8), wide, tall) for r in range(rows)]
    size = (panels[columns - 1][0] + wide + 2.2, panels[-1][1] + tall + 0.7)
    return plot.Picture(drawn.name, *_plotly(scene, columns), size, lambda figure: _draw(scene, figure, size, panels))


class _Band(NamedTuple):
    """Runs of queries that one rank holds: ``len(ranks) + 1`` edges; a colour for each rank."""

    edges: list[int]
    ranks: list[int]
    colours: list[str]


class _Scene(NamedTuple):
    """What both drawings show."""

    name: str
    summary: list[str]
    codes: Int[np.ndarray, "rows q_tiles k_tiles"]
    share: Float[np.ndarray, "rows q_tiles k_tiles"]
    q_edges: list[int]
    k_edges: list[int]
    outlines: list[list[tuple]] | None
    band: _Band | None
    kinds: list[tuple[str, int]]  # the legend: a name and a code of TILES
    labels: list[str]  # of the first ranks


def _draw(scene: _Scene, figure: Any, size: tuple[float, float], panels: list[tuple]) -> None:
    """On a matplotlib figure; ``panels`` are left, top, width and height in inches."""
    from matplotlib.colors import ListedColormap
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    def place(x: float, y: float, w: float = 0.0, h: float = 0.0) -> tuple[float, float, float, float]:
        return x / size[0], 1 - (y + h) / size[1], w / size[0], h / size[1]

    left, top, _, _ = panels[0]
    figure.text(*place(left, 0.42)[:2], scene.name, fontsize=14, fontweight="bold", color=plot.INK)
    note = "\n".join(scene.summary)
    figure.text(*place(left, 0.56)[:2], note, fontsize=9.5, color="#57606a", va="top", linespacing=1.5)
    colours = ListedColormap([colour for _, colour in TILES])
    grid = {"edgecolors": "white", "linewidth": 0.4} if max(scene.codes.shape[1:]) <= 40 else {}
    for row, (x, y, w, h) in enumerate(panels):
        axes = figure.add_axes(place(x, y, w, h))
        limits = {"vmin": -0.5, "vmax": len(TILES) - 0.5}
        axes.pcolormesh(scene.k_edges, scene.q_edges, scene.codes[row], cmap=colours, **limits, **grid)
        if scene.outlines is not None:
            axes.plot(*zip(*scene.outlines[row], strict=True), color=plot.INK, linewidth=0.9, clip_on=False)
        axes.set_xlim(0, scene.k_edges[-1])
        axes.set_ylim(scene.q_edges[-1], 0)
        for put, length in ((axes.set_xticks, scene.k_edges[-1]), (axes.set_yticks, scene.q_edges[-1])):
            put(list(_ticks(length)), list(_ticks(length).values()))
        axes.set_xlabel("key" if len(panels) == 1 else f"key (row {row})", fontsize=11, color=plot.INK)
        edge = axes
        if scene.band is not None:
            axes.tick_params(labelleft=False)
            edge = figure.add_axes(place(x - 0.24, y, 0.18, h), sharey=axes)
            held = np.asarray(scene.band.ranks)[:, None]
            limits = {"vmin": -0.5, "vmax": len(scene.band.colours) - 0.5}
            edge.pcolormesh([0, 1], scene.band.edges, held, cmap=ListedColormap(scene.band.colours), **limits)
            edge.set_xticks([])
        if x == left:
            edge.set_ylabel("query", fontsize=11, color=plot.INK)
        for part in (axes, edge):
            plot.style(part)
            part.spines[:].set_visible(False)
    entries: list[Any] = [Patch(facecolor=TILES[code][1], label=name) for name, code in scene.kinds]
    if scene.outlines is not None:
        entries.append(Line2D([], [], color=plot.INK, linewidth=0.9, label="document"))
    if scene.band is not None:
        entries += [Patch(facecolor=c, label=t) for c, t in zip(scene.band.colours, scene.labels, strict=False)]
    figure.legend(
        handles=entries,
        loc="upper left",
        bbox_to_anchor=place(size[0] - 2.1, top - 0.1)[:2],
        frameon=False,
        fontsize=9.5,
        labelcolor=plot.INK,
        handlelength=1.1,
        handleheight=1.1,
    )


def _plotly(scene: _Scene, columns: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Traces and layout of the page."""
    rows, q_len, kv_len = len(scene.codes), scene.q_edges[-1], scene.k_edges[-1]
    lines = -(-rows // columns)
    # On a page empty tiles are a veil, so that they are quiet in light and in dark.
    colours = ["rgba(128,128,128,0.14)", *(colour for _, colour in TILES[1:])]
    gap = 1 if max(scene.codes.shape[1:]) <= 40 else 0
    wide, tall = (1 - 0.08 * (columns - 1)) / columns, (1 - 0.16 * (lines - 1)) / lines
    corners = np.meshgrid(scene.q_edges[:-1], scene.k_edges[:-1], indexing="ij")
    band_width = kv_len * 0.04

    def cells(x: list, y: list, z: list, colours: list[str], cell: dict, hover: str) -> dict[str, Any]:
        steps = len(colours)
        return {
            "type": "heatmap",
            "x": x,
            "y": y,
            "z": z,
            "zmin": -0.5,
            "zmax": steps - 0.5,
            "colorscale": [[(i + side) / steps, colour] for i, colour in enumerate(colours) for side in (0, 1)],
            "showscale": False,
            "hovertemplate": hover + "<extra></extra>",
            **cell,
        }

    def axis(name: str, length: int) -> dict[str, Any]:
        ticks = _ticks(length)
        return {
            "title": {"text": name, "font": {"size": 13}},
            "showgrid": False,
            "zeroline": False,
            "constrain": "domain",
            "tickvals": list(ticks),
            "ticktext": list(ticks.values()),
        }

    data: list[dict[str, Any]] = []
    layout: dict[str, Any] = {
        "title": plot.bold(scene.name, scene.summary),
        "margin": {"l": 80, "r": 20, "t": 130, "b": 60},
        "legend": {"x": 1.02, "y": 1, "yanchor": "top", "bgcolor": "rgba(0,0,0,0)"},
        "hovermode": "closest",
        "showlegend": True,
    }
    for row in range(rows):
        suffix = str(row + 1) if row else ""
        across, down = row % columns, row // columns
        layout[f"xaxis{suffix}"] = axis("key" if rows == 1 else f"key (row {row})", kv_len) | {
            "range": [-band_width * 1.4 if scene.band is not None else 0, kv_len],
            "domain": [across * (wide + 0.08), across * (wide + 0.08) + wide],
            "constraintoward": "left",
            "anchor": f"y{suffix}",
        }
        layout[f"yaxis{suffix}"] = axis("query" if across == 0 else "", q_len) | {
            "range": [q_len, 0],
            "domain": [1 - down * (tall + 0.16) - tall, 1 - down * (tall + 0.16)],
            "constraintoward": "top",
            "anchor": f"x{suffix}",
            **({"scaleanchor": f"x{suffix}"} if q_len == kv_len else {}),
        }
        cell = {"xaxis": f"x{suffix}", "yaxis": f"y{suffix}"}
        hover = "queries from %{customdata[0]}<br>keys from %{customdata[1]}<br>%{customdata[2]}% visible"
        heat = cells(scene.k_edges, scene.q_edges, scene.codes[row].tolist(), colours, cell, hover)
        visible = np.round(100 * scene.share[row], 1)
        data.append(heat | {"xgap": gap, "ygap": gap, "customdata": np.stack([*corners, visible], axis=-1).tolist()})
        if scene.outlines is not None:
            xs, ys = zip(*scene.outlines[row], strict=True)
            data.append(
                {
                    "type": "scatter",
                    "mode": "lines",
                    "name": "document",
                    "x": [None if np.isnan(x) else x for x in xs],
                    "y": [None if np.isnan(y) else y for y in ys],
                    "line": {"color": "#8c8c8c", "width": 1.2},
                    "hoverinfo": "skip",
                    "showlegend": row == 0,
                    "legendrank": 1001,  # after the tiles, before the ranks
                    **cell,
                }
            )
        if scene.band is not None:
            place, held = [-band_width * 1.25, -band_width * 0.25], [[rank] for rank in scene.band.ranks]
            data.append(cells(place, scene.band.edges, held, scene.band.colours, cell, "rank %{z}"))
    legend = [(name, colours[code] if code else "rgba(128,128,128,0.3)") for name, code in scene.kinds]
    if scene.band is not None:
        legend += zip(scene.labels, scene.band.colours, strict=False)
    for i, (name, colour) in enumerate(legend):
        mark = {"name": name, "legendrank": 1000 if i < len(scene.kinds) else 1002, "x": [None], "y": [None]}
        mark["marker"] = {"symbol": "square", "size": 12, "color": colour}
        data.append({"type": "scatter", "mode": "markers", **mark})
    return data, layout


def _blocks(mask: Mask, kv_len: int, block_q: int | None, block_k: int | None) -> tuple[int, int]:
    blocks = []
    for name, block, length in (("block_q", block_q, mask.q_len), ("block_k", block_k, kv_len)):
        if block is None:
            block = 1 << max(0, -(-length // 64) - 1).bit_length()
        if block < 1:
            raise ValueError(f"{name} must be at least 1, got {block}")
        if -(-length // block) > MOST_TILES:
            raise ValueError(
                f"{name} must be at least {-(-length // MOST_TILES)} for a picture of {length:,} tokens "
                f"({MOST_TILES} tiles a side), got {block}"
            )
        blocks.append(block)
    return blocks[0], blocks[1]


def _codes(mask: Mask, kv_len: int, block_q: int, block_k: int) -> tuple[np.ndarray, np.ndarray]:
    """What each tile is, an index into TILES, and whether a kernel skips its elementwise test."""
    share = mask.coverage(block_q, block_k, kv_len)
    tiles = mask.tiles(block_q, block_k, kv_len)
    lo, full_lo, full_hi, hi = (to_numpy(bound)[..., None] for bound in tiles.rows)
    column = np.arange(share.shape[2])
    visited = ((lo <= column) & (column < hi)) | (column < tiles.prefix)
    untested = (full_lo <= column) & (column < full_hi)
    codes = np.where(share == 1, 2, np.where(share > 0, 1, np.where(visited, 3, 0)))
    return codes.astype(np.int8), untested


def _spans(segments: np.ndarray) -> list[tuple[int, int]]:
    """``(start, stop)`` of each document of a row, padding left out."""
    edges = [0, *(np.flatnonzero(np.diff(segments)) + 1).tolist(), len(segments)]
    return [(a, b) for a, b in itertools.pairwise(edges) if segments[a] != PADDING_SEGMENT_ID]


def _outline(segments: np.ndarray) -> list[tuple]:
    """The documents' squares on the diagonal as one line, NaN between two of them."""
    gap = (float("nan"), float("nan"))
    line: list[tuple] = []
    for a, b in _spans(segments):
        line += [(a, a), (b, a), (b, b), (a, b), (a, a), gap]
    return line or [gap]


def _band(ranks: Ranks | None, numbers: dict[str, Any]) -> tuple[_Band | None, list[str]]:
    """The ranks' runs along the queries, and a legend entry for each of the first sixteen ranks."""
    if ranks is None:
        return None, []
    held = np.empty(len(ranks.order), dtype=np.int64)
    held[ranks.order] = np.repeat(np.arange(ranks.ranks), len(ranks.order) // ranks.ranks)
    starts = [0, *(np.flatnonzero(np.diff(held)) + 1).tolist()]
    colours = []
    for rank in range(ranks.ranks):
        # Hues around the circle but for the tiles' blues, lightness in turn so that neighbours differ for everyone.
        hue = (0.72 + 0.76 * rank / ranks.ranks) % 1
        rgb = colorsys.hls_to_rgb(hue, (0.42, 0.66)[rank % 2], 0.62)
        colours.append("#" + "".join(f"{round(255 * c):02x}" for c in rgb))
    pairs = numbers["context_parallel"]["visible_pairs"]
    mean = max(sum(pairs) / len(pairs), 1e-30)
    labels = [f"rank {rank}: {count / mean:.3f} × mean" for rank, count in enumerate(pairs[:16])]
    return _Band([*starts, len(held)], held[starts].tolist(), colours), labels


def _ticks(length: int) -> dict[int, str]:
    """Multiples of a power of two, at most nine of them, and how they read."""
    step = 1 << max(0, -(-length // 8) - 1).bit_length()
    return {tick: plot.short(tick) if step >= 1024 else f"{tick:,}" for tick in range(0, length + 1, step)}
