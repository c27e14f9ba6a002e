#!/usr/bin/env python3
"""Makes an HDF5 token set, which is what the engine reads, out of text, JSON, JSONL or TSV.

    prepare_data.py --tokenizer DIR --format text|instruction|choices|glue --input FILE...
                    --output F.h5 [--task RTE] [--length N] [--template NAME] [--raw]
                    [--field NAME] [--shots K --shots-from FILE...]
                    [--columns TEXT[,TEXT] --label NAME --classes A,B,...|numbers]

--tokenizer is a checkpoint directory (tokenizer.json, tokenizer_config.json, config.json).

text          one document a file, tokenised whole and without special tokens. Of .json and .jsonl
              files, every record's --field (default: text) is a document.
instruction   records with instruction, input (may be empty or absent) and output. The prompt is
              Alpaca's, the end token stands after the output; --raw joins instruction, input and
              output by a space and a line end instead. /loss_mask is 1 on the output and end token.
choices       questions with choices. Each choice is one row of /tokens, /choice_of is its question,
              /loss_mask is 1 on its tokens, /labels is each question's answer. --template says how
              a record reads and is asked:
              arc, obqa, boolq, siqa, piqa, winogrande: instruction records ("... Answer1: ...
                Answer2: ... Answer format: answer1/answer2") as lm-eval asks these tasks
              rte: GLUE's RTE TSV as lm-eval asks it
              plain (default), question ("Question: ...\\nAnswer:"): records with context, choices and
                answer (number from 0, letter, or the choice's text; one context a choice is allowed)
              --shots K --shots-from FILE...: the first K solved questions of FILE, other than the
              question itself, stand before every question.
glue          labelled rows. --task CoLA, SST-2, MRPC, QQP, STS-B, MNLI, QNLI, RTE or WNLI of GLUE, or a table
              of your own, TSV with a header line, .json or .jsonl: --columns names one or two texts, --label
              the label, --classes all its values in the order of the model's labels ("numbers":
              regression). One or two sentences a row, joined as the tokenizer's own template joins them;
              /labels one a row. --length N cuts the longer sentence until the row has N tokens, as
              transformers does.

--template    instruction: alpaca (default) or plain; choices: see there.

Lines and records that cannot be read are left out and named; where they are more than 20, all of them in
F.h5.unread.txt.

The file:  /tokens int32 [n], /offsets int64 [rows + 1]; where the kind has them /labels int64 (STS-B
float32), /loss_mask uint8 [n], /choice_of int64 [rows], and for classification /token_types uint8
[n] and /characters int64 [rows] for choices. Attributes of the root: kind, tokenizer_checksum
(SHA-256 of tokenizer.json), vocabulary_size, end_token (-1 when the tokenizer has none); for glue
task, classes (0: numbers) and label_names (one a line), for choices shots.
"""

import argparse
import hashlib
import json
import os
import sys
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import h5py
import numpy as np
from choice_questions import RECORD_TEMPLATES, Question, entailment_question, plain_question
from glue_tasks import GLUE_TASKS, GlueTask, glue_label
from tokenizers import Tokenizer
from tqdm import tqdm


class InputError(Exception):
    """What a person can mend; main() prints it and ends with exit code 1."""


