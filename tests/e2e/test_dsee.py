"""DSEE as a whole, by configs/dsee.yaml: masks and removed heads against NumPy on the adapter's file, an adapter that
is trained further on what is left, exports that transformers loads with the same outputs, kills."""

import json
import math
import signal
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from program import Started, differences, perplexities, results, run, run_well, settings, stage_directory
from small_model import write_files
from test_architectures import their_perplexity
from test_architectures import write_files as write_family
from test_classification import MODELS, SMALL, randomized, write_labelled

HIDDEN, HEADS, BLOCKS, SIZE = SMALL["hidden_size"], SMALL["num_attention_heads"], SMALL["num_hidden_layers"], 8
SCALE = 32 / 4  # alpha / adapter_rank
WHOLE = "[discover,retrain,evaluate,prune,evaluate,retrain_again,evaluate,export]"
MASKED = ["prune.sparsity=0.4"]
HEADED = ["prune.pattern=heads", "prune.heads=1"]


class Labelled:
    """A small BERT without a head, and labelled rows."""

    def __init__(self, directory: Path):
        self.model, self.train, self.held = directory / "model", directory / "train.h5", directory / "held.h5"
        randomized(transformers.BertModel(transformers.BertConfig(**SMALL))).save_pretrained(self.model)
        write_labelled(self.train, np.arange(64) % 2, 2, "RTE", seed=1)
        self.rows = write_labelled(self.held, np.arange(24) % 2, 2, "RTE", seed=2)

    def arguments(self, run_dir: Path, *changes) -> list:
        return ["--config-name", "dsee", f"model.path={self.model}", "model.dtype=float32", f"data.train={self.train}",
                f"evaluate.tasks.labels.data={self.held}", "evaluate.tasks.labels.answers=true", f"run.dir={run_dir}",
                f"pipeline={WHOLE}", "cluster.threads_per_rank=1", "retrain.adapter_rank=4", "retrain.cardinality=6",
                "discover=magnitude", "retrain.sequence_length=64", "retrain.steps=8", "retrain.batch_size=8",
                "retrain.learning_rate=0.02", "retrain.validate.every=4", "retrain.checkpoint_every=2", *changes]


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    return Labelled(tmp_path_factory.mktemp("bert"))


def metrics_of(run_dir: Path, name: str, occurrence: int = 0) -> dict:
    return json.loads((stage_directory(run_dir, name, occurrence) / "metrics.json").read_text())


def changes_of(adapters: Path) -> dict:
    """Matrix name -> alpha/r (B A + S) in float64, of an adapters.h5."""
    found = {}
    with h5py.File(adapters) as file:
        def visit(name, node):
            if not name.endswith("/B"):
                return
            matrix = name.removesuffix("/B")
            change = node[()].astype(np.float64) @ file[matrix + "/A"][()].astype(np.float64)
            change.flat[file[f"frozen/{matrix}/positions"][()]] += file[matrix + "/S"][()]
            found[matrix] = SCALE * change
        file.visititems(visit)
    return found


def weights_before(run_dir: Path, labelled: Labelled) -> dict:
    weights = {name: value.double().numpy() for name, value in load_file(labelled.model / "model.safetensors").items()}
    trained = load_file(stage_directory(run_dir, "retrain") / "model" / "ends.safetensors")
    return {**weights, **{name: value.double().numpy() for name, value in trained.items()}}


def masks_of(run_dir: Path) -> dict:
    with h5py.File(stage_directory(run_dir, "prune") / "masks.h5") as file:
        return {name: np.unpackbits(packed[()], axis=1)[:, :packed.attrs["columns"]].astype(bool)
                for name, packed in file.items()}


LAYERS = ["attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense",
          "intermediate.dense", "output.dense"]
NAMES = [f"encoder.layer.{block}.{layer}.weight" for block in range(BLOCKS) for layer in LAYERS]


def judged(criterion: str, weight: np.ndarray, change: np.ndarray) -> np.ndarray:
    return np.abs({"delta": change, "merged": weight + change, "magnitude": weight}[criterion])


def with_terms(model, exported: Path):
    """Puts what stands beside the exported matrices into those of transformers' model."""
    terms = load_file(exported / "adapter" / "terms.safetensors")
    for name in [name.removesuffix(".added.down") for name in terms if name.endswith(".added.down")]:
        part = {key: terms[f"{name}.added.{key}"] for key in ("down", "up", "scale", "positions", "values")}
        change = float(part["scale"]) * (part["up"] @ part["down"])
        change.view(-1).index_add_(0, part["positions"], part["values"])
        parameter = dict(model.named_parameters())
        full = name if name in parameter else "bert." + name
        parameter[full].data += change
    return model


