"""Retraining as a person runs it: validation, kills, stored adapters, labelled data, what is written."""

import hashlib
import json
import signal
from pathlib import Path

import h5py
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers

from program import Started, differences, perplexities, results, run, run_well, settings
from small_model import VOCABULARY, text_tokens, write_files

FULL = dict(pipeline="[prune,retrain,evaluate]", retrain="full", retrain__method="full", retrain__epochs="null",
            retrain__learning_rate=0.002, retrain__merge="masked", retrain__micro_batch_size=1,
            retrain__steps=24, retrain__validate__share=0.2, retrain__validate__every=3)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("small"), 3)


@pytest.fixture(scope="module")
def validated(files, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("validated") / "run"
    run_well(*settings(files, run_dir, **FULL), ranks=2)
    return run_dir


def metrics_of(run_dir: Path, stage: str) -> dict:
    return json.loads((run_dir / stage / "metrics.json").read_text())


def validations(run_dir: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines(keepends=True)
             if line.endswith("\n")]
    return [line for line in lines if line.get("event") == "validation"]


def test_the_earliest_best_validation_is_what_the_next_stage_reads(validated):
    lines = validations(validated)
    assert [line["step"] for line in lines] == list(range(3, 25, 3))
    losses = [line["loss"] for line in lines]
    best = lines[losses.index(min(losses))]
    metrics = metrics_of(validated, "02-retrain")
    assert metrics["validation"]["best_step"] == metrics["validation"]["kept_step"] == best["step"]
    assert metrics["validation"]["best_value"] == best["loss"]
    assert best["perplexity"] == pytest.approx(np.exp(best["loss"]))
    assert metrics["zeros_filled"] == 0
    assert metrics["merge_largest_logit_difference"] < 0.05


def test_a_plan_says_when_nothing_is_validated_and_the_last_step_is_kept(files, tmp_path):
    words = "nothing is validated: the last step is kept"
    assert words not in run_well("--plan", *settings(files, tmp_path / "run", **FULL)).output
    unset = {**FULL, "retrain__validate__share": "null"}
    assert words in run_well("--plan", *settings(files, tmp_path / "run", **unset)).output


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in directory.glob("*.safetensors"):
        found.update(safetensors.torch.load_file(file))
    return found


def relative_distance(changes: dict[str, torch.Tensor], weights: dict[str, torch.Tensor]) -> float:
    squares = [sum(tensor.double().square().sum() for tensor in all_of.values()) for all_of in (changes, weights)]
    return float((squares[0] / squares[1]).sqrt())


def test_the_distance_told_is_that_of_the_written_matrices(validated, beside):
    before, after = (tensors(validated / stage / "model") for stage in ("01-prune", "02-retrain"))
    weights = {name: tensor.double() for name, tensor in before.items() if name.endswith("_proj.weight")}
    changes = {name: after[name].double() - weight for name, weight in weights.items()}
    told = metrics_of(validated, "02-retrain")
    assert told["weight_distance"] == pytest.approx(relative_distance(changes, weights), rel=1e-9)
    assert told["weight_distance"] > 0.01 and "map_distance" not in told

    before, terms = (tensors(beside / stage / "model") for stage in ("01-prune", "02-retrain"))
    names = [name.removesuffix(".added.up") for name in terms if name.endswith(".added.up")]
    changes = {name: terms[f"{name}.added.scale"] * (terms[f"{name}.added.up"] @ terms[f"{name}.added.down"])
               for name in names}
    told = metrics_of(beside, "02-retrain")["weight_distance"]
    assert told == pytest.approx(relative_distance(changes, {name: before[name] for name in names}), rel=1e-5)


def test_validated_training_has_the_same_bits_on_one_two_and_three_ranks(files, validated, tmp_path):
    for ranks in (1, 3):
        run_dir = tmp_path / str(ranks)
        run_well(*settings(files, run_dir, **FULL), ranks=ranks)
        assert differences(results(run_dir), results(validated)) == []


def test_a_kill_behind_a_validation_leaves_the_bits_of_an_undisturbed_run(files, validated, tmp_path):
    run_dir = tmp_path / "run"
    command = settings(files, run_dir, **FULL)
    for count in (2, 5):
        job = Started(command, ranks=2)
        job.wait_until(lambda: (run_dir / "metrics.jsonl").exists() and len(validations(run_dir)) >= count)
        job.signal(signal.SIGKILL, [0])
        assert job.end(timeout=30).code != 0
    run_well(*command, ranks=2)
    assert differences(results(run_dir), results(validated)) == []


def test_a_stored_adapter_is_applied_to_its_base_and_refused_on_another(files, validated, tmp_path):
    adapters = validated / "02-retrain" / "adapters.h5"
    again = {**FULL, "retrain__validate__share": "null", "retrain__steps": 0, "retrain__adapter_from": adapters}
    run_dir = tmp_path / "again"
    run_well(*settings(files, run_dir, **again))
    with h5py.File(adapters) as one, h5py.File(run_dir / "02-retrain" / "adapters.h5") as other:
        name = "model.layers.0.self_attn.q_proj.weight/value"
        assert np.array_equal(one[name][()], other[name][()])
    assert perplexities(run_dir) == perplexities(validated)
    with h5py.File(adapters) as one:
        checksum = one.attrs["base_checksum"]
    checksum = checksum if isinstance(checksum, str) else checksum.decode()
    ended = run(*settings(files, tmp_path / "other", **{**again, "prune.pattern": "1:4"}))
    assert ended.code != 0 and checksum in ended.errors
    # Where no entry before changes the model, before the first of them begins.
    ended = run(*settings(files, tmp_path / "dense", **{**again, "pipeline": "[evaluate,retrain]"}), ranks=2)
    assert ended.code == 2 and len(ended.messages) == 1 and checksum in ended.errors, str(ended)
    assert not (tmp_path / "dense").exists()


@pytest.mark.parametrize("method,more", [("lora_xs", []), ("vera", []), ("dsee", ["retrain.index_sets=random"])])
def test_what_a_method_froze_is_stored_applied_to_its_base_and_refused_on_another(files, tmp_path, method, more):
    changes = {"pipeline": "[prune,retrain,evaluate]", "prune": "magnitude", "retrain": method,
               "retrain__targets": "[q_proj,down_proj]", "retrain__merge": "masked", "retrain__epochs": "null", "retrain__steps": 6, "retrain__adapter_rank": 4,
               "retrain__learning_rate": 0.05, "retrain__warmup_steps": "null", "model__dtype": "float32"}
    run_well(*settings(files, tmp_path / "first", **changes), *more)
    adapters = tmp_path / "first" / "02-retrain" / "adapters.h5"
    again = {**changes, "retrain__steps": 0, "retrain__adapter_from": adapters}
    run_well(*settings(files, tmp_path / "again", **again), *more, "run.seed=5", ranks=2)  # draws others
    assert perplexities(tmp_path / "again") == perplexities(tmp_path / "first")
    refused = run(*settings(files, tmp_path / "other", **{**again, "prune.pattern": "1:4"}), *more)
    assert refused.code == 2 and "stands on a base with the checksum" in refused.errors, str(refused)


def test_patience_ends_a_training_and_the_last_step_is_kept_where_that_is_asked(files, tmp_path):
    """Validated on a text of its own; a rate that diverges is never better than its first measure."""
    changes = {**FULL, "retrain__validate__share": "null", "retrain__validate__data": files.held_out,
               "retrain__validate__every": 2, "retrain__validate__patience": 2, "retrain__learning_rate": 0.5,
               "retrain__validate__keep": "last", "retrain__warmup_ratio": "null"}
    run_well(*settings(files, tmp_path / "run", **changes))
    lines = validations(tmp_path / "run")
    losses = [line["loss"] for line in lines]
    best = losses.index(min(losses))
    assert len(lines) == best + 3 < 12  # two validations behind the best one
    metrics = metrics_of(tmp_path / "run", "02-retrain")
    assert metrics["steps"] == metrics["validation"]["kept_step"] == lines[-1]["step"] == 2 * len(lines)
    assert metrics["validation"]["best_step"] == lines[best]["step"] < metrics["steps"]


# ------------------------------------------------------------------------------- beside the matrices
LORA = dict(pipeline="[prune,retrain,evaluate,export]", retrain="lora", retrain__targets="[q_proj,v_proj]",
            retrain__merge="beside", retrain__steps=12, retrain__epochs="null", retrain__learning_rate=0.02,
            retrain__dropout=0.0, model__dtype="float32")


@pytest.fixture(scope="module")
def beside(files, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("beside") / "run"
    run_well(*settings(files, run_dir, **LORA))
    return run_dir


def perplexity_in_transformers(model, tokens: np.ndarray, length: int = 64) -> float:
    rows = torch.tensor(tokens[:len(tokens) // length * length].astype(np.int64)).view(-1, length)
    with torch.no_grad():
        return float(torch.exp(model(rows, labels=rows).loss))


def test_an_adapter_beside_its_model_is_exported_as_products_on_the_sparse_base(files, beside):
    metrics = metrics_of(beside, "02-retrain")
    assert metrics["merge"] == "beside" and metrics["zeros_filled"] == 0
    assert metrics["merge_largest_logit_difference"] < 1e-3
    exported = beside / "04-export" / "model"
    model = transformers.AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
    config = json.loads((exported / "adapter" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["lora_alpha"] == config["r"]
    adapter = safetensors.torch.load_file(exported / "adapter" / "adapter_model.safetensors")
    assert len(adapter) == 2 * len(config["target_modules"]) == 2 * 2 * 3
    with h5py.File(files.held_out) as data:
        tokens = data["tokens"][()]
    alone = perplexity_in_transformers(model, tokens)
    for module in config["target_modules"]:
        weight = model.get_submodule(module).weight
        assert (weight == 0).float().mean() >= 0.5
        stem = f"base_model.model.{module}.lora_"
        weight.data += adapter[stem + "B.weight"] @ adapter[stem + "A.weight"]
    measured = perplexities(beside)[0]
    assert perplexity_in_transformers(model, tokens) == pytest.approx(measured, rel=1e-4)
    assert alone > measured * 1.01


def test_training_goes_on_from_the_adapter_beside_and_merges_it_later(files, beside, tmp_path):
    run_dir = tmp_path / "run"
    later = {**LORA, "pipeline": "[prune,retrain,evaluate,again,evaluate]"}
    names = ("method", "targets", "adapter_rank", "alpha", "learning_rate")
    again = [f"+again.{name}=${{retrain.{name}}}" for name in names]
    again += ["+again.stage=retrain", "+again.steps=0", "+again.adapter=previous", "+again.merge=dense"]
    run_well(*settings(files, run_dir, **later), *again)
    metrics = metrics_of(run_dir, "04-again")
    assert metrics["zeros_filled"] > 0 and metrics["share_of_zeros_filled"] > 0
    first, second = perplexities(run_dir)
    assert second == pytest.approx(first, rel=1e-5)
    refused = run(*settings(files, tmp_path / "refused", **{**later, "retrain.merge": "masked"}), *again)
    assert refused.code != 0 and "merge: beside" in refused.errors


def later(node: str, *others) -> list:
    """A retraining by the settings of the first one, with its own of `others`."""
    names = ("method", "targets", "adapter_rank", "alpha", "learning_rate", "batch_size", "sequence_length")
    return [*(f"+{node}.{name}=${{retrain.{name}}}" for name in names), f"+{node}.stage=retrain",
            *(f"+{node}.{other}" for other in others)]


def test_going_on_from_one_of_two_adapters_that_stand_beside_is_refused(files, tmp_path):
    """adapters.h5 of the second holds the second alone: going on from it would drop the first."""
    pipeline = "[prune,retrain,second,third]"
    command = settings(files, tmp_path / "run", **{**LORA, "pipeline": pipeline, "retrain__steps": 3})
    refused = run(*command, *later("second", "steps=3", "merge=beside"),
                  *later("third", "steps=0", "adapter=previous", "merge=beside"))
    assert refused.code == 2, str(refused)
    for part in ("adapter: previous", "03-second/adapters.h5", "q_proj.weight", "second adapter"):
        assert part in refused.errors, str(refused)


def test_going_on_passes_over_a_second_adapter_that_was_merged(files, tmp_path):
    """The first stays the one beside; the second is part of the matrices and is counted once."""
    pipeline = "[prune,retrain,second,evaluate,third,evaluate]"
    run_dir = tmp_path / "run"
    run_well(*settings(files, run_dir, **{**LORA, "pipeline": pipeline, "retrain__steps": 3}),
             *later("second", "steps=3", "merge=dense"), *later("third", "steps=0", "adapter=previous", "merge=beside"))
    first, second = perplexities(run_dir)
    assert second == first
    stages = [run_dir / stage / "adapters.h5" for stage in ("02-retrain", "05-third")]
    with h5py.File(stages[0]) as one, h5py.File(stages[1]) as other:
        name = "model.layers.0.self_attn.q_proj.weight/B"
        assert np.array_equal(one[name][()], other[name][()])


def test_an_adapter_is_taken_up_under_the_same_settings_however_they_are_written(files, beside, tmp_path):
    adapters = beside / "02-retrain" / "adapters.h5"
    again = {**LORA, "pipeline": "[prune,retrain]", "retrain__steps": 0, "retrain__adapter_from": adapters}
    run_well(*settings(files, tmp_path / "written", **again, retrain__alpha=16))
    run_well(*settings(files, tmp_path / "left_out", **again), "~retrain.alpha")
    refused = run(*settings(files, tmp_path / "other", **again, retrain__alpha=17))
    assert refused.code == 2 and "16" in refused.errors and "17" in refused.errors, str(refused)


def test_a_start_that_no_stage_can_leave_is_refused_before_any_work(files, tmp_path):
    for changes, words in (({"retrain__adapter": "previous"}, "merge: beside"),
                           ({"retrain": "dsee", "retrain__merge": "beside"}, "no discover stage"),
                           ({"retrain": "dsee", "retrain__merge": "beside",
                             "retrain__index_sets": tmp_path / "missing.h5"}, "missing.h5")):
        refused = run(*settings(files, tmp_path / "run", **{**LORA, "pipeline": "[prune,retrain]", **changes}))
        assert refused.code == 2 and words in refused.errors, str(refused)
        assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------- labelled data
def write_labelled(file: Path, model: Path, classes: int, rows: int = 48) -> Path:
    """The class is told by the last token."""
    labels = np.arange(rows) % max(classes, 2)
    documents = [np.concatenate([text_tokens(6 + row % 5, row), [10 + label]]).astype(np.int32)
                 for row, label in enumerate(labels)]
    with h5py.File(file, "w") as out:
        out["tokens"] = np.concatenate(documents)
        out["offsets"] = np.cumsum([0] + [len(document) for document in documents]).astype(np.int64)
        out["labels"] = labels.astype(np.int64) if classes else labels.astype(np.float32)
        out.attrs["kind"] = np.bytes_("glue")
        out.attrs["task"] = np.bytes_("RTE" if classes else "STS-B")
        out.attrs["classes"] = np.int64(classes)
        out.attrs["label_names"] = np.bytes_("\n".join(f"c{c}" for c in range(classes)))
        out.attrs["tokenizer_checksum"] = np.bytes_(hashlib.sha256((model / "tokenizer.json").read_bytes()).hexdigest())
        out.attrs["vocabulary_size"] = np.int64(VOCABULARY)
        out.attrs["end_token"] = np.int64(0)
    return file


@pytest.mark.parametrize("classes", [3, 0])
def test_a_head_is_trained_on_labels_and_loads_in_transformers(files, tmp_path, classes):
    labelled = write_labelled(tmp_path / "labelled.h5", files.model, classes)
    changes = {**FULL, "pipeline": "[retrain,export]", "data__train": labelled, "retrain__steps": 60,
               "retrain__batch_size": 8, "retrain__learning_rate": 0.003, "model__dtype": "float32",
               "retrain__validate__share": 0.25, "retrain__validate__every": 20,
               "retrain__validate__metric": "task", "retrain__head_learning_rate": 0.01}
    run_dir = tmp_path / "run"
    run_well(*settings(files, run_dir, **changes))
    metrics = metrics_of(run_dir, "01-retrain")
    assert metrics["head_parameters"] == max(classes, 1) * 64
    assert metrics["loss_last"] < 0.5 * metrics["loss_first"]
    last = validations(run_dir)[-1]
    assert last["accuracy" if classes else "pearson"] > 0.8
    model = transformers.AutoModelForSequenceClassification.from_pretrained(run_dir / "02-export" / "model")
    assert model.config.num_labels == max(classes, 1)
    with h5py.File(labelled) as data:
        tokens = torch.tensor(data["tokens"][data["offsets"][0]:data["offsets"][1]].astype(np.int64))
        label = float(data["labels"][0])
    logits = model(tokens[None]).logits[0].detach()
    assert (int(logits.argmax()) if classes else round(float(logits[0]))) == int(label)


def test_a_head_of_other_classes_is_left_out_when_an_adapter_is_taken_up(files, tmp_path):
    """As LoRA-XS goes from MNLI's three classes to RTE's two: the adapter stays, the head is drawn anew."""
    changes = {**LORA, "pipeline": "[retrain]", "retrain__targets": "[q_proj,v_proj]", "retrain__steps": 4,
               "retrain__batch_size": 8, "retrain__merge": "dense"}
    three, two = (write_labelled(tmp_path / f"{classes}.h5", files.model, classes) for classes in (3, 2))
    run_well(*settings(files, tmp_path / "mnli", **{**changes, "data__train": three}))
    adapters = tmp_path / "mnli" / "01-retrain" / "adapters.h5"
    taken = {**changes, "retrain__steps": 0, "retrain__adapter_from": adapters}
    ended = run_well(*settings(files, tmp_path / "rte", **{**taken, "data__train": two}))
    assert "its head left out" in ended.output + ended.errors
    assert metrics_of(tmp_path / "rte", "01-retrain")["head_parameters"] == 2 * 64
    ended = run_well(*settings(files, tmp_path / "again", **{**taken, "data__train": three}))
    assert "its head left out" not in ended.output + ended.errors
    with h5py.File(adapters) as one:
        for name in ("rte", "again"):
            with h5py.File(tmp_path / name / "01-retrain" / "adapters.h5") as other:
                path = "model.layers.0.self_attn.q_proj.weight/B"
                assert np.array_equal(one[path][()], other[path][()])
                heads = [file["head/score.weight/value"][()] for file in (one, other)]
                assert (name == "again") == (heads[0].shape == heads[1].shape and np.array_equal(*heads))