# ------------------------------------------------------------------------------- the tokenizer
class Checkpoint:
    """The tokenizer of a checkpoint directory, and what the data set must remember of it."""

    def __init__(self, directory: Path):
        tokenizer_file = directory / "tokenizer.json"
        try:
            content = tokenizer_file.read_bytes()
        except OSError as error:
            raise InputError(f"{tokenizer_file}: {error.strerror}; --tokenizer takes a checkpoint directory that "
                             f"holds tokenizer.json (transformers writes it with a fast tokenizer)") from error
        try:
            self.tokenizer = Tokenizer.from_str(content.decode("utf-8"))
        except Exception as error:  # tokenizers raises bare Exception
            raise InputError(f"{tokenizer_file} is no tokenizer that the tokenizers library reads: {error}") from error
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.checksum = hashlib.sha256(content).hexdigest()
        self.config = self._json(directory / "config.json")
        self.tokenizer_config = self._json(directory / "tokenizer_config.json")
        # The model's vocabulary may be padded past the tokenizer's; its size is what must agree.
        size = self.config.get("vocab_size")
        self.vocabulary_size = size if isinstance(size, int) else self.tokenizer.get_vocab_size()
        if self.tokenizer.get_vocab_size() > self.vocabulary_size:
            raise InputError(f"{directory}: the tokenizer knows {self.tokenizer.get_vocab_size()} tokens, config.json's "
                             f"vocab_size is {self.vocabulary_size}; they are not of one model")
        self.end_token = self._end_token()

    @staticmethod
    def _json(file: Path) -> dict:
        if not file.exists():
            return {}
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"{file}: {error}") from error
        return values if isinstance(values, dict) else {}

    def _end_token(self) -> int | None:
        """tokenizer_config.json names the token, config.json its number; the name wins."""
        name = self.tokenizer_config.get("eos_token")
        if isinstance(name, dict):
            name = name.get("content")
        if isinstance(name, str):
            number = self.tokenizer.token_to_id(name)
            if number is not None:
                return number
        number = self.config.get("eos_token_id")
        if isinstance(number, list):
            number = number[0] if number else None
        return number if isinstance(number, int) else None

    def plain(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def required_end_token(self) -> int:
        if self.end_token is None:
            raise InputError("the tokenizer has no end token: neither eos_token in tokenizer_config.json nor "
                             "eos_token_id in config.json; instructions end with it")
        return self.end_token


# ------------------------------------------------------------------------------ the token set
@dataclass
class TokenSet:
    """Rows of tokens in the order of the input; numbers in arrays, since a set may be large."""

    tokens: array = field(default_factory=lambda: array("i"))
    offsets: list[int] = field(default_factory=lambda: [0])
    labels: list[float] | None = None
    labels_are_numbers: bool = False  # regression
    loss_mask: array | None = None
    choice_of: list[int] | None = None
    characters: list[int] | None = None
    token_types: array | None = None
    attributes: dict[str, str | int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)  # told at the end

    def add(self, tokens: Iterable[int]) -> None:
        self.tokens.extend(tokens)
        self.offsets.append(len(self.tokens))

    def datasets(self) -> Iterator[tuple[str, np.ndarray]]:
        yield "tokens", np.array(self.tokens, dtype=np.int32)
        yield "offsets", np.array(self.offsets, dtype=np.int64)
        if self.labels is not None:
            yield "labels", np.array(self.labels, dtype=np.float32 if self.labels_are_numbers else np.int64)
        if self.loss_mask is not None:
            yield "loss_mask", np.array(self.loss_mask, dtype=np.uint8)
        if self.choice_of is not None:
            yield "choice_of", np.array(self.choice_of, dtype=np.int64)
        if self.characters is not None:
            yield "characters", np.array(self.characters, dtype=np.int64)
        if self.token_types is not None:
            yield "token_types", np.array(self.token_types, dtype=np.uint8)


class Unreadable:
    """Lines and records that could not be read: shown, and in a file where they are many."""

    SHOWN = 20

    def __init__(self, output: Path) -> None:
        self.places: list[str] = []
        self.file = output.with_name(output.name + ".unread.txt")

    def add(self, place: str, reason: str) -> None:
        self.places.append(f"{place}: {reason}")

    def tell(self) -> None:
        self.file.unlink(missing_ok=True)  # an earlier run's
        for place in self.places[:self.SHOWN]:
            print(f"espalier: not read: {place}", file=sys.stderr)
        if len(self.places) > self.SHOWN:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self.file.write_text("\n".join(self.places) + "\n", encoding="utf-8")
            print(f"espalier: not read: {len(self.places) - self.SHOWN} more; all of them are in {self.file}",
                  file=sys.stderr)


def read_text(file: Path) -> str:
    try:
        return file.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"{file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is not UTF-8 at byte {error.start}; convert it, for example with iconv") from error


