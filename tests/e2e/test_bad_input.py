"""What a person can get wrong: one message that names it, the exit code of its kind, and nothing written."""

import dataclasses
import json
import shutil
import struct
from dataclasses import dataclass, field
from pathlib import Path

import h5py
import numpy as np
import pytest
import transformers
from safetensors.torch import load_file, save_file

from program import SOURCE, run, settings
from small_model import VOCABULARY, Files, text_tokens, write_files, write_model, write_tokens

USER, ENVIRONMENT = 2, 3
MAGNITUDE = dict(prune="magnitude")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("small"))


@dataclass
class Case:
    """Settings that differ from a run that would work, and what the message must contain."""

    words: list
    changes: dict = field(default_factory=dict)
    arguments: list = field(default_factory=list)
    code: int = USER
    run_dir: Path | None = None


def refused(files: Files, tmp_path: Path, case: Case, ranks: int = 2) -> str:
    """The message of a run that must end before it writes anything."""
    run_dir = case.run_dir or tmp_path / "out" / "run"
    ended = run(*settings(files, run_dir, **case.changes), *case.arguments, ranks=ranks, working_directory=tmp_path,
                timeout=60)
    assert ended.code == case.code, str(ended)
    assert len(ended.messages) == 1, str(ended)
    assert ended.errors.strip() == ended.messages[0], str(ended)
    for trace in ("terminate called", "what():", "Traceback", "MPI_ABORT", "Stack", ".cpp:"):
        assert trace not in ended.errors + ended.output, str(ended)
    for word in case.words:
        assert str(word) in ended.messages[0], f"{word!r} is not in: {ended.messages[0]}"
    assert not (tmp_path / "out").exists()
    return ended.messages[0]


