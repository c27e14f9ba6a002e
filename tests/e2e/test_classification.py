"""The evaluation of classification and regression: transformers' logits on the same rows, scikit-learn's and SciPy's
metrics, the same bits on any ranks, and an export that transformers loads with its head."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from scipy import stats
from sklearn import metrics

from program import SOURCE, run, run_well, stage_directory

VOCABULARY = 131
SMALL = dict(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
             max_position_embeddings=96, pad_token_id=0)
DECODER = dict(SMALL, num_key_value_heads=2, eos_token_id=2)


def randomized(model):
    """Weights large enough that a wrong row, mask or activation shows in the logits."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.2 if parameter.dim() == 2 else 0.3
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale
                            + (1.0 if parameter.dim() == 1 else 0.0))
    return model.eval()


MODELS = {
    "bert": lambda labels: transformers.BertForSequenceClassification(transformers.BertConfig(**SMALL, num_labels=labels)),
    "roberta": lambda labels: transformers.RobertaForSequenceClassification(
        transformers.RobertaConfig(**{**SMALL, "pad_token_id": 1}, type_vocab_size=1, num_labels=labels)),
    "deberta-v2": lambda labels: transformers.DebertaV2ForSequenceClassification(transformers.DebertaV2Config(
        **SMALL, relative_attention=True, pos_att_type=["c2p", "p2c"], position_buckets=16, type_vocab_size=0,
        share_att_key=True, norm_rel_ebd="layer_norm", position_biased_input=False, num_labels=labels)),
    "llama": lambda labels: transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**DECODER, num_labels=labels)),
    "gpt2": lambda labels: transformers.GPT2ForSequenceClassification(transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=96, pad_token_id=0, eos_token_id=2,
        num_labels=labels)),
    "opt": lambda labels: transformers.OPTForSequenceClassification(transformers.OPTConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=48,
        max_position_embeddings=96, word_embed_proj_dim=24, do_layer_norm_before=False, pad_token_id=0, eos_token_id=2,
        num_labels=labels)),
    "gpt_neox": lambda labels: transformers.GPTNeoXForSequenceClassification(transformers.GPTNeoXConfig(
        **SMALL, eos_token_id=2, num_labels=labels)),
    "mistral": lambda labels: transformers.MistralForSequenceClassification(transformers.MistralConfig(
        **DECODER, sliding_window=9, num_labels=labels)),
    "qwen2": lambda labels: transformers.Qwen2ForSequenceClassification(transformers.Qwen2Config(
        **DECODER, num_labels=labels)),
    "qwen3": lambda labels: transformers.Qwen3ForSequenceClassification(transformers.Qwen3Config(
        **DECODER, head_dim=8, num_labels=labels)),
    "gemma": lambda labels: transformers.GemmaForSequenceClassification(transformers.GemmaConfig(
        **DECODER, head_dim=8, num_labels=labels)),
    "phi": lambda labels: transformers.PhiForSequenceClassification(transformers.PhiConfig(
        **SMALL, eos_token_id=2, num_labels=labels)),
}


def write_labelled(file: Path, labels: np.ndarray, classes: int, task: str, seed: int = 0, types: bool = True,
                   names: list[str] | None = None) -> list:
    """Random rows of 2 to 60 tokens, the later part of each of the second type. Returns (tokens, types)."""
    generator = np.random.default_rng(seed)
    rows = []
    for _ in labels:
        length = int(generator.integers(2, 60))
        border = int(generator.integers(1, length))
        rows.append((generator.integers(3, VOCABULARY, length), (np.arange(length) >= border) * int(types)))
    with h5py.File(file, "w") as out:
        out["tokens"] = np.concatenate([tokens for tokens, _ in rows]).astype(np.int32)
        out["offsets"] = np.cumsum([0] + [len(tokens) for tokens, _ in rows]).astype(np.int64)
        out["token_types"] = np.concatenate([kinds for _, kinds in rows]).astype(np.uint8)
        out["labels"] = labels.astype(np.int64 if classes else np.float32)
        out.attrs.update({"kind": np.bytes_("glue"), "tokenizer_checksum": np.bytes_(hashlib.sha256(b"{}").hexdigest()),
                          "vocabulary_size": np.int64(VOCABULARY), "end_token": np.int64(-1), "task": np.bytes_(task),
                          "classes": np.int64(classes)})
        if classes:
            out.attrs["label_names"] = np.bytes_("\n".join(names or map(str, range(classes))))
    return rows


