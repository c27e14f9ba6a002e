"""Pruning methods in whole runs: the same bits however they are distributed and after a kill, and what
their masks are held against."""

import dataclasses
import json
import signal

import h5py
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from program import Started, differences, results, run, run_well, settings, stage_directory
from small_model import text_tokens, write_files, write_tokens
from test_classification import SMALL, plain_loop, write_labelled, write_small

SHORT = "[prune,evaluate]"
LAYOUTS = {"2_ranks": (2, 1), "3_ranks": (3, 1), "1_rank_of_2_threads": (1, 2)}
UNSTRUCTURED = dict(prune__pattern="unstructured", prune__sparsity=0.6)
CASES = {
    "alps_2_of_4": dict(prune="alps"),
    "alps_by_owl": dict(prune="alps", prune__iterations=18, prune__allocation="owl", **UNSTRUCTURED),
    "wanda_refined_and_refitted": dict(prune="wanda", prune__refine="dsnot", prune__refit="true"),
    "sparsegpt_by_matrix_refitted_on_masked_tokens": dict(
        prune="sparsegpt", prune__refit="true", prune__tokens="loss_mask",
        prune__overrides="[{match: v_proj, skip: true}, {match: '*.1.mlp.*', sparsity: 0.3}]"),
    "cumulative_wanda_refined_everywhere": dict(prune="wanda", prune__variant="true", prune__refine="dsnot",
                                                prune__dsnot__skip="none", **UNSTRUCTURED),
}


def add_loss_mask(file, counted):
    with h5py.File(file, "a") as out:
        out["loss_mask"] = counted.astype(np.uint8)
    return file


