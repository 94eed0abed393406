"""One page from a folder of records."""

import json

import pytest

from heddle.bench import attention, report
from heddle.bench.attention_peers import Problem

JUNIT = """<testsuites><testsuite name="pytest"><testcase name="a"/><testcase name="b"><skipped/></testcase>
<testcase name="c"><failure message="no"/></testcase><testcase name="d"/></testsuite></testsuites>"""


def test_everything_a_folder_holds(tmp_path):
    problem = Problem(heads=2, kv_heads=2, head_dim=8, documents=2)
    command = ["heddle", "bench", "attention"]
    attention.run(
        problem, seq=[64], framework="torch", peers="sdpa-dense", repeats=1, out=tmp_path / "run", command=command
    )
    (tmp_path / "run" / "triton-bfloat16.xml").write_text(JUNIT)
    (tmp_path / "tiles.json").write_text(json.dumps({"90": {"forward": {"128": [128, 64, 8, 2]}}}))
    text = report.write(tmp_path, tmp_path / "pages" / "page.md", "A device").read_text()
    assert text.startswith("# A device\n\n## Cases against the float64 oracle\n")
    assert "| triton-bfloat16 | 2 | 1 | 1 |" in text
    assert "| forward, head dim 128 | sm_90 | 128 | 64 | 8 | 2 |" in text
    assert "## forward: 2 documents, batch 1, 2 heads of 8, float32\n\n```sh\nheddle bench attention\n```" in text
    record = json.loads((tmp_path / "run" / "attention.json").read_text())
    (header, rows), *_ = attention.tables(record)
    assert all(f"| {' | '.join(row)} |" in text for row in [header, *rows])
    assert all(note in text for note in attention.notes(record))
    assert [p.name for p in (tmp_path / "pages").iterdir()] == ["page.md"]


def test_a_folder_without_records(tmp_path):
    with pytest.raises(ValueError, match="folder must hold records of heddle bench"):
        report.write(tmp_path, tmp_path / "page.md")
    assert not list(tmp_path.iterdir())
