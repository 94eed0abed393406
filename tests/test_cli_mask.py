"""``heddle mask``: its figures equal brute force, its picture shows them, its errors are one line."""

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from heddle import Mask, cli, mask_options, mask_picture


@pytest.fixture
def heddle(monkeypatch, capsys):
    """Run the command in this process: exit code, stdout, stderr."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["heddle", "mask", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        captured = capsys.readouterr()
        return stopped.value.code or 0, captured.out, captured.err

    return run


def segments(lengths, seq):
    return np.repeat(np.arange(len(lengths) + 1), [*lengths, seq - sum(lengths)])


def packed(lengths, seq, window=None):
    ids, i, j = segments(lengths, seq), np.arange(seq)[:, None], np.arange(seq)
    seen = (ids[:, None] == ids) & (j <= i) & (ids[:, None] < len(lengths))
    return seen if window is None else seen & (i - j < window)


def triangle(seq, length=None):
    return np.tri(seq, dtype=bool) & (np.arange(seq)[:, None] < (seq if length is None else length))


def sinks(seq, size, count):
    i, j = np.arange(seq)[:, None], np.arange(seq)
    return (j <= i) & ((i - j < size) | (j < count))


def prefix_lm(seq, prefix):
    i, j = np.arange(seq)[:, None], np.arange(seq)
    return (j <= i) | (j < prefix)


def truncated(seen, padding):
    used = len(seen) - padding
    i, j = np.arange(len(seen))[:, None], np.arange(len(seen))
    return seen & (i < used) & (j < used)


# The options, and what the definition gives for each row of the mask.
CASES = {
    "causal": ("--seq 50", [triangle(50)]),
    "full": ("--kind full --seq 33", [np.ones((33, 33), bool)]),
    "padded full": ("--kind full --seq 33 --padding 4", [truncated(np.ones((33, 33), bool), 4)]),
    "padded causal": ("--kind causal --seq 33 --padding 9", [truncated(triangle(33), 9)]),
    "window": ("--window 7 --seq 40", [sinks(40, 7, 0)]),
    "sinks": ("--kind window --window 7 --prefix 3 --seq 40 --padding 5", [truncated(sinks(40, 7, 3), 5)]),
    "prefix-lm": ("--prefix 11 --seq 40", [prefix_lm(40, 11)]),
    "padded prefix-lm": ("--prefix 11 --seq 40 --padding 10", [truncated(prefix_lm(40, 11), 10)]),
    "documents": ("--lengths 10,30,5", [packed([10, 30, 5], 45)]),
    "documents, short": ("--lengths 10,30,5 --seq 60", [packed([10, 30, 5], 60)]),
    "documents, padded": ("--lengths 10,30,5 --padding 4", [packed([10, 30, 5], 49)]),
    "documents, window": ("--lengths 10,30,5 --window 4", [packed([10, 30, 5], 45, window=4)]),
    "lengths": ("--kind lengths --lengths 20,50,3", [triangle(50, 20), triangle(50), triangle(50, 3)]),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("blocks", [(8, 16), (7, 5), (1, 1)])
def test_figures_equal_brute_force(name, blocks, heddle):
    options, rows = CASES[name]
    block_q, block_k = blocks
    code, out, err = heddle(*options.split(), "--json", "--block-q", block_q, "--block-k", block_k)
    assert (code, err) == (0, "")
    numbers = json.loads(out)
    seq = len(rows[0])
    assert (numbers["rows"], numbers["q_len"], numbers["kv_len"]) == (len(rows), seq, seq)
    assert numbers["visible_pairs"] == sum(int(row.sum()) for row in rows)
    assert numbers["density"] == pytest.approx(np.mean([row.mean() for row in rows]))

    tiles = [
        row[i : i + block_q, j : j + block_k]
        for row in rows
        for i in range(0, seq, block_q)
        for j in range(0, seq, block_k)
    ]
    empty, full = sum(not tile.any() for tile in tiles), sum(bool(tile.all()) for tile in tiles)
    found = numbers["tiles"]
    assert (found["total"], found["empty"], found["full"]) == (len(tiles), empty, full)
    assert found["partial"] == len(tiles) - empty - full
    assert found["partial"] + found["full"] <= found["visited"] <= found["total"]
    assert found["without_test"] <= full


@pytest.mark.parametrize("balance", ["area", "zigzag", "none"])
def test_ranks_equal_brute_force(balance, heddle):
    lengths, seq = [100, 20, 60, 12], 192
    code, out, _ = heddle("--lengths", "100,20,60,12", "--context-parallel", 4, "--balance", balance, "--json")
    assert code == 0
    parallel = json.loads(out)["context_parallel"]
    visible = packed(lengths, seq).sum(axis=1)
    assert sum(parallel["visible_pairs"]) == visible.sum()
    assert parallel["max_over_mean"] == pytest.approx(max(parallel["visible_pairs"]) / (visible.sum() / 4))
    chunks = visible.reshape(8, -1).sum(axis=1)
    if balance == "none":
        assert parallel["visible_pairs"] == visible.reshape(4, -1).sum(axis=1).tolist()
    elif balance == "zigzag":
        assert parallel["visible_pairs"] == [int(chunks[i] + chunks[7 - i]) for i in range(4)]
    else:
        assert parallel["max_over_mean"] < 1.02  # where zigzag has 1.15


def test_random_documents_fill_the_row_and_follow_the_seed(heddle):
    def lengths(seed):
        (found,) = json.loads(heddle("--documents", 9, "--seq", 300, "--padding", 30, "--seed", seed, "--json")[1])[
            "documents"
        ]
        return found

    assert len(lengths(0)) == 9
    assert sum(lengths(0)) == 270
    assert min(lengths(0)) >= 1
    assert lengths(0) == lengths(0)
    assert lengths(0) != lengths(1)


def test_prints_the_mask_without_out(heddle):
    code, out, _ = heddle("--lengths", "3,2", "--padding", 1)
    assert code == 0
    assert out == (
        "█·····\n██····\n███···\n···█··\n···██·\n······\n\n"
        "2 documents, 6 tokens with 1 of padding\n"
        "9 of 36 pairs visible (25.0%)\n"
        "tiles of 1 × 1: 9 of 36 visited, 9 of them without a test\n"
    )


@pytest.mark.parametrize(
    ("out", "files"),
    [
        ("new/", ["new/mask.html", "new/mask.png"]),
        (".", ["mask.html", "mask.png"]),
        ("new/a.b", ["new/a.b.html", "new/a.b.png"]),
        ("only.png", ["only.png"]),
        ("only.html", ["only.html"]),
    ],
)
def test_out(out, files, heddle, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, printed, _ = heddle("--seq", 64, "--out", out, "--json")
    assert code == 0
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()) == files
    assert sorted(json.loads(printed)["files"]) == files


EMPTY, PARTIAL, FULL, VAIN = (tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5)) for _, colour in mask_picture.TILES)


def panel(picture, path):
    """The pixels of a one-row picture's panel: the largest block of pixels in the colours of tiles."""
    with Image.open(picture.png(path)) as opened:
        image = np.asarray(opened.convert("RGB")).astype(int)
    tile = np.zeros(image.shape[:2], bool)
    for colour in (EMPTY, PARTIAL, FULL, VAIN):
        tile |= (np.abs(image - colour) <= 2).all(axis=-1)
    rows = np.flatnonzero(tile.mean(axis=1) > 0.4)
    cols = np.flatnonzero(tile[rows[0] : rows[-1]].mean(axis=0) > 0.6)
    return image[rows[0] : rows[-1] + 1, cols[0] : cols[-1] + 1], image[rows[0] : rows[-1] + 1, : cols[0]]


