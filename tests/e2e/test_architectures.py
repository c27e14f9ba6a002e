"""Every family is pruned, retrained, compressed and exported as a llama is, and transformers reloads what it left."""
import copy
import json
import math
import os
import signal
import subprocess
from pathlib import Path

import h5py
import numpy as np
import pytest
import tokenizers
import torch
import transformers
from safetensors.torch import load_file, save_file

import program
from program import Started, run, run_well, settings, stage_directory
from small_model import END_TOKEN, VOCABULARY, Files, text_tokens, write_tokens

SIZES = dict(vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
             bos_token_id=END_TOKEN, eos_token_id=END_TOKEN)
GATED = dict(SIZES, intermediate_size=96, num_key_value_heads=2, max_position_embeddings=256)
PLAIN = dict(SIZES, intermediate_size=96, max_position_embeddings=256)
DECODERS = {
    "gpt2": transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4, n_positions=256,
                                    bos_token_id=END_TOKEN, eos_token_id=END_TOKEN),
    "opt": transformers.OPTConfig(**SIZES, ffn_dim=96, max_position_embeddings=256, word_embed_proj_dim=48,
                                  do_layer_norm_before=False),
    "gpt_neox": transformers.GPTNeoXConfig(**PLAIN),
    "mistral": transformers.MistralConfig(**GATED, sliding_window=24),
    "qwen2": transformers.Qwen2Config(**GATED),
    "qwen3": transformers.Qwen3Config(**GATED, head_dim=16),
    "phi": transformers.PhiConfig(**PLAIN),
    "gemma": transformers.GemmaConfig(**GATED, head_dim=16),
}
ENCODERS = {
    "roberta": transformers.RobertaConfig(**PLAIN),
    "deberta_v2": transformers.DebertaV2Config(
        **PLAIN, relative_attention=True, pos_att_type=["p2c", "c2p"], share_att_key=True, position_buckets=16,
        norm_rel_ebd="layer_norm", position_biased_input=False, type_vocab_size=0),
}
# The stored matrices that hold layers.
LINEARS = {
    "gpt2": ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
    "opt": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "fc1", "fc2"),
    "gpt_neox": ("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    "phi": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.dense", "mlp.fc1", "mlp.fc2"),
    "roberta": ("self.query", "self.key", "self.value", "attention.output.dense", "intermediate.dense",
                ".output.dense"),
    "deberta_v2": ("self.query_proj", "self.key_proj", "self.value_proj", "attention.output.dense",
                   "intermediate.dense", ".output.dense"),
}
LLAMA_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def linear_names(family, tensors):
    endings = tuple(f"{name}.weight" for name in LINEARS.get(family, LLAMA_LINEARS))
    return [name for name in tensors if name.endswith(endings)]


def outputs_as_rows(family, tensor):
    """A row holds one output's weights; only GPT-2 stores it the other way. Fused parts are rows too."""
    return tensor.T if family == "gpt2" else tensor


def write_model(family, directory, **changes):
    config = copy.deepcopy({"llama": transformers.LlamaConfig(**GATED), **DECODERS, **ENCODERS}[family])
    config.update(changes)
    load = transformers.AutoModel if family in ENCODERS else transformers.AutoModelForCausalLM
    model = load.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            around = 1 if parameter.dim() == 1 and "bias" not in name and family != "gemma" else 0
            parameter.copy_(0.12 * noise if parameter.dim() == 2 else around + 0.1 * noise)
    model.save_pretrained(directory)
    words = {"<end>": END_TOKEN, **{f"w{number}": number for number in range(1, VOCABULARY)}}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<end>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(directory)
    return directory


def write_files(family, directory, **changes):
    model = write_model(family, directory / "model", **changes)
    return Files(model=model, calibration=write_tokens(directory / "calibration.h5", [text_tokens(3000, 1)], model),
                 train=write_tokens(directory / "train.h5", [text_tokens(3000, 2)], model),
                 held_out=write_tokens(directory / "held_out.h5", [text_tokens(500, 4)], model))


def their_perplexity(directory, tokens, length=64):
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    losses = []
    for begin in range(0, len(tokens) - length + 1, length):
        segment = torch.tensor(tokens[begin:begin + length].astype(np.int64))[None]
        with torch.no_grad():
            losses.append(model(segment, labels=segment).loss.double())
    return math.exp(sum(losses) / len(losses))


def masks_of(run_dir):
    with h5py.File(stage_directory(run_dir, "prune") / "masks.h5") as file:
        return {name: torch.tensor(np.unpackbits(data[()], axis=1)[:, :data.attrs["columns"]].astype(bool))
                for name, data in file.items()}


WORK = dict(pipeline="[evaluate,prune,evaluate,export,retrain,evaluate,export,compress,evaluate,export]",
            model__dtype="float32", retrain__targets="['*']", retrain__steps=15)


