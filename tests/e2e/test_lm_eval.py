"""Multiple choice against EleutherAI's harness on the real model: the log-likelihood of every choice, and which
questions are answered right.

The harness reads the same questions from JSON files that this test takes apart by its own means, and asks them by the
prompts of its own task files. ESPALIER_TEST_QUESTIONS says how many of each set (20 unless set, which takes a minute;
200 takes ten).
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from program import SOURCE, run_well, stage_directory

os.environ.update({"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"})
QUESTIONS = int(os.environ.get("ESPALIER_TEST_QUESTIONS", "20"))
MODEL = os.environ.get("ESPALIER_TEST_MODEL")
DATA = os.environ.get("ESPALIER_TEST_DATA")
# doc_to_text, doc_to_choice, doc_to_target of the harness's own arc, openbookqa, boolq, siqa, piqa, winogrande, rte.
ONE_TEXT = {"doc_to_choice": "{{choices}}", "doc_to_target": "{{answer}}"}
HARNESS = {
    "arc": {"doc_to_text": "Question: {{question}}\nAnswer:", **ONE_TEXT},
    "obqa": {"doc_to_text": "question", **ONE_TEXT},
    "boolq": {"doc_to_text": "Question: {{question}}?\nAnswer:", "doc_to_choice": ["no", "yes"], "doc_to_target": "{{answer}}"},
    "siqa": {"doc_to_text": "Q: {{question}}\nA:", **ONE_TEXT},
    "piqa": {"doc_to_text": "Question: {{question}}\nAnswer:", **ONE_TEXT},
    "rte": {"doc_to_text": "{{first}}\nQuestion: {{second}} True or False?\nAnswer:", "doc_to_choice": ["True", "False"],
            "doc_to_target": "{{answer}}"},
    "winogrande": {"doc_to_text": lambda doc: doc["answer"],
                   "doc_to_choice": lambda doc: [doc["question"].split("_")[0] + choice for choice in doc["choices"]],
                   "doc_to_target": lambda doc: doc["question"].split("_")[1].strip()},
}
SETS = {"ARC-Easy": "arc", "ARC-Challenge": "arc", "openbookqa": "obqa", "boolq": "boolq", "social_i_qa": "siqa"}

# Records of the two sets that are not among the local data, as their publishers' instruction files have them.
PIQA = [
    {"instruction": "Please choose the correct solution to the question: How do I ready a guinea pig cage for it's new "
                    "occupants?\n\nSolution1: Provide the guinea pig with a cage full of a few inches of bedding.\n\n"
                    "Solution2: Provide the guinea pig with a cage full of jeans.\n\nAnswer format: solution1/solution2",
     "input": "", "output": "the correct answer is solution1", "answer": "solution1"},
    {"instruction": "Please choose the correct solution to the question: dresser\n\nSolution1: replace drawer with bobby "
                    "pin \n\nSolution2: finish, woodgrain with  bobby pin \n\nAnswer format: solution1/solution2",
     "input": "", "output": "the correct answer is solution2", "answer": "solution2"}]
WINOGRANDE = [
    {"instruction": "Please choose the correct answer to fill in the blank to complete the given sentence: Sarah was a much "
                    "better surgeon than Maria so _ always got the easier cases.\n\nOption1: Sarah Option2: Maria Answer "
                    "format: option1/option2", "input": "", "output": "the correct answer is option2", "answer": "option2"},
    {"instruction": "Please choose the correct answer to fill in the blank to complete the given sentence: The pear fell "
                    "before the apple because the _ was riper.\n\nOption1: pear Option2: apple Answer format: "
                    "option1/option2", "input": "", "output": "the correct answer is option1", "answer": "option1"}]


def document(record: dict) -> dict:
    """The question, choices and answer by one expression, unlike prepare_data.py's way from the back."""
    if record["answer"] in ("true", "false"):
        question = re.fullmatch(r"Please answer .*?, question: (.*?)\?\n\nAnswer format: true/false",
                                record["instruction"], re.DOTALL).group(1)
        return {"question": question, "choices": ["no", "yes"], "answer": ["false", "true"].index(record["answer"])}
    parts = re.split(r"\s+(?:Answer|Solution|Option)\d: ", re.sub(r"\s+Answer\s+format: \S+$", "", record["instruction"]))
    return {"question": parts[0].split(": ", 1)[1], "choices": [part.strip() for part in parts[1:]],
            "answer": int(record["answer"][-1]) - 1}


@pytest.fixture(scope="module")
def harness():
    if not MODEL:
        pytest.skip("skipped: no data (ESPALIER_TEST_MODEL is not set)")
    pytest.importorskip("lm_eval", reason="skipped: lm-eval is not installed")
    import torch
    from lm_eval.models.huggingface import HFLM
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0))))
    return HFLM(pretrained=MODEL, dtype="float32", device="cpu", batch_size=16)


