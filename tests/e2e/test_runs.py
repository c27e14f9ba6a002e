"""Whole runs on a small model: the same bits however they are distributed, what transformers makes
of the export, and that nothing is computed twice."""

import json
import math
import shutil
import time

import h5py
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

import program
from program import differences, manifest_times, results, run, run_well, settings, stage_directory
from small_model import VOCABULARY, text_tokens, write_files

MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("small"))


# ------------------------------------------------------------------------------- the same bits
LAYOUTS = {"2_ranks": (2, 1), "3_ranks": (3, 1), "1_rank_of_2_threads": (1, 2)}
SHORT = "[evaluate,prune,evaluate]"
CASES = {
    "wanda_2_of_4": {},
    "wanda_unstructured": dict(pipeline=SHORT, prune__pattern="unstructured", prune__sparsity=0.6),
    "sparsegpt_2_of_4": dict(pipeline=SHORT, prune="sparsegpt"),
    "sparsegpt_unstructured": dict(prune="sparsegpt", prune__pattern="unstructured", retrain__dropout=0.0,
                                   compress__allocation="greedy"),
    "magnitude_in_float32": dict(pipeline=SHORT, prune="magnitude", model__dtype="float32"),
    "sparsegpt_in_float32": dict(pipeline=SHORT, prune="sparsegpt", model__dtype="float32", prune__block_size=32),
}


@pytest.fixture(scope="module", params=CASES)
def on_one_rank(request, files, tmp_path_factory):
    directory = tmp_path_factory.mktemp(request.param)
    run_well(*settings(files, directory / "1", **CASES[request.param]))
    return request.param, directory


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_output_is_the_same_bits_on_any_ranks_and_threads(on_one_rank, files, layout):
    case, directory = on_one_rank
    ranks, threads = LAYOUTS[layout]
    run_well(*settings(files, directory / layout, **CASES[case], cluster__threads_per_rank=threads), ranks=ranks)
    expected = results(directory / "1")
    assert differences(expected, results(directory / layout)) == []
    whole = "pipeline" not in CASES[case]
    names = {name.rpartition("/")[2] for name in expected}
    assert {"masks.h5", "metrics.json"} <= names
    assert not whole or {"adapters.h5", "residual.h5", "model.safetensors"} <= names
    if whole:
        training = program.losses(directory / "1")
        assert [step for step, _, _ in training] == list(range(1, 21))
        assert training == program.losses(directory / layout)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_hidden_states_on_disk_give_the_same_bits(files, tmp_path, method):
    command = dict(pipeline="[prune,evaluate]", prune=method, prune__unit=5)
    run_well(*settings(files, tmp_path / "memory", **command))
    for layout, (ranks, threads) in {"1": (1, 1), **LAYOUTS}.items():
        run_dir = tmp_path / layout
        ended = run_well(*settings(files, run_dir, **command, cluster__threads_per_rank=threads,
                                   cluster__memory_gib=0.001), ranks=ranks)
        assert "hidden states spill to disk" in ended.output
        assert differences(results(tmp_path / "memory"), results(run_dir)) == []
        assert not [path for path in run_dir.rglob("*") if "hidden" in path.name]


def test_another_seed_gives_other_masks(files, tmp_path):
    """So that the comparison above compares something."""
    masks = []
    for seed in (0, 1):
        run_well(*settings(files, tmp_path / f"{seed}", pipeline="[prune]", run__seed=seed))
        masks.append(results(tmp_path / f"{seed}")["01-prune/masks.h5"])
    assert masks[0] != masks[1]


# ------------------------------------------------------------------- what others make of the export
@pytest.fixture(scope="module")
def exported(files, tmp_path_factory):
    """A float32 run that exports after pruning, retraining and compressing."""
    run_dir = tmp_path_factory.mktemp("exported") / "run"
    pipeline = "[evaluate,prune,evaluate,export,retrain,evaluate,export,compress,evaluate,export]"
    run_well(*settings(files, run_dir, pipeline=pipeline, model__dtype="float32", retrain__steps=40), ranks=2)
    return run_dir


def theirs(directory, tokens, length=64):
    """exp of the mean negative log likelihood over whole segments, by transformers and a plain loop."""
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    total, count = 0.0, 0
    for begin in range(0, len(tokens) - length + 1, length):
        segment = torch.tensor(tokens[begin:begin + length].astype(np.int64))[None]
        with torch.no_grad():
            probabilities = model(segment).logits[0].double().log_softmax(-1).tolist()
        for position in range(length - 1):
            total -= probabilities[position][tokens[begin + position + 1]]
            count += 1
    return math.exp(total / count)


def test_perplexities_are_those_of_transformers(exported, files):
    ours = program.perplexities(exported)
    held_out = text_tokens(1000, 4)
    directories = [files.model] + [stage_directory(exported, "export", i) / "model" for i in range(3)]
    assert ours == pytest.approx([theirs(directory, held_out) for directory in directories], rel=1e-4)