# ------------------------------------------------------------------------------ the configuration
SETTINGS = {
    "misspelt_key": Case(["sparsty", "sparsity"], arguments=["prune.sparsty=0.5"]),
    "misspelt_key_forced": Case(["prune.sparsty", "sparsity"], arguments=["+prune.sparsty=0.5"]),
    "misspelt_top_level_key": Case(["retrian", "retrain"], arguments=["retrian.steps=5"]),
    "misspelt_task_key": Case(["evaluate.tasks.text.segment", "segments"],
                              arguments=["+evaluate.tasks.text.segment=5"]),
    "misspelt_group_choice": Case(["wnda", "wanda"], dict(prune="wnda")),
    "misspelt_pipeline_entry": Case(["prunee", "prune"], dict(pipeline="[prunee]")),
    "misspelt_configuration": Case(["quikstart", "quickstart"], arguments=["--config-name", "quikstart"]),
    "sparsity_out_of_range": Case(["prune.sparsity", "1.2", "[0, 1)"],
                                  dict(prune__sparsity=1.2, prune__pattern="unstructured")),
    "no_samples": Case(["prune.samples", "0"], dict(prune__samples=0)),
    "samples_that_are_no_number": Case(["prune.samples", "many", "integer"], dict(prune__samples="many")),
    "negative_learning_rate": Case(["retrain.learning_rate", "-1"], dict(retrain__learning_rate=-1)),
    "too_many_bits": Case(["compress.bits", "9", "8"], dict(compress__bits=9)),
    "unknown_type": Case(["model.dtype", "float8", "bfloat16", "float32"], dict(model__dtype="float8")),
    "sparsity_against_pattern": Case(["prune.sparsity", "0.7", "2:4"], dict(prune__sparsity=0.7)),
    "pattern_that_is_none": Case(["prune.pattern", "4:2"], dict(prune__pattern="4:2")),
    "pattern_that_does_not_divide": Case(["2:5", "64"], dict(prune__pattern="2:5", prune__block_size=100)),
    "rank_and_budget": Case(["compress", "rank", "budget"], dict(compress__rank=4)),
    "batch_of_broken_units": Case(["retrain.batch_size", "micro_batch_size", "4", "3"],
                                  dict(retrain__micro_batch_size=3)),
    "row_groups_that_do_not_divide": Case(["retrain.row_groups", "7", "model.layers.0.self_attn.q_proj", "64"],
                                          dict(retrain__row_groups=7)),
    "target_that_matches_nothing": Case(["retrain.targets", "qproj"], dict(retrain__targets="[qproj]")),
    "matrix_that_does_not_exist": Case(["prune.include", "*.qproj"], dict(prune__include="['*.qproj']")),
    "unknown_entry_to_start_from": Case(["pruned", "prune"], dict(retrain__from="pruned")),
    "data_that_are_not_set": Case(["data.calibration"], dict(data__calibration="null")),
    "model_that_is_not_set": Case(["model.path"], dict(model__path="???")),
    "device_that_this_version_does_not_use": Case(["cluster.device", "cuda"], dict(cluster__device="cuda")),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings(files, tmp_path, name):
    refused(files, tmp_path, SETTINGS[name], ranks=1)


def test_a_sequence_longer_than_the_learned_positions(files, tmp_path):
    """Rotary positions go on for ever; a table of them ends."""
    model = tmp_path / "gpt2"
    config = transformers.GPT2Config(vocab_size=VOCABULARY, n_positions=96, n_embd=64, n_layer=2, n_head=4)
    transformers.GPT2LMHeadModel(config).save_pretrained(model)
    shutil.copy(files.model / "tokenizer.json", model)
    refused(dataclasses.replace(files, model=model), tmp_path,
            Case(["retrain.sequence_length", "97", "96", str(model)],
                 dict(retrain__sequence_length=97, retrain__targets="null")))


@pytest.fixture
def own_configs(tmp_path):
    shutil.copytree(SOURCE / "configs", tmp_path / "configs")
    return tmp_path / "configs"


def test_a_misspelt_key_in_a_file_is_named_with_file_line_and_nearest_key(files, tmp_path, own_configs):
    (own_configs / "mine.yaml").write_text("defaults: [default, _self_]\nprune:\n  sampels: 4\n")
    refused(files, tmp_path, Case(["mine.yaml:3", "prune.sampels", "samples"],
                                  arguments=["--config-dir", own_configs, "--config-name", "mine"]))


def test_an_unquoted_pattern_in_a_file_is_named_with_the_way_out(files, tmp_path, own_configs):
    (own_configs / "prune" / "mine.yaml").write_text("defaults: [wanda, _self_]\npattern: 2:4\n")
    arguments = [word for word in settings(files, tmp_path / "out" / "run", prune="mine")
                 if not word.startswith("prune.pattern")]
    ended = run("--config-dir", own_configs, *arguments, ranks=2)
    assert ended.code == USER, str(ended)
    assert ended.errors.strip() == ended.messages[0], str(ended)
    for word in ("mine.yaml:2", "prune.pattern", "124", '"2:4"'):
        assert word in ended.messages[0]
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------- the model
@pytest.fixture
def own_model(files, tmp_path):
    """The files of a run with a copy of the model that a test may damage."""
    shutil.copytree(files.model, tmp_path / "model")
    return Files(tmp_path / "model", files.calibration, files.train, files.held_out)


def rewrite_header(file: Path, change) -> None:
    """Changes the header of a safetensors file and leaves its data."""
    content = file.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8:8 + length])
    change(header)
    written = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(written)) + written + content[8 + length:])


def test_a_missing_model(files, tmp_path):
    refused(files, tmp_path, Case([tmp_path / "nowhere"], dict(model__path=tmp_path / "nowhere")))


def test_a_directory_that_is_no_model(files, tmp_path):
    (tmp_path / "empty").mkdir()
    refused(files, tmp_path, Case([tmp_path / "empty", "model.safetensors"], dict(model__path=tmp_path / "empty")))


def test_a_truncated_file(own_model, tmp_path):
    file = own_model.model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    refused(own_model, tmp_path, Case([file, "cut off"]))


def test_a_file_of_a_few_bytes(own_model, tmp_path):
    file = own_model.model / "model.safetensors"
    file.write_bytes(b"abc")
    refused(own_model, tmp_path, Case([file, "3 bytes"]))


def test_a_header_longer_than_any_file(own_model, tmp_path):
    file = own_model.model / "model.safetensors"
    file.write_bytes(struct.pack("<Q", 1 << 62) + file.read_bytes()[8:])
    refused(own_model, tmp_path, Case([file, 1 << 62]))


