"""Residuals and index sets in whole runs: models that gain rows or a head are loaded by transformers, sums follow
their formula, the same bits however the work is distributed and after a kill, bases that cannot be right are refused."""

import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from program import Started, differences, perplexities, results, run, run_well, stage_directory
from small_model import VOCABULARY, text_tokens, write_files, write_model, write_tokens
from test_classification import SMALL, randomized, write_labelled

ROWS = 5
COMPRESS = ["model.dtype=float32", "compress.vectors=float32", "cluster.threads_per_rank=1"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("small"))


def changed(model, seed: int):
    """A change of rank 4 in every matrix, of some percent in the vectors."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                rows, columns = parameter.shape
                parameter += 0.02 * torch.randn(rows, 4, generator=generator) @ torch.randn(4, columns,
                                                                                            generator=generator)
            else:
                parameter *= 1 + 0.02 * torch.randn(parameter.shape, generator=generator)
    return model


def tuned(base: Path, directory: Path, seed: int = 1, rows: int = 0) -> Path:
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if rows:
        model.resize_token_embeddings(VOCABULARY + rows)
    changed(model, seed).save_pretrained(directory)
    shutil.copy(base / "tokenizer.json", directory)
    return directory


def tensors(directory: Path, base: Path | None = None) -> dict:
    """Of a checkpoint, or of a stage's model on its base."""
    found = {} if base is None else load_file(base / "model.safetensors")
    for file in sorted(directory.glob("*.safetensors")):
        found |= load_file(file)
    return {name: tensor.double() for name, tensor in found.items()}


def compress(run_dir: Path, base: Path, finetuned: Path, *keys, ranks: int = 1) -> Path:
    run_well("pipeline=[compress]", f"model.path={base}", "compress.base=start", f"compress.finetuned={finetuned}",
             f"run.dir={run_dir}", *COMPRESS, *keys, ranks=ranks)
    return stage_directory(run_dir, "compress") / "residual.h5"


ERE = ["compress.rank=8", "compress.bits=8"]


# ------------------------------------------------------------------------------- models that grow
def test_rows_added_to_an_embedding_are_evaluated_exported_and_decoded_as_transformers_loads_them(files, tmp_path):
    grown = tuned(files.model, tmp_path / "grown", rows=ROWS)
    held_out = write_tokens(tmp_path / "held_out.h5", [text_tokens(1000, 4)], grown, VOCABULARY + ROWS)
    run_well("pipeline=[compress,evaluate,export]", f"model.path={grown}", f"compress.base={files.model}",
             f"evaluate.tasks.text.data={held_out}", "evaluate.tasks.text.sequence_length=64",
             f"run.dir={tmp_path / 'run'}", *COMPRESS, *ERE, ranks=2)
    exported, residual = (stage_directory(tmp_path / "run", "export") / "model",
                          stage_directory(tmp_path / "run", "compress") / "residual.h5")
    run_well("decode", files.model, residual, tmp_path / "decoded")
    exact = tensors(grown)["model.embed_tokens.weight"]
    rows = torch.tensor(np.concatenate([text_tokens(1000, 4)])[:960].astype(np.int64)).view(-1, 64)
    for directory in (exported, tmp_path / "decoded"):
        assert json.loads((directory / "config.json").read_text())["vocab_size"] == VOCABULARY + ROWS
        assert torch.equal(tensors(directory)["model.embed_tokens.weight"][VOCABULARY:], exact[VOCABULARY:])
        model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        with torch.no_grad():
            theirs = float(torch.exp(model(rows, labels=rows).loss))
        assert theirs == pytest.approx(perplexities(tmp_path / "run")[0], rel=1e-4), directory