def test_retraining_helps_and_compressing_keeps_most_of_it(exported):
    dense, pruned, retrained, compressed = program.perplexities(exported)
    assert pruned != pytest.approx(dense, rel=1e-3)
    assert retrained < pruned
    assert compressed < pruned
    loss = [value for _, value, _ in program.losses(exported)]
    assert sum(loss[-5:]) < sum(loss[:5])


def test_the_export_is_a_checkpoint_with_its_tokenizer(exported, files):
    directory = stage_directory(exported, "export", 2) / "model"
    model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    assert model.dtype == torch.float32
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    assert tokenizer("w5 w199").input_ids == [5, 199]
    assert json.loads((directory / "config.json").read_text())["vocab_size"] == VOCABULARY


def test_zeros_are_2_of_4_and_stay_where_pruning_made_them(exported):
    pruned, retrained, compressed = (
        load_file(stage_directory(exported, "export", i) / "model" / "model.safetensors") for i in range(3))
    matrices = [name for name in pruned if any(name.endswith(f"{matrix}.weight") for matrix in MATRICES)]
    assert len(matrices) == 3 * len(MATRICES)
    for name in matrices:
        zeros = pruned[name] == 0
        assert (zeros.reshape(-1, 4).sum(1) == 2).all(), name
        for model in (retrained, compressed):
            assert torch.equal(model[name] == 0, zeros), name
        assert not torch.equal(retrained[name], pruned[name]), name
    for name in pruned.keys() - matrices:
        assert torch.equal(retrained[name], pruned[name]), name


