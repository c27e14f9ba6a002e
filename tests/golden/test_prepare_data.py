"""launch/prepare_data.py against transformers' tokenizer: the same token ids, borders and labels.

The tokenizer is a small byte-level one that the test trains, and where ESPALIER_TEST_MODEL is set the
real model's as well.
"""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

SOURCE = Path(os.environ.get("ESPALIER_SOURCE", Path(__file__).resolve().parents[2]))
transformers = pytest.importorskip("transformers")

TEXT = ("The pear tree on the south wall is tied to wires, and every winter it is cut back to its spurs.\n\n"
        "  Two spaces, a\ttab, numbers 1234 and 5.6e-7, “quotes”, naïve café, 東京, 🌳 {braces} <unk>\r\nnew line\n")
ALPACA_INPUT = ("Below is an instruction that describes a task, paired with an input that provides further context. "
                "Write a response that appropriately completes the request.\n\n### Instruction:\n%s\n\n"
                "### Input:\n%s\n\n### Response:\n")
ALPACA = ("Below is an instruction that describes a task. Write a response that appropriately completes the request."
          "\n\n### Instruction:\n%s\n\n### Response:\n")


def small_checkpoint(directory: Path) -> Path:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<begin>", "<end>", "<between>"],
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator([TEXT, ALPACA], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<begin> $A", pair="<begin> $A <between>:1 $B:1", special_tokens=[("<begin>", 0), ("<between>", 2)])
    directory.mkdir()
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<begin>",
        "eos_token": {"content": "<end>", "__type": "AddedToken"}}))
    (directory / "config.json").write_text(json.dumps({"vocab_size": 512, "eos_token_id": 7, "model_type": "llama"}))
    return directory


@pytest.fixture(scope="module", params=["small", "real"])
def checkpoint(request, tmp_path_factory):
    if request.param == "small":
        return small_checkpoint(tmp_path_factory.mktemp("tokenizer") / "small")
    if not os.environ.get("ESPALIER_TEST_MODEL"):
        pytest.skip("skipped: no model (ESPALIER_TEST_MODEL is not set)")
    return Path(os.environ["ESPALIER_TEST_MODEL"])


@pytest.fixture(scope="module")
def judge(checkpoint):
    return transformers.PreTrainedTokenizerFast.from_pretrained(checkpoint)


def prepare(checkpoint: Path, output: Path, *arguments, code: int = 0) -> tuple[dict, str]:
    command = [sys.executable, SOURCE / "launch/prepare_data.py", "--tokenizer", checkpoint, "--output", output, *arguments]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    if code:
        assert not output.exists()
        return {}, done.stderr
    with h5py.File(output) as file:
        values = {name: file[name][:] for name in file} | dict(file.attrs)
    assert values["tokens"].dtype == np.int32 and values["offsets"].dtype == np.int64
    assert values["offsets"][0] == 0 and values["offsets"][-1] == len(values["tokens"])
    return values, done.stderr


def rows(values: dict, name: str = "tokens") -> list[list[int]]:
    ends = values["offsets"]
    return [values[name][begin:end].tolist() for begin, end in zip(ends[:-1], ends[1:])]


def plain(judge, text: str) -> list[int]:
    return judge(text, add_special_tokens=False)["input_ids"]


def begun(judge, text: str) -> list[int]:
    """With what the tokenizer puts before a text; neither tokenizer here puts anything after it."""
    return judge(text)["input_ids"]


def test_a_text_file_is_one_document_without_special_tokens(checkpoint, judge, tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + TEXT.encode())
    (tmp_path / "b.txt").write_bytes(TEXT.upper().encode())
    values, _ = prepare(checkpoint, tmp_path / "t.h5", "--format", "text", "--input", tmp_path / "a.txt", tmp_path / "b.txt")
    assert rows(values) == [plain(judge, TEXT), plain(judge, TEXT.upper())]
    assert judge.decode(rows(values)[0]) == TEXT


