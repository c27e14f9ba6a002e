"""Training in full against a plain transformers loop on the same rows: after two steps every tensor of the model is the
loop's, whatever the family keeps outside its linear layers. Masks that move, as whole runs."""

import json
import signal
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from program import Started, differences, results, run, run_well, settings, stage_directory
from small_model import text_tokens, write_files, write_tokens
from test_architectures import write_model
from test_classification import MODELS, SMALL, randomized, write_labelled

# AdamW with an epsilon far above the gradients takes steps in proportion to them: a wrong factor shows.
STEPS, ROWS, RATE, EPSILON, BETAS = 2, 12, 1.0, 1.0, (0.9, 0.98)
OWN_PROJECTIONS = dict(relative_attention=True, pos_att_type=["c2p", "p2c"], position_buckets=16, type_vocab_size=2,
                       share_att_key=False, norm_rel_ebd="layer_norm")
ENCODERS = {
    "bert": MODELS["bert"], "roberta": MODELS["roberta"], "deberta-v2": MODELS["deberta-v2"],
    "deberta_own_projections": lambda labels: transformers.DebertaV2ForSequenceClassification(
        transformers.DebertaV2Config(**SMALL, **OWN_PROJECTIONS, num_labels=labels)),
}
DECODERS = ["phi", "opt", "gpt_neox", "gpt2"]


def arguments(method: str, model: Path, train: Path, run_dir: Path, *others) -> list:
    words = ["pipeline=[retrain,export]", f"model.path={model}", "model.dtype=float32", f"data.train={train}",
             f"run.dir={run_dir}", f"retrain={method}", f"retrain.steps={STEPS}", f"retrain.batch_size={ROWS}",
             "retrain.micro_batch_size=1", "retrain.sequence_length=64", f"retrain.learning_rate={RATE}",
             f"retrain.eps={EPSILON}", "retrain.betas=[0.9,0.98]", "retrain.weight_decay=0",
             "retrain.warmup_ratio=null", "retrain.schedule=constant", "retrain.max_grad_norm=0", "cluster.threads_per_rank=1"]
    return [*words, *others]


def their_steps(model, loss_of, trained) -> dict:
    """The parameters after the steps of a plain loop."""
    parameters = [parameter for name, parameter in model.named_parameters() if trained(name)]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, eps=EPSILON, weight_decay=0.0, betas=BETAS)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def expect_the_same(ours: dict, theirs: dict, before: dict) -> None:
    assert theirs.keys() == ours.keys()
    for name, value in theirs.items():
        moved = (value - before[name]).abs().max()
        assert (ours[name] - value).abs().max() < 2e-3 * moved + 1e-6, name
    assert sum((value - before[name]).abs().max() > 1e-4 for name, value in theirs.items()) > 4


def exported(run_dir: Path, kind) -> dict:
    model = kind.from_pretrained(stage_directory(run_dir, "export") / "model", dtype=torch.float32)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def labelled_loss(rows: list, labels: np.ndarray, types: bool):
    def loss_of(model):
        losses = []
        for (tokens, kinds), label in zip(rows, labels):
            inputs = {"input_ids": torch.tensor(np.array([tokens]))}
            if types:
                inputs["token_type_ids"] = torch.tensor(np.array([kinds]))
            losses.append(torch.nn.functional.cross_entropy(model(**inputs).logits, torch.tensor([int(label)])))
        return torch.stack(losses).mean()
    return loss_of


@pytest.mark.parametrize("method", ["full", "bitfit"])
@pytest.mark.parametrize("name", ENCODERS)
def test_every_tensor_of_an_encoder_is_that_of_a_plain_loop(name, method, tmp_path):
    model = randomized(ENCODERS[name](3))
    model.save_pretrained(tmp_path / "model")
    before = {key: value.detach().clone() for key, value in model.named_parameters()}
    labels = np.arange(ROWS) % 3
    types = name in ("bert", "deberta_own_projections")
    rows = write_labelled(tmp_path / "train.h5", labels, 3, "RTE", types=types)
    run_well(*arguments(method, tmp_path / "model", tmp_path / "train.h5", tmp_path / "run"), ranks=2)

    def trained(key: str) -> bool:
        head = key.startswith(("classifier.", "pooler.", "bert.pooler."))
        return method == "full" or head or key.endswith(".bias")
    theirs = their_steps(model, labelled_loss(rows, labels, types), trained)
    expect_the_same(exported(tmp_path / "run", transformers.AutoModelForSequenceClassification), theirs, before)


def instructions(file: Path, model: Path) -> list:
    rows = [text_tokens(8 + 3 * row, row) for row in range(ROWS)]
    for row in rows:
        row[row == 1] = 2  # OPT's padding: transformers gives its embedding no gradient
    write_tokens(file, rows, model)
    with h5py.File(file, "a") as out:
        out.attrs["kind"] = np.bytes_("instruction")
    return rows


def next_token_loss(rows: list):
    def loss_of(model):
        sums = []
        for row in rows:
            tokens = torch.tensor(row.astype(np.int64))[None]
            sums.append(torch.nn.functional.cross_entropy(model(tokens).logits[0, :-1], tokens[0, 1:], reduction="sum"))
        return torch.stack(sums).sum() / sum(len(row) - 1 for row in rows)
    return loss_of


