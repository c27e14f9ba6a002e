"""--plan: what a run will do is told before anything runs, in the numbers that the run then reports."""

import json
import re

import pytest

import program
from program import configuration, run, run_well, stage_directory
from small_model import write_files

OVERRIDES = ("prune.overrides=[{match: 'model.layers.1.*', skip: true}, {match: down_proj, pattern: '4:8'}, "
             "{match: gate_proj, pattern: unstructured, sparsity: 0.7}]")
# Blocks of a row of the table: three blocks, the middle one skipped.
ROWS = {
    "model.layers.0,2.self_attn.q_proj": ["64 x 64", "2:4", "0.5", 2048],
    "model.layers.1.self_attn.q_proj": ["64 x 64", "skipped"],
    "model.layers.0,2.self_attn.k_proj": ["32 x 64", "2:4", "0.5", 1024],
    "model.layers.0,2.mlp.gate_proj": ["96 x 64", "unstructured", "0.7", 96 * 44],
    "model.layers.0,2.mlp.down_proj": ["64 x 96", "4:8", "0.5", 3072],
    "model.layers.1.mlp.down_proj": ["64 x 96", "skipped"],
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("small"))


def settings(files, run_dir, **changes) -> list[str]:
    return program.settings(files, run_dir, **{"model__dtype": "float32", **changes})


def sections(output: str) -> dict[str, list[str]]:
    """The lines of every entry, its title first."""
    found = re.split(r"\n(?=\d\d-)", output)
    return {part.split()[0]: [line.strip() for line in part.strip().splitlines()] for part in found[1:]}


def table(lines: list[str]) -> dict[str, list]:
    """Rows by the matrix, cells as text or whole numbers."""
    start = next(number for number, line in enumerate(lines) if line.startswith("matrix"))
    rows = [re.split(r"  +", line) for line in lines[start + 1:]]
    return {row[0]: [int(cell) if cell.isdigit() else cell for cell in row[1:]] for row in rows}


def blocks_of(name: str) -> list[str]:
    """The matrices that a row stands for."""
    prefix, ranges, suffix = re.fullmatch(r"(.*layers\.)([\d,-]+)(\..*)", name).groups()
    blocks = []
    for part in ranges.split(","):
        first, _, last = part.partition("-")
        blocks += range(int(first), int(last or first) + 1)
    return [f"{prefix}{block}{suffix}.weight" for block in blocks]


def number(pattern: str, lines: list[str]) -> int:
    found = [match for line in lines if (match := re.search(pattern, line))]
    assert len(found) == 1, (pattern, lines)
    return int(found[0].group(1))


def test_the_table_of_overrides_is_what_pruning_then_does(files, tmp_path):
    command = settings(files, tmp_path / "run", pipeline="[prune]") + [OVERRIDES]
    ended = run_well(*command, "--plan", ranks=2)
    lines = sections(ended.output)["01-prune"]
    planned = table(lines)
    assert {name: planned[name] for name in ROWS} == ROWS
    assert not (tmp_path / "run").exists()
    run_well(*command)
    metrics = json.loads((stage_directory(tmp_path / "run", "prune") / "metrics.json").read_text())
    zeros = {matrix["name"]: matrix["zeros"] for matrix in metrics["matrices"]}
    expected = {matrix: row[3] for name, row in planned.items() if row[1] != "skipped" for matrix in blocks_of(name)}
    assert zeros == expected
    assert number(r"(\d+) zeros", lines) == sum(zeros.values())
    assert number(r"(\d+) matrices of", lines) == len(zeros) == 14
    assert number(r"(\d+) skipped", lines) == 7


@pytest.mark.parametrize("method", ["magnitude", "alps"])
def test_the_unstructured_zeros_of_each_method_are_those_that_are_planned(files, tmp_path, method):
    command = settings(files, tmp_path / "run", pipeline="[prune]", prune=method, prune__pattern="unstructured",
                       prune__sparsity=0.37)
    planned = table(sections(run_well(*command, "--plan").output)["01-prune"])
    run_well(*command)
    metrics = json.loads((stage_directory(tmp_path / "run", "prune") / "metrics.json").read_text())
    assert {matrix["name"]: matrix["zeros"] for matrix in metrics["matrices"]} == {
        matrix: row[3] for name, row in planned.items() for matrix in blocks_of(name)}


@pytest.mark.parametrize("changes", [
    dict(retrain="spp"), dict(retrain="lora"), dict(retrain="oft", retrain__blocks=4), dict(retrain="vera"),
    dict(retrain="lora_xs"), dict(retrain="full"), dict(retrain="ether_plus", retrain__blocks=4)],
    ids=lambda changes: changes["retrain"])