def records(file: Path, key: str, unreadable: Unreadable) -> Iterator[tuple[str, dict]]:
    """(place, record) of a JSON file (a list of records, or one of its values is) or of JSON lines. Every record of
    the format has `key`: what has it holds no list of records, whatever else stands in it."""
    text = read_text(file)
    try:
        whole = json.loads(text)
    except ValueError as error:
        if file.suffix == ".json" and text.lstrip()[:1] == "[":
            raise InputError(f"{file}: {error}") from error
        # split("\n"), not splitlines(): JSON allows the other line separators inside strings.
        for number, line in enumerate(text.split("\n"), start=1):
            if not line.strip():
                continue
            place = f"{file}:{number}"
            try:
                record = json.loads(line)
            except ValueError as line_error:
                unreadable.add(place, str(line_error))
                continue
            if isinstance(record, dict):
                yield place, record
            else:
                unreadable.add(place, "is no record in braces")
        return
    if isinstance(whole, dict) and (key in whole or file.suffix != ".json"):
        whole = [whole]
    elif isinstance(whole, dict):
        lists = [value for value in whole.values() if isinstance(value, list) and value and isinstance(value[0], dict)]
        whole = lists[0] if len(lists) == 1 else [whole]
    for number, record in enumerate(whole):
        place = f"{file}: record {number}"
        if isinstance(record, dict):
            yield place, record
        else:
            unreadable.add(place, "is no record in braces")


def text_of(record: dict, key: str) -> str:
    value = record.get(key)
    if not isinstance(value, str):
        raise ValueError(f"has no text under '{key}'" if value is None else f"'{key}' is no text")
    return value


# ------------------------------------------------------------------------------- text
def read_documents(arguments: argparse.Namespace, checkpoint: Checkpoint, unreadable: Unreadable) -> TokenSet:
    result = TokenSet()
    key = arguments.field or "text"
    for file in progress(arguments.input, "documents"):
        if file.suffix not in (".json", ".jsonl"):
            result.add(checkpoint.plain(read_text(file)))
            continue
        for place, record in progress(records(file, key, unreadable), file.name):
            try:
                result.add(checkpoint.plain(text_of(record, key)))
            except ValueError as error:
                unreadable.add(place, str(error))
    return result


# ------------------------------------------------------------------------------- instructions
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
ALPACA = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)


def instruction_prompt(instruction: str, given: str, template: str) -> str:
    if template == "plain":
        return " ".join(part for part in (instruction, given) if part) + "\n"
    # One pass over the template: braces inside a record stay what they are.
    return (ALPACA_WITH_INPUT if given else ALPACA).format(instruction=instruction, input=given)


def read_instructions(arguments: argparse.Namespace, checkpoint: Checkpoint, unreadable: Unreadable) -> TokenSet:
    result = TokenSet(loss_mask=array("B"))
    end = checkpoint.required_end_token()
    template = "plain" if arguments.raw else arguments.template or "alpaca"
    output_field = arguments.field or "output"
    for file in arguments.input:
        for place, record in progress(records(file, "instruction", unreadable), file.name):
            try:
                given = record.get("input") or ""
                if not isinstance(given, str):
                    raise ValueError("'input' is no text")
                prompt = instruction_prompt(text_of(record, "instruction"), given, template)
                output = text_of(record, output_field)
            except ValueError as error:
                unreadable.add(place, str(error))
                continue
            add_with_loss(result, *tokens_after(checkpoint, prompt, output), [end])
    return result


