"""Which tiles the kernels get: the table, what is tuned, what is overridden."""

import json
import subprocess
import sys

import pytest

from heddle.kernels import plan
from heddle.kernels.plan import Tile


def test_the_nearest_entry_of_the_table():
    table = plan.TILES[90]["forward"]
    assert plan.tile("forward", 128, 128, 2, 90) == table[128]
    assert plan.tile("forward", 80, 80, 2, 90) == table[128]  # padded to the next power of two
    assert plan.tile("forward", 64, 192, 2, 90) == table[256]  # the larger of both dims decides
    assert plan.tile("forward", 16, 16, 2, 90) == table[64]
    assert plan.tile("forward", 128, 128, 2, 100) == table[128]  # a newer device takes the newest table
    assert plan.tile("forward", 128, 128, 2, 70) == plan.TILES[80]["forward"][128]
    assert plan.tile("forward", 128, 128, 4, 90) == table[128]._replace(block_k=table[128].block_k // 2)


def test_override_is_for_what_stands_inside():
    before, tile = plan.tile("forward", 64, 64, 2, 90), Tile(32, 16, 2, 1)
    with plan.override(forward=tile):
        with plan.override(decode=Tile(16, 32, 2, 1)):
            assert plan.tile("forward", 64, 64, 2, 90) == tile
            assert plan.tile("decode", 64, 64, 4, 90) == Tile(16, 32, 2, 1)
        assert plan.tile("decode", 64, 64, 2, 90) == plan.TILES[90]["decode"][256]
    assert plan.tile("forward", 64, 64, 2, 90) == before


IMPOSSIBLE = [(24, 16, 4, 1), (8, 16, 4, 1), (16, 16, 3, 1), (16, 16, 4, 0)]


@pytest.mark.parametrize("tiles", [{"forwards": Tile(16, 16, 4, 1)}, *({"forward": Tile(*t)} for t in IMPOSSIBLE)])
def test_a_tile_that_cannot_be(tiles):
    with pytest.raises(ValueError, match=r"kernel must be one of|the tile of forward must be"), plan.override(**tiles):
        pass


def test_a_tuned_table_comes_before_the_starting_points(tmp_path):
    path = tmp_path / "tiles.json"
    path.write_text(json.dumps({"90": {"forward": {"128": [64, 32, 4, 1]}}}))
    program = """if True:
        from heddle.kernels.plan import TILES, tile
        print(*tile("forward", 128, 128, 2, 90), tile("forward", 64, 64, 2, 90) == TILES[90]["forward"][64])
    """
    done = subprocess.run(
        [sys.executable, "-c", program], env={"HEDDLE_TILES": str(path)}, capture_output=True, text=True, check=True
    )
    assert done.stdout == "64 32 4 1 True\n"


BROKEN = ["[]", "{", '{"90": {"forward": {"128": [64, 32]}}}', '{"90": 3}', '{"90": {"decode": {"64": [7, 32, 4, 1]}}}']


@pytest.mark.parametrize("text", BROKEN)
def test_a_broken_tuned_table_is_named(tmp_path, text):
    path = tmp_path / "tiles.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"tiles\.json must be a table of tiles"):
        plan.read_tuned(path)
