"""Pictures of measurements: one description, drawn as an interactive Plotly page or as a PNG.

    picture = lines({"heddle": (lengths, ms), "peer": (lengths, theirs)}, title="Forward", x="tokens", y="ms")
    picture.html("forward.html")    # one file with plotly.js inside: works offline, in light and dark
    picture.png("forward.png")      # by matplotlib's Agg; needs no display and no browser
    page("report.html", "Attention", ["<p>On two cores.</p>", picture, other])

Needs ``pip install heddle-attention[bench]``; nothing is imported before a file is written.
"""

from __future__ import annotations

import hashlib
import html
import json
import math
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

#: Okabe and Ito's colours, which every kind of colour vision tells apart, without those that vanish on white or black.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#8C8C8C")
MARKERS = (("circle", "o"), ("square", "s"), ("diamond", "D"), ("triangle-up", "^"), ("x", "X"), ("pentagon", "p"))
GRID = "rgba(128,128,128,0.25)"
INK = "#24292f"
DPI = 160


@dataclass(frozen=True)
class Picture:
    """One chart, to be written as a page, a PNG or a fragment of a larger page.

    Args:
        title: the heading; it may be empty.
        data, layout: Plotly's traces and layout, as plain JSON values.
        size: width and height of the PNG in inches, at 160 dots an inch; the page takes the same height.
        draw: draws the same data on a ``matplotlib.figure.Figure`` of that size.
    """

    title: str
    data: list[dict[str, Any]] = field(repr=False)
    layout: dict[str, Any] = field(repr=False)
    size: tuple[float, float]
    draw: Callable[[Any], None] = field(repr=False)

    def html(self, path: str | Path) -> Path:
        """Write a self-contained page (plotly.js inside, no outside assets); returns its path."""
        return page(path, self.title, [self], heading=False)

    def png(self, path: str | Path) -> Path:
        """Write a PNG of ``size`` at 160 dots an inch; returns its path."""
        try:
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure
        except ImportError as error:
            raise _missing("matplotlib") from error
        figure = Figure(figsize=self.size, dpi=DPI, facecolor="white")
        FigureCanvasAgg(figure)
        self.draw(figure)
        return write_beside(path, lambda file: figure.savefig(file, format="png", metadata={"Software": None}))

    def div(self) -> str:
        """This chart as a fragment for a page that holds plotly.js once (:func:`page` does)."""
        figure = json.dumps([self.data, {**_LAYOUT, **self.layout}, _CONFIG], default=_plain, separators=(",", ":"))
        figure = figure.replace("</", "<\\/")
        name = "plot-" + hashlib.sha1(figure.encode()).hexdigest()[:12]
        height = round(self.size[1] * 100)
        return (
            f'<figure class="plot"><div id="{name}" style="height:{height}px"></div><script>'
            f'Plotly.newPlot("{name}",...{figure})</script></figure>'
        )


