"""Every family gives transformers' logits (encoders: last hidden states), with padding behind, and its gradients."""
import json
import subprocess

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_model import TOOL, randomized

VOCABULARY = 131
LENGTH = 150
SHAPE = dict(vocab_size=VOCABULARY, hidden_size=48, num_hidden_layers=3, num_attention_heads=6)
GATED = dict(SHAPE, intermediate_size=80, num_key_value_heads=2, max_position_embeddings=512)
GPT2 = dict(vocab_size=VOCABULARY, n_embd=48, n_layer=3, n_head=6, n_positions=256, bos_token_id=0, eos_token_id=0)
OPT = dict(SHAPE, ffn_dim=80, max_position_embeddings=256)
NEOX = dict(SHAPE, intermediate_size=80, max_position_embeddings=512)
PHI = dict(SHAPE, intermediate_size=80, max_position_embeddings=512)
ENCODER = dict(SHAPE, intermediate_size=80, max_position_embeddings=256)
DEBERTA = dict(ENCODER, relative_attention=True, pos_att_type=["p2c", "c2p"], type_vocab_size=0)

DECODERS = {
    "gpt2": (transformers.GPT2Config, GPT2),
    "gpt2_wide_inner_untied": (transformers.GPT2Config, dict(GPT2, n_inner=72, tie_word_embeddings=False,
                                                             activation_function="relu")),
    "opt": (transformers.OPTConfig, OPT),
    "opt_norm_after_narrow_embeddings": (transformers.OPTConfig, dict(OPT, do_layer_norm_before=False,
                                                                      word_embed_proj_dim=32)),
    "opt_no_biases_untied_projected": (transformers.OPTConfig, dict(OPT, enable_bias=False, tie_word_embeddings=False,
                                                                    word_embed_proj_dim=32)),
    "opt_norm_after": (transformers.OPTConfig, dict(OPT, do_layer_norm_before=False)),
    "gpt_neox": (transformers.GPTNeoXConfig, NEOX),
    "gpt_neox_sequential": (transformers.GPTNeoXConfig, dict(NEOX, use_parallel_residual=False)),
    "gpt_neox_all_features_turn": (transformers.GPTNeoXConfig, dict(
        NEOX, attention_bias=False, hidden_act="gelu_new",
        rope_parameters=dict(rope_type="default", rope_theta=500.0, partial_rotary_factor=1.0))),
    "qwen2": (transformers.Qwen2Config, GATED),
    "qwen2_tied_window": (transformers.Qwen2Config, dict(GATED, tie_word_embeddings=True, use_sliding_window=True,
                                                         sliding_window=9, max_window_layers=0)),
    "qwen3": (transformers.Qwen3Config, dict(GATED, head_dim=12)),
    "qwen3_biases_own_head_size": (transformers.Qwen3Config, dict(GATED, head_dim=16, attention_bias=True,
                                                                  tie_word_embeddings=True)),
    "phi": (transformers.PhiConfig, PHI),
    "phi_grouped_heads_normed": (transformers.PhiConfig, dict(
        PHI, num_key_value_heads=3, qk_layernorm=True,
        rope_parameters=dict(rope_type="default", rope_theta=10000.0, partial_rotary_factor=0.75))),
    "gemma": (transformers.GemmaConfig, dict(GATED, head_dim=16)),
    "gemma_legacy_gelu_untied": (transformers.GemmaConfig, dict(GATED, head_dim=8, num_key_value_heads=1,
                                                                hidden_act="gelu", tie_word_embeddings=False)),
}
ENCODERS = {
    "roberta": (transformers.RobertaConfig, ENCODER),
    "roberta_another_padding_token": (transformers.RobertaConfig, dict(ENCODER, pad_token_id=5, type_vocab_size=1)),
    "deberta_v3": (transformers.DebertaV2Config, dict(
        DEBERTA, share_att_key=True, position_buckets=32, norm_rel_ebd="layer_norm", position_biased_input=False,
        max_relative_positions=-1)),
    "deberta_own_projections_token_types": (transformers.DebertaV2Config, dict(
        DEBERTA, position_buckets=16, type_vocab_size=2, max_relative_positions=100)),
    "deberta_content_to_position": (transformers.DebertaV2Config, dict(DEBERTA, pos_att_type="c2p",
                                                                       share_att_key=True)),
    "deberta_position_to_content": (transformers.DebertaV2Config, dict(DEBERTA, pos_att_type=["p2c"],
                                                                       max_relative_positions=40)),
    "deberta_absolute_only": (transformers.DebertaV2Config, dict(ENCODER, relative_attention=False)),
}
FAMILIES = {**DECODERS, **ENCODERS}


