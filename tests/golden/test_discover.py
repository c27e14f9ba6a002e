"""index_sets.h5 as other programs read it, and GreBsmo against the published program in numpy."""

import json
import os
import pathlib
import subprocess

import h5py
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

BUILD = pathlib.Path(os.environ.get("ESPALIER_BUILD", "build"))
CARDINALITY = 16


def write_model(directory, hidden, scale, blocks=1):
    torch.manual_seed(1)
    config = LlamaConfig(hidden_size=hidden, intermediate_size=32, num_hidden_layers=blocks, num_attention_heads=4,
                         num_key_value_heads=2, vocab_size=32, tie_word_embeddings=True)
    LlamaForCausalLM(config).save_pretrained(directory)
    weights = load_file(directory / "model.safetensors")
    for name, weight in weights.items():
        if "_proj" in name:  # a spectrum that falls, as trained weights have, and heavy tails
            m, n = weight.shape
            k = min(m, n)
            low = torch.randn(m, k) * 0.99 ** torch.arange(k) @ torch.randn(k, n) / k**0.5
            weights[name] = (scale * (low + torch.distributions.StudentT(5.0).sample((m, n)))).contiguous()
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    return weights


def discover(directory, *overrides):
    command = [BUILD / "espalier", "pipeline=[discover]", f"model.path={directory}/model", "model.dtype=float32",
               f"run.dir={directory}/run", f"discover.cardinality={CARDINALITY}", *overrides]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return directory / "run" / "01-discover"


def objective(residual, cardinality=CARDINALITY):
    """1/2 ||W - UV - S||^2 with S the `cardinality` largest entries of W - UV."""
    squares = np.sort((residual**2).ravel())
    return squares[:-cardinality].sum() / 2


def published(w, threshold=0.01, outer_steps=100, cap=496, rows=5):
    """The program's constants and steps in float64; returns W - UV, its rank, and how many entries of S are not 0."""
    generator = np.random.default_rng(0)
    v = generator.standard_normal((1, w.shape[1]))
    for outer in range(outer_steps):
        s = np.zeros_like(w)
        for _ in range(2):
            u, _ = np.linalg.qr((w - s) @ v.T)
            v = u.T @ (w - s)
            s = w - u @ v
            s[np.abs(s) < threshold] = 0
        if v.shape[0] >= cap or outer == outer_steps - 1:
            return w - u @ v, v.shape[0], np.count_nonzero(s)
        v = np.vstack([v, np.linalg.qr(w - u @ v - s, mode="r")[: min(rows, cap - v.shape[0])]])


@pytest.mark.parametrize("method", ["grebsmo", "magnitude", "random"])
def test_index_sets_are_ascending_positions_of_every_target(tmp_path, method):
    weights = write_model(tmp_path / "model", 64, 0.05, blocks=2)
    stage = discover(tmp_path, f"discover={method}", "discover.targets=[q_proj,self_attn.v_proj]")
    metrics = json.loads((stage / "metrics.json").read_text())
    figures = {matrix["name"]: matrix for matrix in metrics["matrices"]}
    with h5py.File(stage / "index_sets.h5") as file:
        assert file.attrs["cardinality"] == CARDINALITY and len(file.attrs["model_checksum"]) == 32
        assert sorted(file) == sorted(name for name in weights if "q_proj" in name or "v_proj" in name)
        for name, dataset in file.items():
            positions = dataset[:]
            assert dataset.dtype == np.int64 and positions.shape == (CARDINALITY,)
            assert (np.diff(positions) > 0).all() and 0 <= positions[0] and positions[-1] < weights[name].numel()
            assert dataset.attrs["method"] in (method, method.encode())
            assert dataset.attrs["objective"] == figures[name]["objective"]
            w = weights[name].double().numpy()
            if method == "magnitude":
                expected = np.argsort(-np.abs(w).ravel(), kind="stable")[:CARDINALITY]
                assert sorted(expected) == list(positions)
            if method != "grebsmo":
                w.ravel()[positions] = 0
                assert dataset.attrs["objective"] == pytest.approx((w**2).sum() / 2, rel=1e-9)
    assert not (stage / "model").exists()


def test_grebsmo_is_never_worse_than_the_published_program_at_its_rank(tmp_path):
    """560 x 560 with entries of about 0.5, so that the program's 0.01 leaves some entries; both at rank 496. At 280 x
    560 the rank reaches the smaller side there: S is empty, and its threshold selects everything."""
    weights = write_model(tmp_path / "model", 560, 0.5)
    stage = discover(tmp_path, "discover=grebsmo", "discover.rank=496", "discover.targets=[q_proj]")
    (figures,) = json.loads((stage / "metrics.json").read_text())["matrices"]
    w = weights[figures["name"]].double().numpy()
    residual, rank, entries = published(w)
    assert rank == figures["rank"] == 496 and entries > CARDINALITY
    print(f"objective {figures['objective']:.6g} in {figures['iterations']} steps; published {objective(residual):.6g}")
    assert figures["objective"] <= objective(residual)
    narrow = weights[figures["name"].replace("q_proj", "v_proj")].double().numpy()
    assert published(narrow, outer_steps=60)[2] == 0