def arguments(model: Path, data: Path, run_dir: Path, *others) -> list:
    return ["evaluate=classification", "pipeline=[evaluate,export]", f"model.path={model}", "model.dtype=float32",
            f"evaluate.tasks.labels.data={data}", "evaluate.tasks.labels.answers=true", f"run.dir={run_dir}",
            "cluster.threads_per_rank=1", *others]


def measured(run_dir: Path) -> tuple[dict, np.ndarray]:
    """The task's metrics, and the logits of every row."""
    directory = stage_directory(run_dir, "evaluate")
    said = json.loads((directory / "metrics.json").read_text())["tasks"]["labels"]
    answers = [json.loads(line) for line in (directory / "labels.answers.jsonl").read_text().splitlines()]
    assert [answer["row"] for answer in answers] == list(range(len(answers)))
    return said, np.array([answer["logits"] for answer in answers])


def plain_loop(model, rows: list, types: bool) -> np.ndarray:
    """One row after the other, without padding. Weights of memory of their own: where they lie in their file, and so
    how a product's loops begin, depends on the length of its header."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    logits = []
    with torch.no_grad():
        for tokens, kinds in rows:
            inputs = {"input_ids": torch.tensor(np.array([tokens]))}
            if types:
                inputs["token_type_ids"] = torch.tensor(np.array([kinds]))
            logits.append(model(**inputs).logits[0].double().numpy())
    return np.array(logits)


def write_small(name: str, labels: int, directory: Path):
    model = randomized(MODELS[name](labels))
    model.save_pretrained(directory)
    return model


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("classes", [2, 3, 0])
def test_logits_are_those_of_transformers_and_metrics_those_of_scikit_learn(name, classes, tmp_path):
    model = write_small(name, max(1, classes), tmp_path / "model")
    generator = np.random.default_rng(1)
    labels = generator.integers(0, classes, 70) if classes else np.round(generator.random(70) * 10).astype(np.float32) / 2
    types = name == "bert"
    rows = write_labelled(tmp_path / "data.h5", labels, classes, "RTE" if classes else "STS-B", types=types)
    ended = run(*arguments(tmp_path / "model", tmp_path / "data.h5", tmp_path / "run"))
    if "is not one espalier knows" in ended.errors:
        pytest.skip(f"skipped: this build has no {name}")
    assert ended.code == 0, str(ended)
    said, logits = measured(tmp_path / "run")
    assert said["head"] == "model" and said["rows"] == 70
    assert np.abs(logits - plain_loop(model, rows, types)).max() < 1e-4
    if classes:
        predicted = logits.argmax(1)
        average = "binary" if classes == 2 else "macro"
        assert said["accuracy"] == pytest.approx(metrics.accuracy_score(labels, predicted), abs=1e-12)
        assert said["f1"] == pytest.approx(metrics.f1_score(labels, predicted, average=average), abs=1e-12)
        assert said["matthews"] == pytest.approx(metrics.matthews_corrcoef(labels, predicted), abs=1e-12)
        assert said["mean_loss"] == pytest.approx(metrics.log_loss(
            labels, torch.softmax(torch.tensor(logits), 1).numpy(), labels=range(classes)), abs=1e-9)
    else:
        assert said["pearson"] == pytest.approx(stats.pearsonr(logits[:, 0], labels).statistic, abs=1e-12)
        assert said["spearman"] == pytest.approx(stats.spearmanr(logits[:, 0], labels).statistic, abs=1e-12)
        assert said["mean_squared_error"] == pytest.approx(metrics.mean_squared_error(labels, logits[:, 0]), abs=1e-9)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_a_model_without_a_head_is_measured_with_a_drawn_one_and_exported_without(name, tmp_path):
    """Evaluating changes nothing: the head is drawn and said, and the export is the model as it was."""
    base = {"bert": lambda: transformers.BertModel(transformers.BertConfig(**SMALL)),
            "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**DECODER))}[name]()
    randomized(base).save_pretrained(tmp_path / "model")
    write_labelled(tmp_path / "data.h5", np.arange(40) % 3, 3, "MNLI", types=False)
    ended = run_well(*arguments(tmp_path / "model", tmp_path / "data.h5", tmp_path / "run"))
    said, logits = measured(tmp_path / "run")
    assert said["head"] == "drawn" and "no classification head yet" in ended.output
    # N(0, 0.02) over hidden states behind a norm: small logits, not constant ones.
    assert 0 < np.abs(logits).max() < 2 and np.ptp(logits[:, 0]) > 0
    config = json.loads((stage_directory(tmp_path / "run", "export") / "model/config.json").read_text())
    assert config["architectures"] == [type(base).__name__]


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_an_export_with_a_head_is_a_classification_model_to_transformers(name, tmp_path):
    """The head's tensors beside a base model's config.json, as retraining leaves them."""
    model = write_small(name, 3, tmp_path / "model")
    file = tmp_path / "model/config.json"
    config = json.loads(file.read_text())
    config["architectures"] = [{"bert": "BertModel", "llama": "LlamaForCausalLM"}[name]]
    for key in ("id2label", "label2id", "problem_type", "pad_token_id"):
        config.pop(key, None)
    file.write_text(json.dumps(config))
    rows = write_labelled(tmp_path / "data.h5", np.arange(40) % 3, 3, "MNLI", types=False)
    run_well(*arguments(tmp_path / "model", tmp_path / "data.h5", tmp_path / "run"))
    exported = stage_directory(tmp_path / "run", "export") / "model"
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(exported).eval()
    assert type(loaded) is type(model) and loaded.config.num_labels == 3
    assert loaded.config.problem_type == "single_label_classification"
    assert name == "bert" or loaded.config.pad_token_id == 2
    assert np.array_equal(plain_loop(loaded, rows, False), plain_loop(model, rows, False))


ENTAILMENT = ["entailment", "neutral", "contradiction"]


def change_config(model: Path, **changes) -> None:
    config = json.loads((model / "config.json").read_text()) | changes
    (model / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def test_classes_are_matched_by_name_where_both_sides_have_names(tmp_path):
    """A model of MNLI with another order of classes, as such models are published."""
    model = write_small("bert", 3, tmp_path / "model")
    change_config(tmp_path / "model", id2label={"0": "CONTRADICTION", "1": "NEUTRAL", "2": "ENTAILMENT"})
    rows = write_labelled(tmp_path / "data.h5", np.arange(40) % 3, 3, "MNLI", names=ENTAILMENT)
    run_well(*arguments(tmp_path / "model", tmp_path / "data.h5", tmp_path / "run"))
    _, logits = measured(tmp_path / "run")
    assert np.abs(logits - plain_loop(model, rows, True)[:, [2, 1, 0]]).max() < 1e-4
    exported = json.loads((stage_directory(tmp_path / "run", "export") / "model/config.json").read_text())
    assert exported["id2label"]["0"] == "CONTRADICTION"  # evaluating changes nothing
    change_config(tmp_path / "model", id2label={"0": "joy", "1": "anger", "2": "fear"})
    ended = run(*arguments(tmp_path / "model", tmp_path / "data.h5", tmp_path / "other"))
    assert ended.code == 2 and "tells joy, anger, fear apart, the data entailment" in ended.errors, str(ended)
    assert not (tmp_path / "other").exists()  # before anything runs


def test_a_residual_keeps_the_names_of_the_head_that_was_tuned(tmp_path):
    """The decoded model stands on a base that names its classes otherwise, or not at all."""
    model = write_small("bert", 3, tmp_path / "base")
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape)
    shutil.copytree(tmp_path / "base", tmp_path / "tuned")
    model.save_pretrained(tmp_path / "tuned")
    names = {"0": "CONTRADICTION", "1": "NEUTRAL", "2": "ENTAILMENT"}
    change_config(tmp_path / "tuned", id2label=names)
    rows = write_labelled(tmp_path / "data.h5", np.arange(40) % 3, 3, "MNLI", names=ENTAILMENT)
    run_well(*arguments(tmp_path / "base", tmp_path / "data.h5", tmp_path / "run", "pipeline=[compress,evaluate,export]",
                        "compress.base=start", f"compress.finetuned={tmp_path / 'tuned'}", "compress.rank=32"))
    exported = stage_directory(tmp_path / "run", "export") / "model"
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(exported, dtype=torch.float32).eval()
    assert loaded.config.id2label == {int(key): name for key, name in names.items()}
    _, logits = measured(tmp_path / "run")
    assert np.abs(logits - plain_loop(loaded, rows, True)[:, [2, 1, 0]]).max() < 1e-4


@pytest.mark.parametrize("names,kept", [(["entailment", "not_entailment"], ["entailment", "not_entailment"]),
                                        (["0", "1"], ["NEGATIVE", "POSITIVE"])])
def test_a_head_is_exported_with_the_names_of_the_set_it_was_trained_on(names, kept, tmp_path):
    """Where the set names its classes; numbers are no names, and the head's own then stay."""
    write_small("bert", 2, tmp_path / "model")
    change_config(tmp_path / "model", id2label={"0": "NEGATIVE", "1": "POSITIVE"}, architectures=None)
    rows = write_labelled(tmp_path / "data.h5", np.arange(40) % 2, 2, "RTE", names=names)
    run_well(*arguments(tmp_path / "model", tmp_path / "data.h5", tmp_path / "run",
                        "pipeline=[retrain,compress,evaluate,export]", "retrain=full", "retrain.targets=null",
                        f"data.train={tmp_path / 'data.h5'}", "retrain.steps=2", "retrain.batch_size=8",
                        "retrain.sequence_length=64", "compress.rank=4"), ranks=2)
    exported = stage_directory(tmp_path / "run", "export") / "model"
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(exported, dtype=torch.float32).eval()
    assert loaded.config.id2label == dict(enumerate(kept))
    _, logits = measured(tmp_path / "run")
    assert np.abs(plain_loop(loaded, rows, True) - logits).max() < 1e-4


