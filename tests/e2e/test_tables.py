"""The tables of launch/tables.sh: every sweep it lists is read to its last key, and its parts work on a small model."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
import torch
import transformers
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser

from program import ENVIRONMENT, PROGRAM, SOURCE
from small_model import write_model

TABLES = ("dsee", "lora_xs", "ether", "ere", "spp")


def listed(*arguments: str) -> list[tuple[str, list[str]]]:
    """(configuration, overrides) of every sweep that the arguments ask for."""
    done = subprocess.run([SOURCE / "launch/tables.sh", *arguments, "--list"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    sweeps = []
    for line in done.stdout.splitlines():
        option, name, multirun, *overrides = shlex.split(line)
        assert (option, multirun) == ("--config-name", "-m")
        sweeps.append((name, overrides))
    return sweeps


def members(overrides: list[str]) -> list[tuple[str, ...]]:
    """By hydra-core's own sweeper; of tasks and seeds, which change no key, only the first."""
    first = [re.sub(r"^(task|run\.seed)=([^,]+),.*$", r"\1=\2", override) for override in overrides]
    parsed = OverridesParser.create().parse_overrides(first)
    return [tuple(member) for batch in BasicSweeper.split_arguments(parsed, max_batch_size=None) for member in batch]


def test_a_task_of_glue_asks_for_its_part_of_a_table_alone():
    everything, part = listed("ere"), listed("ere", "task=rte", "run.seed=0")
    assert {name for name, _ in everything} == {"table_glue", "table_ere"}
    assert part == [(name, [*overrides, "task=rte", "run.seed=0"]) for name, overrides in everything if name == "table_glue"]


RUN = """#!/usr/bin/env bash
echo "$*" >>calls
member=outputs/table_glue-sweep/member; mkdir -p "$member"
case "$*" in
  *compress=low_rank*) echo '{"numerical": false}' >"$member/failure.json"; exit 3 ;;
  *compress=quantization*)
    [ ! -e "$member-1/failure.json" ] || { echo 'the sweep is done but for members that have no figures:'; exit 2; }
    mkdir "$member-1"; echo '{"numerical": true}' >"$member-1/failure.json"; exit 2 ;;
esac
"""


def test_a_sweep_that_fails_stops_none_behind_it_and_one_that_diverges_goes_on(tmp_path):
    """tables.sh in a folder of its own, where nothing has run yet, with a run.sh that fails on purpose."""
    launch = tmp_path / "launch"
    launch.mkdir()
    for name, text in {"run.sh": RUN, "make_example.sh": "#!/bin/sh\n", "table_data.sh": "#!/bin/sh\n",
                       **{name: (SOURCE / "launch" / name).read_text() for name in ("tables.sh", "environment.sh")}}.items():
        (launch / name).write_text(text)
        (launch / name).chmod(0o755)
    environment = {**os.environ, "ESPALIER_WORK": str(tmp_path / "work")}
    done = subprocess.run([launch / "tables.sh", "ere", "--data", tmp_path], env=environment, capture_output=True,
                          text=True, timeout=60)
    calls = (tmp_path / "calls").read_text().splitlines()
    assert len(calls) == len(listed("ere")) + 1 and sum("quantization" in call for call in calls) == 2, done.stderr
    assert "table_ere" in calls[-1]
    assert done.returncode == 1 and "low_rank" in done.stderr.splitlines()[-1], done.stderr
    assert "quantization" not in done.stderr.splitlines()[-1]