@pytest.mark.parametrize("method", ["full", "bitfit"])
@pytest.mark.parametrize("family", DECODERS)
def test_every_tensor_of_a_decoder_is_that_of_a_plain_loop(family, method, tmp_path):
    """phi: a bias of the head; opt: projections around the blocks, tied embedding; gpt_neox: an untied head."""
    write_model(family, tmp_path / "model")
    rows = instructions(tmp_path / "train.h5", tmp_path / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    before = {key: value.detach().clone() for key, value in model.named_parameters()}
    run_well(*arguments(method, tmp_path / "model", tmp_path / "train.h5", tmp_path / "run"), ranks=2)
    theirs = their_steps(model, next_token_loss(rows), lambda key: method == "full" or key.endswith(".bias"))
    expect_the_same(exported(tmp_path / "run", transformers.AutoModelForCausalLM), theirs, before)


def test_an_untied_output_embedding_takes_no_part_on_labels(tmp_path):
    """No gradient reaches it: weight decay must not either, nor the counts, nor the written model."""
    write_model("gpt_neox", tmp_path / "model")
    write_labelled(tmp_path / "train.h5", np.arange(ROWS) % 2, 2, "RTE")
    with h5py.File(tmp_path / "train.h5", "a") as out:
        del out.attrs["tokenizer_checksum"]
        out.attrs["vocabulary_size"] = np.int64(200)
    run_well(*arguments("full", tmp_path / "model", tmp_path / "train.h5", tmp_path / "run",
                        "retrain.weight_decay=0.1", "retrain.learning_rate=0.1"))
    before = load_file(tmp_path / "model" / "model.safetensors")
    stage = stage_directory(tmp_path / "run", "retrain")
    written = set().union(*(load_file(file).keys() for file in (stage / "model").glob("*.safetensors")))
    assert before.keys() - written == {"embed_out.weight"}
    trained = json.loads((stage / "metrics.json").read_text())["trainable_parameters"]
    assert trained == sum(value.numel() for name, value in before.items() if name != "embed_out.weight")


# ------------------------------------------------------------------------------- masks that move
@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("moving"), 2)


def moving(files, run_dir: Path, mask: str, **changes) -> list:
    return settings(files, run_dir, **{
        "pipeline": "[prune,retrain,evaluate]", "prune": "magnitude", "model__dtype": "float32", "retrain": "full",
        "retrain__mask": mask, "retrain__merge": "dense", "retrain__epochs": "null", "retrain__learning_rate": 0.003,
        "retrain__steps": 16, "retrain__checkpoint_every": 2, "retrain__micro_batch_size": 1, **changes})


@pytest.mark.parametrize("mask", ["ste", "sr_ste"])
def test_a_moving_mask_ends_in_its_pattern_with_the_same_bits_on_any_ranks_and_after_a_kill(files, tmp_path, mask):
    pattern = {"retrain__mask_pattern": '"2:4"'}
    run_well(*moving(files, tmp_path / "1", mask, **pattern))
    run_well(*moving(files, tmp_path / "3", mask, **pattern), ranks=3)
    assert differences(results(tmp_path / "1"), results(tmp_path / "3")) == []
    command = moving(files, tmp_path / "cut", mask, **pattern)
    job = Started(command, ranks=2)
    job.wait_until(lambda: (tmp_path / "cut" / "02-retrain" / "state" / "step.h5").exists())
    job.signal(signal.SIGKILL, [1])
    assert job.end(timeout=30).code != 0
    run_well(*command, ranks=2)
    assert differences(results(tmp_path / "1"), results(tmp_path / "cut")) == []
    before, after = ({name: value for file in (tmp_path / "1" / stage / "model").glob("block-*.safetensors")
                      for name, value in load_file(file).items() if name.endswith("_proj.weight")}
                     for stage in ("01-prune", "02-retrain"))
    assert len(after) == 14
    assert all(((value.reshape(-1, 4) != 0).sum(1) == 2).all() for value in after.values())
    assert any(((after[name] != 0) & (value == 0)).any() for name, value in before.items())  # it has moved
    assert json.loads((tmp_path / "1" / "02-retrain" / "metrics.json").read_text())["zeros_filled"] > 0


def test_a_moving_mask_keeps_the_share_of_zeros_asked_for_and_its_contradictions_are_refused(files, tmp_path):
    run_well(*moving(files, tmp_path / "run", "ste", retrain__mask_sparsity=0.75))
    for file in (tmp_path / "run" / "02-retrain" / "model").glob("block-*.safetensors"):
        for name, value in load_file(file).items():
            if name.endswith("_proj.weight"):
                assert (value == 0).sum() == int(0.75 * value.numel()), name
    for words, key in ((dict(retrain__merge="masked"), "retrain.merge"),
                       (dict(retrain__mask="moved"), "retrain.mask"),
                       (dict(retrain__mask_pattern='"4:2"'), "retrain.mask_pattern"),
                       (dict(retrain__mask_pattern='"2:4"', retrain__mask_sparsity=0.5), "retrain.mask_sparsity"),
                       (dict(retrain__mask_pattern='"2:5"'), "retrain.mask_pattern"),
                       (dict(retrain__mask="fixed", retrain__mask_sparsity=0.5), "retrain.mask_sparsity"),
                       (dict(retrain__mask_decay=-1), "retrain.mask_decay")):
        refused = run(*moving(files, tmp_path / "refused", "sr_ste", **words))
        assert refused.code == 2 and key in refused.errors, (words, str(refused))


def test_bitfit_is_refused_on_a_model_without_biases(files, tmp_path):
    refused = run(*settings(files, tmp_path / "run", pipeline="[retrain]", retrain="bitfit"))
    assert refused.code == 2 and "nothing to train" in refused.errors, str(refused)
