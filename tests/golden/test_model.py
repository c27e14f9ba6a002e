"""Logits equal transformers': on small random configurations and on the real models."""
import os
import subprocess

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

TOOL = os.path.join(os.environ.get("ESPALIER_BUILD", "build"), "tests", "logits_tool")


def ours(model_directory, tokens, tmp_path, visible=None, dtype="float32"):
    tensors = {"tokens": tokens.to(torch.int64)}
    if visible is not None:
        tensors["visible"] = visible
    save_file(tensors, tmp_path / "in.safetensors")
    subprocess.run([TOOL, str(model_directory), str(tmp_path / "in.safetensors"),
                    str(tmp_path / "out.safetensors"), dtype], check=True)
    return load_file(tmp_path / "out.safetensors")["out"]


SMALL = dict(vocab_size=131, hidden_size=48, intermediate_size=80, num_hidden_layers=3,
             num_attention_heads=6, num_key_value_heads=2, max_position_embeddings=512)
LLAMAS = {
    "grouped_queries": {},
    "one_key_value_head": dict(num_key_value_heads=1),
    "tied_head": dict(tie_word_embeddings=True),
    "biases": dict(attention_bias=True, mlp_bias=True),
    "head_size_of_its_own": dict(head_dim=12),
    "theta": dict(rope_parameters=dict(rope_type="default", rope_theta=100000.0)),
    "linear_rope": dict(rope_parameters=dict(rope_type="linear", factor=4.0, rope_theta=10000.0)),
    "llama3_rope": dict(rope_parameters=dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0,
                                             high_freq_factor=4.0, rope_theta=500000.0,
                                             original_max_position_embeddings=64)),
}


def randomized(model):
    """Weights large enough that a wrong norm, bias or mask shows in the logits."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.15 if parameter.dim() == 2 else 0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale
                            + (1.0 if parameter.dim() == 1 else 0.0))
    return model.eval()


@pytest.mark.parametrize("name", LLAMAS)
def test_small_llama(name, tmp_path):
    config = transformers.LlamaConfig(**{**SMALL, **LLAMAS[name]})
    model = randomized(transformers.LlamaForCausalLM(config))
    model.save_pretrained(tmp_path / "model")
    tokens = torch.randint(0, 131, (2, 200), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        theirs = model(tokens).logits
    assert (ours(tmp_path / "model", tokens, tmp_path) - theirs).abs().max() < 1e-4


@pytest.mark.parametrize("window", [1, 7, 150])
def test_mistral_with_sliding_window(window, tmp_path):
    config = transformers.MistralConfig(**SMALL, sliding_window=window)
    model = randomized(transformers.MistralForCausalLM(config))
    model.save_pretrained(tmp_path / "model")
    tokens = torch.randint(0, 131, (2, 300), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        theirs = model(tokens).logits
    assert (ours(tmp_path / "model", tokens, tmp_path) - theirs).abs().max() < 1e-4


def test_small_bert_with_padding(tmp_path):
    config = transformers.BertConfig(vocab_size=131, hidden_size=48, intermediate_size=80,
                                     num_hidden_layers=3, num_attention_heads=4,
                                     max_position_embeddings=160)
    model = randomized(transformers.BertModel(config, add_pooling_layer=False))
    model.save_pretrained(tmp_path / "model")
    tokens = torch.randint(0, 131, (3, 140), generator=torch.Generator().manual_seed(3))
    visible = torch.tensor([140, 17, 1])
    mask = torch.arange(140) < visible[:, None]
    with torch.no_grad():
        theirs = model(tokens, attention_mask=mask.long()).last_hidden_state
    difference = (ours(tmp_path / "model", tokens, tmp_path, visible) - theirs).abs()
    assert difference[mask].max() < 1e-4


def test_old_and_new_config_json_read_the_same(tmp_path):
    import json
    config = transformers.LlamaConfig(**SMALL, rope_parameters=dict(rope_type="linear", factor=2.0,
                                                                   rope_theta=50000.0))
    randomized(transformers.LlamaForCausalLM(config)).save_pretrained(tmp_path / "model")
    tokens = torch.randint(0, 131, (1, 64), generator=torch.Generator().manual_seed(4))
    new = ours(tmp_path / "model", tokens, tmp_path)
    file = tmp_path / "model" / "config.json"
    values = json.loads(file.read_text())
    values.pop("rope_parameters")
    values.update(rope_theta=50000.0, rope_scaling=dict(type="linear", factor=2.0))
    file.write_text(json.dumps(values))
    assert torch.equal(ours(tmp_path / "model", tokens, tmp_path), new)
    values.pop("rope_theta")
    file.write_text(json.dumps(values))
    run = subprocess.run([TOOL, str(tmp_path / "model"), str(tmp_path / "in.safetensors"),
                          str(tmp_path / "out.safetensors"), "float32"], capture_output=True, text=True)
    assert run.returncode == 2 and "rope_theta is missing" in run.stderr


@pytest.mark.parametrize("variable, kind", [("ESPALIER_TEST_MODEL", "causal"),
                                            ("ESPALIER_TEST_MINILM", "encoder")])
def test_real_model(variable, kind, tmp_path):
    directory = os.environ.get(variable)
    if not directory:
        pytest.skip(f"skipped: no data ({variable} is not set)")
    load = transformers.AutoModelForCausalLM if kind == "causal" else transformers.AutoModel
    model = load.from_pretrained(directory, dtype=torch.float32).eval()
    length = 512 if kind == "causal" else 256
    tokens = torch.randint(0, model.config.vocab_size, (1, length),
                           generator=torch.Generator().manual_seed(6))
    text = "Espalier is the art of training a tree flat against a wall. " * 60
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    tokens = torch.cat([tokens, tokenizer(text, return_tensors="pt", add_special_tokens=False,
                                          truncation=True, max_length=length).input_ids[:, :length]])
    with torch.no_grad():
        out = model(tokens)
    theirs = out.logits if kind == "causal" else out.last_hidden_state
    assert (ours(directory, tokens, tmp_path) - theirs).abs().max() < 5e-4
    assert np.isfinite(ours(directory, tokens, tmp_path, dtype="bfloat16").numpy()).all()
