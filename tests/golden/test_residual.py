"""residual.h5 read by h5py and decoded by numpy from the format's description alone
(stages/compress/residual_file.h) gives the weights that espalier's compress stage leaves."""

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


def write_models(directory):
    """A random llama whose linear layers are half zero, and one that changed inside that mask."""
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, vocab_size=128,
                         tie_word_embeddings=True)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory / "base")
    base = load_file(directory / "base/model.safetensors")
    tuned = {}
    for name, weight in base.items():
        if weight.dim() < 2 or "embed" in name:
            tuned[name] = weight.clone()
            continue
        weight[torch.rand(weight.shape) < 0.5] = 0
        change = torch.randn(weight.shape[0], 6) @ torch.randn(6, weight.shape[1]) * 0.002
        tuned[name] = ((weight.float() + change) * (weight != 0)).to(torch.bfloat16)
    tuned["model.norm.weight"] *= 1.25
    save_file(base, directory / "base/model.safetensors", {"format": "pt"})
    (directory / "tuned").mkdir()
    (directory / "tuned/config.json").write_text((directory / "base/config.json").read_text())
    save_file(tuned, directory / "tuned/model.safetensors", {"format": "pt"})
    return base, tuned


class Residual:
    """Reads the data sets from front to back."""

    def __init__(self, path):
        file = h5py.File(path)
        assert file.attrs["kind"] in ("espalier.residual", b"espalier.residual")
        self.bits = int(file.attrs["bits"])
        self.polar = bool(file.attrs["polar"])
        self.contents = json.loads(bytes(file["contents"][:]))
        def numbers(name):  # empty data sets are not stored
            return file[name][:].astype(float) if name in file else np.empty(0)
        self.codes = np.unpackbits(file["codes"][:], bitorder="little")
        self.scales, self.diagonals = numbers("scales"), numbers("diagonals")
        self.whole = file["whole"][:].tobytes() if "whole" in file else b""

    def take(self, dataset, count):
        values = getattr(self, dataset)
        setattr(self, dataset, values[count:])
        return values[:count]

    def stream(self, count):
        """`count` codes of one bit stream."""
        bits = self.take("codes", (count * self.bits + 7) // 8 * 8)[: count * self.bits]
        return (bits.reshape(-1, self.bits) * (1 << np.arange(self.bits))).sum(1)

    def factor(self, length, rank):
        codes = self.stream(length * rank).reshape(rank, length)
        if self.bits == 16:
            vectors = (codes.astype(np.uint16).view(np.float16).astype(float) / np.sqrt(length)).T
        else:
            step = self.take("scales", rank) / np.sqrt(length)
            vectors = ((codes - (2**self.bits - 1) / 2) * step[:, None]).T
        if not self.polar:
            return vectors
        left, _, right = np.linalg.svd(vectors, full_matrices=False)
        return left @ right

    def matrix(self, entry, base):
        rows, columns = entry["shape"][0], int(np.prod(entry["shape"][1:]))
        if "entries" in entry:
            step = self.take("scales", rows)[:, None] / np.sqrt(columns) * 2.0 ** entry["exponent"]
            kept = (base != 0) if entry["mask"] else np.ones(base.shape, bool)
            change = np.zeros((rows, columns))
            change[kept.reshape(rows, columns)] = self.stream(entry["entries"]) - (2**self.bits - 1) / 2
            return base + (change * step).reshape(base.shape) * kept
        u, v = self.factor(rows, entry["rank"]), self.factor(columns, entry["rank"])
        d = self.take("diagonals", entry["rank"]) * 2.0 ** entry["exponent"]
        weight = base + ((u * d) @ v.T).reshape(base.shape)
        return weight * (base != 0) if entry["mask"] else weight


SETTINGS = {"ere_1": ("ere", "compress.rank=8", "compress.bits=1"),
            "ere_4": ("ere", "compress.rank=8", "compress.bits=4"),
            "ere_7_not_orthonormal": ("ere", "compress.rank=8", "compress.bits=7", "compress.polar=false"),
            "low_rank": ("low_rank", "compress.rank=8"),
            "quantization_3": ("quantization", "compress.bits=3")}


@pytest.mark.parametrize("case", SETTINGS)
def test_numpy_decodes_the_residual_to_the_weights_that_the_stage_leaves(tmp_path, case):
    base, tuned = write_models(tmp_path)
    method, *keys = SETTINGS[case]
    command = [BUILD / "espalier", "pipeline=[compress]", f"compress={method}", f"model.path={tmp_path}/base",
               f"run.dir={tmp_path}/run", f"compress.finetuned={tmp_path}/tuned", "compress.base=start", *keys]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    left = load_file(tmp_path / "run/01-compress/model/changed-00001.safetensors")
    residual = Residual(tmp_path / "run/01-compress/residual.h5")
    names = [entry["name"] for entry in residual.contents["matrices"]]
    assert "model.embed_tokens.weight" not in names and len(names) == 14
    for entry in residual.contents["matrices"]:
        name = entry["name"]
        ours = torch.from_numpy(residual.matrix(entry, base[name].double().numpy()))
        # One rounding to bfloat16 apart at most where the two products end on either side of a tie.
        torch.testing.assert_close(left[name].double(), ours, rtol=2**-8, atol=0)
        assert torch.equal(left[name] == 0, base[name] == 0)
    assert [entry["name"] for entry in residual.contents["whole"]] == ["model.norm.weight"]
    assert torch.equal(left["model.norm.weight"], tuned["model.norm.weight"])
    assert len(residual.codes) == len(residual.scales) == len(residual.diagonals) == 0