@pytest.mark.parametrize("kind", [transformers.BertForTokenClassification, transformers.BertForMultipleChoice])
def test_a_head_of_another_task_is_no_head_for_sequences(kind, tmp_path):
    classes = 2 if kind is transformers.BertForTokenClassification else 1
    randomized(kind(transformers.BertConfig(**SMALL, num_labels=classes))).save_pretrained(tmp_path / "model")
    write_labelled(tmp_path / "data.h5", np.arange(40) % 2, 2, "RTE")
    ended = run_well(*arguments(tmp_path / "model", tmp_path / "data.h5", tmp_path / "run"))
    said, _ = measured(tmp_path / "run")
    assert said["head"] == "drawn" and "classifier.weight" in ended.output
    exported = stage_directory(tmp_path / "run", "export") / "model"
    config = json.loads((exported / "config.json").read_text())
    assert config["architectures"] == [kind.__name__] and "problem_type" not in config


@pytest.mark.parametrize("name", ["bert", "roberta", "deberta-v2", "llama", "gpt2"])
def test_an_adapter_beside_a_model_with_a_head_is_loaded_by_peft(name, tmp_path):
    """Trained on a checkpoint of the body alone, whose names lack what the class puts before them."""
    model = randomized(MODELS[name](2))
    (model.base_model if name != "llama" else transformers.LlamaForCausalLM(model.config)).save_pretrained(tmp_path / "model")
    rows = write_labelled(tmp_path / "data.h5", np.arange(40) % 2, 2, "RTE", types=name == "bert")
    targets = {"gpt2": "['mlp.c_proj']", "llama": "['q_proj']"}.get(name, "['query*']")
    ended = run_well(*arguments(tmp_path / "model", tmp_path / "data.h5", tmp_path / "run",
                                "pipeline=[retrain,evaluate,export]", "retrain=lora", "retrain.merge=beside",
                                f"retrain.targets={targets}", f"data.train={tmp_path / 'data.h5'}", "retrain.steps=4",
                                "retrain.learning_rate=0.05", "retrain.batch_size=4", "retrain.sequence_length=64"))
    assert "as peft loads it" in ended.output
    exported = stage_directory(tmp_path / "run", "export") / "model"
    _, logits = measured(tmp_path / "run")
    dense = transformers.AutoModelForSequenceClassification.from_pretrained(exported, dtype=torch.float32).eval()
    alone = plain_loop(dense, rows, name == "bert")
    adapted = peft.PeftModel.from_pretrained(dense, exported / "adapter").eval()
    assert np.abs(alone - logits).max() > 1e-3
    assert np.abs(plain_loop(adapted, rows, name == "bert") - logits).max() < 1e-4


