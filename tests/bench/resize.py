"""resize.py MODEL BLOCKS OUT: the checkpoint with another number of blocks, its own repeated or cut.

Block b of the result holds the weights of block b modulo the model's number of blocks, in shards of 15
blocks: the same width at any depth, for the measurements of run.py.
"""

import json
import re
import shutil
import sys
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

BLOCKS_OF_A_SHARD = 15
IN_A_BLOCK = re.compile(r"(.*\blayers\.)(\d+)(\..*)")


def sources(files):
    """name -> (file, name) of every tensor, apart from (prefix, rest) -> {block: (file, name)} of the blocks'."""
    ends, blocks = {}, {}
    for file in files:
        for name in file.keys():
            match = IN_A_BLOCK.fullmatch(name)
            if match:
                blocks.setdefault((match[1], match[3]), {})[int(match[2])] = (file, name)
            else:
                ends[name] = (file, name)
    return ends, blocks


def resize(model, count, out):
    out.mkdir(parents=True)
    for file in model.iterdir():
        if ".safetensors" not in file.name and file.is_file():
            shutil.copy(file, out)
    config = json.loads((model / "config.json").read_text())
    depth, config["num_hidden_layers"] = config["num_hidden_layers"], count
    (out / "config.json").write_text(json.dumps(config, indent=2))
    ends, blocks = sources([safe_open(file, "pt") for file in sorted(model.glob("*.safetensors"))])

    shards = [{name: source for name, source in ends.items()}]
    for first in range(0, count, BLOCKS_OF_A_SHARD):
        shards.append({f"{prefix}{block}{rest}": by_block[block % depth]
                       for block in range(first, min(first + BLOCKS_OF_A_SHARD, count))
                       for (prefix, rest), by_block in blocks.items()})
    weight_map, total = {}, 0
    for number, shard in enumerate(shards, 1):
        tensors = {name: file.get_tensor(source) for name, (file, source) in shard.items()}
        shard_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(tensors, out / shard_name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, shard_name))
        total += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    (out / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=1))


if __name__ == "__main__":
    resize(Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