def page(path: str | Path, title: str, parts: Iterable[Picture | str], heading: bool = True) -> Path:
    """Write one self-contained page of pictures and HTML fragments, in order, under its title as a heading.

    Fragments are trusted HTML: escape (``html.escape``) what comes from elsewhere. Beside ordinary elements the page
    styles ``<p class="note">`` (small print), ``<ul class="figures">`` (``<li><b>42</b> tokens/s</li>``) and ``<pre>``.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise _missing("plotly") from error
    body = "\n".join(part.div() if isinstance(part, Picture) else part for part in parts)
    top = f"<h1>{html.escape(title)}</h1>" if heading and title else ""
    text = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title or 'Heddle')}</title>\n<style>{_STYLE}</style>\n"
        f"<script>{get_plotlyjs()}</script>\n</head>\n<body>\n<main>\n{top}\n{body}\n</main>\n</body>\n</html>\n"
    )
    return write_beside(path, lambda file: file.write(text.encode()))


def lines(
    series: Mapping[str, tuple[Iterable, Iterable]],
    *,
    title: str,
    x: str,
    y: str,
    log_x: bool = False,
    log_y: bool = False,
    dashed: Collection[str] = (),
    markers: bool | None = None,
    errors: Mapping[str, Iterable] | None = None,
) -> Picture:
    """Curves, one for each name: ``{"heddle": (xs, ys), ...}``.

    Args:
        x, y: the axes' names with their units ("milliseconds").
        log_x: a logarithmic axis to base 2, labelled at the points measured (up to 16 of them).
        log_y: a logarithmic axis to base 10.
        dashed: names of curves drawn dashed: rooflines, floors, targets.
        markers: whether points are marked; by default where a curve has at most 40.
        errors: half the height of the bar at each point of the curves named, such as a standard error.

    A ``None`` or NaN leaves a gap.

    Raises:
        ValueError: no series, an x, y and errors of different lengths, or a value that a logarithmic axis can't show.
    """
    curves = {}
    for name, (xs, ys) in _some("series", series).items():
        xs, ys = [_number(value) for value in xs], [_number(value) for value in ys]
        if len(xs) != len(ys) or not xs:
            raise ValueError(f"series {name!r} must have as many x as y, and some, got {len(xs)} and {len(ys)}")
        for axis, log, values in (("log_x", log_x, xs), ("log_y", log_y, ys)):
            low = min((value for value in values if value is not None), default=1.0)
            if log and low <= 0:
                raise ValueError(f"{axis} needs positive values, series {name!r} has {low}")
        curves[name] = (xs, ys)
    heights = {name: [_number(value) for value in values] for name, values in (errors or {}).items()}
    for option, names in (("dashed", set(dashed)), ("errors", set(heights))):
        if unknown := names - set(curves):
            raise ValueError(f"{option} must name series, got {sorted(unknown)} beside {sorted(curves)}")
    for name, values in heights.items():
        if len(values) != len(curves[name][0]):
            raise ValueError(f"errors must have one value a point of {name!r}, got {len(values)}")
    ticks = sorted({value for xs, _ in curves.values() for value in xs if value is not None}) if log_x else []
    ticks = ticks if len(ticks) <= 16 else []

    def marked(xs: Sequence) -> bool:
        return len(xs) <= 40 if markers is None else markers

    data = []
    for i, (name, (xs, ys)) in enumerate(curves.items()):
        data.append(
            {
                "type": "scatter",
                "name": html.escape(name),
                "x": xs,
                "y": ys,
                "mode": "lines+markers" if marked(xs) and name not in dashed else "lines",
                "line": {"color": _colour(i), "width": 2, "dash": "dash" if name in dashed else "solid"},
                "marker": {"symbol": MARKERS[i % len(MARKERS)][0], "size": 8},
                **({"error_y": {"type": "data", "array": heights[name]}} if name in heights else {}),
            }
        )
    layout = {
        "xaxis": _axis(x, log_x) | ({"tickvals": ticks, "ticktext": [short(t) for t in ticks]} if ticks else {}),
        "yaxis": _axis(y, log_y),
        "hovermode": "x unified",
        "showlegend": len(curves) > 1,
        "title": bold(title),
    }

    def draw(figure: Any) -> None:
        axes = _axes(figure, title, x, y)
        for i, (name, (xs, ys)) in enumerate(curves.items()):
            axes.plot(
                _nan(xs),
                _nan(ys),
                label=name,
                color=_colour(i),
                linewidth=2,
                linestyle="--" if name in dashed else "-",
                marker=MARKERS[i % len(MARKERS)][1] if marked(xs) and name not in dashed else None,
                markersize=6,
            )
            if name in heights:
                axes.errorbar(xs, _nan(ys), _nan(heights[name]), fmt="none", ecolor=_colour(i), capsize=4)
        if log_x:
            axes.set_xscale("log", base=2)
            if ticks:
                axes.set_xticks(ticks, [short(t) for t in ticks])
                axes.minorticks_off()
        if log_y:
            _log_y(axes)
        axes.grid(True, color="#d8dce1", linewidth=0.8)
        _legend(axes, len(curves))

    return Picture(title, data, layout, (8.0, 4.5), draw)


def bars(
    series: Mapping[str, Iterable],
    *,
    categories: Iterable[str],
    title: str,
    y: str,
    x: str = "",
    log_y: bool = False,
    stacked: bool = False,
) -> Picture:
    """Bars beside each other (or ``stacked``): ``{"heddle": [1.2, 3.4], ...}``, one value for each category.

    ``None`` or NaN leaves the place empty (a peer that was not measured). Values stand over the bars.

    Raises:
        ValueError: no series, or one that has not one value for each category.
    """
    labels = [str(category) for category in categories]
    columns = {name: [_number(value) for value in values] for name, values in _some("series", series).items()}
    for name, values in columns.items():
        if len(values) != len(labels) or not labels:
            raise ValueError(f"series {name!r} must have one value for each of {labels}, got {len(values)}")
    data = [
        {
            "type": "bar",
            "name": html.escape(name),
            "x": labels,
            "y": values,
            "marker": {"color": _colour(i)},
            "text": ["" if value is None else short(value) for value in values],
            "textposition": "inside" if stacked else "outside",
            "insidetextanchor": "middle",
            "textfont": {"color": _on(_colour(i))},
            "cliponaxis": False,
        }
        for i, (name, values) in enumerate(columns.items())
    ]
    layout = {
        "xaxis": _axis(x, False) | {"type": "category", "showgrid": False},
        "yaxis": _axis(y, log_y),
        "barmode": "stack" if stacked else "group",
        "bargap": 0.25,
        "showlegend": len(columns) > 1,
        "title": bold(title),
    }

    def draw(figure: Any) -> None:
        axes = _axes(figure, title, x, y)
        axes.set_axisbelow(True)
        axes.grid(True, axis="y", color="#d8dce1", linewidth=0.8)
        width = 0.75 if stacked else 0.75 / len(columns)
        under = [0.0] * len(labels)
        tallest = max(sum(value or 0.0 for value in column) for column in zip(*columns.values(), strict=True))
        for i, (name, values) in enumerate(columns.items()):
            shift = 0.0 if stacked else (i - (len(columns) - 1) / 2) * width
            drawn = axes.bar(
                [place + shift for place in range(len(labels))],
                _nan(values),
                width * 0.94,
                bottom=under if stacked else None,
                label=name,
                color=_colour(i),
            )
            least = tallest * 0.05 if stacked else 0.0  # a thinner part has no room for its value
            texts = ["" if value is None or value < least else short(value) for value in values]
            axes.bar_label(
                drawn,
                texts,
                label_type="center" if stacked else "edge",
                padding=0 if stacked else 2,
                fontsize=8,
                color=_on(_colour(i)) if stacked else INK,
            )
            under = [low + (value or 0.0) for low, value in zip(under, values, strict=True)]
        axes.set_xticks(range(len(labels)), labels)
        if log_y:
            _log_y(axes)
        axes.margins(y=0.12)
        _legend(axes, len(columns))

    return Picture(title, data, layout, (8.0, 4.5), draw)


def short(value: int | float) -> str:
    """A number as an axis shows it: three figures, ``4k`` for 4096, ``1.2M`` for 1,234,567.

    >>> [short(v) for v in (4096, 1500, 1_234_567, 0.01234, 42)]
    ['4k', '1,500', '1.23M', '0.0123', '42']
    """
    if value >= 1024 and value % 1024 == 0 and value < 1 << 20:
        return f"{int(value) // 1024}k"
    for unit, scale in (("G", 1e9), ("M", 1e6)):
        if abs(value) >= scale:
            return f"{value / scale:.3g}{unit}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def write_beside(path: str | Path, write: Callable[[Any], object]) -> Path:
    """Write a file beside ``path`` and rename it there, so that no reader meets half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(beside, "wb") as file:
            write(file)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    return path