@pytest.fixture(params=FAMILIES)
def model(request, tmp_path):
    """A random model, its directory, and whether it is a decoder."""
    kind, values = FAMILIES[request.param]
    causal = request.param in DECODERS
    made = (transformers.AutoModelForCausalLM if causal else transformers.AutoModel).from_config(
        kind(**values), dtype=torch.float32)
    randomized(made).save_pretrained(tmp_path / "model")
    return made, tmp_path / "model", causal


def random_tokens(sequences, length, seed):
    return torch.randint(0, VOCABULARY, (sequences, length), generator=torch.Generator().manual_seed(seed))


def ours(directory, tmp_path, dtype="float32", **tensors):
    save_file(tensors, tmp_path / "in.safetensors")
    subprocess.run([TOOL, str(directory), str(tmp_path / "in.safetensors"), str(tmp_path / "out.safetensors"), dtype],
                   check=True)
    return load_file(tmp_path / "out.safetensors")


def test_the_outputs_are_those_of_transformers(model, tmp_path):
    made, directory, causal = model
    tokens = random_tokens(2, LENGTH, 1)
    with torch.no_grad():
        theirs = made(tokens, attention_mask=torch.ones_like(tokens))
    theirs = theirs.logits if causal else theirs.last_hidden_state
    assert (ours(directory, tmp_path, tokens=tokens)["out"] - theirs).abs().max() < 1e-4


def test_padding_behind_changes_nothing_before_it(model, tmp_path):
    made, directory, causal = model
    tokens = random_tokens(3, LENGTH, 2)
    visible = torch.tensor([LENGTH, 17, 1])
    mask = torch.arange(LENGTH) < visible[:, None]
    with torch.no_grad():
        theirs = made(tokens, attention_mask=mask.long())
    theirs = theirs.logits if causal else theirs.last_hidden_state
    difference = (ours(directory, tmp_path, tokens=tokens, visible=visible)["out"] - theirs).abs()
    assert difference[mask].max() < 1e-4


def test_gradients_are_those_of_autograd(model, tmp_path):
    """Of a random direction of what the head reads, at what the first block reads, with padding."""
    made, directory, causal = model
    tokens = random_tokens(2, 40, 3)
    visible = torch.tensor([40, 23])
    mask = torch.arange(40) < visible[:, None]
    first_block = next(part for part in made.modules() if isinstance(part, torch.nn.ModuleList))[0]
    entered = []

    def keep(_, arguments, named):
        entered.append(arguments[0] if arguments else named["hidden_states"])
        entered[0].retain_grad()

    first_block.register_forward_pre_hook(keep, with_kwargs=True)
    body = made.base_model if causal else made
    out = body(tokens, attention_mask=mask.long()).last_hidden_state
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(4)) * mask[..., None]
    (out * upstream).sum().backward()
    theirs = entered[0].grad
    mine = ours(directory, tmp_path, tokens=tokens, visible=visible, gradient=upstream)["gradient"]
    assert torch.isfinite(mine).all()
    assert (mine - theirs).abs().max() < 1e-4 * max(1, theirs.abs().max())


def test_bfloat16_stays_near(model, tmp_path):
    """As near to float32 as transformers' own bfloat16, within a factor."""
    made, directory, causal = model
    tokens = random_tokens(1, 60, 5)
    arguments = dict(attention_mask=torch.ones_like(tokens))
    with torch.no_grad():
        exact = made(tokens, **arguments)
        rounded = made.to(torch.bfloat16)(tokens, **arguments)
    name = "logits" if causal else "last_hidden_state"
    exact, rounded = exact[name], rounded[name].float()
    mine = ours(directory, tmp_path, "bfloat16", tokens=tokens)["out"]
    assert (mine - exact).norm() < 1.5 * (rounded - exact).norm()


