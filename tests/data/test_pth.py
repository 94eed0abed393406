"""Files of torch.save: what torch.load gives, and nothing that a pickle could do beside."""

import os
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch

from heddle.data.pth import Pth


def saved(path, content):
    torch.save(content, path)
    return path


def error_of(path) -> str:
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        Pth(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_what_torch_loads(dtype, tmp_path):
    whole = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    content = OrderedDict(
        whole=whole, transposed=whole.T, part=whole[1:5:2, 2:], one=whole[2, 3], none=whole[:0],
        repeated=whole[:1].expand(3, 5), parameter=torch.nn.Parameter(whole + 1),
    )  # fmt: skip
    content._metadata = {"": {"version": 1}}  # as a module's state_dict has it
    file = Pth(saved(tmp_path / "model.pth", content))
    expected = torch.load(tmp_path / "model.pth", weights_only=True)
    assert file.shapes == {name: tuple(tensor.shape) for name, tensor in expected.items()}
    assert set(file.dtypes.values()) == {str(dtype).removeprefix("torch.")}
    for name, tensor in expected.items():
        ours = file.tensor(name)
        assert ours.dtype.name == file.dtypes[name]
        assert not ours.flags.writeable
        np.testing.assert_array_equal(ours.astype(np.float64), tensor.detach().double().numpy(), err_msg=name)


class _Touch:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_that_calls_something_is_refused(tmp_path):
    path = saved(tmp_path / "model.pth", {"weight": torch.ones(2), "more": _Touch(tmp_path / "harm")})
    assert error_of(path) == f"{path}: names {os.mkdir.__module__}.mkdir, which weights don't need, so it isn't loaded"
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"ids": torch.ones(2, dtype=torch.int64)}, "names torch.LongStorage, which weights don't need"),
        ({"module": torch.nn.Linear(1, 1)}, "names torch.nn.modules.linear.Linear, which weights don't need"),
        ({"step": 3}, "must hold a dict of tensors by name"),
        ([torch.ones(2)], "must hold a dict of tensors by name"),
        (torch.ones(2), "must hold a dict of tensors by name"),
    ],
)
def test_anything_but_weights_is_refused_by_name(content, message, tmp_path):
    assert message in error_of(saved(tmp_path / "model.pth", content))


def test_broken_files_are_one_clear_line(tmp_path):
    path = saved(tmp_path / "model.pth", {"weight": torch.ones(40)})
    whole = path.read_bytes()
    for data in [whole[:end] for end in range(0, len(whole), 37)] + [b"\x80\x02}q\x00."]:
        path.write_bytes(data)
        assert error_of(path).startswith(f"{path}: not a whole file of torch.save: ")
    assert error_of(tmp_path / "nowhere.pth") == f"{tmp_path / 'nowhere.pth'}: no such file"


@pytest.mark.parametrize("fault", ["short", "odd", "missing", "compressed", "big-endian"])
def test_a_tensor_lies_within_its_storage(fault, tmp_path):
    """Else a broken or wicked file would have memory read that isn't its own."""
    path, broken = saved(tmp_path / "model.pth", {"weight": torch.ones(4, 10)[:, ::3]}), tmp_path / "broken.pth"
    how = zipfile.ZIP_DEFLATED if fault == "compressed" else zipfile.ZIP_STORED
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(broken, "w", how) as new:
        for name in old.namelist():
            data = old.read(name)
            if name.endswith("data/0"):
                # The last element read is the 40th.
                data = {"short": data[:-4], "odd": data + b"0"}.get(fault, data)
            if name.endswith("byteorder") and fault == "big-endian":
                data = b"big"
            if not (name.endswith("data/0") and fault == "missing"):
                new.writestr(name, data)
    what = {"compressed": "data.pkl is compressed", "big-endian": "its numbers aren't little-endian"}
    expected = what.get(fault, "tensor weight doesn't lie within it")
    assert error_of(broken) == f"{broken}: not a whole file of torch.save: {expected}"