def counted_tokens(count):
    """Stretches of a few dozen tokens, so that some calibration sequences have none."""
    return np.repeat(np.random.default_rng(5).random(count // 50) < 0.4, 50)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    written = write_files(tmp_path_factory.mktemp("small"))
    add_loss_mask(written.calibration, counted_tokens(4000))
    return written


def masks(run_dir, occurrence=0):
    """Matrix name -> bool [rows, columns], True where pruned."""
    found = {}
    with h5py.File(sorted(run_dir.glob("[0-9][0-9]-prune*"))[occurrence] / "masks.h5") as file:
        for name, packed in file.items():
            found[name] = np.unpackbits(packed[()], axis=1)[:, :packed.attrs["columns"]].astype(bool)
    return found


def metrics(run_dir):
    return json.loads((stage_directory(run_dir, "prune") / "metrics.json").read_text())


# ------------------------------------------------------------------------------- the same bits
@pytest.fixture(scope="module", params=CASES)
def on_one_rank(request, files, tmp_path_factory):
    directory = tmp_path_factory.mktemp(request.param)
    run_well(*settings(files, directory / "1", pipeline=SHORT, **CASES[request.param]))
    return request.param, directory


@pytest.mark.parametrize("layout", LAYOUTS)
def test_masks_weights_and_metrics_are_the_same_bits_on_any_ranks_and_threads(on_one_rank, files, layout):
    case, directory = on_one_rank
    ranks, threads = LAYOUTS[layout]
    run_well(*settings(files, directory / layout, pipeline=SHORT, **CASES[case], cluster__threads_per_rank=threads),
             ranks=ranks)
    assert differences(results(directory / "1"), results(directory / layout)) == []


@pytest.mark.parametrize("case", ["alps_by_owl", "wanda_refined_and_refitted"])
def test_a_killed_run_goes_on_to_the_same_bits(files, tmp_path, case):
    run_well(*settings(files, tmp_path / "whole", pipeline=SHORT, **CASES[case]))
    command = settings(files, tmp_path / "killed", pipeline=SHORT, **CASES[case])
    state = tmp_path / "killed" / "01-prune" / "state"
    job = Started(command, ranks=2)
    job.wait_until(lambda: (state / "mask-00000.safetensors").exists())
    assert not (state.parent / "manifest.json").exists()
    job.signal(signal.SIGKILL)
    assert job.end(timeout=30).code != 0
    if case == "alps_by_owl":
        assert len(json.loads((state / "owl.json").read_text())) == 3
    run_well(*command, ranks=3)
    assert differences(results(tmp_path / "whole"), results(tmp_path / "killed")) == []


# ------------------------------------------------------------------------------- what is pruned
def test_overrides_give_each_matrix_its_own_pattern(files, tmp_path):
    run_well(*settings(files, tmp_path / "run", pipeline="[prune]", prune="magnitude",
                       prune__overrides="[{match: v_proj, skip: true}, {match: '*.1.mlp.*', sparsity: 0.3},"
                                        "{match: down_proj, pattern: '1:4'}]"))
    found = masks(tmp_path / "run")
    assert len(found) == 3 * 6
    for name, pruned in found.items():
        expected = 0.3 if ".1.mlp." in name else 0.75 if "down_proj" in name else 0.5
        assert pruned.mean() == pytest.approx(expected, abs=1e-3), name
        if expected != 0.3:
            assert (pruned.reshape(-1, 4).mean(1) == expected).all(), name


def test_owl_gives_each_block_its_sparsity_and_keeps_the_mean(files, tmp_path):
    run_well(*settings(files, tmp_path / "run", pipeline="[prune]", prune="wanda", prune__allocation="owl",
                       prune__owl__outlier_factor=3, **UNSTRUCTURED))
    blocks = metrics(tmp_path / "run")["blocks"]
    sparsities = [block["sparsity"] for block in blocks]
    assert np.mean(sparsities) == pytest.approx(0.6, abs=1e-9)
    assert max(sparsities) - min(sparsities) == pytest.approx(0.16, abs=1e-9)
    assert np.argmax([block["outlier_ratio"] for block in blocks]) == np.argmin(sparsities)
    for name, pruned in masks(tmp_path / "run").items():
        columns = pruned.shape[1]
        assert (pruned.sum(1) == int(columns * sparsities[int(name.split(".")[2])])).all(), name


@pytest.mark.parametrize("again", ["magnitude", "wanda", "sparsegpt", "alps"])
def test_zeros_of_a_sparse_model_stay_and_count_when_it_is_pruned_further(files, tmp_path, again):
    arguments = settings(files, tmp_path / "run", pipeline="[prune,prune_again,export]", prune="wanda", **UNSTRUCTURED)
    run_well(*arguments, f"+prune@prune_again={again}", "prune_again.stage=prune", "prune_again.sparsity=0.75",
             "prune_again.samples=12", "prune_again.sequence_length=64", "prune_again.refit=true")
    first, second = masks(tmp_path / "run"), masks(tmp_path / "run", 1)
    weights = load_file(stage_directory(tmp_path / "run", "export") / "model" / "model.safetensors")
    for name, before in first.items():
        zero = (weights[name] == 0).numpy()
        assert zero[before].all(), name
        assert (zero | ~second[name]).all() and second[name][before].all(), name
        assert second[name].mean() == pytest.approx(0.75, abs=0.02), name


def test_an_already_sparse_model_loses_no_weight_more_where_its_inputs_are_silent(files, tmp_path):
    """2:4 by magnitude, then 2:4 by Wanda, on a model whose down projections read features of which half are 0."""
    model = transformers.AutoModelForCausalLM.from_pretrained(files.model, dtype=torch.float32)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.up_proj.weight[torch.arange(96) % 4 < 2] = 0
    model.save_pretrained(tmp_path / "model")
    own = dataclasses.replace(files, model=tmp_path / "model")
    for again in ("wanda", "sparsegpt"):
        run_dir = tmp_path / again
        run_well(*settings(own, run_dir, pipeline="[prune,prune_again]", prune="magnitude"),
                 f"+prune@prune_again={again}", "prune_again.stage=prune", "prune_again.pattern=2:4",
                 "prune_again.samples=12", "prune_again.sequence_length=64", "prune_again.exclude=[up_proj]")
        for name, pruned in masks(run_dir, 1).items():
            assert (pruned.reshape(-1, 4).sum(1) == 2).all(), (again, name)
        said = json.loads((stage_directory(run_dir, "prune_again") / "metrics.json").read_text())
        assert said["sparsity"] == 0.5


def test_metrics_tell_the_sparsity_that_was_reached_and_the_log_where_it_is_another_than_asked(files, tmp_path):
    for name, changes, words in (
            ("variant", dict(prune="wanda", prune__variant="true"), ["prune.variant", "0.95"]),
            ("owl", dict(prune="wanda", prune__allocation="owl", prune__owl__span=0.4), ["owl", "0.95", "span"]),
            ("dense", dict(prune="magnitude"), [])):
        ended = run_well(*settings(files, tmp_path / name, pipeline="[prune]", **{**UNSTRUCTURED, "prune__sparsity": 0.95},
                                   **changes))
        said, pruned = metrics(tmp_path / name), np.concatenate([mask.ravel() for mask in masks(tmp_path / name).values()])
        assert said["sparsity"] == pytest.approx(pruned.mean(), abs=1e-12) and said["sparsity_asked"] == 0.95
        assert (abs(said["sparsity"] - 0.95) > 0.001) == bool(words), said["sparsity"]
        assert all(word in ended.output for word in words), ended.output
        assert ("samples" in said) == (name != "dense")


# ------------------------------------------------------------------------------- encoders
ENCODERS = {
    "sparsegpt": ["prune=sparsegpt", "prune.pattern=2:4"],
    "alps": ["prune=alps", "prune.sparsity=0.6"],
    "owl": ["prune=wanda", "prune.sparsity=0.6", "prune.allocation=owl"],
    "dsnot_and_refit": ["prune=wanda", "prune.pattern=2:4", "prune.refine=dsnot", "prune.dsnot.skip=none",
                        "prune.refit=true"],
    "masked_tokens": ["prune=sparsegpt", "prune.sparsity=0.6", "prune.tokens=loss_mask"],
}


@pytest.mark.parametrize("case", ENCODERS)
def test_an_encoder_is_pruned_the_same_on_any_ranks_and_reloaded_by_transformers(case, tmp_path):
    write_small("bert", 2, tmp_path / "model")
    rows = write_labelled(tmp_path / "rows.h5", np.arange(20) % 2, 2, "RTE")
    tokens = np.random.default_rng(1).integers(3, SMALL["vocab_size"], 4000)
    with h5py.File(tmp_path / "text.h5", "w") as out:
        out["tokens"], out["offsets"] = tokens.astype(np.int32), np.array([0, len(tokens)], np.int64)
        out.attrs.update({"kind": np.bytes_("text"), "vocabulary_size": np.int64(SMALL["vocab_size"]),
                          "tokenizer_checksum": np.bytes_("0" * 64), "end_token": np.int64(2)})
    add_loss_mask(tmp_path / "text.h5", counted_tokens(4000))
    for ranks in (1, 3):
        run_well("pipeline=[prune,evaluate,export]", *ENCODERS[case], "evaluate=classification", "model.dtype=float32",
                 f"model.path={tmp_path / 'model'}", f"data.calibration={tmp_path / 'text.h5'}", "prune.samples=12",
                 "prune.sequence_length=64", f"evaluate.tasks.labels.data={tmp_path / 'rows.h5'}",
                 "evaluate.tasks.labels.answers=true", f"run.dir={tmp_path / str(ranks)}", "cluster.threads_per_rank=1",
                 ranks=ranks)
    assert differences(results(tmp_path / "1"), results(tmp_path / "3")) == []
    exported = stage_directory(tmp_path / "1", "export") / "model"
    weights, found = load_file(exported / "model.safetensors"), masks(tmp_path / "1")
    assert len(found) == 12
    for name, pruned in found.items():
        assert ((weights[name] == 0).numpy() == pruned).all(), name
    asked = 0.5 if "prune.pattern=2:4" in ENCODERS[case] else 0.6
    # Wanda's rows of 32 inputs lose a whole number of them each.
    assert asked - 1 / 32 < metrics(tmp_path / "1")["sparsity"] < asked + 0.01
    model = transformers.AutoModelForSequenceClassification.from_pretrained(exported, dtype=torch.float32).eval()
    answers = (stage_directory(tmp_path / "1", "evaluate") / "labels.answers.jsonl").read_text().splitlines()
    ours, theirs = np.array([json.loads(line)["logits"] for line in answers]), plain_loop(model, rows, True)
    assert np.abs(ours - theirs).max() < 1e-4 * np.abs(theirs).max()


# ------------------------------------------------------------------------------- masked tokens
def first_block_wanda(model_directory, tokens, counted, sparsity):
    """Pruned entries of the first block's q_proj by transformers' own hidden states and a plain loop."""
    model = transformers.AutoModelForCausalLM.from_pretrained(model_directory, dtype=torch.float32).eval()
    layer = model.model.layers[0]
    with torch.no_grad():
        x = layer.input_layernorm(model.model.embed_tokens(torch.tensor(tokens.astype(np.int64)))).double().numpy()
    weight = layer.self_attn.q_proj.weight.detach().double().numpy()
    score = np.abs(weight) * np.sqrt((x[counted] ** 2).sum(0))
    pruned = np.zeros(weight.shape, bool)
    for row, order in enumerate(np.argsort(score, axis=1, kind="stable")):
        pruned[row, order[:int(weight.shape[1] * sparsity)]] = True
    return pruned


def test_only_counted_tokens_weigh(files, tmp_path):
    tokens = text_tokens(96, 9)
    counted = np.arange(96) % 7 < 2
    own = dataclasses.replace(
        files, calibration=add_loss_mask(write_tokens(tmp_path / "masked.h5", [tokens], files.model), counted))
    found = {}
    for which in ("all", "loss_mask"):
        run_well(*settings(own, tmp_path / which, pipeline="[prune]", prune="wanda", prune__tokens=which,
                           prune__samples=1, prune__sequence_length=96, model__dtype="float32", **UNSTRUCTURED))
        found[which] = masks(tmp_path / which)["model.layers.0.self_attn.q_proj.weight"]
    everything = np.ones(96, bool)
    assert (found["all"] == first_block_wanda(files.model, tokens, everything, 0.6)).all()
    assert (found["loss_mask"] == first_block_wanda(files.model, tokens, counted, 0.6)).all()
    assert (found["all"] != found["loss_mask"]).any()


def test_a_mask_that_is_missing_or_counts_nothing_is_refused(files, tmp_path):
    for counted, words in ((None, ["loss_mask", "none.h5"]), (np.zeros(4000, bool), ["loss_mask", "no token"])):
        own = dataclasses.replace(
            files, calibration=write_tokens(tmp_path / "none.h5", [text_tokens(4000, 1)], files.model))
        if counted is not None:
            add_loss_mask(own.calibration, counted)
        ended = run(*settings(own, tmp_path / "run", pipeline="[prune]", prune__tokens="loss_mask"), ranks=2)
        assert ended.code == 2, str(ended)
        assert all(word in ended.messages[0] for word in words), ended.messages