# ---------------------------------------------------------------------- style

_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"

# Everything transparent and the ink set by the page's style, so that one chart reads in light and in dark.
_LAYOUT = {
    "paper_bgcolor": "rgba(0,0,0,0)",
    "plot_bgcolor": "rgba(0,0,0,0)",
    "font": {"family": _FONT, "size": 13, "color": "#57606a"},
    "margin": {"l": 70, "r": 20, "t": 80, "b": 60},
    "legend": {
        "orientation": "h",
        "yanchor": "bottom",
        "y": 1.01,
        "x": 0,
        "bgcolor": "rgba(0,0,0,0)",
        "traceorder": "normal",
    },
    "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": "#8c8c8c", "activecolor": "#0072B2"},
}

_CONFIG = {"displaylogo": False, "responsive": True, "modeBarButtonsToRemove": ["select2d", "lasso2d"]}

_STYLE = f"""
:root {{ color-scheme: light dark; --ink: {INK}; --quiet: #57606a; --page: #ffffff; --panel: #f6f8fa; --edge: #d0d7de;
  --mark: #0072B2 }}
@media (prefers-color-scheme: dark) {{
  :root {{ --ink: #e6edf3; --quiet: #9aa4af; --page: #0d1117; --panel: #161b22; --edge: #30363d; --mark: #56B4E9 }}
}}
* {{ box-sizing: border-box }}
body {{ margin: 0; background: var(--page); color: var(--ink); font: 16px/1.6 {_FONT} }}
main {{ max-width: 62rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem }}
h1 {{ font-size: 1.9rem; line-height: 1.25; margin: 0 0 .5rem; letter-spacing: -.01em }}
h2 {{ font-size: 1.3rem; margin: 2.8rem 0 .4rem; padding-top: 1.2rem; border-top: 1px solid var(--edge) }}
p {{ margin: .5rem 0; max-width: 48rem }}
a {{ color: var(--mark) }}
code {{ font: .88em ui-monospace, "SF Mono", Menlo, Consolas, monospace }}
pre {{ background: var(--panel); border: 1px solid var(--edge); border-radius: 8px; padding: .9rem 1.1rem;
  overflow-x: auto; font: 13.5px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; white-space: pre-wrap;
  overflow-wrap: anywhere }}
table {{ border-collapse: collapse; margin: .8rem 0; font-variant-numeric: tabular-nums }}
th, td {{ padding: .35rem .9rem .35rem 0; border-bottom: 1px solid var(--edge); text-align: left }}
td.number, th.number {{ text-align: right }}
.note {{ color: var(--quiet); font-size: .92rem }}
.figures {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: .7rem; list-style: none;
  margin: .9rem 0; padding: 0 }}
.figures li {{ background: var(--panel); border: 1px solid var(--edge); border-radius: 8px; padding: .55rem .95rem;
  color: var(--quiet); font-size: .88rem; line-height: 1.4 }}
.figures b {{ display: block; color: var(--ink); font-size: 1.35rem; line-height: 1.35;
  font-variant-numeric: tabular-nums }}
figure.plot {{ margin: 1.2rem 0 }}
.plot .infolayer text, .plot .legend text, .plot [class$="tick"] text,
.plot .bartext-outside {{ fill: var(--quiet) !important }}
.plot .infolayer .g-gtitle text {{ fill: var(--ink) !important }}
"""


