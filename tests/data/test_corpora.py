"""Corpora: what is read, what is refused, and that reading goes on from any cursor."""

import gzip
import itertools
import json
import logging

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from heddle.data.corpora import is_held_out, open_corpus, stdlib, tokenized
from heddle.data.packing import Packer


class Bytes:
    vocab_size, eos_id = 257, 256

    def encode(self, text):
        return list(text.encode())


def texts(reader, epoch=0):
    return [text for _, text, _ in reader(epoch, None)]


def check_cursors(reader, epoch=0):
    """Reading on from any cursor gives what would have come, and so does reading on from a cursor met on that way."""
    items = list(reader(epoch, None))
    for at, (_, _, cursor) in enumerate(items, 1):
        rest = list(reader(epoch, json.loads(json.dumps(cursor))))
        assert [item[:2] for item in rest] == [item[:2] for item in items[at:]]
        for further, (_, _, cursor) in enumerate(rest, at + 1):
            assert [item[:2] for item in reader(epoch, json.loads(json.dumps(cursor)))] == [
                item[:2] for item in items[further:]
            ]


@pytest.fixture
def folder(tmp_path):
    for i in range(7):
        path = tmp_path / "text" / f"part{i % 2}" / f"{i}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"document {i}\n" * (i + 1))
    return tmp_path / "text"


def jsonl(path, documents):
    path.write_text("".join(json.dumps({"text": d}) + "\n" for d in documents))
    return path


# ---------------------------------------------------------------------- the standard library


def test_stdlib_is_the_library_without_its_tests():
    names = [name for name, _, _ in stdlib()(0, None)]
    assert len(names) == len(set(names)) > 400
    assert {"heapq.py", "asyncio/tasks.py", "argparse.py"} <= set(names)
    assert not any({"test", "tests", "lib2to3", "site-packages"} & set(name.split("/")) for name in names)
    assert names == sorted(names, key=lambda name: name.split("/"))


def test_stdlib_is_shuffled_by_seed_and_epoch():
    first, again, other_epoch, other_seed = (
        [name for name, _, _ in itertools.islice(stdlib(seed)(epoch, None), 20)]
        for seed, epoch in ((1, 0), (1, 0), (1, 1), (2, 0))
    )
    assert first == again
    assert len({tuple(first), tuple(other_epoch), tuple(other_seed)}) == 3


@pytest.mark.parametrize("row_len", [512, 1024, 2048, 4096])
def test_packing_stdlib_uses_at_least_98_percent_of_the_places(row_len):
    packer = Packer(tokenized(stdlib(0), Bytes()), row_len, 8, epochs=1)
    used = [batch.used() for batch in packer]
    assert sum(used) / len(used) >= 0.98


def test_parts_are_disjoint_and_together_all():
    every, train, held_out = (
        {name for name, _, _ in open_corpus("stdlib", part=part, held_out=0.1, seed=0)(0, None)}
        for part in ("all", "train", "held_out")
    )
    assert train | held_out == every
    assert not train & held_out
    assert 0.05 < len(held_out) / len(every) < 0.15
    assert not texts(open_corpus("stdlib", part="held_out", held_out=0.0))


def test_being_held_out_is_a_property_of_the_key_alone():
    assert is_held_out("heapq.py", 0.5) == is_held_out("heapq.py", 0.5)
    assert sum(is_held_out(f"{i}.py", 0.25) for i in range(10_000)) == pytest.approx(2500, abs=150)


# ---------------------------------------------------------------------- text files


def test_a_folder_of_text_is_a_document_a_file(folder):
    (folder / ".hidden").write_text("not a document")
    reader = open_corpus(str(folder))
    assert [name for name, _, _ in reader(0, None)] == [f"part{i % 2}/{i}.txt" for i in (0, 2, 4, 6, 1, 3, 5)]
    assert sorted(texts(open_corpus(str(folder), seed=1))) == sorted(texts(reader))
    check_cursors(open_corpus(str(folder), seed=1), epoch=3)
    check_cursors(open_corpus(str(folder), seed=1, part="train", held_out=0.5))


def test_a_file_and_a_pattern_name_the_files_they_match(folder):
    assert texts(open_corpus(str(folder / "part0" / "2.txt"))) == ["document 2\n" * 3]
    assert texts(open_corpus(f"{folder}/*/[34].txt")) == ["document 4\n" * 5, "document 3\n" * 4]
    # A file's name within the corpus, by which it is held out or not, doesn't depend on how the pattern ends.
    assert next(name for name, _, _ in open_corpus(f"{folder}/**/*.txt")(0, None)) == "part0/0.txt"