@pytest.fixture(scope="module", params=DECODERS)
def decoder(request, tmp_path_factory):
    """A float32 run of every stage with three exports."""
    directory = tmp_path_factory.mktemp(request.param)
    files = write_files(request.param, directory)
    run_well(*settings(files, directory / "run", **WORK), ranks=2)
    return request.param, files, directory / "run"


def test_perplexities_of_every_stage_are_those_of_transformers(decoder):
    _, files, run_dir = decoder
    directories = [files.model] + [stage_directory(run_dir, "export", i) / "model" for i in range(3)]
    assert program.perplexities(run_dir) == pytest.approx(
        [their_perplexity(directory, text_tokens(500, 4)) for directory in directories], rel=1e-4)


def test_training_lowers_the_loss_and_the_zeros_stay(decoder):
    family, files, run_dir = decoder
    dense, pruned, retrained, _ = program.perplexities(run_dir)
    assert retrained < pruned
    before = load_file(files.model / "model.safetensors")
    exports = [load_file(stage_directory(run_dir, "export", i) / "model" / "model.safetensors") for i in range(3)]
    assert all(tensors.keys() == before.keys() for tensors in exports)
    names = linear_names(family, before)
    assert len(names) == 2 * len(LINEARS.get(family, LLAMA_LINEARS))
    for name in names:
        zeros = outputs_as_rows(family, exports[0][name]) == 0
        assert (zeros.reshape(-1, 4).sum(1) == 2).all(), name
        kept = exports[0][name] != 0
        assert torch.equal(exports[0][name][kept], before[name][kept]), name
        for tensors in exports[1:]:
            assert torch.equal(outputs_as_rows(family, tensors[name]) == 0, zeros), name
        assert not torch.equal(exports[1][name], exports[0][name]), name
    for name in before.keys() - names:
        for tensors in exports:
            assert torch.equal(tensors[name], before[name]), name


def test_masks_and_adapters_name_layers_not_tensors(decoder):
    family, _, run_dir = decoder
    masks = masks_of(run_dir)
    assert len(masks) == 2 * (7 if family in ("mistral", "qwen2", "qwen3", "gemma") else 6)
    pruned = load_file(stage_directory(run_dir, "export") / "model" / "model.safetensors")
    if family == "gpt2":
        zeros = pruned["transformer.h.1.attn.c_attn.weight"] == 0
        for part, name in enumerate("qkv"):
            assert torch.equal(masks[f"transformer.h.1.attn.c_attn.{name}.weight"], zeros.T[64 * part:64 * part + 64])
    elif family == "gpt_neox":
        zeros = pruned["gpt_neox.layers.1.attention.query_key_value.weight"] == 0
        for part, name in enumerate("qkv"):
            assert torch.equal(masks[f"gpt_neox.layers.1.attention.query_key_value.{name}.weight"],
                               zeros.view(4, 3, 16, 64)[:, part].reshape(64, 64))
    else:
        assert all(torch.equal(mask, pruned[name] == 0) for name, mask in masks.items())
    with h5py.File(stage_directory(run_dir, "retrain") / "adapters.h5") as file:
        stored = []
        file.visit(stored.append)
    assert all(any(name.startswith(layer.removesuffix(".weight")) for name in stored) for layer in masks)


def test_the_same_bits_on_three_ranks(decoder, tmp_path):
    _, files, run_dir = decoder
    run_well(*settings(files, tmp_path / "run", **WORK), ranks=3)
    assert program.differences(program.results(run_dir), program.results(tmp_path / "run")) == []


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])
def test_a_part_of_a_fused_tensor_can_be_pruned_and_trained_alone(family, tmp_path):
    files = write_files(family, tmp_path)
    run_well(*settings(files, tmp_path / "run", pipeline="[prune,export,retrain,export]", model__dtype="float32",
                       prune="magnitude", prune__include="['k']", retrain__targets="['v']", retrain__steps=3))
    before = load_file(files.model / "model.safetensors")
    pruned, retrained = (load_file(stage_directory(tmp_path / "run", "export", i) / "model" / "model.safetensors")
                         for i in range(2))
    fused = "attn.c_attn.weight" if family == "gpt2" else "attention.query_key_value.weight"

    def parts(tensor):
        rows = outputs_as_rows(family, tensor)
        return rows.view(4, 3, 16, 64).transpose(0, 1) if family == "gpt_neox" else rows.reshape(3, 64, 64)

    for name, tensor in before.items():
        if not name.endswith(fused):
            assert torch.equal(pruned[name], tensor) and torch.equal(retrained[name], tensor), name
            continue
        expected = parts(tensor).clone()
        groups = expected[1].reshape(-1, 4)
        groups.scatter_(1, groups.abs().topk(2, largest=False).indices, 0)
        expected[1] = groups.view(expected[1].shape)
        assert torch.equal(parts(pruned[name]), expected), name
        assert torch.equal(parts(retrained[name])[:2], expected[:2]), name
        assert not torch.equal(parts(retrained[name])[2], expected[2]), name