def at(image, q, k, seq):
    """The colour in the middle of the cell of query q and key k."""
    height, width, _ = image.shape
    return tuple(image[int((q + 0.5) / seq * height), int((k + 0.5) / seq * width)])


def test_picture_colours_tiles(tmp_path):
    drawn = mask_options.from_options(lengths=[24, 8, 22], padding=10)  # 8 x 8 tiles of 8
    image, _ = panel(mask_picture.picture(drawn, 8, 8), tmp_path / "mask.png")
    seen = packed([24, 8, 22], 64)
    for i in range(8):
        for j in range(8):
            tile = seen[8 * i : 8 * i + 8, 8 * j : 8 * j + 8]
            expected = FULL if tile.all() else PARTIAL if tile.any() else EMPTY
            # Away from the middle of the tile, so that no outline of a document lies there.
            assert at(image, 8 * i + 2, 8 * j + 2, 64) == expected, (i, j)


def test_picture_marks_tiles_visited_in_vain(tmp_path):
    drawn = mask_options.from_options("window", window=2, prefix=4, seq=16)
    image, _ = panel(mask_picture.picture(drawn, 2, 2), tmp_path / "mask.png")
    assert at(image, 0, 2, 16) == VAIN  # the tiles of the prefix are always visited
    assert at(image, 0, 4, 16) == EMPTY
    assert at(image, 8, 0, 16) == FULL
    seen = sinks(16, 2, 4)
    vain = [i for i in range(0, 16, 2) for j in (0, 2) if not seen[i : i + 2, j : j + 2].any()]
    tiles = mask_picture.figures(drawn, 2, 2)["tiles"]
    assert tiles["visited"] == tiles["partial"] + tiles["full"] + len(vain)


def test_picture_outlines_documents(tmp_path):
    drawn = mask_options.from_options(lengths=[20, 44])
    image, _ = panel(mask_picture.picture(drawn, 8, 8), tmp_path / "mask.png")
    ink = (image < 90).all(axis=-1)
    size = len(image)
    row = ink[int(10 / 64 * size)]  # crosses the first document's right side, at key 20
    assert np.flatnonzero(row[5:-5]).mean() + 5 == pytest.approx(20 / 64 * size, abs=2)
    row = ink[int(40 / 64 * size)]  # and the second one's left side
    assert np.flatnonzero(row[5:-5]).mean() + 5 == pytest.approx(20 / 64 * size, abs=2)


