#!/usr/bin/env python3
"""Restores what export.format=dense writes, bit for bit, from what export.format=bitmask or nm wrote. Needs numpy.

    unpack.py DIR OUT

A packed file's __metadata__ holds "espalier.packed", JSON: {NAME: {"packing": "bitmask" or "N:M", "shape": [...],
"axis": 0 or 1}}. NAME.values are the elements of which any bit is set, in row-major order, and NAME.bits has one bit an
element, lowest first. For N:M, NAME.values are N of every M neighbours along the axis (with axis 0 of the transposed
matrix), and NAME.indices their places among the M, ceil(log2 M) bits each, lowest first.
"""

import json
import math
import shutil
import sys
from pathlib import Path

import numpy as np

BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
PREFIX = "packed_"  # of the files' names


def unpacked(entry: dict, values: np.ndarray, places: np.ndarray) -> np.ndarray:
    elements, bits = np.zeros(math.prod(entry["shape"]), values.dtype), np.unpackbits(places, bitorder="little")
    if entry["packing"] == "bitmask":
        elements[bits[:elements.size].view(bool)] = values
        return elements
    n, m = map(int, entry["packing"].split(":"))
    width = (m - 1).bit_length()
    indices = np.packbits(bits[:values.size * width].reshape(-1, width), axis=1, bitorder="little")
    np.put_along_axis(elements.reshape(-1, m), indices.reshape(-1, n).astype(np.int64), values.reshape(-1, n), axis=1)
    return elements if entry["axis"] == 1 else np.ascontiguousarray(elements.reshape(entry["shape"][::-1]).T)


def restore(source: Path, target: Path) -> None:
    data = np.memmap(source, np.uint8, "r")
    begin = 8 + int.from_bytes(data[:8].tobytes(), "little")
    header = json.loads(data[8:begin].tobytes())
    metadata = header.pop("__metadata__", {})
    packed = json.loads(metadata.pop("espalier.packed", "{}"))
    places = {f"{name}.values": name + (".bits" if entry["packing"] == "bitmask" else ".indices")
              for name, entry in packed.items()}
    stored = [part for part in header if part not in set(places.values())]  # in the dense file's order
    entries, end = {"__metadata__": metadata}, 0
    for part in stored:
        name, dtype = part.removesuffix(".values") if part in places else part, header[part]["dtype"]
        shape = packed[name]["shape"] if part in places else header[part]["shape"]
        offsets = [end, end := end + math.prod(shape) * BYTES[dtype]]
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)

    def bytes_of(part: str) -> np.ndarray:
        first, last = header[part]["data_offsets"]
        return data[begin + first:begin + last]

    with target.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for part in stored:
            elements = bytes_of(part).view(f"u{BYTES[header[part]['dtype']]}")
            if part in places:
                elements = unpacked(packed[part.removesuffix(".values")], elements, bytes_of(places[part]))
            elements.tofile(file)


def main(source: Path, target: Path) -> None:
    files = sorted(path for path in source.rglob("*") if path.is_file())
    if target.exists():
        sys.exit(f"unpack.py: {target} is there already; choose another directory")
    if not any(file.name.startswith(PREFIX) for file in files):
        sys.exit(f"unpack.py: {source} holds no {PREFIX}*.safetensors, which export.format=bitmask or nm writes")
    unfinished = target.with_name(target.name + ".part")  # what an earlier try left is written over
    for file in files:
        out = unfinished / file.relative_to(source).parent / file.name.removeprefix(PREFIX)
        out.parent.mkdir(parents=True, exist_ok=True)
        if not file.name.startswith(PREFIX):
            shutil.copyfile(file, out)
        elif file.suffix == ".safetensors":
            restore(file, out)
        else:
            index = json.loads(file.read_text(encoding="utf-8"))
            index["weight_map"] = {name: shard.removeprefix(PREFIX) for name, shard in index["weight_map"].items()}
            out.write_text(json.dumps(index, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    unfinished.rename(target)


if __name__ == "__main__":
    if "--help" in sys.argv:
        print(__doc__)
        sys.exit()
    if len(sys.argv) != 3:
        sys.exit("unpack.py takes DIR OUT; see --help")
    main(*map(Path, sys.argv[1:]))