def test_buffers_and_positions_are_no_parameters(tmp_path):
    model = write_small("bert", 2, tmp_path / "model")
    file = tmp_path / "model/model.safetensors"
    save_file({**load_file(file), "bert.embeddings.position_ids": torch.arange(96)[None]}, file, {"format": "pt"})
    write_labelled(tmp_path / "data.h5", np.arange(40) % 2, 2, "RTE")
    run_well(*arguments(tmp_path / "model", tmp_path / "data.h5", tmp_path / "run", "pipeline=[evaluate]"))
    said = json.loads((stage_directory(tmp_path / "run", "evaluate") / "metrics.json").read_text())["model"]
    assert said["parameters"] == model.num_parameters()


def test_the_same_bits_on_any_ranks_and_threads(tmp_path):
    write_small("bert", 2, tmp_path / "model")
    write_labelled(tmp_path / "data.h5", np.arange(400) % 2, 2, "MRPC")
    found = []
    for ranks, threads in [(1, 1), (2, 1), (3, 1), (1, 2)]:
        run_dir = tmp_path / f"{ranks}-{threads}"
        run_well(*arguments(tmp_path / "model", tmp_path / "data.h5", run_dir, "pipeline=[evaluate]",
                            f"cluster.threads_per_rank={threads}", "model.dtype=bfloat16"), ranks=ranks)
        directory = stage_directory(run_dir, "evaluate")
        found.append([(directory / name).read_bytes() for name in ("metrics.json", "labels.answers.jsonl")])
    assert all(other == found[0] for other in found)