def test_picture_shows_ranks_along_the_queries(tmp_path):
    drawn = mask_options.from_options("causal", seq=64, context_parallel=4, balanced="zigzag")
    _, side = panel(mask_picture.picture(drawn), tmp_path / "mask.png")
    column = side[:, -25]  # the band stands left of the panel
    colours = [tuple(column[int((chunk + 0.5) / 8 * len(column))]) for chunk in range(8)]
    assert colours == colours[::-1]  # zigzag: rank 0 1 2 3 3 2 1 0
    assert len(set(colours)) == 4


def test_page_and_picture_tell_the_figures():
    import plotly.graph_objects as go

    drawn = mask_options.from_options(documents=5, seq=512, context_parallel=4)
    numbers, picture = mask_picture.figures(drawn), mask_picture.picture(drawn)
    go.Figure(data=picture.data, layout=picture.layout)
    title = picture.layout["title"]["text"]
    assert f"{numbers['visible_pairs']:,} of 262,144 pairs visible ({numbers['density']:.1%})" in title
    assert f"max/mean {numbers['context_parallel']['max_over_mean']:.3f}" in title
    names = [trace.get("name") for trace in picture.data]
    mean = numbers["visible_pairs"] / 4
    for rank, pairs in enumerate(numbers["context_parallel"]["visible_pairs"]):
        assert f"rank {rank}: {pairs / mean:.3f} × mean" in names
    assert {"empty tile", "partial tile", "full tile", "document"} <= set(names)


def test_draws_a_batch_and_other_lengths_of_keys(tmp_path):
    two = mask_picture.Drawn(Mask.lengths(np.array([9, 16]), 4, causal=True), 16, "decoding")
    picture = mask_picture.picture(two, 1, 1)
    assert sum(trace["type"] == "heatmap" for trace in picture.data) == 2
    assert picture.png(tmp_path / "two.png").stat().st_size > 0
    ten = mask_picture.Drawn(Mask.lengths(np.arange(1, 11), 10), 10, "ten")
    with pytest.raises(ValueError, match="at most 9 rows of a mask, got 10"):
        mask_picture.picture(ten)


ERRORS = [
    ("--kind casual", "--kind must be one of causal, full"),
    ("--balance best --context-parallel 2", "--balance must be one of area, zigzag, none"),
    ("--kind window", "--kind window needs --window"),
    ("--kind lengths", "--kind lengths needs --lengths"),
    ("--kind prefix-lm", "--kind prefix-lm needs --prefix"),
    ("--kind causal --window 4", "--window goes with --kind window or documents, not with causal"),
    ("--kind full --documents 4", "--documents goes with --kind documents, not with full"),
    ("--kind lengths --lengths 3 --padding 2", "--padding goes with"),
    ("--documents 3 --lengths 4,5", "give one"),
    ("--documents 0", "--documents must be at least 1, got 0"),
    ("--documents 11 --seq 10", "--documents must be at most the 10 tokens there are, got 11"),
    ("--lengths 4,five", "--lengths must be whole numbers"),
    ("--lengths 4,-5", "--lengths must be at least 1, got -5"),
    ("--lengths 40,50 --seq 80", "at most 80 (--seq less --padding), got 90"),
    ("--kind lengths --lengths 40,90 --seq 80", "--lengths must be at most --seq 80, got 90"),
    ("--seq 0", "--seq must be at least 1, got 0"),
    ("--seq 10 --padding 10", "--padding must leave a token of --seq 10, got 10"),
    ("--prefix 11 --seq 10", "--prefix must be at most the 10 tokens there are, got 11"),
    ("--seq 10 --context-parallel 4", "multiple of 4"),
    ("--seq 20 --context-parallel 4 --balance zigzag", "multiple of 8"),
    ("--block-q 0", "block_q must be at least 1, got 0"),
    ("--seq 4096 --block-k 1", "block_k must be at least 8"),
    ("--seq 8 --out /dev/null/x", "'/dev/null'"),
]


@pytest.mark.parametrize(("options", "message"), ERRORS, ids=[options for options, _ in ERRORS])
def test_errors_are_one_line(options, message, heddle):
    code, out, err = heddle(*options.split())
    assert code == 2
    assert out == ""
    assert err.startswith("heddle: ")
    assert err.count("\n") == 1
    assert message in err


def test_help_names_every_kind(heddle):
    code, out, _ = heddle("--help")
    assert code == 0
    for kind in mask_options.KINDS:
        assert kind in out


def test_imports_neither_wing(tmp_path):
    program = (
        "import sys; from heddle import cli\n"
        f"sys.argv = ['heddle', 'mask', '--seq', '64', '--out', {str(tmp_path / 'm')!r}]\n"
        "try: cli.main()\nexcept SystemExit: pass\n"
        "print([name for name in ('torch', 'jax', 'pandas') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
