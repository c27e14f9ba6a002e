"""`espalier inspect`: what it says of a run's artifacts is held against safetensors and h5py's reading of them."""

import json
import shutil

import h5py
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from program import Started, run, run_well, settings, stage_directory
from small_model import write_files


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def run_dir(files, tmp_path_factory):
    directory = tmp_path_factory.mktemp("inspect") / "run"
    run_well(*settings(files, directory, pipeline="[prune,retrain,compress,discover]", prune__pattern="2:4",
                       retrain__steps=6, compress__budget=0.5, discover__targets="['*q_proj']", discover__cardinality=16))
    return directory


def inspected(path) -> dict:
    ended = run_well("inspect", path, "--json")
    return json.loads(ended.output)


def told(path) -> list[list[str]]:
    """The lines of the text, in columns."""
    return [[cell for cell in line.split("  ") if cell] for line in run_well("inspect", path).output.splitlines()]


def test_a_pruned_models_zeros_patterns_and_origin(files, run_dir):
    model = stage_directory(run_dir, "prune") / "model"
    said = inspected(model)
    tensors = load_file(files.model / "model.safetensors")
    for file in model.glob("*.safetensors"):
        tensors |= load_file(file)
    rows = {row["name"]: row for row in said["tensors"]}
    assert set(rows) == set(tensors)
    for name, tensor in tensors.items():
        assert rows[name]["nonzeros"] == int(torch.count_nonzero(tensor)) and rows[name]["shape"] == list(tensor.shape)
        linear = tensor.dim() == 2 and "embed" not in name and "lm_head" not in name
        assert rows[name]["pattern"] == ("2:4" if linear else ""), name
    assert said["nonzeros"] == sum(int(torch.count_nonzero(tensor)) for tensor in tensors.values())
    assert said["kind"] == "model" and said["made_by"] == "01-prune" and said["stands_on"] == [str(files.model)]
    assert said["architecture"] == "llama"


def test_text_folds_what_differs_in_the_block_alone(files, run_dir):
    lines = told(files.model)
    blocks = json.loads((files.model / "config.json").read_text())["num_hidden_layers"]
    [queries] = [[cell.strip() for cell in line] for line in lines if "q_proj" in str(line)]
    assert queries[:2] == ["model.layers.*.self_attn.q_proj.weight", str(blocks)]
    size = sum(tensor.numel() for tensor in load_file(files.model / "model.safetensors").values())
    assert ["parameters", f"{size:,}"] in [[cell.strip() for cell in line] for line in lines]


def test_residuals_adapters_index_sets_and_token_sets(files, run_dir):
    residual = stage_directory(run_dir, "compress") / "residual.h5"
    said, metrics = inspected(residual), json.loads((residual.parent / "metrics.json").read_text())
    assert said["kind"] == "espalier.residual" and said["file_bytes"] == residual.stat().st_size == metrics["bytes"]
    ranks = {row["name"]: row["truncation_rank"] for row in metrics["matrices"] if row["truncation_rank"]}
    assert {row["name"]: row["rank"] for row in said["matrices"]} == ranks and ranks
    with h5py.File(residual) as file:
        stored = sum(file[name].nbytes for name in ("codes", "scales", "diagonals") if name in file)
        assert said["base_checksum"] == file.attrs["base_checksum"]
    assert sum(row["bytes"] for row in said["matrices"]) == stored

    masks = stage_directory(run_dir, "prune") / "masks.h5"
    said = inspected(masks)
    with h5py.File(masks) as file:
        zeros = {name: int(np.unpackbits(file[name], axis=1)[:, :file[name].attrs["columns"]].sum()) for name in file}
    assert {row["name"]: row["zeros"] for row in said["matrices"]} == zeros
    assert all(row["sparsity"] == 0.5 for row in said["matrices"]) and said["sparsity"] == 0.5

    adapters = stage_directory(run_dir, "retrain") / "adapters.h5"
    said, metrics = inspected(adapters), json.loads((adapters.parent / "metrics.json").read_text())
    assert said["method"] == "spp" and said["parameters"] == metrics["trainable_parameters"] > 0

    sets = stage_directory(run_dir, "discover") / "index_sets.h5"
    said = inspected(sets)
    with h5py.File(sets) as file:
        assert {row["name"] for row in said["matrices"]} == set(file)
        for row in said["matrices"]:
            assert row["positions"] == len(file[row["name"]]) == said["cardinality"] == 16
            assert row["objective"] == file[row["name"]].attrs["objective"]

    said = inspected(files.calibration)
    with h5py.File(files.calibration) as file:
        assert said["tokens"] == len(file["tokens"]) and said["documents"] == len(file["offsets"]) - 1
        assert said["longest_document"] == np.diff(file["offsets"]).max()