def test_data_that_does_not_fit_is_refused_before_anything_runs(tmp_path):
    write_small("bert", 2, tmp_path / "model")
    rows = write_labelled(tmp_path / "data.h5", np.arange(9) % 2, 2, "RTE")
    longest = max(len(tokens) for tokens, _ in rows)
    cases = [([f"evaluate.tasks.labels.sequence_length={longest - 1}"], ["data.h5: row", f"--length {longest - 1}"]),
             (["evaluate.tasks.labels.shots=3"], ["evaluate.tasks.labels.shots", "read by multiple_choice"]),
             (["evaluate.tasks.labels.segments=3"], ["evaluate.tasks.labels.segments", "read by perplexity"]),
             (["evaluate.tasks.labels.kind=perplexity", "~evaluate.tasks.labels.answers"],
              ["perplexity is of causal language models; this is bert"]),
             (["evaluate.tasks.labels.kind=regression"], ["classification", "multiple_choice", "perplexity"])]
    for changes, words in cases:
        ended = run(*arguments(tmp_path / "model", tmp_path / "data.h5", tmp_path / "run", *changes))
        assert ended.code == 2 and len(ended.messages) == 1, str(ended)
        assert all(word in ended.messages[0] for word in words), str(ended)
    write_labelled(tmp_path / "three.h5", np.arange(9) % 3, 3, "MNLI")
    ended = run(*arguments(tmp_path / "model", tmp_path / "three.h5", tmp_path / "run"))
    assert ended.code == 2 and "head has 2 labels, the data 3" in ended.errors, str(ended)
    assert not (tmp_path / "run").exists()


def test_minilm_on_rte_is_a_plain_loop_of_transformers_over_the_raw_file(tmp_path):
    base = os.environ.get("ESPALIER_TEST_MINILM")
    data = os.environ.get("ESPALIER_TEST_DATA")
    if not base or not data:
        pytest.skip("skipped: no data (ESPALIER_TEST_MINILM, ESPALIER_TEST_DATA)")
    file = Path(data) / "glue/RTE/dev.tsv"
    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=2, dtype=torch.float32).eval()
    with torch.no_grad():
        model.classifier.weight.mul_(20)  # so that the classes are told apart
    model.save_pretrained(tmp_path / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    tokenizer.save_pretrained(tmp_path / "model")
    subprocess.run([sys.executable, SOURCE / "launch/prepare_data.py", "--tokenizer", tmp_path / "model", "--format", "glue",
                    "--task", "RTE", "--length", "128", "--input", file, "--output", tmp_path / "rte.h5"], check=True)
    run_well(*arguments(tmp_path / "model", tmp_path / "rte.h5", tmp_path / "run", "pipeline=[evaluate]"), timeout=300)
    said, logits = measured(tmp_path / "run")
    right = 0
    lines = file.read_text(encoding="utf-8").split("\n")[1:]
    for row, line in enumerate(filter(None, lines)):
        _, first, second, label = line.split("\t")
        inputs = tokenizer(first, second, truncation=True, max_length=128, return_tensors="pt")
        with torch.no_grad():
            theirs = model(**inputs).logits[0].double().numpy()
        assert np.abs(logits[row] - theirs).max() < 1e-3
        right += int(theirs.argmax() == (label == "not_entailment"))
    assert said["rows"] == row + 1 == 277
    assert said["accuracy"] == right / 277