def test_a_text_file_that_is_not_utf8_is_named_with_its_line(folder, caplog):
    (folder / "part0" / "3.txt").write_bytes(b"one\ntwo\n\xff\n")
    with pytest.raises(ValueError, match=r"part0/3\.txt:3: not UTF-8: byte 0xff"):
        texts(open_corpus(str(folder)))
    with caplog.at_level(logging.WARNING):
        assert len(texts(open_corpus(str(folder), on_error="skip"))) == 7
    assert "part0/3.txt:3: not UTF-8: byte 0xff; skipped" in caplog.text


# ---------------------------------------------------------------------- JSONL


@pytest.mark.parametrize("compressed", [False, True])
def test_jsonl_is_a_document_a_line(tmp_path, compressed):
    lines = [json.dumps({"text": f"{i} ä\u2028\n", "id": i}) for i in range(6)]
    data = ("\n".join(lines[:3]) + "\n\n" + "\r\n".join(lines[3:])).encode()  # no newline at the end
    if compressed:
        (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(data))
    else:
        (tmp_path / "a.jsonl").write_bytes(data)
    jsonl(tmp_path / "b.jsonl", ["b0", "b1"])
    reader = open_corpus(str(tmp_path))
    assert texts(reader) == [f"{i} ä\u2028\n" for i in range(6)] + ["b0", "b1"]
    check_cursors(reader)
    orders = {tuple(texts(open_corpus(str(tmp_path), seed=0), epoch)) for epoch in range(8)}
    assert orders == {tuple(texts(reader)), tuple(texts(reader)[6:] + texts(reader)[:6])}


BROKEN = {
    b'{"text": "a" "b"}': "not JSON: Expecting ',' delimiter at column 14",
    b'{"text": "\xff"}': "not UTF-8: byte 0xff",
    b'["text"]': "list, not an object",
    b'{"txt": "a", "id": 1}': "no field 'text'; it has txt, id",
    b'{"text": null}': "'text' is null, not text",
    b'{"text": 5}': "'text' is int, not text",
    rb'{"text": "\ud800"}': "'text' holds a lone surrogate",
    b"[" * 100_000: "not JSON: nested too deeply",
}


@pytest.mark.parametrize("line", BROKEN, ids=BROKEN.values())
def test_a_broken_line_is_named_and_fatal_or_skipped(tmp_path, caplog, line):
    path = tmp_path / "broken.jsonl"
    path.write_bytes(b'{"text": "first"}\n\n' + line + b'\n{"text": "last"}\n')
    with pytest.raises(ValueError) as error:
        texts(open_corpus(str(path)))
    assert str(error.value) == f"{path}:3: {BROKEN[line]}"
    with caplog.at_level(logging.WARNING):
        assert texts(open_corpus(str(path), on_error="skip")) == ["first", "last"]
    assert caplog.messages == [f"{path}:3: {BROKEN[line]}; skipped"]
    check_cursors(open_corpus(str(path), on_error="skip"))


def test_jsonl_texts_are_held_out_by_what_they_say(tmp_path):
    documents = [f"document {i}" for i in range(50)]
    jsonl(tmp_path / "a.jsonl", documents)
    jsonl(tmp_path / "b.jsonl", documents[::-1])
    held_out = [
        texts(open_corpus(str(tmp_path / name), part="held_out", held_out=0.3)) for name in ("a.jsonl", "b.jsonl")
    ]
    assert 5 < len(held_out[0]) < 25
    assert held_out[0] == held_out[1][::-1]


def test_a_damaged_gzip_file_is_named(tmp_path):
    data = gzip.compress(b"".join(json.dumps({"text": str(i) * 50}).encode() + b"\n" for i in range(1000)))
    (tmp_path / "a.jsonl.gz").write_bytes(data[:-200])
    with pytest.raises(ValueError, match=r"a\.jsonl\.gz is a damaged gzip file"):
        texts(open_corpus(str(tmp_path)))


# ---------------------------------------------------------------------- Parquet and the hub