def tokens_after(checkpoint: Checkpoint, prompt: str, continuation: str) -> tuple[list[int], list[int]]:
    """Both tokenised as one text, cut where the prompt ends. A token across the border is scored."""
    whole = checkpoint.tokenizer.encode(prompt + continuation, add_special_tokens=True)
    length = len(whole.ids)
    while length and whole.special_tokens_mask[length - 1]:
        length -= 1
    border = 0
    while border < length and (whole.special_tokens_mask[border] or whole.offsets[border][1] <= len(prompt)):
        border += 1
    return whole.ids[:border], whole.ids[border:length]


def add_with_loss(result: TokenSet, prompt: list[int], scored: list[int], end: list[int]) -> None:
    result.add([*prompt, *scored, *end])
    result.loss_mask.extend(bytes(len(prompt)))
    result.loss_mask.extend(b"\x01" * (len(scored) + len(end)))


# ------------------------------------------------------------------------------- choices
def read_questions(files: list[Path], template: str, context_field: str,
                   unreadable: Unreadable) -> Iterator[Question]:
    for file in files:
        if template == "rte":
            for _, sentences, label in labelled_rows(file, GLUE_TASKS["RTE"], "RTE", unreadable):
                yield entailment_question(*sentences, int(label))
            continue
        key = "instruction" if template in RECORD_TEMPLATES else "choices"
        for place, record in progress(records(file, key, unreadable), file.name):
            try:
                if template in RECORD_TEMPLATES:
                    yield RECORD_TEMPLATES[template](record)
                else:
                    form = "Question: {}\nAnswer:" if template == "question" else "{}"
                    yield plain_question(record, context_field, form)
            except ValueError as error:
                unreadable.add(place, str(error))


def read_choices(arguments: argparse.Namespace, checkpoint: Checkpoint, unreadable: Unreadable) -> TokenSet:
    result = TokenSet(loss_mask=array("B"), choice_of=[], characters=[], labels=[],
                      attributes={"shots": arguments.shots})
    form = arguments.template or "plain", arguments.field or "context"
    # One more than asked for: a question is never its own example.
    solved: list[str] = []
    for question in read_questions(arguments.shots_from, *form, unreadable) if arguments.shots else ():
        solved.append(question.solved())
        if len(solved) > arguments.shots:
            break
    for question in read_questions(arguments.input, *form, unreadable):
        examples = [text for text in solved if text != question.solved()][:arguments.shots]
        if len(examples) < arguments.shots:
            raise InputError(f"--shots {arguments.shots}: --shots-from has {len(examples)} questions other than the "
                             f"one that is asked")
        before = "".join(text + "\n\n" for text in examples)
        for (context, continuation), text in zip(question.pairs(), question.continuations):
            add_with_loss(result, *tokens_after(checkpoint, before + context, continuation), [])
            result.choice_of.append(len(result.labels))
            result.characters.append(len(text))
        result.labels.append(question.answer)
    return result


# ------------------------------------------------------------------------------- GLUE
def glue_rows(file: Path) -> Iterator[tuple[str, list[str]]]:
    """(place, cells) of each line. The format knows no quoting, so no CSV reader: quotation marks are text."""
    for number, line in enumerate(read_text(file).split("\n"), start=1):
        line = line.removesuffix("\r")
        if line:
            yield f"{file}:{number}", line.split("\t")


def labelled_rows(file: Path, task: GlueTask, name: str,
                  unreadable: Unreadable) -> Iterator[tuple[str, list[str], float]]:
    """(place, sentences, label) of every row of a task's file."""
    rows = glue_rows(file)
    columns: dict[str, int] = {str(position): position for position in range(4)}
    if task.label != "1":
        place, header = next(rows, (str(file), []))
        columns = {column.strip(): position for position, column in enumerate(header)}
        absent = [column for column in (*task.sentences, task.label) if column not in columns]
        if absent:
            raise InputError(f"{place}: the header has no column {', '.join(map(repr, absent))}; is this {name}, and "
                             f"a part that has labels?")
    for place, cells in progress(rows, file.name):
        try:
            yield place, [cells[columns[column]] for column in task.sentences], glue_label(cells, columns[task.label], task)
        except IndexError:
            unreadable.add(place, f"has {len(cells)} columns, fewer than its header asks")
        except ValueError as error:
            unreadable.add(place, str(error))