# --------------------------------------------------------------- older files, and what is refused
def made_from(name, directory, **changes):
    kind, values = FAMILIES[name]
    load = transformers.AutoModelForCausalLM if name in DECODERS else transformers.AutoModel
    made = randomized(load.from_config(kind(**values), dtype=torch.float32))
    made.save_pretrained(directory)
    rewrite(directory, **changes)
    return made


def rewrite(directory, remove=(), **changes):
    values = json.loads((directory / "config.json").read_text())
    values.update(changes)
    for key in remove:
        values.pop(key)
    (directory / "config.json").write_text(json.dumps(values))


@pytest.mark.parametrize("name, old", [
    ("gpt_neox", dict(rotary_pct=0.25, rotary_emb_base=10000)),
    ("phi", dict(partial_rotary_factor=0.5, rope_theta=10000.0)),
    ("gemma", dict(rope_theta=10000.0, hidden_activation=None)),
])
def test_configurations_of_older_transformers_read_the_same(name, old, tmp_path):
    made_from(name, tmp_path / "model")
    tokens = random_tokens(1, 50, 6)
    new = ours(tmp_path / "model", tmp_path, tokens=tokens)["out"]
    rewrite(tmp_path / "model", remove=["rope_parameters"], **old)
    assert torch.equal(ours(tmp_path / "model", tmp_path, tokens=tokens)["out"], new)


def their_logits(directory, tokens):
    made = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        return made(tokens, attention_mask=torch.ones_like(tokens)).logits


@pytest.mark.parametrize("name", ["gemma", "gpt2", "opt", "gpt_neox"])
@pytest.mark.parametrize("equal", [False, True])
def test_a_head_stored_beside_a_tied_embedding_is_read_as_transformers_reads_it(name, equal, tmp_path):
    """With the same values it is the embedding; with others it is a head of its own, whatever the flag says."""
    made_from(name, tmp_path / "model", tie_word_embeddings=True)
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    head = "embed_out.weight" if name == "gpt_neox" else "lm_head.weight"
    embedding = next(tensor for key, tensor in tensors.items()
                     if key.endswith(("embed_tokens.weight", "wte.weight", "embed_in.weight")))
    noise = 0.2 * torch.randn(embedding.shape, generator=torch.Generator().manual_seed(9))
    save_file({**tensors, head: embedding.clone() if equal else noise}, file, {"format": "pt"})
    tokens = random_tokens(1, 50, 10)
    theirs = their_logits(tmp_path / "model", tokens)
    assert (ours(tmp_path / "model", tmp_path, tokens=tokens)["out"] - theirs).abs().max() < 1e-4


@pytest.mark.parametrize("both", [False, True])
def test_the_theta_inside_rope_scaling_is_the_one_that_counts(both, tmp_path):
    made_from("qwen2", tmp_path / "model")
    table = dict(rope_type="linear", factor=2.0, rope_theta=500.0)
    rewrite(tmp_path / "model", rope_scaling=table, rope_theta=10000.0, rope_parameters=table if both else None)
    tokens = random_tokens(1, 50, 11)
    theirs = their_logits(tmp_path / "model", tokens)
    assert (ours(tmp_path / "model", tmp_path, tokens=tokens)["out"] - theirs).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["mistral", "qwen2"])