def test_a_new_classification_head_is_decoded_into_the_class_that_has_it(files, tmp_path):
    names = ["contradiction", "entailment", "neutral"]
    config = transformers.AutoConfig.from_pretrained(files.model, num_labels=3, pad_token_id=0,
                                                     id2label=dict(enumerate(names)))
    torch.manual_seed(0)  # of the head that transformers draws
    model = transformers.AutoModelForSequenceClassification.from_pretrained(files.model, config=config,
                                                                            dtype=torch.float32)
    changed(model, 2).save_pretrained(tmp_path / "tuned")
    residual = compress(tmp_path / "run", files.model, tmp_path / "tuned", *ERE)
    run_well("decode", files.model, residual, tmp_path / "decoded")
    loaded, said = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "decoded", dtype=torch.float32, output_loading_info=True)
    assert not said["missing_keys"] and loaded.config.id2label == dict(enumerate(names))
    assert type(loaded) is transformers.LlamaForSequenceClassification
    tokens = torch.tensor(text_tokens(40, 8).astype(np.int64))[None]
    with torch.no_grad():
        theirs, exact = loaded(tokens).logits, model(tokens).logits
    assert (theirs - exact).norm() < 0.1 * exact.norm()
    run_well("pipeline=[compress,export]", f"model.path={files.model}", "compress=sum", "compress.base=start",
             f"compress.residuals=[{residual}]", f"run.dir={tmp_path / 'sum'}", "model.dtype=float32")
    exported = stage_directory(tmp_path / "sum", "export") / "model"
    assert transformers.AutoConfig.from_pretrained(exported).id2label == dict(enumerate(names))
    other = changed(model, 3)
    other.config.id2label = {0: "no", 1: "yes", 2: "perhaps"}
    other.save_pretrained(tmp_path / "other")
    named_otherwise = compress(tmp_path / "other_run", files.model, tmp_path / "other", *ERE)
    ended = run("decode", files.model, residual, named_otherwise, tmp_path / "refused")
    assert ended.code == 2 and all(word in ended.messages[0] for word in ["entailment", "perhaps", "agree"]), str(ended)


def test_decode_replaces_what_it_decoded_and_no_model_of_another_program(files, tmp_path):
    residual = compress(tmp_path / "run", files.model, tuned(files.model, tmp_path / "tuned"), *ERE)
    run_well("decode", files.model, residual, tmp_path / "decoded")
    expected = (tmp_path / "decoded/model.safetensors").read_bytes()
    run_well("decode", files.model, residual, tmp_path / "decoded")
    assert (tmp_path / "decoded/model.safetensors").read_bytes() == expected
    before = {file.name: file.read_bytes() for file in (tmp_path / "tuned").iterdir()}
    ended = run("decode", files.model, residual, tmp_path / "tuned")
    assert ended.code == 2 and len(ended.messages) == 1, str(ended)
    assert all(word in ended.messages[0] for word in (str(tmp_path / "tuned"), "model.safetensors", "choose another"))
    assert {file.name: file.read_bytes() for file in (tmp_path / "tuned").iterdir()} == before


# ------------------------------------------------------------------------------- sums
def test_the_stage_sum_adds_weighted_differences_to_the_base(files, tmp_path):
    base = tensors(files.model)
    parts, weights, decoded = [], [0.5, -2.0], []
    for number in range(2):
        parts.append(compress(tmp_path / f"{number}", files.model, tuned(files.model, tmp_path / f"t{number}", number),
                              *ERE))
        decoded.append(tensors(parts[-1].parent / "model", files.model))
    run_well("pipeline=[compress]", "compress=sum", f"compress.residuals=[{parts[0]},{parts[1]}]",
             f"compress.weights={weights}".replace(" ", ""), f"model.path={files.model}", f"run.dir={tmp_path / 'sum'}",
             "model.dtype=float32", ranks=2)
    summed = tensors(stage_directory(tmp_path / "sum", "compress") / "model", files.model)
    for name, exact in base.items():
        expected = exact + sum(weight * (part[name] - exact) for weight, part in zip(weights, decoded))
        assert not torch.equal(expected, exact), name
        torch.testing.assert_close(summed[name], expected, rtol=1e-6, atol=1e-6, msg=name)


