"""Packed exports: safetensors and numpy find the dense export's bits in them, unpack.py writes its files again, and
espalier takes them as the same model."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file

from program import SOURCE, differences, results, run_well, settings, stage_directory
from small_model import write_files

PACKED = ("bitmask", "nm")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def exports(files, tmp_path_factory):
    """One model, 2:4 but for its unstructured queries, as each format exports it."""
    run_dir = tmp_path_factory.mktemp("export") / "run"
    run_well(*settings(files, run_dir, pipeline="[prune,export,bitmask,nm]", prune="magnitude",
                       prune__overrides="[{match: q_proj, pattern: unstructured, sparsity: 0.6}]"),
             *(f"+{name}={{stage: export, format: {name}, directory: null}}" for name in PACKED), ranks=2)
    return {name: stage_directory(run_dir, stage) / "model"
            for name, stage in (("dense", "export"), ("bitmask", "bitmask"), ("nm", "nm"))}


def bits_of(tensor: torch.Tensor) -> np.ndarray:
    return tensor.flatten().view(torch.int16).numpy()


def packings(file: Path) -> dict:
    with safe_open(file, "pt") as opened:
        return json.loads(opened.metadata()["espalier.packed"])


@pytest.mark.parametrize("name", PACKED)
def test_values_and_places_are_those_of_the_dense_export(exports, name):
    dense = load_file(exports["dense"] / "model.safetensors")
    file = exports[name] / "packed_model.safetensors"
    found, packed = load_file(file), packings(file)
    linear = {matrix for matrix in dense if matrix.endswith("_proj.weight")}
    assert packed.keys() == linear and len(linear) == 21
    for matrix, entry in packed.items():
        assert entry["packing"] == ("bitmask" if name == "bitmask" or "q_proj" in matrix else "2:4"), matrix
        assert entry["shape"] == list(dense[matrix].shape), matrix
        exact, values = bits_of(dense.pop(matrix)), bits_of(found.pop(f"{matrix}.values"))
        if entry["packing"] == "bitmask":
            bits = np.packbits(exact != 0, bitorder="little")
            assert np.array_equal(found.pop(f"{matrix}.bits").numpy()[:len(bits)], bits), matrix
            assert np.array_equal(values, exact[exact != 0]), matrix
        else:
            places = (found.pop(f"{matrix}.indices").numpy()[:, None] >> np.array([0, 2, 4, 6])) & 3
            rebuilt = np.zeros((len(exact) // 4, 4), np.int16)
            np.put_along_axis(rebuilt, places.reshape(-1, 2)[:len(rebuilt)], values.reshape(-1, 2), axis=1)
            assert entry["axis"] == 1 and np.array_equal(rebuilt.ravel(), exact), matrix
    assert found.keys() == dense.keys()  # what is stored as it is
    assert all(torch.equal(found[name], dense[name]) for name in dense)


@pytest.mark.parametrize("name", PACKED)
def test_bytes_are_stated_as_they_are_against_dense_and_the_entropy(exports, name):
    metrics = json.loads((exports[name].parent / "metrics.json").read_text())
    file = exports[name] / "packed_model.safetensors"
    stored, packed = load_file(file), packings(file)
    assert metrics["bytes"] == sum(path.stat().st_size for path in exports[name].iterdir())
    assert metrics["tensor_bytes"] == sum(tensor.nbytes for tensor in stored.values())
    dense = load_file(exports["dense"] / "model.safetensors")
    assert metrics["dense_bytes"] == sum(tensor.nbytes for tensor in dense.values())
    bound = 0.0
    for matrix, tensor in dense.items():
        if matrix not in packed:
            bound += 8 * tensor.nbytes
            continue
        values, packing = stored[f"{matrix}.values"].numel(), packed[matrix]["packing"]
        bound += 16 * values
        if packing == "bitmask":
            bound += math.log2(math.comb(tensor.numel(), values))
        else:
            bound += tensor.numel() / 4 * math.log2(math.comb(4, 2))
    assert abs(metrics["bound_bytes"] - bound / 8) <= 1
    assert metrics["bound_bytes"] < metrics["tensor_bytes"] < metrics["dense_bytes"]
    assert metrics["share_of_dense"] == metrics["tensor_bytes"] / metrics["dense_bytes"]
    assert metrics["share_of_bound"] == pytest.approx(metrics["tensor_bytes"] / metrics["bound_bytes"], rel=1e-4)
    assert sum(metrics["packed"].values()) == len(packed)
    inspected = json.loads(run_well("inspect", exports[name], "--json").output)
    assert inspected["stored_bytes"] == metrics["tensor_bytes"] and inspected["bytes"] == metrics["dense_bytes"]
    assert {row["name"]: row["packing"] for row in inspected["tensors"] if "packing" in row} == {
        matrix: entry["packing"] for matrix, entry in packed.items()}


@pytest.mark.parametrize("name", PACKED)
def test_unpack_writes_the_files_of_the_dense_export(exports, tmp_path, name):
    command = [sys.executable, SOURCE / "launch/unpack.py", exports[name], tmp_path / "out"]
    subprocess.run(command, check=True)
    expected, found = ({path.name: path.read_bytes() for path in directory.iterdir()}
                       for directory in (exports["dense"], tmp_path / "out"))
    assert expected.keys() == found.keys() and {"model.safetensors", "config.json", "tokenizer.json"} <= found.keys()
    assert all(found[file] == content for file, content in expected.items())
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode != 0 and str(tmp_path / "out") in again.stderr


def test_transformers_finds_no_weights_in_a_packed_export_rather_than_wrong_ones(exports):
    for name in PACKED:
        with pytest.raises(OSError, match="model.safetensors"):
            transformers.AutoModelForCausalLM.from_pretrained(exports[name])


def test_a_packed_export_is_evaluated_to_the_same_figures(files, exports, tmp_path):
    found = []
    for name, directory in exports.items():
        run_well(*settings(files, tmp_path / name, pipeline="[evaluate]", model__path=directory), ranks=2)
        found.append(results(tmp_path / name))
    assert "01-evaluate/metrics.json" in found[0]
    assert all(differences(found[0], other) == [] for other in found[1:])


def test_residuals_stack_on_a_packed_export_as_on_the_dense_one(files, exports, tmp_path):
    found = {}
    for name in ("dense", "nm"):
        run_well(*settings(files, tmp_path / name, pipeline="[retrain,compress]", model__path=exports[name],
                           retrain__steps=6, compress__budget=0.5), ranks=2)
        everything = results(tmp_path / name)
        found[name] = {file: everything[file] for file in ("01-retrain/adapters.h5", "02-compress/residual.h5")}
    assert differences(found["dense"], found["nm"]) == []
    residual = stage_directory(tmp_path / "dense", "compress") / "residual.h5"
    for name, directory in exports.items():
        run_well("decode", directory, residual, tmp_path / f"decoded-{name}")
    exact, *others = (
        {path.name: path.read_bytes() for path in (tmp_path / f"decoded-{name}").iterdir()} for name in exports)
    assert "model.safetensors" in exact and all(other == exact for other in others)