def judged(harness, tmp_path: Path, template: str, documents: list[dict], shots: list[dict] = ()) -> list[dict]:
    from lm_eval import evaluator
    from lm_eval.tasks import TaskManager
    files = {"test": tmp_path / "documents.jsonl"}
    files["test"].write_text("\n".join(map(json.dumps, documents)))
    config = {"task": f"local_{template}", "dataset_path": "json", "output_type": "multiple_choice", "test_split": "test",
              "target_delimiter": " ", **HARNESS[template],
              "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")]}
    if shots:
        files["train"] = tmp_path / "shots.jsonl"
        files["train"].write_text("\n".join(map(json.dumps, shots)))
        config.update(training_split="train", fewshot_split="train", fewshot_config={"sampler": "first_n"})
    config["dataset_kwargs"] = {"data_files": {name: str(file) for name, file in files.items()},
                                "cache_dir": str(tmp_path / "cache")}
    results = evaluator.simple_evaluate(harness, tasks=[config], num_fewshot=len(shots), log_samples=True, bootstrap_iters=0,
                                        task_manager=TaskManager(include_defaults=False))
    return sorted(results["samples"][config["task"]], key=lambda sample: sample["doc_id"])


def ours(tmp_path: Path, template: str, file: Path, *others, shots: int = 0) -> tuple[dict, list[dict]]:
    subprocess.run([sys.executable, SOURCE / "launch/prepare_data.py", "--tokenizer", MODEL, "--format", "choices",
                    "--template", template, "--input", file, "--output", tmp_path / "choices.h5", *others], check=True)
    run_well("evaluate=multiple_choice", "pipeline=[evaluate]", f"model.path={MODEL}", "model.dtype=float32",
             f"evaluate.tasks.choices.data={tmp_path}/choices.h5", "evaluate.tasks.choices.answers=true",
             f"evaluate.tasks.choices.shots={shots}", f"run.dir={tmp_path}/run", timeout=1200)
    directory = stage_directory(tmp_path / "run", "evaluate")
    answers = (directory / "choices.answers.jsonl").read_text().splitlines()
    return json.loads((directory / "metrics.json").read_text())["tasks"]["choices"], [json.loads(line) for line in answers]


def require_equal(said: dict, answers: list[dict], samples: list[dict]) -> None:
    assert len(answers) == len(samples) == said["questions"]
    for answer, sample in zip(answers, samples):
        theirs = [likelihood for likelihood, _ in sample["filtered_resps"]]
        assert len(theirs) == len(answer["log_likelihoods"])
        assert np.abs(np.array(theirs) - answer["log_likelihoods"]).max() < 1e-3, sample["doc"]
    assert said["accuracy"] == pytest.approx(np.mean([sample["acc"] for sample in samples]), abs=1e-12)
    assert said["accuracy_by_characters"] == pytest.approx(np.mean([sample["acc_norm"] for sample in samples]), abs=1e-12)


@pytest.mark.parametrize("name", SETS)
def test_likelihoods_and_accuracies_are_the_harnesss(name, harness, tmp_path):
    if not DATA:
        pytest.skip("skipped: no data (ESPALIER_TEST_DATA is not set)")
    records = json.loads((Path(DATA) / "commonsense" / name / "test.json").read_text())[:QUESTIONS]
    (tmp_path / "records.json").write_text(json.dumps(records))
    said, answers = ours(tmp_path, SETS[name], tmp_path / "records.json")
    require_equal(said, answers, judged(harness, tmp_path, SETS[name], list(map(document, records))))


def test_two_shots_are_the_harnesss_first_two(harness, tmp_path):
    if not DATA:
        pytest.skip("skipped: no data (ESPALIER_TEST_DATA is not set)")
    folder = Path(DATA) / "commonsense/openbookqa"
    records = json.loads((folder / "test.json").read_text())[:min(QUESTIONS, 10)]
    (tmp_path / "records.json").write_text(json.dumps(records))
    said, answers = ours(tmp_path, "obqa", tmp_path / "records.json", "--shots", "2", "--shots-from", folder / "train.json",
                         shots=2)
    shots = [document(record) for record in json.loads((folder / "train.json").read_text())[:2]]
    assert said["shots"] == 2
    require_equal(said, answers, judged(harness, tmp_path, "obqa", list(map(document, records)), shots))


def test_rte_is_asked_as_the_harness_asks_it(harness, tmp_path):
    if not DATA:
        pytest.skip("skipped: no data (ESPALIER_TEST_DATA is not set)")
    lines = (Path(DATA) / "glue/RTE/dev.tsv").read_text(encoding="utf-8").split("\n")[:min(QUESTIONS, 10) + 1]
    (tmp_path / "dev.tsv").write_text("\n".join(lines) + "\n")
    documents = []
    for line in lines[1:]:
        _, first, second, label = line.split("\t")
        documents.append({"first": first, "second": second, "answer": int(label == "not_entailment")})
    said, answers = ours(tmp_path, "rte", tmp_path / "dev.tsv")
    require_equal(said, answers, judged(harness, tmp_path, "rte", documents))


@pytest.mark.parametrize("template,records", [("piqa", PIQA), ("winogrande", WINOGRANDE)])
def test_piqa_and_winogrande_where_the_context_differs_by_choice(template, records, harness, tmp_path):
    (tmp_path / "records.json").write_text(json.dumps(records))
    said, answers = ours(tmp_path, template, tmp_path / "records.json")
    samples = judged(harness, tmp_path, template, list(map(document, records)))
    if template == "winogrande":  # the harness divides by the contexts' lengths there, and does not report it
        for sample in samples:
            sample["acc_norm"] = sample["acc"]
    require_equal(said, answers, samples)