# ----------------------------------------------------------------------- nothing is computed twice
@pytest.fixture(scope="module")
def finished_once(files, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    run_well(*settings(files, run_dir))
    return run_dir


@pytest.fixture
def finished(finished_once, tmp_path):
    """A finished run as it was left, always under the same path, whatever a test does to it."""
    shutil.copytree(finished_once, tmp_path / "kept", symlinks=True)
    yield finished_once
    shutil.rmtree(finished_once)
    shutil.move(tmp_path / "kept", finished_once)


def test_the_same_command_again_runs_nothing_and_ends_soon(files, finished):
    before, expected = manifest_times(finished), results(finished)
    assert len(before) == 8
    ended = run_well(*settings(files, finished))
    assert manifest_times(finished) == before
    assert results(finished) == expected
    assert ended.seconds < 10


def test_neither_ranks_nor_threads_nor_the_time_limit_make_a_finished_run_another(files, finished):
    before = manifest_times(finished)
    run_well(*settings(files, finished, cluster__threads_per_rank=2, cluster__timeout_seconds=300), ranks=2)
    assert manifest_times(finished) == before


@pytest.mark.parametrize("stage,output", [("prune", "masks.h5"), ("retrain", "adapters.h5"),
                                          ("compress", "residual.h5"), ("export", "model/model.safetensors")])
def test_a_stage_with_a_lost_output_runs_again_and_no_other(files, finished, stage, output):
    before, expected = manifest_times(finished), results(finished)
    directory = stage_directory(finished, stage)
    (directory / output).unlink()
    run_well(*settings(files, finished))
    after = manifest_times(finished)
    assert {name for name in before if after[name] != before[name]} == {directory.name}
    assert differences(expected, results(finished)) == []


def test_a_stage_with_an_altered_output_runs_again(files, finished):
    before, expected = manifest_times(finished), results(finished)
    directory = stage_directory(finished, "retrain")
    weights = next((directory / "model").glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-100] ^= 1
    weights.write_bytes(content)
    run_well(*settings(files, finished))
    assert manifest_times(finished)[directory.name] != before[directory.name]
    assert differences(expected, results(finished)) == []


@pytest.mark.parametrize("name,stage", [("calibration", "prune"), ("train", "retrain"), ("held_out", "evaluate")])
def test_other_tokens_under_the_same_path_make_their_stage_run_again(files, finished, tmp_path, name, stage):
    before, file = manifest_times(finished), getattr(files, name)
    shutil.copy2(file, tmp_path / "kept.h5")
    try:
        with h5py.File(file, "r+") as opened:
            opened["tokens"][100:200] = 5
        run_well(*settings(files, finished))
        directory = stage_directory(finished, stage).name
        after = manifest_times(finished)
        assert after[directory] != before[directory]
        # What neither reads them nor stands on what does is kept.
        kept = {"calibration": [], "train": ["prune"], "held_out": ["prune", "retrain", "compress", "export"]}[name]
        for other in (stage_directory(finished, one).name for one in kept):
            assert after[other] == before[other], other
    finally:
        shutil.copy2(tmp_path / "kept.h5", file)


def test_an_export_to_a_directory_of_ones_own_is_made_again_when_it_is_lost(files, tmp_path):
    own = tmp_path / "mine" / "model"
    command = settings(files, tmp_path / "run", pipeline="[prune,export]", prune="magnitude", export__directory=own)
    run_well(*command)
    expected = (own / "model.safetensors").read_bytes()
    run_well(*command)
    shutil.rmtree(own)
    run_well(*command)
    assert (own / "model.safetensors").read_bytes() == expected
    run_well(*command, "run.resume=false")  # over the export that lies there
    assert (own / "model.safetensors").read_bytes() == expected


def test_an_export_beside_other_files_answers_for_its_own_only(files, tmp_path):
    own = tmp_path / "mine"
    own.mkdir()
    (own / "notes.txt").write_text("mine" * 1000)
    command = settings(files, tmp_path / "run", pipeline="[export]", export__directory=own)
    run_well(*command, ranks=2)
    directory = stage_directory(tmp_path / "run", "export")
    manifest = json.loads((directory / "manifest.json").read_text())
    listed = {file["path"]: file["bytes"] for file in manifest["facts"]["elsewhere"]["files"]}
    assert "notes.txt" not in listed and {"model.safetensors", "config.json", "tokenizer.json"} <= listed.keys()
    metrics = json.loads((directory / "metrics.json").read_text())
    assert (metrics["files"], metrics["bytes"]) == (len(listed), sum(listed.values()))
    before = manifest_times(tmp_path / "run")
    (own / "notes.txt").write_text("changed")
    run_well(*command)
    assert manifest_times(tmp_path / "run") == before


def test_another_configuration_in_the_same_directory_is_refused_with_both_values(files, finished):
    before, expected = manifest_times(finished), results(finished)
    kept = (finished / "config.yaml").read_bytes()
    ended = run(*settings(files, finished, prune="sparsegpt"), ranks=2)
    assert ended.code == 2, str(ended)
    assert len(ended.messages) == 1
    for word in ("prune.method", "wanda", "sparsegpt", "run.dir", "run.resume=false"):
        assert word in ended.messages[0]
    assert manifest_times(finished) == before
    assert results(finished) == expected
    assert (finished / "config.yaml").read_bytes() == kept


def test_resume_false_starts_the_run_anew(files, finished):
    before, expected = manifest_times(finished), results(finished)
    run_well(*settings(files, finished, run__resume="false"))
    after = manifest_times(finished)
    assert all(after[name] != before[name] for name in before)
    assert differences(expected, results(finished)) == []


# ------------------------------------------------------------------------------- the command line
def test_a_log_holds_plain_lines(files, tmp_path):
    """mpirun gives its ranks a terminal even where its own output is a file."""
    ended = run_well(*settings(files, tmp_path / "run", pipeline="[prune,evaluate]"), ranks=2)
    assert "\x1b" not in ended.output and "\r" not in ended.output.replace("\r\n", "\n"), repr(ended.output)
    assert "perplexity" in ended.output and str(tmp_path / "run") in ended.output


def test_help_lists_the_groups_and_their_choices():
    start = time.monotonic()
    ended = run_well("--help")
    for word in ("prune", "magnitude", "sparsegpt", "wanda", "retrain", "spp", "compress", "ere", "export", "dense",
                 "--config-name", "--multirun", "--cfg"):
        assert word in ended.output, word
    assert time.monotonic() - start < 20


def test_cfg_job_prints_the_composed_configuration_and_writes_nothing(files, tmp_path):
    import yaml
    ended = run_well(*settings(files, "out"), "--cfg", "job", working_directory=tmp_path)
    printed = yaml.safe_load(ended.output)
    assert printed["prune"]["method"] == "wanda"
    assert printed["prune"]["pattern"] == "2:4"
    assert printed["retrain"]["steps"] == 20
    assert printed["pipeline"][1] == "prune"
    assert list(tmp_path.iterdir()) == []


def test_cfg_job_works_without_a_model():
    assert "path: ???" in run_well("--cfg", "job").output


def test_info_defaults_lists_where_every_group_comes_from():
    ended = run_well("--info", "defaults", "prune=sparsegpt")
    for word in ("prune/sparsegpt", "prune/base", "retrain/spp", "compress/ere"):
        assert word in ended.output, word


def test_a_sweep_makes_a_directory_for_each_job(files, tmp_path):
    arguments = [word for word in settings(files, "unused", pipeline="[prune,evaluate]")
                 if not word.startswith(("run.dir=", "prune="))]
    run_well("-m", *arguments, "prune=wanda,magnitude", working_directory=tmp_path, timeout=60)
    jobs = sorted(path.parent.parent for path in tmp_path.glob("outputs/default-sweep/**/01-prune/manifest.json"))
    assert len(jobs) == 2, list(tmp_path.rglob("*"))
    masks = [results(job)["01-prune/masks.h5"] for job in jobs]
    assert masks[0] != masks[1]
    # Neither threads nor run.resume name a directory: the same sweep goes on in the same ones.
    assert not [job for job in jobs if "threads" in str(job) or "timeout" in str(job)]
    again = [word for word in arguments if not word.startswith("cluster.")]
    ended = run_well("-m", *again, "prune=wanda,magnitude", "cluster.timeout_seconds=300", "run.resume=true",
                     working_directory=tmp_path, timeout=60)
    assert ended.output.count("done before, kept") == 4, str(ended)
