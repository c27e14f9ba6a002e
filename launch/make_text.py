#!/usr/bin/env python3
"""Cuts English text into calibration, training and held-out parts that share no document.

    make_text.py DIRECTORY                 the text of the example: Python's own documentation
    make_text.py DIRECTORY --text FILE     a person's text; its documents are its paragraphs
    make_text.py DIRECTORY --sources DIR   another folder of .rst.txt, .rst, .md or .txt files

Writes calibration.txt (25 %), train.txt (60 %) and heldout.txt (15 %). A document goes where a hash of
it says, so the same input always gives the same parts and equal documents never meet themselves in
another part. Without the documentation's sources, the texts of Python's help and the docstrings of
the installed packages take their place.
"""

import argparse
import ast
import hashlib
import os
import re
import sys
from pathlib import Path

DOCUMENTATION = ["/usr/share/doc/python3.11/html/_sources"]
SHARES = [("heldout", 0.15), ("calibration", 0.40), ("train", 1.0)]  # upper ends of each part


def part_of(document: str) -> str:
    digest = hashlib.sha256(" ".join(document.split()).encode()).digest()
    position = int.from_bytes(digest[:8], "big") / 2**64
    return next(part for part, end in SHARES if position < end)


def clean_markup(text: str) -> str:
    """reStructuredText as prose: markup that only steers a renderer goes, everything said stays."""
    lines = []
    for line in text.splitlines():
        stripped = line.strip()
        if re.fullmatch(r"([=\-~^\"'*#+.`])\1{2,}", stripped):  # the underline of a heading
            continue
        if re.match(r"\.\.( _.*:| index::| module::| moduleauthor::| sectionauthor::| highlight::|$| \w+$| \|)", stripped):
            continue
        if re.match(r":(platform|synopsis|noindex|maxdepth|numbered|glob|lineno\w*|emphasize\w*):", stripped):
            continue
        lines.append(line.rstrip())
    text = "\n".join(lines)
    text = re.sub(r":[\w:+.-]+:`[!~]?([^`<]+?)\s*(<[^`>]*>)?`", r"\1", text)  # roles
    text = re.sub(r"`([^`<]+?)\s*<[^`>]*>`_+", r"\1", text)  # links
    text = re.sub(r"``([^`]+)``", r"\1", text)
    text = re.sub(r"^( *)\.\. (?:function|method|class|data|attribute|exception|describe|option|c:\w+):: *", r"\1",
                  text, flags=re.M)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def folder_documents(folder: Path) -> list[str]:
    files = sorted(file for ending in ("*.rst.txt", "*.rst", "*.md", "*.txt") for file in folder.rglob(ending))
    texts = (clean_markup(file.read_text(encoding="utf-8", errors="replace")) for file in dict.fromkeys(files))
    return [text for text in texts if len(text) > 500]


def docstring_documents() -> list[str]:
    """What a Python installation always has: the language reference inside pydoc, and docstrings."""
    import pydoc_data.topics

    documents = [pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics)]
    folders = [Path(os.__file__).parent]
    for package in ("numpy", "matplotlib"):
        module = __import__(package)
        folders.append(Path(module.__file__).parent)
    for folder in folders:
        for file in sorted(folder.rglob("*.py")):
            relative = file.relative_to(folder)
            if {"test", "tests", "site-packages", "idlelib"} & set(relative.parts):
                continue
            try:
                tree = ast.parse(file.read_text(encoding="utf-8"))
            except (SyntaxError, ValueError):
                continue
            kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
            strings = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
            document = clean_markup("\n\n".join(string for string in strings if string))
            if len(document) > 2000:
                documents.append(document)
    return documents


def paragraphs(file: Path) -> list[str]:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        sys.exit(f"espalier: {file} is not UTF-8 at byte {error.start}; convert it, for example with iconv")
    except OSError as error:
        sys.exit(f"espalier: {file}: {error.strerror}")
    return [paragraph.strip("\n") + "\n" for paragraph in re.split(r"\n\s*\n", text) if paragraph.strip()]


def write_atomically(target: Path, text: str) -> None:
    scratch = target.with_name(f".{target.name}.{os.getpid()}")
    with open(scratch, "w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    scratch.rename(target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--sources", type=Path, action="append", default=[])
    arguments = parser.parse_args()

    if arguments.text:
        documents, origin = paragraphs(arguments.text), str(arguments.text)
    else:
        folders = [folder for folder in [*arguments.sources, *map(Path, DOCUMENTATION)] if folder.is_dir()]
        documents = folder_documents(folders[0]) if folders else docstring_documents()
        origin = str(folders[0]) if folders else "the docstrings of the Python installation"
    parts: dict[str, list[str]] = {part: [] for part, _ in SHARES}
    for document in documents:
        parts[part_of(document)].append(document)
    empty = [part for part, texts in parts.items() if not texts]
    if empty:
        sys.exit(f"espalier: {origin} has {len(documents)} documents, too few to split: nothing is left for "
                 f"{', '.join(empty)}; paragraphs are separated by empty lines")
    arguments.directory.mkdir(parents=True, exist_ok=True)
    for part, texts in parts.items():
        write_atomically(arguments.directory / f"{part}.txt", "\n".join(texts))
    print(", ".join(f"{part} {sum(map(len, texts)) / 1e6:.2f} MB" for part, texts in parts.items()), f"from {origin}")


if __name__ == "__main__":
    main()