# ------------------------------------------------------------------------------- on small models
def write_small_bert(directory: Path) -> None:
    """Six blocks and twelve heads, as the cells of configs/cell expect them of MiniLM."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{number}" for number in range(96))]
    config = transformers.BertConfig(vocab_size=len(words), hidden_size=96, num_hidden_layers=6, num_attention_heads=12,
                                     intermediate_size=192, max_position_embeddings=128)
    torch.manual_seed(1)
    transformers.BertModel(config).save_pretrained(directory)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]",
                                         cls_token="[CLS]", sep_token="[SEP]").save_pretrained(directory)


def write_data(folder: Path) -> None:
    headers = {"CoLA": None, "MRPC": "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String", "RTE": "index\tsentence1\tsentence2\tlabel",
               "SST-2": "sentence\tlabel"}

    def row(task: str, i: int) -> str:
        one, other, label = f"w{i % 90} w{i % 7}", f"w{i % 11} w{i % 90 + 1}", i % 2
        return {"CoLA": f"x\t{label}\t\t{one}", "MRPC": f"{label}\t1\t2\t{one}\t{other}",
                "RTE": f"{i}\t{one}\t{other}\t{('entailment', 'not_entailment')[label]}", "SST-2": f"{one}\t{label}"}[task]

    for task, header in headers.items():
        for part, count in (("train", 40), ("dev", 24)):
            file = folder / "glue" / task / f"{part}.tsv"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("\n".join([*([header] if header else []), *(row(task, i) for i in range(count))]) + "\n")
    for task in ("ARC-Easy", "ARC-Challenge", "boolq", "openbookqa", "social_i_qa"):
        directory = folder / "commonsense" / task
        directory.mkdir(parents=True)
        question = ("Please answer the following question with true or false, question: w1 w2?\n\nAnswer format: true/false"
                    if task == "boolq" else
                    "Please choose the correct answer to the question: w1 w2\n\nAnswer1: w3 Answer2: w4\n\nAnswer format: answer1/answer2")
        answer = "true" if task == "boolq" else "answer2"
        records = [{"instruction": question, "input": "", "output": f"the correct answer is {answer}", "answer": answer}] * 12
        for part in ("train", "test"):
            (directory / f"{part}.json").write_text(json.dumps(records))
    (folder / "wikitext-2").mkdir()
    for part in ("valid", "test"):
        (folder / "wikitext-2" / f"{part}.txt").write_text(" ".join(f"w{i * 7 % 190}" for i in range(900)))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tables")
    write_small_bert(folder / "models/minilm-l6")
    write_model(folder / "models/smollm2-135m")
    write_data(folder / "data")
    done = subprocess.run([SOURCE / "launch/table_data.sh", folder / "models", folder / "data", folder / "sets"],
                          capture_output=True, text=True, timeout=300,
                          env=os.environ | {"ESPALIER_WORK": str(folder), "ESPALIER_VENV": str(Path(sys.prefix))})
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def carry_out(prepared: Path, name: str, *overrides: str) -> None:
    done = subprocess.run([PROGRAM, "--config-name", name, "--config-dir", SOURCE / "configs", "-m", *overrides],
                          capture_output=True, text=True, timeout=300, cwd=prepared,
                          env=ENVIRONMENT | {"ESPALIER_TABLES": str(prepared / "sets")})
    assert done.returncode == 0, done.stdout + done.stderr


def rows(prepared: Path, *arguments: str) -> list[list[str]]:
    done = subprocess.run([sys.executable, SOURCE / "launch/table_rows.py", *arguments], capture_output=True, text=True,
                          timeout=60, cwd=prepared)
    assert done.returncode == 0, done.stderr
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in done.stdout.splitlines()]


@pytest.mark.parametrize("table", TABLES)
def test_every_member_of_every_sweep_is_read_to_its_last_key(prepared, tmp_path, table):
    """All keys of all stages are read before the model's files are: that it has none is all that is left to say."""
    distinct = {(name, member) for name, overrides in listed(table) for member in members(overrides)}
    assert len(distinct) >= 4
    failures = []
    for name, member in sorted(distinct):
        done = subprocess.run([PROGRAM, "--config-name", name, *member, f"model.path={tmp_path}"], capture_output=True,
                              text=True, timeout=60, cwd=tmp_path,
                              env=ENVIRONMENT | {"ESPALIER_TABLES": str(prepared / "sets")})
        if done.returncode != 2 or not done.stderr.startswith(f"espalier: {tmp_path}: "):
            failures.append(f"{name} {' '.join(member)}: {done.stderr}")
    assert failures == []


def test_a_second_preparation_leaves_what_is_there(prepared):
    before = {file: file.stat().st_mtime_ns for file in (prepared / "sets").glob("*.h5")}
    assert len(before) == 16
    done = subprocess.run([SOURCE / "launch/table_data.sh", prepared / "models", prepared / "data", prepared / "sets"],
                          capture_output=True, text=True, timeout=300, env=os.environ | {"ESPALIER_WORK": str(prepared)})
    assert (done.returncode, done.stdout) == (0, "")
    assert {file: file.stat().st_mtime_ns for file in (prepared / "sets").glob("*.h5")} == before


