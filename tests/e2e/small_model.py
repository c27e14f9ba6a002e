"""A random llama of a few hundred kilobytes with its tokenizer, and token sets as prepare_data.py writes them."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import tokenizers
import torch
import transformers

VOCABULARY = 200
END_TOKEN = 0


@dataclass
class Files:
    """What a run reads."""

    model: Path
    calibration: Path
    train: Path
    held_out: Path


def write_model(directory: Path, blocks: int = 3, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Weights large enough that pruning the wrong ones shows."""
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=blocks, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True, eos_token_id=END_TOKEN,
        bos_token_id=END_TOKEN)
    model = transformers.LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.12 * noise if parameter.dim() == 2 else 1 + 0.1 * noise)
    model.to(dtype).save_pretrained(directory)
    words = {"<end>": END_TOKEN, **{f"w{number}": number for number in range(1, VOCABULARY)}}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<end>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(directory)
    return directory


def text_tokens(count: int, seed: int) -> np.ndarray:
    """Two tokens in three follow from the one before: something to learn, and inputs of unequal size."""
    generator = np.random.default_rng(seed)
    tokens = np.empty(count, dtype=np.int32)
    tokens[0] = 1
    for i in range(1, count):
        follows = generator.random() < 0.67
        tokens[i] = (tokens[i - 1] * 7 + 3) % VOCABULARY if follows else generator.integers(1, VOCABULARY)
    return tokens


def write_tokens(file: Path, documents: list[np.ndarray], model: Path, vocabulary: int = VOCABULARY) -> Path:
    offsets = np.cumsum([0] + [len(document) for document in documents])
    with h5py.File(file, "w") as out:
        out["tokens"] = np.concatenate([np.empty(0, np.int32), *documents]).astype(np.int32)
        out["offsets"] = offsets.astype(np.int64)
        out.attrs["kind"] = np.bytes_("text")
        out.attrs["tokenizer_checksum"] = np.bytes_(hashlib.sha256((model / "tokenizer.json").read_bytes()).hexdigest())
        out.attrs["vocabulary_size"] = np.int64(vocabulary)
        out.attrs["end_token"] = np.int64(END_TOKEN)
    return file


def write_files(directory: Path, blocks: int = 3) -> Files:
    directory.mkdir(parents=True, exist_ok=True)
    model = write_model(directory / "model", blocks)
    # Two documents in the training set: the end token between them is part of its stream.
    return Files(
        model=model,
        calibration=write_tokens(directory / "calibration.h5", [text_tokens(4000, 1)], model),
        train=write_tokens(directory / "train.h5", [text_tokens(2500, 2), text_tokens(2000, 3)], model),
        held_out=write_tokens(directory / "held_out.h5", [text_tokens(1000, 4)], model))