def labelled_records(file: Path, task: GlueTask, unreadable: Unreadable) -> Iterator[tuple[str, list[str], float]]:
    for place, record in progress(records(file, task.label, unreadable), file.name):
        try:
            if task.label not in record:
                raise ValueError(f"has no '{task.label}'")
            label = glue_label([str(record[task.label])], 0, task)
            yield place, [text_of(record, key) for key in task.sentences], label
        except ValueError as error:
            unreadable.add(place, str(error))


def task_of(arguments: argparse.Namespace) -> tuple[str, GlueTask]:
    """GLUE's by its name, or that of the person's own table."""
    if arguments.columns:
        classes = None if arguments.classes == "numbers" else tuple(arguments.classes.split(","))
        return "own", GlueTask(tuple(arguments.columns.split(",")), arguments.label, classes)
    names = {name.lower().replace("-", ""): name for name in GLUE_TASKS}
    name = names.get((arguments.task or "").lower().replace("-", ""))
    if name is None:
        raise InputError(f"--format glue takes --task, one of {', '.join(GLUE_TASKS)}, or --columns, --label and "
                         f"--classes of a table of your own; given: {arguments.task}")
    return name, GLUE_TASKS[name]


def read_glue(arguments: argparse.Namespace, checkpoint: Checkpoint, unreadable: Unreadable) -> TokenSet:
    name, task = task_of(arguments)
    result = TokenSet(labels=[], labels_are_numbers=task.classes is None, token_types=array("B"),
                      attributes={"task": name, "classes": len(task.classes or ())})
    if task.classes:
        result.attributes["label_names"] = "\n".join(task.classes)
    if arguments.length:
        checkpoint.tokenizer.enable_truncation(arguments.length, strategy="longest_first")
    cut = 0
    for file in arguments.input:
        own_records = arguments.columns and file.suffix in (".json", ".jsonl")
        rows = labelled_records(file, task, unreadable) if own_records else labelled_rows(file, task, name, unreadable)
        for _, sentences, label in rows:
            encoding = checkpoint.tokenizer.encode(*sentences, add_special_tokens=True)
            cut += bool(encoding.overflowing)
            result.add(encoding.ids)
            result.token_types.extend(encoding.type_ids)
            result.labels.append(label)
    if cut:
        result.notes.append(f"{cut} rows cut to {arguments.length} tokens")
    return result


# ------------------------------------------------------------------------------- the file
def progress(items: Iterable, name: str) -> Iterable:
    return tqdm(items, desc=name, unit="", disable=not sys.stderr.isatty(), leave=False)


def write(result: TokenSet, kind: str, checkpoint: Checkpoint, target: Path) -> None:
    """To a temporary name in the same directory, synced, renamed: the file is whole or not there."""
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        with h5py.File(scratch, "w") as file:
            for name, values in result.datasets():
                file.create_dataset(name, data=values, track_times=False)
            file.attrs["kind"] = np.bytes_(kind)
            file.attrs["tokenizer_checksum"] = np.bytes_(checkpoint.checksum)
            file.attrs["vocabulary_size"] = np.int64(checkpoint.vocabulary_size)
            file.attrs["end_token"] = np.int64(-1 if checkpoint.end_token is None else checkpoint.end_token)
            for name, value in result.attributes.items():
                file.attrs[name] = np.bytes_(value) if isinstance(value, str) else np.int64(value)
        with open(scratch, "rb") as written:
            os.fsync(written.fileno())
        scratch.rename(target)
    finally:
        scratch.unlink(missing_ok=True)


FORMATS: dict[str, Callable[[argparse.Namespace, Checkpoint, Unreadable], TokenSet]] = {
    "text": read_documents,
    "instruction": read_instructions,
    "choices": read_choices,
    "glue": read_glue,
}
TEMPLATES = {"text": (), "instruction": ("alpaca", "plain"), "choices": ("plain", "question", *RECORD_TEMPLATES, "rte"),
             "glue": ()}