def logits_of(model, rows) -> np.ndarray:
    with torch.no_grad():
        return np.array([model(input_ids=torch.tensor(np.array([tokens])),
                               token_type_ids=torch.tensor(np.array([kinds]))).logits[0].double().numpy()
                         for tokens, kinds in rows])


def answers_of(run_dir: Path, occurrence: int) -> np.ndarray:
    file = stage_directory(run_dir, "evaluate", occurrence) / "labels.answers.jsonl"
    return np.array([json.loads(line)["logits"] for line in file.read_text().splitlines()])


# ------------------------------------------------------------------------------- unstructured
@pytest.fixture(scope="module", params=["delta", "merged", "magnitude", "random"])
def masked(request, labelled, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("masked_" + request.param) / "run"
    run_well(*labelled.arguments(run_dir, *MASKED, f"prune.criterion={request.param}"), ranks=2)
    return request.param, run_dir


def test_each_group_is_masked_by_one_global_threshold(masked, labelled):
    criterion, run_dir = masked
    weights = weights_before(run_dir, labelled)
    changes = changes_of(stage_directory(run_dir, "retrain") / "adapters.h5")
    masks = masks_of(run_dir)
    names = [*NAMES, "pooler.dense.weight"]
    assert sorted(masks) == sorted(names)
    said = metrics_of(run_dir, "prune")
    for group, key in (([name for name in names if name in changes], "with_terms"),
                       ([name for name in names if name not in changes], "without_terms")):
        pruned = np.concatenate([masks[name].ravel() for name in group])
        lost = math.floor(pruned.size * 0.4)
        assert pruned.sum() == lost and said[key] == {"matrices": len(group), "weights": pruned.size, "lost": lost}
        if criterion == "random" and key == "with_terms":
            continue
        quantity = np.concatenate([(judged(criterion, weights[name], changes[name]) if name in changes
                                    else np.abs(weights[name])).ravel() for name in group])
        expected = np.zeros(pruned.size, bool)
        expected[np.argsort(quantity, kind="stable")[:lost]] = True
        threshold = np.sort(quantity)[lost]
        assert np.abs(quantity[expected != pruned] - threshold).max(initial=0) < 1e-6 * threshold
    shares = [masks[name].mean() for name in names if name in changes]
    assert criterion == "random" or max(shares) - min(shares) > 0.02  # not the same share in every matrix


def test_only_the_matrices_are_masked_and_the_adapter_trains_on_beside_them(masked, labelled):
    criterion, run_dir = masked
    exported = stage_directory(run_dir, "export") / "model"
    weights = load_file(exported / "model.safetensors")
    for name, pruned in masks_of(run_dir).items():
        assert (weights[name].numpy()[pruned] == 0).all(), name  # the pooler too, though its head was trained
        assert (weights[name].numpy()[~pruned] != 0).all(), name
    before = changes_of(stage_directory(run_dir, "retrain") / "adapters.h5")
    after = changes_of(stage_directory(run_dir, "retrain_again") / "adapters.h5")
    assert before.keys() == after.keys() and len(before) == 2 * BLOCKS
    assert any(not np.array_equal(before[name], after[name]) for name in before)
    assert not (stage_directory(run_dir, "prune") / "adapters.h5").exists()
    model = transformers.AutoModelForSequenceClassification.from_pretrained(exported, dtype=torch.float32).eval()
    theirs = logits_of(with_terms(model, exported), labelled.rows)
    assert np.abs(theirs - answers_of(run_dir, 2)).max() < 1e-4 * np.abs(theirs).max()
    dense, pruned = metrics_of(run_dir, "evaluate", 0), metrics_of(run_dir, "evaluate", 1)
    lost = sum(metrics_of(run_dir, "prune")[key]["lost"] for key in ("with_terms", "without_terms"))
    assert dense["model"]["nonzeros"] - pruned["model"]["nonzeros"] == lost
    assert dense["model"]["parameters"] == pruned["model"]["parameters"]
    assert pruned["tasks"]["labels"]["flops"] == dense["tasks"]["labels"]["flops"]
    of_pooler = int(masks_of(run_dir)["pooler.dense.weight"].sum())
    saved = 2 * dense["tasks"]["labels"]["mean_length"] * (lost - of_pooler) + 2 * of_pooler
    assert dense["tasks"]["labels"]["flops_of_nonzeros"] - pruned["tasks"]["labels"]["flops_of_nonzeros"] == (
        pytest.approx(saved, rel=1e-9))


# ------------------------------------------------------------------------------- heads
@pytest.fixture(scope="module", params=["delta", "merged", "magnitude", "random"])
def headed(request, labelled, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("headed_" + request.param) / "run"
    run_well(*labelled.arguments(run_dir, *HEADED, f"prune.criterion={request.param}"), ranks=2)
    return request.param, run_dir


def rows_of(heads) -> np.ndarray:
    return np.concatenate([np.arange(head * SIZE, (head + 1) * SIZE) for head in heads])


def test_the_heads_of_the_lowest_score_leave_the_matrices_and_the_adapter(headed, labelled):
    criterion, run_dir = headed
    stage = stage_directory(run_dir, "prune")
    weights = weights_before(run_dir, labelled)
    changes = changes_of(stage_directory(run_dir, "retrain") / "adapters.h5")
    kept = json.loads((stage / "model" / "heads.json").read_text())["heads"]
    left = changes_of(stage / "adapters.h5")
    for block in range(BLOCKS):
        prefix = f"encoder.layer.{block}.attention."
        assert len(kept[block]) == HEADS - 1
        if criterion != "random":
            score = sum(judged(criterion, weights[name], changes[name]).reshape(HEADS, -1).sum(1)
                        for name in (prefix + "self.query.weight", prefix + "self.value.weight"))
            assert sorted(set(range(HEADS)) - set(kept[block])) == [int(np.argmin(score))]
        stored = load_file(stage / "model" / f"block-{block:05}.safetensors")
        rows = rows_of(kept[block])
        for layer in ("query", "key", "value"):
            name = f"{prefix}self.{layer}"
            assert np.array_equal(stored[name + ".weight"].double().numpy(), weights[name + ".weight"][rows])
            assert np.array_equal(stored[name + ".bias"].double().numpy(), weights[name + ".bias"][rows])
        assert np.array_equal(stored[prefix + "output.dense.weight"].double().numpy(),
                              weights[prefix + "output.dense.weight"][:, rows])
        for layer in ("query", "value"):
            name = f"{prefix}self.{layer}.weight"
            assert np.allclose(left[name], changes[name][rows], rtol=1e-12, atol=0)
    said = metrics_of(run_dir, "prune")
    assert said["heads"] == 1 and [block["kept"] for block in said["blocks"]] == kept


def test_the_model_without_heads_is_smaller_trains_on_and_is_exported_with_zeros(headed, labelled):
    _, run_dir = headed
    figures = [metrics_of(run_dir, "evaluate", i) for i in range(3)]
    dense, pruned, again = [of["model"] for of in figures]
    positions = sum(value.size for value in hdf5_values(stage_directory(run_dir, "retrain"), "S"))
    stayed = sum(value.size for value in hdf5_values(stage_directory(run_dir, "prune"), "S"))
    # Of each block: rows and biases of q, k and v, columns of o, two rows of B by its rank.
    removed = BLOCKS * (SIZE * (3 * (HIDDEN + 1) + HIDDEN) + 2 * SIZE * 4) + positions - stayed
    assert dense["parameters"] - pruned["parameters"] == removed == dense["parameters"] - again["parameters"]
    flops = [of["tasks"]["labels"] for of in figures]
    assert flops[1]["flops"] == flops[2]["flops"] < flops[0]["flops"]
    lengths = np.array([len(tokens) for tokens, _ in labelled.rows], float)
    of_blocks = BLOCKS * (2 * lengths * SIZE * (4 * HIDDEN + 2 * 4) + 4 * lengths ** 2 * SIZE)
    assert flops[0]["flops"] - flops[1]["flops"] == pytest.approx(
        np.mean(of_blocks + 2 * lengths * (positions - stayed)), rel=1e-12)
    exported = stage_directory(run_dir, "export") / "model"
    kept = json.loads((stage_directory(run_dir, "prune") / "model" / "heads.json").read_text())["heads"]
    weights = load_file(exported / "model.safetensors")
    for block in range(BLOCKS):
        gone = rows_of(sorted(set(range(HEADS)) - set(kept[block])))
        for layer in ("query", "key", "value"):
            stem = f"encoder.layer.{block}.attention.self.{layer}"
            assert weights[stem + ".weight"].shape == (HIDDEN, HIDDEN)
            assert (weights[stem + ".weight"][gone] == 0).all() and (weights[stem + ".bias"][gone] == 0).all()
    model = transformers.AutoModelForSequenceClassification.from_pretrained(exported, dtype=torch.float32).eval()
    theirs = logits_of(with_terms(model, exported), labelled.rows)
    assert np.abs(theirs - answers_of(run_dir, 2)).max() < 1e-4 * np.abs(theirs).max()
    trained = [metrics_of(run_dir, name)["trainable_parameters"] for name in ("retrain", "retrain_again")]
    assert trained[1] == trained[0] - (BLOCKS * 2 * SIZE * 4 + positions - stayed)


def hdf5_values(stage: Path, part: str) -> list:
    found = []
    with h5py.File(stage / "adapters.h5") as file:
        file.visititems(lambda name, node: found.append(node[()]) if name.endswith("/" + part) else None)
    return found


@pytest.mark.parametrize("method", ["lora", "lora_xs", "vera"])
def test_heads_leave_an_adapter_beside_or_the_pruning_is_refused(labelled, tmp_path, method):
    """A LoRA-XS adapter loses rows of its base; VeRA's matrices belong to all targets and cannot."""
    words = labelled.arguments(tmp_path / "run", *HEADED, "pipeline=[retrain,prune,evaluate,retrain_again,evaluate]",
                               f"retrain={method}", f"retrain@retrain_again={method}", "retrain.merge=beside",
                               "retrain_again.merge=beside", "retrain_again.steps=0", "retrain_again.validate=null",
                               "retrain.warmup_steps=null", "retrain_again.warmup_steps=null",
                               "discover.cardinality=6", "retrain_again.cardinality=null",
                               *([] if method == "lora" else ["retrain_again.alpha=null"]))
    words = [word for word in words if not word.startswith(("retrain.cardinality", "pipeline=[discover"))]
    ended = run(*words, ranks=2)
    if method == "vera":
        assert ended.code == 2 and "lora, dsee, lora_xs" in ended.errors and "vera" in ended.errors, str(ended)
        assert not list((tmp_path / "run" / "02-prune").glob("state/heads-*"))
        return
    assert ended.code == 0, str(ended)
    before, after = answers_of(tmp_path / "run", 0), answers_of(tmp_path / "run", 1)
    assert np.abs(before - after).max() < 1e-5 * np.abs(before).max()


def test_heads_are_removed_again_from_what_is_left(labelled, tmp_path):
    twice = ["pipeline=[discover,retrain,prune,prune_again,retrain_again,evaluate,export]", *HEADED,
             "+prune@prune_again=dsee", "prune_again.stage=prune", "prune_again.pattern=heads", "prune_again.heads=2"]
    run_well(*labelled.arguments(tmp_path / "run", *twice))
    first, second = [json.loads((stage_directory(tmp_path / "run", name) / "model" / "heads.json").read_text())["heads"]
                     for name in ("prune", "prune_again")]
    assert all(len(block) == 1 and set(block) < set(before) for before, block in zip(first, second))
    exported = stage_directory(tmp_path / "run", "export") / "model"
    model = transformers.AutoModelForSequenceClassification.from_pretrained(exported, dtype=torch.float32).eval()
    theirs = logits_of(with_terms(model, exported), labelled.rows)
    assert np.abs(theirs - answers_of(tmp_path / "run", 0)).max() < 1e-4 * np.abs(theirs).max()


def test_a_model_that_lost_heads_is_pruned_by_weights_and_then_by_heads_again(files, tmp_path):
    """The masks have the smaller matrices' shapes; heads that go afterwards take their zeros along."""
    run_well(*settings(files, tmp_path / "run", pipeline="[prune,weights,again,evaluate,export]", prune="dsee",
                       prune__pattern="heads", prune__criterion="magnitude", model__dtype="float32"), "prune.heads=1",
             "+prune@weights=sparsegpt", "weights.stage=prune", "weights.pattern=2:4", "weights.samples=12",
             "weights.sequence_length=64", "+prune@again=dsee", "again.stage=prune", "again.criterion=magnitude",
             "again.pattern=heads", "again.heads=1", ranks=2)
    with h5py.File(stage_directory(tmp_path / "run", "weights") / "masks.h5") as file:
        shapes = {name: (packed.shape[0], int(packed.attrs["columns"])) for name, packed in file.items()}
    assert shapes["model.layers.0.self_attn.q_proj.weight"] == (48, 64)
    assert shapes["model.layers.0.self_attn.o_proj.weight"] == (64, 48)
    exported = stage_directory(tmp_path / "run", "export") / "model"
    weights = load_file(exported / "model.safetensors")
    for name in shapes:
        assert (weights[name] == 0).double().mean() >= 0.5, name
    model = transformers.AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
    with h5py.File(files.held_out) as data:
        tokens = torch.tensor(data["tokens"][()].astype(np.int64))
    rows = tokens[:len(tokens) // 64 * 64].view(-1, 64)
    with torch.no_grad():
        theirs = float(torch.exp(model(rows, labels=rows).loss))
    assert theirs == pytest.approx(perplexities(tmp_path / "run")[0], rel=1e-4)


# ------------------------------------------------------------------------------- the plan, refits
def test_the_plan_counts_what_the_run_prunes_and_names_a_pooler_that_is_skipped(labelled, tmp_path):
    def plan(*changes):
        return run_well(*labelled.arguments(tmp_path / "run", *MASKED, *changes), "--plan").output
    hidden, middle = HIDDEN, SMALL["intermediate_size"]
    blocks = BLOCKS * (4 * hidden * hidden + 2 * hidden * middle)
    said = plan()
    assert f"{6 * BLOCKS + 1} matrices of {blocks + hidden * hidden} weights, " \
           f"{math.floor(0.4 * (blocks + hidden * hidden))} zeros or one fewer (40.00 %)" in said
    said = plan("prune.overrides=[{match: pooler.dense, skip: true}]")
    assert f"{6 * BLOCKS} matrices of {blocks} weights" in said and "1 skipped" in said
    assert [line for line in said.splitlines() if "pooler.dense" in line and "skipped" in line]
    assert "pooling layer keeps" in plan("prune.refit=true", "prune.sequence_length=32", f"data.calibration={labelled.train}")


def test_a_refit_changes_what_stays_in_the_blocks_and_neither_masks_nor_the_pooler(labelled, tmp_path):
    words = ["pipeline=[discover,retrain,prune,retrain_again]", *MASKED, f"data.calibration={labelled.train}", "prune.samples=8",
             "prune.sequence_length=32"]
    said = {}
    for refit in ("false", "true"):
        said[refit] = run_well(*labelled.arguments(tmp_path / refit, *words, f"prune.refit={refit}"), ranks=2).output
    plain, solved = masks_of(tmp_path / "false"), masks_of(tmp_path / "true")
    assert plain.keys() == solved.keys() and all((plain[name] == solved[name]).all() for name in plain)
    assert "pooling layer keeps" in said["true"] and "pooling layer keeps" not in said["false"]
    models = [stage_directory(tmp_path / refit, "prune") / "model" for refit in said]
    ends = [load_file(model / "ends.safetensors") for model in models]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    for block in range(BLOCKS):
        before, after = (load_file(model / f"block-{block:05}.safetensors") for model in models)
        for name, weight in after.items():
            assert ((weight == 0).numpy() >= solved[name]).all() and not torch.equal(weight, before[name]), name


# ------------------------------------------------------------------------------- the same bits
@pytest.mark.parametrize("structure", [MASKED, HEADED], ids=["masked", "headed"])
def test_the_same_bits_on_any_ranks_and_threads(labelled, tmp_path, structure):
    found = []
    for ranks, threads in ((1, 1), (2, 1), (3, 1), (1, 2)):
        run_dir = tmp_path / f"{ranks}-{threads}"
        run_well(*labelled.arguments(run_dir, *structure, f"cluster.threads_per_rank={threads}"), ranks=ranks)
        found.append(results(run_dir))
    assert all(differences(found[0], other) == [] for other in found[1:])


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize("structure,first", [(MASKED, "mask-00000.safetensors"), (MASKED, "model.json"),
                                             (HEADED, "heads-00000.json")], ids=["masked", "thresholds", "headed"])
def test_a_run_that_is_cut_off_while_it_prunes_goes_on_to_the_same_bits(labelled, tmp_path, structure, first, number):
    blocks = ["model.path=" + str(tmp_path / "model")]
    randomized(transformers.BertModel(transformers.BertConfig(**{**SMALL, "num_hidden_layers": 24}))).save_pretrained(
        tmp_path / "model")
    run_well(*labelled.arguments(tmp_path / "whole", *structure, *blocks), ranks=2)
    for attempt in range(5):  # pruning takes tenths of a second: the signal may come too late
        run_dir = tmp_path / f"cut{attempt}"
        command = labelled.arguments(run_dir, *structure, *blocks)
        job = Started(command, ranks=2)
        job.wait_until(lambda: (run_dir / "04-prune" / "state" / first).exists())
        job.signal(number)
        ended = job.end(timeout=30)
        assert ended.code != 0 if number == signal.SIGKILL else ended.code == 75, str(ended)
        if not (run_dir / "04-prune" / "manifest.json").exists():
            break
    assert not (run_dir / "04-prune" / "manifest.json").exists(), "no signal came while it pruned"
    run_well(*command, ranks=3)
    assert differences(results(tmp_path / "whole"), results(run_dir)) == []


# ------------------------------------------------------------------------------- decoders
LLAMA = ["--config-name", "dsee", "evaluate=perplexity", "retrain.validate.data=null", "retrain.validate.metric=loss",
         "discover=magnitude", "retrain.adapter_rank=4", "retrain.cardinality=6", "retrain.learning_rate=0.01",
         "model.dtype=float32", "prune.pattern=heads"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("llama"), 2)


def decoder_settings(files, run_dir: Path) -> list:
    mine = ("pipeline", "run.dir", "model.path", "data.train", "evaluate.tasks.text.data", "retrain.steps",
            "evaluate.tasks.text.sequence_length", "retrain.batch_size", "cluster.threads_per_rank")
    return [item for item in settings(files, run_dir, pipeline=WHOLE) if item.partition("=")[0] in mine]


@pytest.mark.parametrize("heads,left,absent", [(3, (1, 1), True), (1, None, False)])
def test_heads_of_a_llama_are_absent_from_its_export_where_the_config_can_say_so(files, tmp_path, heads, left, absent):
    ended = run_well(*LLAMA, *decoder_settings(files, tmp_path / "run"), f"prune.heads={heads}", ranks=2)
    exported = stage_directory(tmp_path / "run", "export") / "model"
    config = json.loads((exported / "config.json").read_text())
    query = load_file(exported / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"]
    if absent:
        assert (config["num_attention_heads"], config["num_key_value_heads"]) == left and config["head_dim"] == 16
        assert query.shape == (16, 64) and "are absent" in ended.output
    else:  # four heads share two key/value heads: three share them unevenly
        assert config["num_attention_heads"] == 4 and query.shape == (64, 64)
        assert (query == 0).all(1).sum() == 16 and "2 of 8 heads are zeros" in ended.output
    model = transformers.AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
    with h5py.File(files.held_out) as data:
        tokens = torch.tensor(data["tokens"][()].astype(np.int64))
    rows = tokens[:len(tokens) // 64 * 64].view(-1, 64)
    with torch.no_grad():
        theirs = float(torch.exp(with_terms(model, exported)(rows, labels=rows).loss))
    assert theirs == pytest.approx(perplexities(tmp_path / "run")[2], rel=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "opt", "mistral", "qwen2", "qwen3", "gemma", "phi"])
def test_every_decoder_loses_heads_and_is_reloaded(family, tmp_path):
    """Fused, transposed and head-wise stored projections; 3 of 4 heads go by magnitude, which needs no adapter."""
    files = write_family(family, tmp_path / "files")
    run_well(*settings(files, tmp_path / "run", pipeline="[evaluate,prune,evaluate,export]", prune="dsee",
                       prune__pattern="heads", prune__criterion="magnitude", model__dtype="float32"), "prune.heads=3")
    before, after = perplexities(tmp_path / "run")
    with h5py.File(files.held_out) as data:
        tokens = data["tokens"][()]
    theirs = their_perplexity(stage_directory(tmp_path / "run", "export") / "model", tokens)
    assert theirs == pytest.approx(after, rel=1e-4) and abs(before - after) > 1e-3 * before
    said = [metrics_of(tmp_path / "run", "evaluate", i) for i in range(2)]
    assert said[1]["model"]["parameters"] < said[0]["model"]["parameters"]
    config = json.loads((stage_directory(tmp_path / "run", "export") / "model" / "config.json").read_text())
    assert (config.get("num_attention_heads") == 1) == (family in ("mistral", "qwen2", "qwen3", "gemma"))


@pytest.mark.parametrize("family,absent", [("llama", False), ("mistral", True)])
def test_heads_stay_absent_only_in_a_number_that_the_familys_class_takes(family, absent, tmp_path):
    """3 of 4 heads are left of a hidden size of 64: LlamaConfig refuses that, MistralConfig does not."""
    files = write_family(family, tmp_path / "files", num_key_value_heads=4)
    run_well(*settings(files, tmp_path / "run", pipeline="[prune,evaluate,export]", prune="dsee", prune__pattern="heads",
                       prune__criterion="magnitude", model__dtype="float32"), "prune.heads=1")
    exported = stage_directory(tmp_path / "run", "export") / "model"
    assert transformers.AutoConfig.from_pretrained(exported).num_attention_heads == (3 if absent else 4)
    with h5py.File(files.held_out) as data:
        theirs = their_perplexity(exported, data["tokens"][()])
    assert theirs == pytest.approx(perplexities(tmp_path / "run")[0], rel=1e-4)


@pytest.mark.parametrize("name", ["roberta", "deberta-v2", "deberta-v2 with projections of its own"])
def test_every_encoder_loses_heads_and_is_reloaded(name, tmp_path):
    if name.endswith("own"):
        config = transformers.DebertaV2Config(**SMALL, relative_attention=True, pos_att_type=["c2p", "p2c"],
                                              position_buckets=16, type_vocab_size=0, share_att_key=False, num_labels=2)
        model = randomized(transformers.DebertaV2ForSequenceClassification(config))
    else:
        model = randomized(MODELS[name](2))
    model.save_pretrained(tmp_path / "model")
    rows = write_labelled(tmp_path / "data.h5", np.arange(20) % 2, 2, "RTE", types=False)
    run_well("prune=dsee", "prune.criterion=magnitude", "prune.pattern=heads", "prune.heads=2",
             "evaluate=classification", "evaluate.tasks.labels.answers=true", "pipeline=[prune,evaluate,export]",
             f"model.path={tmp_path / 'model'}", "model.dtype=float32", f"run.dir={tmp_path / 'run'}",
             f"evaluate.tasks.labels.data={tmp_path / 'data.h5'}", "cluster.threads_per_rank=1")
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(
        stage_directory(tmp_path / "run", "export") / "model", dtype=torch.float32).eval()
    with torch.no_grad():
        theirs = np.array([loaded(torch.tensor(np.array([tokens]))).logits[0].numpy() for tokens, _ in rows])
        dense = np.array([model(torch.tensor(np.array([tokens]))).logits[0].numpy() for tokens, _ in rows])
    assert np.abs(theirs - answers_of(tmp_path / "run", 0)).max() < 1e-4 * np.abs(theirs).max()
    assert np.abs(theirs - dense).max() > 1e-3


# ------------------------------------------------------------------------------- refusals
def test_what_cannot_be_pruned_so_is_refused_with_the_way_out(labelled, tmp_path):
    bare = ["pipeline=[prune]", "~retrain_again"]
    cases = [(["prune.pattern=heads", "prune.heads=4"], ["prune.heads: 4", "which has 4"]),
             (["prune.pattern=heads"], ["prune.heads", "needs the number"]),
             (["prune.heads=2"], ["prune.heads", "pattern"]),
             (["prune.pattern=heads", "prune.heads=1", "prune.sparsity=0.5"], ["prune.sparsity", "null"]),
             (["prune.pattern=heads", "prune.heads=1", "prune.exclude=[key]"], ["prune.exclude", "every block"]),
             (["prune=magnitude", "prune.pattern=heads", "prune.heads=1"], ["prune.pattern", "magnitude", "dsee"]),
             (bare, ["prune.criterion: delta", "merge: beside"]),
             ([*bare, "prune.criterion=random"], ["prune.criterion: random", "magnitude"]),
             ([*bare, *HEADED], ["prune.criterion", "merge: beside"])]
    for number, (changes, words) in enumerate(cases):
        ended = run(*labelled.arguments(tmp_path / str(number), *changes), ranks=2)
        assert ended.code == 2 and len(ended.messages) == 1, (changes, str(ended))
        assert all(word in ended.messages[0] for word in words), (changes, ended.messages)
        assert not (tmp_path / str(number)).exists()  # before any stage began
