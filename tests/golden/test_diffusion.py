"""Compression knows nothing of the model: diffusion checkpoints as the diffusers library lays them out (nested
names, convolutions, parts in folders, shards), and single files."""

import json
import os
import pathlib
import subprocess

import h5py
import torch
from safetensors.torch import load_file, save_file

BUILD = pathlib.Path(os.environ.get("ESPALIER_BUILD", "build"))


def unet(seed):
    """The names and ranks of a small text-to-image network."""
    generator = torch.Generator().manual_seed(seed)
    def random(*shape):
        return torch.randn(*shape, generator=generator) * 0.1
    tensors = {"conv_in.weight": random(32, 4, 3, 3), "conv_in.bias": random(32),
               "time_embedding.linear_1.weight": random(128, 32)}
    for block in range(2):
        prefix = f"down_blocks.{block}.attentions.0.transformer_blocks.0"
        tensors |= {f"{prefix}.attn1.to_q.weight": random(64, 64),
                    f"{prefix}.ff.net.0.proj.weight": random(256, 64),
                    f"{prefix}.norm1.weight": 1 + random(64),
                    f"down_blocks.{block}.resnets.0.conv1.weight": random(64, 32, 3, 3),
                    f"down_blocks.{block}.resnets.0.conv_shortcut.weight": random(64, 32, 1, 1)}
    return tensors


def tuned(tensors):
    """A change of rank 6 in every matrix (folded to out x rest), of 3 % in the vectors."""
    generator = torch.Generator().manual_seed(9)
    changed = {}
    for name, tensor in tensors.items():
        if tensor.dim() < 2:
            changed[name] = tensor * 1.03
            continue
        rows = tensor.shape[0]
        change = torch.randn(rows, 6, generator=generator) @ torch.randn(6, tensor.numel() // rows,
                                                                         generator=generator)
        changed[name] = tensor + 0.01 * change.reshape(tensor.shape)
    return changed