def test_a_run_tells_what_is_finished_at_work_and_due(files, run_dir, tmp_path):
    stages = inspected(run_dir)["stages"]
    assert [(row["name"], row["status"]) for row in stages] == [
        ("01-prune", "finished"), ("02-retrain", "finished"), ("03-compress", "finished"), ("04-discover", "finished")]
    manifest = json.loads((run_dir / "01-prune/manifest.json").read_text())
    assert stages[0]["seconds"] == manifest["seconds"]
    assert inspected(run_dir / "01-prune")["key"] == manifest["key"]

    job = Started(settings(files, tmp_path / "run", pipeline="[prune,retrain,evaluate]", retrain__steps=100000), ranks=1)
    job.wait_until((tmp_path / "run/01-prune/manifest.json").exists)
    job.wait_until((tmp_path / "run/02-retrain").exists)
    said = inspected(tmp_path / "run")
    assert f"process {job.ranks()[0]} on" in said["in_use_by"]
    assert [row["status"] for row in said["stages"]] == ["finished", "unfinished", "due"]
    assert inspected(tmp_path / "run/02-retrain")["status"] == "unfinished"
    assert inspected(tmp_path)["members"] == [{"name": "run", "finished": 1, "stages": 3}]
    job.process.terminate()
    job.end()


def test_an_evaluation_tells_its_figures(files, tmp_path):
    run_well(*settings(files, tmp_path / "run", pipeline="[evaluate]"), f"run.seed={2 ** 32 + 1}")
    metrics = json.loads((tmp_path / "run/01-evaluate/metrics.json").read_text())
    assert inspected(tmp_path / "run/01-evaluate")["metrics"]["text perplexity"] == metrics["tasks"]["text"]["perplexity"]
    assert inspected(tmp_path / "run")["seed"] == 2 ** 32 + 1


def test_damaged_files_end_in_one_message_or_in_none(files, run_dir, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run_dir, copy)
    for lock in ("", "[]", '{"process": "x", "host": 3}'):
        (copy / "run.lock").write_text(lock)
        assert "in_use_by" in inspected(copy), lock
    with h5py.File(copy / "01-prune/masks.h5", "r+") as file:
        next(iter(file.values())).attrs["columns"] = 1
    (copy / "environment.json").write_text("[]")
    for path in (copy / "01-prune/masks.h5", copy):
        ended = run("inspect", path)
        assert ended.code == 2 and len(ended.messages) == 1 and str(path) in ended.messages[0], str(ended)
    (copy / "environment.json").write_text('{"configuration": {"model": "x", "pipeline": 3, "run": {"seed": []}}}')
    (copy / "failure.json").write_text('{"stage": 1}')
    assert inspected(copy)["stages"] == []


def test_what_is_nothing_of_espaliers_is_refused_by_name(files, tmp_path):
    foreign = tmp_path / "foreign.h5"
    with h5py.File(foreign, "w") as file:
        file.attrs["kind"] = np.bytes_("somebody's")
    (tmp_path / "text.h5").write_text("{")
    (tmp_path / "empty").mkdir()
    for path, words in {foreign: ["somebody's", "espalier.residual"], tmp_path / "text.h5": ["HDF5"],
                        tmp_path / "empty": ["model.safetensors"], tmp_path / "absent": ["no such"]}.items():
        ended = run("inspect", path)
        assert ended.code == 2 and len(ended.messages) == 1 and str(path) in ended.messages[0], str(ended)
        assert all(word in ended.messages[0] for word in words), ended.messages
    assert run("inspect").code == 2 and run("inspect", files.model, "--jsno").code == 2
