"""The safetensors package and h5py read what we write, and we read what they write."""

import json
import os
import pathlib
import subprocess

import h5py
import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file

TOOL = pathlib.Path(os.environ["ESPALIER_BUILD"]) / "tests" / "io_tool"


def run(*words):
    return subprocess.run([TOOL, *map(str, words)], capture_output=True, text=True, timeout=120)


def checked(*words):
    done = run(*words)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def model(tmp_path):
    generator = torch.Generator().manual_seed(1)
    tensors = {
        "b": torch.randn(3, 5, generator=generator).bfloat16(),
        "h": torch.randn(7, generator=generator).half(),
        "f": torch.randn(2, 2, 2, generator=generator),
        "d": torch.randn(3, generator=generator).double(),
        "i": torch.arange(9),
        "flag": torch.tensor([True, False, True]),
        "byte": torch.arange(5, dtype=torch.uint8),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
    }
    directory = tmp_path / "model"
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text('{"dtype": "bfloat16"}')
    return directory, tensors


def test_we_read_what_the_safetensors_package_writes(model):
    directory, tensors = model
    found = json.loads(checked("list", directory))["tensors"]
    assert sorted(found) == sorted(tensors)
    for name, tensor in tensors.items():
        expected = tensor.double().sum().item()
        assert found[name]["shape"] == list(tensor.shape)
        assert found[name]["sum"] == pytest.approx(expected, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("shard_bytes", [1 << 30, 40])
def test_the_safetensors_package_reads_what_we_write(model, tmp_path, shard_bytes):
    directory, tensors = model
    out = tmp_path / "out"
    checked("dense", directory, out, "float32", shard_bytes)
    index = out / "model.safetensors.index.json"
    if shard_bytes == 40:
        weight_map = json.loads(index.read_text())["weight_map"]
        read = {name: load_file(out / shard)[name] for name, shard in weight_map.items()}
    else:
        assert not index.exists()
        read = load_file(out / "model.safetensors")
    assert sorted(read) == sorted(tensors)
    for name, tensor in tensors.items():
        expected = tensor.float() if tensor.is_floating_point() else tensor
        assert read[name].dtype == expected.dtype and torch.equal(read[name], expected)
    assert json.loads((out / "config.json").read_text())["dtype"] == "float32"


def test_the_checksum_does_not_depend_on_the_shards(model, tmp_path):
    directory, _ = model
    checked("dense", directory, tmp_path / "one", "bfloat16", 1 << 30)
    checked("dense", directory, tmp_path / "many", "bfloat16", 40)
    sums = {json.loads(checked("list", tmp_path / name))["checksum"] for name in ("one", "many")}
    assert len(sums) == 1


def test_h5py_and_we_read_each_other(tmp_path):
    values = numpy.random.default_rng(2).standard_normal((40, 6)).astype("<f4")
    with h5py.File(tmp_path / "in.h5", "w") as file:
        file["plain"] = values
        file.create_dataset("packed", data=values, chunks=(7, 6), compression="gzip", shuffle=True)
        file.attrs["kind"] = "text é"
        file.attrs["count"] = 40
    checked("h5", tmp_path / "in.h5", tmp_path / "out.h5")
    with h5py.File(tmp_path / "out.h5") as file:
        assert numpy.array_equal(file["plain"][:], values)
        assert numpy.array_equal(file["packed"][:], values)
        assert file.attrs["kind"] == "text é" and file.attrs["count"] == 40


def test_a_file_cut_off_ends_in_one_message(model):
    directory, _ = model
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    done = run("list", directory)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"espalier: {file}: tensor ") and done.stderr.count("\n") == 1
