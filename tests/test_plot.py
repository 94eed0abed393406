"""Charts: the files are self-contained, hold the data, and show it where they should."""

import re
import sys

import numpy as np
import pytest
from pages import assets, figures_in
from PIL import Image

from heddle import plot

LENGTHS = [1024, 2048, 4096]


def curves(**options):
    series = {"heddle": (LENGTHS, np.array([1.0, 2.0, 4.0])), "a <peer>": (LENGTHS, [3.0, None, 50])}
    return plot.lines(series, title="Forward & backward", x="tokens", y="milliseconds", **options)


def columns(**options):
    series = {"heddle": [1.0, 2.0], "peer": [4.0, float("nan")]}
    return plot.bars(series, categories=["causal", "documents"], title="Forward", y="milliseconds", **options)


PICTURES = {
    "lines": curves,
    "log": lambda: curves(log_x=True, log_y=True, dashed=["a <peer>"]),
    "error bars": lambda: curves(errors={"heddle": [0.1, None, 0.3]}),
    "bars": columns,
    "stacked": lambda: columns(stacked=True),
    "log bars": lambda: columns(log_y=True),
}


@pytest.mark.parametrize("name", PICTURES)
def test_page_is_self_contained(name, tmp_path):
    path = PICTURES[name]().html(tmp_path / "new" / "chart.html")
    text = path.read_text()
    found = assets(text)
    assert found.loaded == []
    assert found.scripts == 2  # plotly.js and the chart
    style = re.search(r"<style>(.*?)</style>", text, re.S)
    assert style
    assert "url(" not in style[1]
    assert "@import" not in style[1]
    assert "prefers-color-scheme: dark" in style[1]
    assert list(tmp_path.rglob("*.part")) == []


@pytest.mark.parametrize("name", PICTURES)
def test_plotly_accepts_every_property(name):
    import plotly.graph_objects as go

    picture = PICTURES[name]()
    ((data, layout, _),) = figures_in(picture.div())
    go.Figure(data=data, layout=layout)  # raises on a property that Plotly doesn't know


@pytest.mark.parametrize("name", PICTURES)
def test_png_has_its_size_and_comes_out_the_same_twice(name, tmp_path):
    picture = PICTURES[name]()
    first, second = picture.png(tmp_path / "1.png"), PICTURES[name]().png(tmp_path / "2.png")
    assert first.read_bytes() == second.read_bytes()
    image = pixels(first)
    assert image.shape == (round(picture.size[1] * 160), round(picture.size[0] * 160), 3)
    assert len(np.unique(image.reshape(-1, 3), axis=0)) > 10


def test_page_holds_the_data():
    ((data, layout, _),) = figures_in(curves(log_x=True).div())
    assert [(trace["name"], trace["x"], trace["y"]) for trace in data] == [
        ("heddle", LENGTHS, [1.0, 2.0, 4.0]),
        ("a &lt;peer&gt;", LENGTHS, [3.0, None, 50]),
    ]
    assert layout["xaxis"]["type"] == "log"
    assert layout["xaxis"]["ticktext"] == ["1k", "2k", "4k"]
    assert "Forward &amp; backward" in layout["title"]["text"]


def test_script_cannot_be_closed_by_a_name():
    fragment = plot.lines({"</script><img src=x>": ([1], [1])}, title="</script>", x="x", y="y").div()
    assert fragment.count("</script>") == 1
    assert assets(fragment).loaded == []


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def is_colour(image, colour, within=2):
    rgb = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return (np.abs(image - rgb) <= within).all(axis=-1)


def test_bars_are_as_tall_as_their_values(tmp_path):
    picture = plot.bars({"a": [1.0, 2.0], "b": [4.0, None]}, categories=["x", "y"], title="", y="")
    image = pixels(picture.png(tmp_path / "bars.png"))
    body = image[:, : round(image.shape[1] * 0.85)]  # the legend stands to the right

    def heights(colour):
        tall = is_colour(body, colour).sum(axis=0)
        runs = np.split(tall, np.flatnonzero(np.diff((tall > 5).astype(int))) + 1)
        return [int(np.median(run)) for run in runs if run[0] > 5]

    (one, two), (four,) = heights(plot.COLOURS[0]), heights(plot.COLOURS[1])
    assert two / one == pytest.approx(2, abs=0.05)
    assert four / one == pytest.approx(4, abs=0.1)


def test_curve_passes_through_its_points(tmp_path):
    picture = plot.lines({"a": ([0, 1, 2], [0.0, 10.0, 0.0])}, title="", x="", y="")
    blue = is_colour(pixels(picture.png(tmp_path / "curve.png")), plot.COLOURS[0])
    rows, cols = np.nonzero(blue)
    peak = cols[rows < rows.min() + 5]
    assert peak.mean() == pytest.approx((cols.min() + cols.max()) / 2, abs=3)


def test_page_of_parts(tmp_path):
    path = plot.page(tmp_path / "report.html", "Two <charts>", [curves(), '<p class="note">between</p>', columns()])
    text = path.read_text()
    assert "<h1>Two &lt;charts&gt;</h1>" in text
    assert "<title>Two &lt;charts&gt;</title>" in text
    assert assets(text).scripts == 3  # plotly.js once
    assert text.index("Forward &amp; backward") < text.index('<p class="note">between</p>') < text.rindex("newPlot(")
    assert len(figures_in(text)) == 2


def test_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "chart.html"
    path.write_text("old")

    def fail(file):
        file.write(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        plot.write_beside(path, fail)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["chart.html"]


@pytest.mark.parametrize(
    ("package", "module", "write"),
    [("plotly", "plotly.offline", "html"), ("matplotlib", "matplotlib.figure", "png")],
)
def test_missing_package_names_the_extra(package, module, write, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"pictures need {package}: pip install heddle-attention\[bench\]"):
        getattr(curves(), write)(tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: plot.lines({}, title="", x="", y=""), "series must hold at least one"),
        (lambda: plot.lines({"a": ([1, 2], [1])}, title="", x="", y=""), "'a' must have as many x as y.* got 2 and 1"),
        (lambda: plot.lines({"a": ([], [])}, title="", x="", y=""), "and some, got 0 and 0"),
        (lambda: curves(dashed=["b"]), r"dashed must name series, got \['b'\]"),
        (lambda: plot.lines({"a": ([0, 1], [1, 2])}, title="", x="", y="", log_x=True), "log_x needs positive.* has 0"),
        (lambda: plot.lines({"a": ([1], [-2.0])}, title="", x="", y="", log_y=True), "log_y needs positive.* has -2"),
        (lambda: plot.bars({"a": [1]}, categories=["x", "y"], title="", y=""), "'a' must have one value for each of"),
        (lambda: plot.bars({}, categories=["x"], title="", y=""), "series must hold at least one"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_error_bars_stand_at_the_points_of_the_curves_named(tmp_path):
    ((data, _, _),) = figures_in(curves(errors={"heddle": [0.1, 0.2, 0.3]}).div())
    assert data[0]["error_y"]["array"] == [0.1, 0.2, 0.3]
    assert "error_y" not in data[1]
    drawn, plain = (curves(**o).png(tmp_path / "a.png").read_bytes() for o in ({"errors": {"heddle": [9, 9, 9]}}, {}))
    assert drawn != plain
    for errors, message in (({"other": [1]}, "errors must name series"), ({"heddle": [1]}, "one value a point of")):
        with pytest.raises(ValueError, match=message):
            curves(errors=errors)
