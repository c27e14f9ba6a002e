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