def write_pipeline(directory, weights):
    """unet in two shards, a transformer as its text encoder, a scheduler without weights."""
    (directory / "unet").mkdir(parents=True)
    (directory / "text_encoder").mkdir()
    (directory / "scheduler").mkdir()
    (directory / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    (directory / "scheduler/scheduler_config.json").write_text('{"num_train_timesteps": 1000}')
    (directory / "unet/config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    (directory / "text_encoder/config.json").write_text('{"model_type": "clip_text_model"}')
    names = sorted(weights)
    shards = {"diffusion_pytorch_model-00001-of-00002.safetensors": names[::2],
              "diffusion_pytorch_model-00002-of-00002.safetensors": names[1::2]}
    for shard, of_shard in shards.items():
        save_file({name: weights[name] for name in of_shard}, directory / "unet" / shard)
    (directory / "unet/diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(
        {"metadata": {}, "weight_map": {name: shard for shard, of_shard in shards.items() for name in of_shard}}))
    save_file({"text_model.encoder.layers.0.fc1.weight": weights["time_embedding.linear_1.weight"].clone()},
              directory / "text_encoder/model.safetensors")


def espalier(*words):
    done = subprocess.run([str(BUILD / "espalier"), *map(str, words)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def compress(directory, base, finetuned, *keys):
    espalier("pipeline=[compress]", f"model.path={base}", f"run.dir={directory}/run", "model.dtype=float32",
             f"compress.finetuned={finetuned}", "compress.base=start", "compress.rank=6", "compress.bits=8",
             "compress.allocation=uniform", "compress.vectors=float32", *keys)
    return directory / "run/01-compress/residual.h5"


def assert_close(decoded, base, finetuned):
    assert decoded.keys() == finetuned.keys()
    for name, exact in finetuned.items():
        if exact.dim() < 2:
            assert torch.equal(decoded[name], exact), name
        else:
            assert (decoded[name] - exact).norm() < 0.02 * (exact - base[name]).norm(), name


def test_a_diffusion_pipeline_is_compressed_and_decoded_part_by_part(tmp_path):
    weights = unet(1)
    changed = tuned(weights)
    write_pipeline(tmp_path / "base", weights)
    write_pipeline(tmp_path / "tuned", changed)
    residual = compress(tmp_path, tmp_path / "base", tmp_path / "tuned")
    with h5py.File(residual) as file:
        names = [entry["name"] for entry in json.loads(bytes(file["contents"][:]))["matrices"]]
    assert "unet/conv_in.weight" in names and "text_encoder/text_model.encoder.layers.0.fc1.weight" in names
    espalier("decode", tmp_path / "base", residual, tmp_path / "decoded")
    decoded = load_file(tmp_path / "decoded/unet/diffusion_pytorch_model.safetensors")
    assert_close(decoded, weights, changed)
    assert (tmp_path / "decoded/text_encoder/model.safetensors").exists()
    for file in ("model_index.json", "scheduler/scheduler_config.json", "unet/config.json"):
        assert (tmp_path / "decoded" / file).read_text() == (tmp_path / "base" / file).read_text()


def test_a_part_whose_weights_have_a_variants_name_is_compressed_too(tmp_path):
    """unet/diffusion_pytorch_model.fp16.safetensors, as hubs store half precision, and an adapter of any name."""
    weights = unet(1)
    changed = tuned(weights)
    for name, tensors in (("base", weights), ("tuned", changed)):
        write_pipeline(tmp_path / name, tensors)
        for file in (tmp_path / name / "unet").glob("*.safetensors*"):
            file.unlink()
        (tmp_path / name / "adapter").mkdir()
        save_file(tensors, tmp_path / name / "unet/diffusion_pytorch_model.fp16.safetensors")
        save_file({"down.weight": tensors["time_embedding.linear_1.weight"]},
                  tmp_path / name / "adapter/pytorch_lora_weights.safetensors")
    residual = compress(tmp_path, tmp_path / "base", tmp_path / "tuned")
    espalier("decode", tmp_path / "base", residual, tmp_path / "decoded")
    assert_close(load_file(tmp_path / "decoded/unet/diffusion_pytorch_model.safetensors"), weights, changed)
    decoded = load_file(tmp_path / "decoded/adapter/pytorch_lora_weights.safetensors")
    assert_close(decoded, {"down.weight": weights["time_embedding.linear_1.weight"]},
                 {"down.weight": changed["time_embedding.linear_1.weight"]})


def test_a_transformer_of_another_family_in_one_file_without_a_configuration(tmp_path):
    """Nested names of a diffusion transformer, bfloat16, in a file of any name; budget instead of rank."""
    generator = torch.Generator().manual_seed(2)
    base = {f"transformer.single_blocks.{i}.{part}.weight": torch.randn(96, 64, generator=generator)
            for i in range(3) for part in ("linear1", "modulation.lin")}
    changed = tuned(base)
    save_file(base, tmp_path / "flow.safetensors")
    save_file(changed, tmp_path / "flow-tuned.safetensors")
    residual = compress(tmp_path, tmp_path / "flow.safetensors", tmp_path / "flow-tuned.safetensors")
    espalier("decode", tmp_path / "flow.safetensors", residual, tmp_path / "decoded")
    assert_close(load_file(tmp_path / "decoded/model.safetensors"), base, changed)


def test_refused_inputs_are_named(tmp_path):
    (tmp_path / "empty/unet").mkdir(parents=True)
    save_file({"a.weight": torch.ones(4, 4)}, tmp_path / "a.safetensors")
    save_file({"a.weight": torch.ones(4, 5)}, tmp_path / "b.safetensors")
    for model, finetuned, words in (
            (tmp_path / "empty", tmp_path / "a.safetensors", ["empty", "safetensors"]),
            (tmp_path / "a.safetensors", tmp_path / "b.safetensors", ["a.weight", "[4, 5]", "[4, 4]"]),
            (tmp_path / "a.safetensors", tmp_path / "c.safetensors", ["compress.finetuned", "c.safetensors"])):
        done = subprocess.run([str(BUILD / "espalier"), "pipeline=[compress]", f"model.path={model}",
                               f"run.dir={tmp_path}/run", f"compress.finetuned={finetuned}", "compress.base=start",
                               "compress.rank=2"], capture_output=True, text=True, timeout=120)
        assert done.returncode == 2 and all(word in done.stderr for word in words), done.stderr