def bold(text: str, notes: Iterable[str] = ()) -> dict[str, Any]:
    """Plotly's title: bold, on the left, small lines below it."""
    text = f"<b>{html.escape(text)}</b>"
    text += "".join(f'<br><span style="font-size:12px">{html.escape(note)}</span>' for note in notes)
    return {"text": text, "x": 0, "xref": "paper", "y": 1, "yanchor": "top", "pad": {"t": 14}, "font": {"size": 17}}


def _axis(name: str, log: bool) -> dict[str, Any]:
    axis: dict[str, Any] = {
        "title": {"text": html.escape(name), "font": {"size": 13}},
        "gridcolor": GRID,
        "zerolinecolor": GRID,
        "linecolor": GRID,
        "automargin": True,
    }
    return axis | ({"type": "log", "exponentformat": "e"} if log else {})


def _axes(figure: Any, title: str, x: str, y: str) -> Any:
    figure.set_layout_engine("constrained")
    axes = figure.add_subplot()
    style(axes)
    axes.set_title(title, loc="left", fontsize=13, fontweight="bold", color=INK, pad=12)
    axes.set_xlabel(x, fontsize=11, color=INK)
    axes.set_ylabel(y, fontsize=11, color=INK)
    return axes


def style(axes: Any) -> None:
    """The house's look on a matplotlib ``Axes``: no box, quiet ticks."""
    axes.tick_params(labelsize=10, colors="#57606a", length=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#b0b8c1")


def _log_y(axes: Any) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: short(value))
    axes.yaxis.set_minor_formatter("")
    axes.tick_params(axis="y", which="minor", length=0)


def _legend(axes: Any, count: int) -> None:
    # A single curve is named by the title.
    if count > 1:
        axes.legend(frameon=False, fontsize=10, labelcolor=INK, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _colour(i: int) -> str:
    return COLOURS[i % len(COLOURS)]


def _on(colour: str) -> str:
    """Ink that reads on a bar of this colour."""
    return INK if colour in ("#E69F00", "#CC79A7", "#56B4E9") else "#ffffff"


def _some(name: str, mapping: Mapping) -> Mapping:
    if not mapping:
        raise ValueError(f"{name} must hold at least one, got none")
    return mapping


def _number(value: Any) -> int | float | None:
    """A JSON number, or None for a gap."""
    if value is None:
        return None
    value = value.item() if hasattr(value, "item") else value
    return value if math.isfinite(value) else None


def _nan(values: Iterable) -> list:
    return [math.nan if value is None else value for value in values]


def _plain(value: Any) -> Any:
    """NumPy arrays and numbers as JSON has them."""
    return value.tolist()


def _missing(package: str) -> ImportError:
    return ImportError(f"pictures need {package}: pip install heddle-attention[bench]")