def test_the_trainable_parameters_of_a_plan_are_those_of_the_run(files, tmp_path, changes):
    changes = {"retrain__targets": "[q_proj,down_proj]", "retrain__learning_rate": 0.001, "retrain__steps": 2,
               "retrain__warmup_steps": 0, "retrain__warmup_ratio": "null", "retrain__micro_batch_size": 1, **changes}
    command = settings(files, tmp_path / "run", pipeline="[prune,retrain]", **changes)
    if changes["retrain"] in ("vera", "lora_xs"):
        command.append("retrain.adapter_rank=4")
    lines = sections(run_well(*command, "--plan").output)["02-retrain"]
    run_well(*command)
    metrics = json.loads((stage_directory(tmp_path / "run", "retrain") / "metrics.json").read_text())
    assert number(r"(\d+) trainable parameters", lines) == metrics["trainable_parameters"]
    if metrics["reported_parameters"] != metrics["trainable_parameters"]:
        assert number(r"its paper counts (\d+)", lines) == metrics["reported_parameters"]
    assert sum(row[1] * len(blocks_of(name)) for name, row in table(lines).items()) == metrics["trainable_parameters"]
    assert number(r"(\d+) steps of 4 sequences", lines) == 2
    assert number(r"(\d+) tokens a step", lines) == 256 == metrics["tokens"] // 2


def test_a_plan_tells_of_every_entry_and_writes_nothing(files, tmp_path):
    command = settings(files, tmp_path / "run", pipeline="[evaluate,discover,prune,retrain,compress,evaluate,export]",
                       retrain="dsee", retrain__targets="[q_proj,v_proj]", retrain__epochs=2, retrain__steps="null",
                       retrain__cardinality=9, retrain__adapter_rank=4, retrain__merge="masked",
                       discover__cardinality=9)
    found = sections(run_well(*command, "--plan", working_directory=tmp_path).output)
    assert [lines[0] for lines in found.values()] == [
        "01-evaluate  evaluate takes start", "02-discover  discover takes start", "03-prune  prune takes start",
        "04-retrain  retrain takes 03-prune", "05-compress  compress takes 04-retrain",
        "06-evaluate  evaluate takes 05-compress", "07-export  export takes 05-compress"]
    assert number(r"perplexity of (\d+) segments of 64 tokens", found["01-evaluate"]) == 1000 // 64
    assert str(files.held_out) in found["01-evaluate"][1]
    assert number(r"(\d+) in all", found["02-discover"]) == 9 * 6
    assert number(r"at most (\d+) bytes", found["05-compress"]) > 0
    assert list(tmp_path.iterdir()) == []
    ended = run_well(*command)
    said = re.search(r"(\d+) trainable parameters", ended.output).group(1)
    assert number(r"(\d+) trainable parameters", found["04-retrain"]) == int(said)
    steps = json.loads((stage_directory(tmp_path / "run", "retrain") / "metrics.json").read_text())["steps"]
    assert number(r"(\d+) steps of", found["04-retrain"]) == steps
    exported = stage_directory(tmp_path / "run", "export") / "model/model.safetensors"
    tensors = number(r"tensors of (\d+) bytes", found["07-export"])
    assert exported.stat().st_size - int.from_bytes(exported.read_bytes()[:8], "little") - 8 == tensors


def test_a_glob_that_matches_nothing_is_refused_by_the_plan_as_by_the_run(files, tmp_path):
    command = settings(files, tmp_path / "run", pipeline="[evaluate,prune]") + [
        "prune.overrides=[{match: no_proj, skip: true}]"]
    planned, real = run(*command, "--plan"), run(*command)
    assert planned.code == real.code == 2
    assert planned.messages == real.messages and "no_proj" in planned.messages[0]
    assert not (tmp_path / "run").exists()


def test_a_directory_of_another_run_is_refused_by_the_plan_as_by_the_run(files, tmp_path):
    run_well(*settings(files, tmp_path / "run", pipeline="[prune]", prune="magnitude"))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    command = settings(files, tmp_path / "run", pipeline="[prune]")
    planned, real = run(*command, "--plan", ranks=2), run(*command)
    assert planned.code == 2 and planned.messages == real.messages
    run_well(*settings(files, tmp_path / "run", pipeline="[prune]", prune="magnitude"), "--plan")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before


def test_the_plan_of_a_sweep_tells_of_every_member(files, tmp_path):
    words = configuration(tmp_path, files, pipeline="[prune]")
    ended = run_well(*words, "-m", "prune.pattern='2:4','4:8'", "--plan", working_directory=tmp_path)
    assert ended.output.count("plan of outputs/small-sweep/prune.pattern=") == 2
    assert not (tmp_path / "outputs").exists()


def test_where_the_data_decides_the_plan_says_so(files, tmp_path):
    command = settings(files, tmp_path / "run", pipeline="[prune]", prune="sparsegpt", prune__pattern="unstructured",
                       prune__sparsity=0.5, prune__allocation="owl")
    lines = sections(run_well(*command, "--plan").output)["01-prune"]
    assert "zeros as the data decides" in lines[2]
    assert {tuple(row[2:]) for row in table(lines).values()} == {("0.5 by owl", "-")}