def test_rows_hold_the_mean_over_seeds_of_what_the_members_measured(prepared):
    carry_out(prepared, "table_glue", "task=rte,mrpc", "run.seed=0,1", "cell=lora_xs,ether", "retrain.steps=2")
    sweep = prepared / "outputs/table_glue-sweep"
    header, _, *table = rows(prepared, str(sweep), "--figures", "retrain.trainable_parameters", "retrain.map_distance")
    assert header == ["cell", "mrpc", "rte", "trainable parameters", "map distance"]
    found = {row[0]: row[1:] for row in table}
    assert set(found) == {"lora_xs, steps 2", "ether, steps 2"}

    def measured(cell: str, task: str, seed: int) -> float:
        member = sweep / f"cell={cell},retrain.steps=2,run.seed={seed},task={task}"
        return 100 * json.loads((member / "02-evaluate/metrics.json").read_text())["tasks"]["labels"]["accuracy"]

    for cell in ("lora_xs", "ether"):
        for column, task in ((0, "mrpc"), (1, "rte")):
            one, other = (measured(cell, task, seed) for seed in (0, 1))
            mean, deviation = (one + other) / 2, abs(one - other) / 2 ** 0.5
            assert found[f"{cell}, steps 2"][column] == f"{mean:.1f} ± {deviation:.1f}"
    # R of 16 x 16 at four matrices of six blocks; u of 96 at five and of 192 at one.
    assert [found[f"{cell}, steps 2"][2] for cell in ("lora_xs", "ether")] == ["6,144", "4,032"]
    assert float(found["ether, steps 2"][3]) == pytest.approx(4.0, rel=1e-5)  # 2 sqrt(4 blocks)
    assert found["lora_xs, steps 2"][3] == "–"


def test_rows_tell_evaluations_and_conditions_apart_and_curves_have_an_epoch_a_column(prepared):
    carry_out(prepared, "table_glue", "task=mrpc", "cell=ere", "retrain.epochs=3", "compress.rank=2,8")
    sweep = str(prepared / "outputs/table_glue-sweep")
    header, _, *table = rows(prepared, sweep, "--where", "cell=ere", "compress.rank=8", "--figures", "compress.share")
    assert header == ["cell", "mrpc", "share"] and [row[0] for row in table] == ["ere, rank 8, epochs 3"]
    *_, one = rows(prepared, sweep, "--where", "cell=ere", "--evaluation", "1")
    member = next((prepared / "outputs/table_glue-sweep").glob("cell=ere,*"))
    tuned = json.loads((member / "02-evaluate/metrics.json").read_text())["tasks"]["labels"]["accuracy"]
    assert one[1] == f"{100 * tuned:.1f}"
    header, _, *table = rows(prepared, sweep, "--where", "cell=ere", "--curves")
    assert header == ["cell", "task", "epoch 1", "epoch 2", "epoch 3"] and len(table) == 2
    header, _, *table = rows(prepared, sweep, "--where", "compress.rank=8", "--losses", "2")
    steps = [line for line in map(json.loads, (member / "metrics.jsonl").read_text().splitlines())
             if line.get("event") == "step"]
    halves = [[line["loss"] for line in steps if (2 * line["step"] > len(steps) + 1) == later] for later in (False, True)]
    assert header == ["cell", "task", "part 1", "part 2"]
    assert table[0][2:] == [f"{sum(half) / len(half):.3f}" for half in halves]


def test_the_languages_table_measures_perplexity_and_five_tasks(prepared):
    carry_out(prepared, "table_spp", "prune.pattern=2:4", "prune.samples=4", "prune.sequence_length=64", "retrain.steps=2",
              "retrain.targets=null", "evaluate.tasks.text.sequence_length=64", "evaluate.tasks.text.segments=4")
    header, _, row = rows(prepared, str(prepared / "outputs/table_spp-sweep"))
    assert header == ["cell", "text", "arc_easy", "arc_challenge", "boolq", "openbookqa", "siqa"]
    assert float(row[1]) > 1 and all(0 <= float(cell) <= 100 for cell in row[2:])