# Options that one format reads alone: given to another they would be without effect.
OPTIONS = dict.fromkeys(("task", "length", "columns", "label", "classes"), "glue") | {
    "raw": "instruction", "shots": "choices", "shots_from": "choices"}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True, metavar="DIR")
    parser.add_argument("--format", choices=FORMATS, required=True)
    parser.add_argument("--input", type=Path, nargs="+", required=True, metavar="FILE")
    parser.add_argument("--output", type=Path, required=True, metavar="F.h5")
    parser.add_argument("--task", metavar="NAME")
    parser.add_argument("--columns", metavar="TEXT[,TEXT]")
    parser.add_argument("--label", metavar="NAME")
    parser.add_argument("--classes", metavar="A,B,...|numbers")
    parser.add_argument("--template", metavar="NAME")
    parser.add_argument("--raw", action="store_true")
    parser.add_argument("--field", metavar="NAME")
    parser.add_argument("--length", type=int, metavar="N")
    parser.add_argument("--shots", type=int, default=0, metavar="K")
    parser.add_argument("--shots-from", type=Path, nargs="+", metavar="FILE")
    arguments = parser.parse_args()
    for option, owner in OPTIONS.items():
        if getattr(arguments, option) and arguments.format != owner:
            parser.error(f"--{option.replace('_', '-')} is read by --format {owner}, not by {arguments.format}")
    if bool(arguments.shots) != bool(arguments.shots_from) or arguments.shots < 0:
        parser.error("--shots K (above 0) and --shots-from FILE go together")
    own = [arguments.columns, arguments.label, arguments.classes]
    if any(own) and (arguments.task or not all(own)):
        parser.error("--columns, --label and --classes go together, and --task is GLUE's instead of them")
    if arguments.columns and not 1 <= len(arguments.columns.split(",")) <= 2:
        parser.error(f"--columns {arguments.columns}: one or two texts make a row")
    if arguments.classes and arguments.classes != "numbers" and len(set(arguments.classes.split(","))) < 2:
        parser.error(f"--classes {arguments.classes}: at least two different values, or numbers")
    if arguments.length is not None and arguments.length < 8:
        parser.error(f"--length {arguments.length}: at least 8 tokens a row")
    if arguments.raw and arguments.template not in (None, "plain"):
        parser.error(f"--raw leaves the template out, and --template {arguments.template} asks for one")
    if arguments.field and (arguments.format == "glue" or arguments.format == "choices"
                            and arguments.template not in (None, "plain", "question")):
        parser.error(f"--field is not read by --format {arguments.format}"
                     + (f" --template {arguments.template}" if arguments.template else ""))
    if arguments.template and arguments.template not in TEMPLATES[arguments.format]:
        legal = ", ".join(TEMPLATES[arguments.format]) or "none"
        parser.error(f"--template {arguments.template}: --format {arguments.format} knows {legal}")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    unreadable = Unreadable(arguments.output)
    try:
        checkpoint = Checkpoint(arguments.tokenizer)
        result = FORMATS[arguments.format](arguments, checkpoint, unreadable)
        unreadable.tell()
        if not result.tokens:
            raise InputError(f"nothing readable in {', '.join(map(str, arguments.input))}; no file was written")
        write(result, arguments.format, checkpoint, arguments.output)
    except InputError as error:
        sys.exit(f"espalier: {error}")
    except OSError as error:
        sys.exit(f"espalier: {error.filename or arguments.output}: {error.strerror}")
    print(f"{arguments.output}: {len(result.offsets) - 1} rows, {len(result.tokens)} tokens"
          + "".join(f", {note}" for note in result.notes)
          + (f", {len(unreadable.places)} records not read" if unreadable.places else ""))


if __name__ == "__main__":
    main()