def test_overlapping_tensors(own_model, tmp_path):
    def overlap(header):
        names = sorted((name for name in header if "q_proj" in name), key=lambda name: header[name]["data_offsets"])
        header[names[1]]["data_offsets"] = header[names[0]]["data_offsets"]
    file = own_model.model / "model.safetensors"
    rewrite_header(file, overlap)
    refused(own_model, tmp_path, Case([file, "q_proj.weight"]))


def test_a_tensor_larger_than_the_file(own_model, tmp_path):
    def enlarge(header):
        entry = header["model.norm.weight"]
        entry["data_offsets"][1] += 1 << 40
        entry["shape"] = [64 + (1 << 39)]
    file = own_model.model / "model.safetensors"
    rewrite_header(file, enlarge)
    refused(own_model, tmp_path, Case([file, "model.norm.weight"]))


def test_a_shape_that_is_not_the_configurations(own_model, tmp_path):
    config = json.loads((own_model.model / "config.json").read_text())
    config["intermediate_size"] = 128
    (own_model.model / "config.json").write_text(json.dumps(config))
    refused(own_model, tmp_path, Case(["gate_proj.weight", "96", "128", own_model.model]))


def test_a_missing_tensor(own_model, tmp_path):
    file = own_model.model / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, file)
    refused(own_model, tmp_path, Case(["model.layers.1.mlp.up_proj.weight", own_model.model]))


def test_a_missing_config(own_model, tmp_path):
    (own_model.model / "config.json").unlink()
    refused(own_model, tmp_path, Case([own_model.model, "config.json"]))


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_a_weight_that_is_not_a_number_is_named(own_model, tmp_path, method):
    file = own_model.model / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.self_attn.v_proj.weight"][3, 5] = float("nan")
    save_file(tensors, file)
    ended = run(*settings(own_model, tmp_path / "run", pipeline="[prune,export]", prune=method), ranks=2)
    assert ended.code == USER, str(ended)
    assert len(ended.messages) == 1, str(ended)
    # What depends on it alone is met first where inputs are looked at before weights.
    assert "layers.1.self_attn.v_proj" in ended.messages[0] or "block 1" in ended.messages[0]
    assert not list(tmp_path.glob("run/*/manifest.json"))


def test_an_activation_that_overflows_is_named_with_its_block(own_model, tmp_path):
    """Finite weights, infinite products: in bfloat16 as in float32."""
    file = own_model.model / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"].fill_(3e38)
    save_file(tensors, file)
    ended = run(*settings(own_model, tmp_path / "run", pipeline="[prune,export]"), ranks=2)
    assert ended.code == USER, str(ended)
    assert len(ended.messages) == 1, str(ended)
    assert "layers.1" in ended.messages[0] or "block 1" in ended.messages[0]


def test_an_exports_directory_with_a_model_of_another_program_is_left_alone(files, tmp_path):
    shutil.copytree(files.model, tmp_path / "theirs")
    before = {file.name: file.read_bytes() for file in (tmp_path / "theirs").iterdir()}
    refused(files, tmp_path, Case([tmp_path / "theirs", "model.safetensors", "choose another", "export.directory"],
                                  dict(export__directory=tmp_path / "theirs")))
    assert {file.name: file.read_bytes() for file in (tmp_path / "theirs").iterdir()} == before


# -------------------------------------------------------------------------------------- the data
def test_data_of_another_vocabulary(files, tmp_path):
    file = write_tokens(tmp_path / "other.h5", [text_tokens(2000, 1)], files.model, vocabulary=300)
    for key in ("data__calibration", "data__train", "evaluate__tasks__text__data"):
        refused(files, tmp_path, Case([file, 300, 200], {key: file}))


@pytest.mark.parametrize("key", ["data__calibration", "data__train", "evaluate__tasks__text__data"])
def test_data_of_another_tokenizer_with_as_many_tokens(files, tmp_path, key):
    other = write_model(tmp_path / "other")
    (other / "tokenizer.json").write_text((other / "tokenizer.json").read_text().replace('"w7"', '"v7"'))
    file = write_tokens(tmp_path / "other.h5", [text_tokens(2000, 1)], other)
    refused(files, tmp_path, Case([file, files.model / "tokenizer.json", "--tokenizer"], {key: file}))