def test_the_attributes_say_which_tokenizer_made_the_set(checkpoint, judge, tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    values, _ = prepare(checkpoint, tmp_path / "t.h5", "--format", "text", "--input", tmp_path / "a.txt")
    assert values["kind"] == b"text"
    assert values["tokenizer_checksum"].decode() == hashlib.sha256((checkpoint / "tokenizer.json").read_bytes()).hexdigest()
    assert values["vocabulary_size"] == json.loads((checkpoint / "config.json").read_text())["vocab_size"]
    assert values["end_token"] == judge.eos_token_id


def test_every_record_of_json_lines_is_a_document_and_bad_lines_are_named(checkpoint, judge, tmp_path):
    lines = [json.dumps({"text": TEXT}), "{broken", json.dumps({"other": 1}), "", "3",
             json.dumps({"text": "line\u2028separator"}, ensure_ascii=False)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    values, told = prepare(checkpoint, tmp_path / "t.h5", "--format", "text", "--input", tmp_path / "a.jsonl")
    assert rows(values) == [plain(judge, TEXT), plain(judge, "line\u2028separator")]
    assert all(f"a.jsonl:{line}:" in told for line in (2, 3, 5)) and "a.jsonl:1:" not in told


def test_more_bad_lines_than_are_shown_are_all_in_a_file(checkpoint, tmp_path):
    lines = [json.dumps({"text": TEXT}), *["{broken"] * 25]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    _, told = prepare(checkpoint, tmp_path / "t.h5", "--format", "text", "--input", tmp_path / "a.jsonl")
    unread = (tmp_path / "t.h5.unread.txt").read_text().splitlines()
    assert [line.partition(": ")[0] for line in unread] == [f"{tmp_path}/a.jsonl:{number}" for number in range(2, 27)]
    assert "5 more" in told and str(tmp_path / "t.h5.unread.txt") in told
    (tmp_path / "a.jsonl").write_text(lines[0])
    prepare(checkpoint, tmp_path / "t.h5", "--format", "text", "--input", tmp_path / "a.jsonl")
    assert not (tmp_path / "t.h5.unread.txt").exists()


@pytest.mark.parametrize("name, wrapped, documents", [("a.jsonl", False, [TEXT]), ("a.json", False, [TEXT]),
                                                      ("a.json", True, ["inner", "second"])])
def test_a_record_that_holds_records_is_itself_read(checkpoint, judge, tmp_path, name, wrapped, documents):
    """Only a .json file's one dictionary that is no record of the format is opened for the list inside."""
    inside = [{"text": "inner"}, {"text": "second"}]
    (tmp_path / name).write_text(json.dumps({"data": inside} if wrapped else {"text": TEXT, "sources": inside}))
    values, _ = prepare(checkpoint, tmp_path / "t.h5", "--format", "text", "--input", tmp_path / name)
    assert rows(values) == [plain(judge, text) for text in documents]


@pytest.mark.parametrize("arguments, words", [
    (["--format", "glue", "--task", "RTE", "--field", "x"], "--field is not read by --format glue"),
    (["--format", "choices", "--template", "arc", "--field", "x"], "--field is not read by --format choices --template arc"),
    (["--format", "instruction", "--raw", "--template", "alpaca"], "--raw leaves the template out"),
])
def test_an_option_that_would_be_without_effect_is_refused(checkpoint, tmp_path, arguments, words):
    (tmp_path / "a.json").write_text("[]")
    _, told = prepare(checkpoint, tmp_path / "t.h5", *arguments, "--input", tmp_path / "a.json", code=2)
    assert words in told


INSTRUCTIONS = [
    {"instruction": "Name a tree with {braces}.", "input": "", "output": "A pear tree."},
    {"instruction": "Shorten this.", "input": "The wall is to the south.", "output": "South wall."},
    {"instruction": "Say nothing more.", "output": "東京 naïve"},
]


@pytest.mark.parametrize("raw", [False, True])
def test_instructions_have_alpacas_prompt_and_the_end_token_and_count_on_the_answer(checkpoint, judge, tmp_path, raw):
    (tmp_path / "a.json").write_text(json.dumps([*INSTRUCTIONS, {"instruction": "no output"}, 7]))
    values, told = prepare(checkpoint, tmp_path / "i.h5", "--format", "instruction", "--input", tmp_path / "a.json",
                           *(["--raw"] if raw else []))
    assert len(rows(values)) == 3 and "record 3: has no text under 'output'" in told and "record 4" in told
    for tokens, mask, record in zip(rows(values), rows(values, "loss_mask"), INSTRUCTIONS):
        given = record.get("input")
        if raw:
            prompt = record["instruction"] + (" " + given if given else "") + "\n"
        else:
            prompt = ALPACA_INPUT % (record["instruction"], given) if given else ALPACA % record["instruction"]
        assert tokens == [*begun(judge, prompt + record["output"]), judge.eos_token_id]
        scored = len(tokens) - mask.count(0)
        assert mask == [0] * mask.count(0) + [1] * scored
        # The tokens that count spell the answer and nothing else.
        assert judge.decode(tokens[-scored:-1]) == record["output"]


def test_choices_are_rows_of_one_question_and_count_on_the_choice(checkpoint, judge, tmp_path):
    records = [
        {"context": "The pear tree is tied to", "choices": ["wires", "the moon"], "answer": 0},
        {"context": ["A stands", "B stands", "C stands"], "choices": ["here", "there", "nowhere at all"], "answer": "C"},
        {"context": "It is", "choices": ["true", "false"], "answer": "false"},
        {"context": "It is", "choices": ["true", "false"], "answer": 2},
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    values, told = prepare(checkpoint, tmp_path / "c.h5", "--format", "choices", "--input", tmp_path / "a.jsonl")
    assert "a.jsonl:4: answer 2 names none of the 2 choices" in told
    assert values["choice_of"].tolist() == [0, 0, 1, 1, 1, 2, 2]
    assert values["labels"].tolist() == [0, 2, 1]
    assert values["characters"].tolist() == [5, 8, 4, 5, 14, 4, 5]
    expected = []
    for record in records[:3]:
        contexts = record["context"] if isinstance(record["context"], list) else [record["context"]] * len(record["choices"])
        expected += [(context, " " + choice) for context, choice in zip(contexts, record["choices"])]
    for tokens, mask, (context, continuation) in zip(rows(values), rows(values, "loss_mask"), expected):
        # The evaluation harness's way: the continuation is what the whole has beyond the context.
        assert tokens == begun(judge, context + continuation)
        assert mask == [0] * len(begun(judge, context)) + [1] * (len(tokens) - len(begun(judge, context)))
    values, _ = prepare(checkpoint, tmp_path / "q.h5", "--format", "choices", "--template", "question",
                        "--input", tmp_path / "a.jsonl")
    assert rows(values)[1] == begun(judge, "Question: The pear tree is tied to\nAnswer: the moon")


ARC = {"instruction": "Please choose the correct answer to the question: Which tree is flat: trained? \n\nAnswer1: a pear on "
                      "a wall Answer2: an oak, see Answer1 Answer3: none\n\nAnswer format: answer1/answer2/answer3",
       "input": "", "output": "the correct answer is answer2", "answer": "answer2"}
BOOLQ = {"instruction": "Please answer the following question with true or false, question: do pears grow on walls?\n\n"
                        "Answer format: true/false", "input": "", "output": "the correct answer is true", "answer": "true"}
BLANK = {"instruction": "Please choose the correct answer to fill in the blank to complete the given sentence: The pear fell "
                        "before the apple as the _ was riper.\n\nOption1: pear Option2: apple Answer format: "
                        "option1/option2", "input": "", "output": "the correct answer is option1", "answer": "option1"}
PAIRS = {  # (context, continuation) of every choice, and the answer, written by hand
    "arc": (ARC, [("Question: Which tree is flat: trained?\nAnswer:", choice)
                  for choice in (" a pear on a wall", " an oak, see Answer1", " none")], 1),
    "obqa": (ARC, [("Which tree is flat: trained?", choice)
                   for choice in (" a pear on a wall", " an oak, see Answer1", " none")], 1),
    "siqa": (ARC, [("Q: Which tree is flat: trained?\nA:", choice)
                   for choice in (" a pear on a wall", " an oak, see Answer1", " none")], 1),
    "boolq": (BOOLQ, [("Question: do pears grow on walls?\nAnswer:", choice) for choice in (" no", " yes")], 1),
    "winogrande": (BLANK, [(f"The pear fell before the apple as the {choice}", " was riper.")
                           for choice in ("pear", "apple")], 0),
}


@pytest.mark.parametrize("template", PAIRS)
def test_instruction_records_become_the_harnesss_questions(checkpoint, judge, tmp_path, template):
    record, pairs, answer = PAIRS[template]
    broken = [{**record, "answer": "answer9"}, {**record, "instruction": "Choose."}, {"instruction": 3, "answer": "true"},
              {**record, "instruction": record["instruction"].replace("Answer2:", "").replace("Option2:", "")
               .replace("true/false", "yes/no")}]
    (tmp_path / "a.json").write_text(json.dumps([record, *broken]))
    values, told = prepare(checkpoint, tmp_path / "c.h5", "--format", "choices", "--template", template,
                           "--input", tmp_path / "a.json")
    assert all(f"record {number}: " in told for number in (1, 2, 3, 4)) and "record 0" not in told
    assert values["labels"].tolist() == [answer] and values["choice_of"].tolist() == [0] * len(pairs)
    assert values["shots"] == 0
    for tokens, mask, characters, (context, continuation) in zip(rows(values), rows(values, "loss_mask"),
                                                                 values["characters"], pairs):
        assert tokens == begun(judge, context + continuation)
        assert mask == [0] * len(begun(judge, context)) + [1] * (len(tokens) - len(begun(judge, context)))
        assert characters == len(continuation) - 1


def test_solved_questions_stand_before_each_and_never_the_question_itself(checkpoint, judge, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([ARC]))
    other = {**ARC, "answer": "answer1", "instruction": ARC["instruction"].replace("Which tree", "What")}
    (tmp_path / "shots.json").write_text(json.dumps([ARC, other]))
    values, _ = prepare(checkpoint, tmp_path / "c.h5", "--format", "choices", "--template", "arc", "--shots", "1",
                        "--shots-from", tmp_path / "shots.json", "--input", tmp_path / "a.json")
    assert values["shots"] == 1
    shot = "Question: What is flat: trained?\nAnswer: a pear on a wall\n\n"
    assert rows(values)[2] == begun(judge, shot + "Question: Which tree is flat: trained?\nAnswer: none")
    _, told = prepare(checkpoint, tmp_path / "d.h5", "--format", "choices", "--template", "arc", "--shots", "2",
                      "--shots-from", tmp_path / "shots.json", "--input", tmp_path / "a.json", code=1)
    assert "--shots 2" in told


def test_rte_is_a_question_too(checkpoint, judge, tmp_path):
    (tmp_path / "dev.tsv").write_text("index\tsentence1\tsentence2\tlabel\n0\tA pear.\tA tree.\tnot_entailment\n")
    values, _ = prepare(checkpoint, tmp_path / "c.h5", "--format", "choices", "--template", "rte", "--input", tmp_path / "dev.tsv")
    context = "A pear.\nQuestion: A tree. True or False?\nAnswer:"
    assert rows(values) == [begun(judge, f"{context} {choice}") for choice in ("True", "False")]
    assert values["labels"].tolist() == [1]


def test_long_rows_are_cut_as_transformers_cuts_them(checkpoint, judge, tmp_path):
    first, second = "The pear tree on the south wall is tied to wires. " * 3, "It is cut back every winter."
    (tmp_path / "dev.tsv").write_text(f"index\tsentence1\tsentence2\tlabel\n0\t{first}\t{second}\tentailment\n")
    values, _ = prepare(checkpoint, tmp_path / "g.h5", "--format", "glue", "--task", "RTE", "--length", "24",
                        "--input", tmp_path / "dev.tsv")
    judged = judge(first, second, truncation=True, max_length=24, return_token_type_ids=True)
    assert rows(values) == [judged["input_ids"]] and len(judged["input_ids"]) == 24
    assert rows(values, "token_types") == [judged["token_type_ids"]]
    assert (values["task"], values["classes"], values["label_names"]) == (b"RTE", 2, b"entailment\nnot_entailment")


MRPC = ("\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n"
        "1\t10\t11\tHe said \" no .\tHe said no .\r\n"
        "0\t12\t13\t\" Quotes open here\tand close \" there \"\"\r\n"
        "1\t14\t15\tonly one sentence\r\n"
        "2\t16\t17\ta\tb\r\n")


def test_glue_is_read_without_quoting_and_without_its_byte_order_mark(checkpoint, judge, tmp_path):
    (tmp_path / "train.tsv").write_bytes(MRPC.encode())
    values, told = prepare(checkpoint, tmp_path / "g.h5", "--format", "glue", "--task", "MRPC", "--input", tmp_path / "train.tsv")
    pairs = [('He said " no .', "He said no ."), ('" Quotes open here', 'and close " there ""')]
    judged = [judge(*pair, return_token_type_ids=True) for pair in pairs]
    assert rows(values) == [encoding["input_ids"] for encoding in judged]
    assert rows(values, "token_types") == [encoding["token_type_ids"] for encoding in judged]
    assert values["labels"].tolist() == [1, 0]
    assert "train.tsv:4: has 4 columns" in told and "train.tsv:5: label '2'" in told


@pytest.mark.parametrize("task,content,labels", [
    ("CoLA", "gj04\t1\t\tThe pear grew.\ngj04\t0\t*\tGrew pear the.\n", [1, 0]),
    ("SST-2", "sentence\tlabel\na fine tree \t1\n", [1]),
    ("rte", "index\tsentence1\tsentence2\tlabel\n0\tA.\tB.\tnot_entailment\n", [1]),
    ("QQP", "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n0\t1\t2\tA?\tB?\t1\n", [1]),
    ("MNLI", "index\tpairID\tsentence1\tsentence2\tlabel1\tgold_label\n0\tx\tA.\tB.\tneutral\tcontradiction\n"
             "1\tx\tA.\tB.\t-\t-\n", [2]),
    ("QNLI", "index\tquestion\tsentence\tlabel\n0\tA?\tB.\tentailment\n", [0]),
    ("STS-B", "index\tsentence1\tsentence2\tscore\n0\tA.\tB.\t3.25\n", [3.25])])
def test_each_glue_task_has_its_columns_and_classes(checkpoint, judge, tmp_path, task, content, labels):
    (tmp_path / "dev.tsv").write_text(content)
    values, _ = prepare(checkpoint, tmp_path / "g.h5", "--format", "glue", "--task", task, "--input", tmp_path / "dev.tsv")
    assert values["labels"].tolist() == labels
    if task == "CoLA":
        assert rows(values) == [begun(judge, "The pear grew."), begun(judge, "Grew pear the.")]


OWN = [("mood", "a fine tree", "glad"), ("mood", "no pears", "sad"), ("mood", "hm", "neither"), ("mood", "bark", "odd")]


@pytest.mark.parametrize("name,content", [
    ("own.tsv", "mood\ttext\n" + "".join(f"{label}\t{text}\n" for _, text, label in OWN)),
    ("own.jsonl", "".join(json.dumps({"text": text, key: label}) + "\n" for key, text, label in OWN)),
    ("own.json", json.dumps([{"text": text, key: label} for key, text, label in OWN]))])
def test_a_table_of_ones_own_has_the_columns_and_classes_that_are_named(checkpoint, judge, tmp_path, name, content):
    (tmp_path / name).write_text(content)
    values, told = prepare(checkpoint, tmp_path / "g.h5", "--format", "glue", "--columns", "text", "--label", "mood",
                           "--classes", "sad,neither,glad", "--input", tmp_path / name)
    assert values["labels"].tolist() == [2, 0, 1] and values["classes"] == 3
    assert values["label_names"] == b"sad\nneither\nglad"
    assert rows(values) == [begun(judge, text) for _, text, _ in OWN[:3]]
    assert told.count("not read") == 1 and "label 'odd' is none of sad, neither, glad" in told


def test_numbers_of_ones_own_and_two_texts_make_a_regression(checkpoint, judge, tmp_path):
    (tmp_path / "own.jsonl").write_text('{"a": "one", "b": "two", "score": 2.5}\n{"a": "one", "b": "two"}\n')
    values, told = prepare(checkpoint, tmp_path / "g.h5", "--format", "glue", "--columns", "a,b", "--label", "score",
                           "--classes", "numbers", "--input", tmp_path / "own.jsonl")
    assert values["labels"].tolist() == [2.5] and values["classes"] == 0
    assert rows(values) == [judge("one", "two")["input_ids"]]
    assert "own.jsonl:2: has no 'score'" in told


def test_all_3668_lines_of_mrpc_are_read_the_first_as_the_header(tmp_path):
    data = os.environ.get("ESPALIER_TEST_DATA") or SOURCE.parent / "shared/data"
    train = Path(data) / "glue/MRPC/train.tsv"
    if not train.exists():
        pytest.skip("skipped: no data (ESPALIER_TEST_DATA is not set)")
    checkpoint = small_checkpoint(tmp_path / "small")
    values, told = prepare(checkpoint, tmp_path / "g.h5", "--format", "glue", "--task", "MRPC", "--input", train)
    assert train.read_bytes().count(b"\n") == 3668
    assert len(values["labels"]) == 3667 and "not read" not in told


def test_bad_input_ends_in_one_message_and_no_file(checkpoint, tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "dev.tsv").write_text("index\tsentence\n0\tno label\n")
    cases = [
        (["--format", "text", "--input", tmp_path / "latin.txt"], "not UTF-8 at byte 3"),
        (["--format", "text", "--input", tmp_path / "empty.txt"], "nothing readable"),
        (["--format", "text", "--input", tmp_path / "none.txt"], "No such file"),
        (["--format", "glue", "--input", tmp_path / "dev.tsv"], "takes --task"),
        (["--format", "glue", "--task", "SST-2", "--input", tmp_path / "dev.tsv"], "no column 'label'"),
        (["--format", "choices", "--template", "rte", "--input", tmp_path / "dev.tsv"], "no column"),
    ]
    for arguments, message in cases:
        _, told = prepare(checkpoint, tmp_path / "x.h5", *arguments, code=1)
        assert message in told and told.count("\n") == 1
    _, told = prepare(tmp_path, tmp_path / "x.h5", *cases[0][0], code=1)
    assert "tokenizer.json" in told


def test_the_same_input_gives_the_same_bytes_and_leaves_nothing_else(checkpoint, tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    folder = tmp_path / "out"
    for name in ("one.h5", "two.h5"):
        prepare(checkpoint, folder / name, "--format", "text", "--input", tmp_path / "a.txt")
    assert (folder / "one.h5").read_bytes() == (folder / "two.h5").read_bytes()
    assert sorted(file.name for file in folder.iterdir()) == ["one.h5", "two.h5"]