def test_parquet_is_a_document_a_row(tmp_path, caplog):
    rows = [f"row {i}" for i in range(25)]
    rows[11] = None
    pq.write_table(pa.table({"id": list(range(25)), "text": rows}), tmp_path / "a.parquet", row_group_size=10)
    pq.write_table(pa.table({"text": ["b"]}), tmp_path / "b.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet:12: 'text' is null, not text"):
        texts(open_corpus(str(tmp_path)))
    reader = open_corpus(str(tmp_path), on_error="skip")
    with caplog.at_level(logging.WARNING):
        assert texts(reader) == [row for row in rows if row] + ["b"]
    assert "a.parquet:12: 'text' is null, not text; skipped" in caplog.text
    check_cursors(reader)
    with pytest.raises(ValueError, match=r"a\.parquet has no column 'content'; it has id, text"):
        texts(open_corpus(str(tmp_path), field="content"))
    (tmp_path / "c.parquet").write_bytes(b"not parquet at all")
    with pytest.raises(ValueError, match=r"c\.parquet isn't Parquet"):
        texts(open_corpus(str(tmp_path / "c.parquet")))


def test_a_hub_dataset_is_streamed(tmp_path, caplog, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    data = tmp_path / "data"
    data.mkdir()
    jsonl(data / "a.jsonl", ["a0", "a1", "a2"])
    jsonl(data / "b.jsonl", ["b0", None, "b2"])
    with pytest.raises(ValueError, match=r"hub:.*:5: 'text' is null, not text"):
        texts(open_corpus(f"hub:{data}"))
    reader = open_corpus(f"hub:{data}", on_error="skip")
    with caplog.at_level(logging.WARNING, logger="heddle"):
        assert texts(reader) == ["a0", "a1", "a2", "b0", "b2"]
    check_cursors(reader)


def test_a_hub_dataset_has_subsets_and_splits(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    data = tmp_path / "data"
    for subset in ("all", "few"):
        (data / subset).mkdir(parents=True)
        for split in ("train", "validation"):
            jsonl(data / subset / f"{split}.jsonl", [f"{subset} {split}"])
    (data / "README.md").write_text(
        "---\nconfigs:\n- {config_name: all, data_dir: all, default: true}\n- {config_name: few, data_dir: few}\n---\n"
    )
    for name, text in {"": "all train", "::validation": "all validation", ":few": "few train"}.items():
        assert texts(open_corpus(f"hub:{data}{name}")) == [text]
    both = [texts(open_corpus(f"hub:{data}:few:validation", part=part, held_out=0.5)) for part in ("train", "held_out")]
    assert sorted(both) == [[], ["few validation"]]
    with pytest.raises(ValueError, match="much"):
        texts(open_corpus(f"hub:{data}:much"))
    with pytest.raises(ValueError, match="test"):
        texts(open_corpus(f"hub:{data}:few:test"))


# ---------------------------------------------------------------------- names and options


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("no/such/place", {}, "corpus must be stdlib, hub:NAME, or a file, .*; got 'no/such/place'"),
        ("no/such/*.txt", {}, r"corpus must be .*; got 'no/such/\*\.txt'"),
        ("hub:", {}, r"a corpus of the hub must be hub:NAME, hub:NAME:SUBSET or hub:NAME:SUBSET:SPLIT, got 'hub:'"),
        ("hub:a:b:c:d", {}, "a corpus of the hub must be hub:NAME, .*, got 'hub:a:b:c:d'"),
        ("stdlib", {"part": "test"}, "part must be one of all, train, held_out; got 'test'"),
        ("stdlib", {"on_error": "warn"}, "on_error must be one of fail, skip; got 'warn'"),
        ("stdlib", {"held_out": 1.5}, "held_out must be at least 0 and below 1, got 1.5"),
    ],
)
def test_impossible_options_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        open_corpus(name, **options)


def test_a_folder_of_several_kinds_is_refused(folder):
    jsonl(folder / "a.jsonl", ["a"])
    with pytest.raises(ValueError, match=r"corpus must hold files of one kind, .* holds JSONL and text"):
        open_corpus(str(folder))


def test_tokenized_closes_each_document_and_passes_over_empty_ones(tmp_path):
    jsonl(tmp_path / "a.jsonl", ["ab", "", "c"])
    documents = tokenized(open_corpus(str(tmp_path / "a.jsonl")), Bytes())
    assert [tokens.tolist() for tokens, _ in documents(0, None)] == [[97, 98, 256], [99, 256]]