def test_a_window_that_is_not_written_down_is_that_of_transformers_and_null_is_none(name, tmp_path):
    """Beyond 4096 tokens, where it shows."""
    kind = {"mistral": transformers.MistralConfig, "qwen2": transformers.Qwen2Config}[name]
    small = dict(GATED, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
                 max_position_embeddings=8192)
    if name == "qwen2":
        small.update(use_sliding_window=True, max_window_layers=0)
    made = randomized(transformers.AutoModelForCausalLM.from_config(kind(**small), dtype=torch.float32))
    made.save_pretrained(tmp_path / "model")
    tokens = random_tokens(1, 4200, 12)
    for change in (dict(remove=["sliding_window"]), dict(sliding_window=None, remove=["layer_types"] * (name == "qwen2"))):
        rewrite(tmp_path / "model", **change)
        theirs = their_logits(tmp_path / "model", tokens)
        assert (ours(tmp_path / "model", tmp_path, tokens=tokens)["out"] - theirs).abs().max() < 1e-4, change


@pytest.mark.parametrize("kind", [transformers.BertConfig, transformers.DebertaV2Config])
def test_norms_called_gamma_and_beta_are_read(kind, tmp_path):
    """bert-base-uncased as it is published."""
    values = DEBERTA | dict(norm_rel_ebd="layer_norm") if kind is transformers.DebertaV2Config else ENCODER
    made = randomized(transformers.AutoModel.from_config(kind(**values), dtype=torch.float32))
    made.save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    renamed = {name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
               for name, tensor in load_file(file).items()}
    assert sum(name.endswith("gamma") for name in renamed) >= 7
    save_file(renamed, file, {"format": "pt"})
    tokens = random_tokens(1, 50, 13)
    loaded = transformers.AutoModel.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    with torch.no_grad():
        theirs = loaded(tokens, attention_mask=torch.ones_like(tokens)).last_hidden_state
    assert (ours(tmp_path / "model", tmp_path, tokens=tokens)["out"] - theirs).abs().max() < 1e-4


def test_gpt2_without_the_prefix_reads_the_same(tmp_path):
    """The first GPT-2 files: no "transformer.", buffers beside the weights."""
    made_from("gpt2", tmp_path / "model")
    tokens = random_tokens(1, 50, 7)
    new = ours(tmp_path / "model", tmp_path, tokens=tokens)["out"]
    file = tmp_path / "model" / "model.safetensors"
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(file).items()}
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 8, 8)
    save_file(tensors, file)
    assert torch.equal(ours(tmp_path / "model", tmp_path, tokens=tokens)["out"], new)


@pytest.mark.parametrize("name, changes, words", [
    ("deberta_v3", dict(conv_kernel_size=3), "conv_kernel_size"),
    ("deberta_v3", dict(pos_att_type=["p2p"]), "p2p"),
    ("deberta_v3", dict(embedding_size=24), "embedding_size"),
    ("roberta", dict(is_decoder=True), "is_decoder"),
    ("gpt2", dict(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx"),
    ("gpt2", dict(n_inner=100), "h.0.mlp.c_fc.weight has shape [48, 192], config.json asks for [48, 100]"),
    ("opt", dict(layer_norm_elementwise_affine=False), "layer_norm_elementwise_affine"),
    ("qwen2", dict(use_sliding_window=True, sliding_window=8, layer_types=["sliding_attention"]
                   + ["full_attention"] * 2), "1 of 3 layers"),
    ("gpt_neox", dict(rope_parameters=dict(rope_theta=1e4, partial_rotary_factor=0.4)), "even number"),
    ("phi", dict(hidden_act="quick_gelu"), "quick_gelu"),
    ("gemma", dict(use_bidirectional_attention=True), "use_bidirectional_attention"),
    ("qwen2", dict(rope_scaling=dict(rope_type="linear", factor=2.0)), "rope_parameters and rope_scaling"),
    ("qwen2", dict(rope_scaling=dict(rope_type="linear", factor=2.0, rope_theta=10000.0)),
     "rope_parameters and rope_scaling"),
])
def test_what_is_not_supported_is_refused_with_its_key(name, changes, words, tmp_path):
    made_from(name, tmp_path / "model", **changes)
    save_file({"tokens": random_tokens(1, 8, 8)}, tmp_path / "in.safetensors")
    run = subprocess.run([TOOL, str(tmp_path / "model"), str(tmp_path / "in.safetensors"),
                          str(tmp_path / "out.safetensors"), "float32"], capture_output=True, text=True)
    assert run.returncode == 2 and words in run.stderr, run.stderr