# ------------------------------------------------------------------------------- the same bits
@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A base that stores its embedding twice, and a model with more rows that does so too."""
    directory = tmp_path_factory.mktemp("pair")
    write_model(directory / "tied")
    for name, rows, seed in (("base", 0, 0), ("tuned", ROWS, 3)):
        tied = tuned(directory / "tied", directory / f"{name}-tied", seed, rows) if rows else directory / "tied"
        model = transformers.AutoModelForCausalLM.from_pretrained(tied, dtype=torch.float32)
        model.config.tie_word_embeddings = False
        embedding = model.get_input_embeddings().weight
        model.lm_head.weight = torch.nn.Parameter(embedding.detach().clone())
        model.save_pretrained(directory / name)
        assert torch.equal(load_file(directory / name / "model.safetensors")["lm_head.weight"], embedding)
    return directory


METHODS = {"ere": ["compress=ere", *ERE], "low_rank": ["compress=low_rank", "compress.rank=8"],
           "quantization": ["compress=quantization", "compress.bits=3"]}


@pytest.mark.parametrize("method", METHODS)
def test_residuals_with_added_rows_and_tied_tensors_are_the_same_bits_on_any_ranks_and_threads(pair, tmp_path, method):
    found = []
    for ranks, threads in ((1, 1), (2, 1), (3, 1), (1, 2)):
        run_dir = tmp_path / f"{ranks}-{threads}"
        compress(run_dir, pair / "base", pair / "tuned", *METHODS[method], f"cluster.threads_per_rank={threads}",
                 ranks=ranks)
        found.append(results(run_dir))
    said = found[0]["01-compress/metrics.json"]
    assert said["added_rows"] == ROWS and said["tied_tensors"] == 1
    assert all(differences(found[0], other) == [] for other in found[1:])


def test_a_sum_is_the_same_bits_on_any_ranks(pair, tmp_path):
    parts = [compress(tmp_path / "a", pair / "base", pair / "tuned", *ERE),
             compress(tmp_path / "b", pair / "base", pair / "tuned", *METHODS["low_rank"])]
    found = []
    for ranks in (1, 2, 3):
        # What only the residuals have, rows and all, must be equal in both: here they come from one model.
        run_well("pipeline=[compress]", "compress=sum", f"compress.residuals=[{parts[0]},{parts[1]}]",
                 f"model.path={pair / 'base'}", f"run.dir={tmp_path / str(ranks)}", "model.dtype=float32", ranks=ranks)
        found.append(results(tmp_path / str(ranks)))
    assert all(differences(found[0], other) == [] for other in found[1:])


@pytest.mark.parametrize("method", ["grebsmo", "magnitude", "random"])
def test_index_sets_are_the_same_bits_on_any_ranks_and_threads(files, tmp_path, method):
    found = []
    for ranks, threads in ((1, 1), (2, 1), (3, 1), (1, 2)):
        run_dir = tmp_path / f"{ranks}-{threads}"
        run_well("pipeline=[discover]", f"discover={method}", "discover.targets=['*']", f"model.path={files.model}",
                 f"run.dir={run_dir}", f"cluster.threads_per_rank={threads}", ranks=ranks)
        found.append(results(run_dir))
    assert all(differences(found[0], other) == [] for other in found[1:])


# ------------------------------------------------------------------------------- kills
@pytest.mark.parametrize("stage", ["compress", "discover"])
def test_a_killed_rank_costs_no_finished_matrix_and_no_bit(tmp_path, stage):
    base = write_model(tmp_path / "model", blocks=24)
    words = {"compress": ["pipeline=[compress]", f"compress.finetuned={tuned(base, tmp_path / 'tuned')}",
                          "compress.base=start", *COMPRESS, *ERE],
             "discover": ["pipeline=[discover]", "discover=grebsmo", "discover.targets=['*']"]}[stage]
    command = [*words, f"model.path={base}", "cluster.threads_per_rank=1"]
    run_well(*command, f"run.dir={tmp_path / 'whole'}", ranks=2)
    for attempt in range(5):  # the work takes seconds at most: the kill may come too late
        run_dir = tmp_path / f"cut{attempt}"
        state = run_dir / f"01-{stage}" / "state"
        job = Started([*command, f"run.dir={run_dir}"], ranks=2)
        job.wait_until(lambda: sum(path.is_file() for path in state.rglob("*")) >= 8)
        job.signal(signal.SIGKILL, [1])
        assert job.end(timeout=60).code != 0
        if not (run_dir / f"01-{stage}" / "manifest.json").exists():
            break
    assert not (run_dir / f"01-{stage}" / "manifest.json").exists(), "no kill came while it worked"
    kept = {path: path.stat().st_mtime_ns for path in state.rglob("*") if path.is_file()}
    job = Started([*command, f"run.dir={run_dir}"], ranks=3)
    ended = job.end()
    assert ended.code == 0 and len(kept) >= 8, str(ended)
    assert differences(results(tmp_path / "whole"), results(run_dir)) == []


# ------------------------------------------------------------------------------- bases
def test_a_base_that_fits_only_what_the_stages_before_leave_is_taken(tmp_path):
    """The plain encoder that the run starts from lacks the head that retraining gives it."""
    randomized(transformers.BertModel(transformers.BertConfig(**SMALL))).save_pretrained(tmp_path / "model")
    write_labelled(tmp_path / "train.h5", np.arange(32) % 2, 2, "RTE")
    command = ["retrain=full", f"model.path={tmp_path / 'model'}", f"data.train={tmp_path / 'train.h5'}",
               "retrain.steps=2", "retrain.batch_size=8", "retrain.sequence_length=64", *COMPRESS]
    run_well("pipeline=[retrain]", f"run.dir={tmp_path / 'first'}", *command)
    base = stage_directory(tmp_path / "first", "retrain") / "model"
    run_well("pipeline=[retrain,compress]", f"run.dir={tmp_path / 'second'}", "run.seed=1", f"compress.base={base}",
             *command, *ERE)


def test_more_unnamed_classes_than_the_bases_are_decoded_as_many(tmp_path):
    randomized(transformers.BertModel(transformers.BertConfig(**SMALL))).save_pretrained(tmp_path / "model")
    command = ["retrain=full", "retrain.steps=4", "retrain.batch_size=8", "retrain.sequence_length=64",
               "retrain.warmup_steps=null", "retrain.learning_rate=1e-3", *COMPRESS]
    for classes in (2, 3):
        write_labelled(tmp_path / f"{classes}.h5", np.arange(32) % classes, classes, "RTE")
    run_well("pipeline=[retrain]", f"run.dir={tmp_path / 'two'}", f"data.train={tmp_path / '2.h5'}",
             f"model.path={tmp_path / 'model'}", *command)
    base = stage_directory(tmp_path / "two", "retrain") / "model"
    run_well("pipeline=[retrain,compress,evaluate]", f"run.dir={tmp_path / 'three'}", f"data.train={tmp_path / '3.h5'}",
             f"model.path={base}", "compress.base=start", "evaluate=classification",
             f"evaluate.tasks.labels.data={tmp_path / '3.h5'}", *command, *ERE)
    residual = stage_directory(tmp_path / "three", "compress") / "residual.h5"
    run_well("decode", base, residual, tmp_path / "decoded")
    config = json.loads((tmp_path / "decoded/config.json").read_text())
    assert list(config["id2label"].values()) == ["0", "1", "2"]


def test_a_model_without_heads_needs_a_base_without_them(files, tmp_path):
    words = ["prune=dsee", "prune.criterion=magnitude", "prune.pattern=heads", "prune.heads=1", "pipeline=[prune,compress]",
             f"model.path={files.model}", f"run.dir={tmp_path / 'run'}", *COMPRESS, *ERE]
    ended = run(*words, "compress.base=start", ranks=2)
    assert ended.code == 2 and len(ended.messages) == 1, str(ended)
    assert all(word in ended.messages[0] for word in ["heads.json", "compress.base", str(files.model)]), ended.messages


def test_zeros_of_a_pruned_model_are_not_filled_unless_that_is_asked_for(files, tmp_path):
    words = ["pipeline=[prune,compress]", "prune=magnitude", f"model.path={files.model}", *COMPRESS, *ERE]
    ended = run(*words, f"run.dir={tmp_path / 'kept'}", ranks=2)
    assert ended.code == 2 and len(ended.messages) == 1, str(ended)
    assert all(word in ended.messages[0] for word in ["compress.base", "compress.zeros=fill", str(files.model)])
    run_well(*words, f"run.dir={tmp_path / 'filled'}", "compress.zeros=fill")
    zeros = [(tensors(tmp_path / "filled" / stage / "model", files.model)["model.layers.0.mlp.up_proj.weight"] == 0).sum()
             for stage in ("01-prune", "02-compress")]
    assert zeros[0] > 0 and zeros[1] == 0


def test_a_merged_adapter_is_compressed_against_what_it_was_trained_on(files, tmp_path):
    """The stage that merges takes a model with an adapter beside its matrices: that is no base."""
    merge = ("+merge={stage: retrain, method: lora, steps: 0, adapter: previous, merge: dense, learning_rate: 1e-4, "
             "adapter_rank: 4, alpha: 8.0, targets: [q_proj], batch_size: 4, sequence_length: 64}")
    run_well("pipeline=[retrain,merge,compress,evaluate,export]", f"run.dir={tmp_path / 'run'}", "retrain=lora",
             "retrain.merge=beside", "retrain.adapter_rank=4", "retrain.alpha=8.0", "retrain.targets=[q_proj]",
             "retrain.steps=4", "retrain.batch_size=4", "retrain.sequence_length=64", "retrain.warmup_steps=null",
             "retrain.learning_rate=1e-2", merge, f"model.path={files.model}", f"data.train={files.train}",
             f"evaluate.tasks.text.data={files.held_out}", "evaluate.tasks.text.sequence_length=64", *COMPRESS,
             "compress=low_rank", "compress.rank=8")
    metrics = json.loads((tmp_path / "run/03-compress/metrics.json").read_text())
    assert metrics["base"] == str(files.model)
    assert {matrix["name"].split(".")[-2] for matrix in metrics["matrices"]} == {"q_proj"}
    merged, decoded = (tensors(tmp_path / "run" / stage / "model", files.model) for stage in ("02-merge", "03-compress"))
    exported = load_file(tmp_path / "run/05-export/model/model.safetensors")
    assert not any(".added." in name for name in exported)
    for name, tensor in load_file(files.model / "model.safetensors").items():
        change = (merged[name] - tensor).norm()
        assert (decoded[name] - merged[name]).norm() <= 2e-3 * change, name