def test_a_killed_run_takes_the_layers_out_of_the_fused_tensors_it_wrote(tmp_path):
    """The journal of blocks holds the checkpoint's tensors; the calibration passes through their layers again."""
    files = write_files("gpt2", tmp_path, n_layer=8)
    work = dict(pipeline="[prune]", prune="sparsegpt", prune__samples=64, prune__sequence_length=128)
    run_well(*settings(files, tmp_path / "undisturbed", **work))
    state = tmp_path / "run" / "01-prune" / "state"
    job = Started(settings(files, tmp_path / "run", **work))
    job.wait_until(lambda: (state / "mask-00001.safetensors").exists())
    job.signal(signal.SIGKILL)
    assert job.end().code != 0
    assert not (tmp_path / "run" / "01-prune" / "manifest.json").exists(), "give it more work"
    run_well(*settings(files, tmp_path / "run", **work))
    assert program.differences(program.results(tmp_path / "undisturbed"), program.results(tmp_path / "run")) == []


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_tied_head_that_is_stored_twice_stays_tied_and_counts_once(family, tmp_path):
    """All tensors are trained; transformers ties what is equal and would take a stale copy for a head of its own."""
    files = write_files(family, tmp_path, tie_word_embeddings=True)
    file = files.model / "model.safetensors"
    tensors = load_file(file)
    name = "transformer.wte.weight" if family == "gpt2" else "model.embed_tokens.weight"
    buffers = {"transformer.h.0.attn.bias": torch.ones(1, 1, 256, 256)} if family == "gpt2" else {}
    save_file({**tensors, "lm_head.weight": tensors[name].clone(), **buffers}, file, {"format": "pt"})
    run_well(*settings(files, tmp_path / "run", pipeline="[retrain,evaluate,export,compress,export]", retrain="full",
                       retrain__targets="null", retrain__steps=5, retrain__batch_size=8, model__dtype="float32"), ranks=2)
    for number in range(2):
        exported = stage_directory(tmp_path / "run", "export", number) / "model"
        after = load_file(exported / "model.safetensors")
        assert torch.equal(after[name], after["lm_head.weight"]) and not torch.equal(after[name], tensors[name])
    first = stage_directory(tmp_path / "run", "export") / "model"
    assert their_perplexity(first, text_tokens(500, 4)) == pytest.approx(program.perplexities(tmp_path / "run")[0], rel=1e-4)
    said = json.loads((stage_directory(tmp_path / "run", "evaluate") / "metrics.json").read_text())["model"]
    assert said["parameters"] == transformers.AutoModelForCausalLM.from_pretrained(first).num_parameters()


def test_targets_that_a_family_has_not_are_refused_with_its_layers(tmp_path):
    ended = run(*settings(write_files("gpt2", tmp_path), tmp_path / "run"))  # SPP's targets are llama's
    assert ended.code == 2, str(ended)
    for word in ("retrain.targets", "q_proj", "attn.c_attn.q", "mlp.c_fc"):
        assert word in ended.messages[0], str(ended)


@pytest.mark.parametrize("family", ENCODERS)
def test_encoders_are_pruned_and_exported(family, tmp_path):
    files = write_files(family, tmp_path)
    run_well(*settings(files, tmp_path / "run", pipeline="[prune,export]", model__dtype="float32"), ranks=2)
    exported = stage_directory(tmp_path / "run", "export") / "model"
    tensors = load_file(exported / "model.safetensors")
    names = linear_names(family, tensors)
    assert len(names) == 2 * 6
    for name in names:
        assert ((tensors[name] == 0).reshape(-1, 4).sum(1) == 2).all(), name
    assert all(torch.equal(mask, tensors[name] == 0) for name, mask in masks_of(tmp_path / "run").items())
    model = transformers.AutoModel.from_pretrained(exported, dtype=torch.float32).eval()
    tokens = torch.randint(3, VOCABULARY, (2, 90), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        theirs = model(tokens, attention_mask=torch.ones_like(tokens)).last_hidden_state
    save_file({"tokens": tokens}, tmp_path / "in.safetensors")
    tool = Path(os.environ.get("ESPALIER_BUILD", program.SOURCE / "build")) / "tests" / "logits_tool"
    subprocess.run([tool, exported, tmp_path / "in.safetensors", tmp_path / "out.safetensors", "float32"], check=True)
    assert (load_file(tmp_path / "out.safetensors")["out"] - theirs).abs().max() < 1e-4