def test_data_of_another_tokenizer_for_a_derived_model(files, tmp_path):
    """Its tokenizer is that of the checkpoint at its root."""
    first = tmp_path / "first"
    assert run(*settings(files, first, pipeline="[prune]", **MAGNITUDE)).code == 0
    derived = dict(model__path=first / "01-prune" / "model", pipeline="[evaluate]")
    file = write_tokens(tmp_path / "other.h5", [text_tokens(2000, 1)], files.model)
    with h5py.File(file, "r+") as opened:
        opened.attrs["tokenizer_checksum"] = np.bytes_("0" * 64)
    refused(files, tmp_path, Case([file, files.model / "tokenizer.json"],
                                  dict(evaluate__tasks__text__data=file, **derived)))
    assert run(*settings(files, tmp_path / "second", **derived)).code == 0


def test_data_that_do_not_say_their_tokenizer_are_used_with_a_warning(files, tmp_path):
    file = write_tokens(tmp_path / "old.h5", [text_tokens(2000, 1)], files.model)
    with h5py.File(file, "r+") as opened:
        del opened.attrs["tokenizer_checksum"]
    ended = run(*settings(files, tmp_path / "run", pipeline="[evaluate]", evaluate__tasks__text__data=file), ranks=2)
    assert ended.code == 0, str(ended)
    warnings = [line for line in ended.output.splitlines() if "does not say" in line]
    assert len(warnings) == 1 and str(file) in warnings[0], str(ended)


def test_an_empty_data_set(files, tmp_path):
    file = write_tokens(tmp_path / "empty.h5", [np.empty(0, np.int32)], files.model)
    refused(files, tmp_path, Case([file, "empty"], dict(data__train=file)))


@pytest.mark.parametrize("key", ["data__calibration", "data__train", "evaluate__tasks__text__data"])
def test_fewer_tokens_than_asked(files, tmp_path, key):
    file = write_tokens(tmp_path / "short.h5", [text_tokens(50, 1)], files.model)
    refused(files, tmp_path, Case([file, 50, 64], {key: file}))


def test_fewer_segments_than_asked(files, tmp_path):
    refused(files, tmp_path, Case([files.held_out, 15, 16], dict(evaluate__tasks__text__segments=16)))


def test_a_token_outside_the_vocabulary(files, tmp_path):
    tokens = text_tokens(2000, 1)
    tokens[77] = 200
    file = write_tokens(tmp_path / "outside.h5", [tokens], files.model)
    refused(files, tmp_path, Case([file, "77", "200"], dict(data__calibration=file)))


def test_data_that_are_not_there(files, tmp_path):
    refused(files, tmp_path, Case([tmp_path / "nowhere.h5"], dict(data__train=tmp_path / "nowhere.h5")))


def test_data_that_are_no_hdf5(files, tmp_path):
    (tmp_path / "text.h5").write_text("a text\n" * 100)
    refused(files, tmp_path, Case([tmp_path / "text.h5"], dict(data__calibration=tmp_path / "text.h5")))


# ----------------------------------------------------------------------------- the run directory
def test_a_run_directory_below_a_file(files, tmp_path):
    (tmp_path / "file").write_text("mine")
    refused(files, tmp_path, Case([tmp_path / "file"], code=ENVIRONMENT, run_dir=tmp_path / "file" / "run"))
    assert (tmp_path / "file").read_text() == "mine"


def test_a_run_directory_that_cannot_be_written(files, tmp_path):
    """/proc refuses new directories to everyone, root too."""
    refused(files, tmp_path, Case(["/proc/espalier"], code=ENVIRONMENT, run_dir=Path("/proc/espalier/run")))


def test_a_run_directory_that_is_damaged_is_named(files, tmp_path):
    run_dir = tmp_path / "run"
    arguments = settings(files, run_dir, pipeline="[prune]", **MAGNITUDE)
    assert run(*arguments).code == 0
    (run_dir / "01-prune" / "manifest.json").write_text("{")
    ended = run(*arguments, ranks=2)
    # Either it says which file is damaged, or it makes the stage anew; it does not go on from it.
    if ended.code == 0:
        assert json.loads((run_dir / "01-prune" / "manifest.json").read_text())["status"] == "finished"
    else:
        assert ended.code == USER and len(ended.messages) == 1 and "manifest.json" in ended.messages[0], str(ended)
