"""Sweeps: what their members share is computed once, and every member is nevertheless whole by itself."""

import csv
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

import program
from program import Started, configuration, differences, losses, manifest_times, results, run_well
from small_model import write_files

SWEEP = Path("outputs/small-sweep")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("small"))


@pytest.fixture
def words(files, tmp_path, monkeypatch):
    """What chooses the small configuration; the test is in a directory of its own, where outputs/ will lie."""
    monkeypatch.chdir(tmp_path)
    return configuration(tmp_path, files, retrain__steps=8, model__dtype="float32")


def manifests(member: Path) -> dict[str, dict]:
    return {file.parent.name: json.loads(file.read_text()) for file in sorted(member.glob("[0-9][0-9]-*/manifest.json"))}


def taken_over(member: Path) -> dict[str, dict]:
    """Stages that were not computed here, and where they came from."""
    return {name: manifest["facts"]["taken_over"] for name, manifest in manifests(member).items()
            if "taken_over" in manifest["facts"]}


def lone(words: list, *overrides: str) -> Path:
    """The run that such a member would be without a sweep."""
    run_dir = Path("lone") / ",".join(overrides)
    run_well(*words, f"run.dir='{run_dir}'", *overrides)
    return run_dir


def test_a_sweep_over_a_late_key_computes_the_early_stages_once_with_the_bits_of_lone_runs(words):
    ended = run_well(*words, "-m", "compress.budget=0.2,0.3")
    first, second = SWEEP / "compress.budget=0.2", SWEEP / "compress.budget=0.3"
    shared = ["01-evaluate", "02-prune", "03-evaluate", "04-retrain", "05-evaluate"]
    assert taken_over(first) == {}
    assert list(taken_over(second)) == shared
    for name, origin in taken_over(second).items():
        assert (origin["member"], origin["stage"]) == (first.name, name)
        assert origin["computing"]["seconds"] == manifests(first)[name]["seconds"]
        assert f"{name}  taken over from {first.name}" in ended.output
    for member, budget in ((first, 0.2), (second, 0.3)):
        assert differences(results(lone(words, f"compress.budget={budget}")), results(member)) == []
    # No second copy on the disk, and the losses of the training in either run's own file.
    assert (first / "02-prune/masks.h5").samefile(second / "02-prune/masks.h5")
    assert losses(first) == losses(second) and len(losses(first)) == 8
    events = [json.loads(line) for line in (second / "metrics.jsonl").read_text().splitlines()]
    assert [event["stage"] for event in events if event.get("event") == "taken_over"] == shared


def test_a_member_stands_when_the_one_it_took_from_is_gone_and_when_it_is_moved(words):
    run_well(*words, "-m", "compress.budget=0.2,0.3")
    member = SWEEP / "compress.budget=0.3"
    expected, times = results(member), manifest_times(member)
    shutil.rmtree(SWEEP / "compress.budget=0.2")
    ended = run_well(*words, "-m", "compress.budget=0.3")
    assert ended.output.count("done before, kept") == 8
    shutil.move(member, "moved")
    ended = run_well(*words, "run.dir=moved", "compress.budget=0.3")
    assert ended.output.count("done before, kept") == 8
    assert manifest_times(Path("moved")) == times
    # What is left of it is enough to make a lost stage again.
    (Path("moved") / "07-evaluate/manifest.json").unlink()
    shutil.rmtree("moved/06-compress")
    run_well(*words, "run.dir=moved", "compress.budget=0.3")
    again = results(Path("moved"))
    assert [name for name in expected if name.endswith((".h5", ".safetensors")) and again[name] != expected[name]] == []


def test_stages_are_shared_between_different_places_of_a_pipeline(words):
    short = "[prune,retrain,compress,export]"
    longer = "[evaluate,prune,evaluate,retrain,compress,evaluate,export]"
    ended = run_well(*words, "-m", f"pipeline={short},{longer}", ranks=2)
    first, second = SWEEP / f"pipeline={short}", SWEEP / f"pipeline={longer}"
    assert {name: origin["stage"] for name, origin in taken_over(second).items()} == {
        "02-prune": "01-prune", "04-retrain": "02-retrain", "05-compress": "03-compress", "07-export": "04-export"}
    base = json.loads((second / "04-retrain/model/derived.json").read_text())["base"]
    assert base == "../../02-prune/model", str(ended)
    assert json.loads((second / "07-export/metrics.json").read_text())["directory"] == str(second / "07-export/model")
    for pipeline, member in ((short, first), (longer, second)):
        run_well(*words, "run.dir=lone", "run.resume=false", f"pipeline={pipeline}")
        assert differences(results(Path("lone")), results(member)) == []
    shutil.rmtree(first)
    ended = run_well(*words, "-m", f"pipeline={longer}")
    assert ended.output.count("done before, kept") == 7


def test_the_same_name_of_another_model_is_not_taken_over(files, words):
    """evaluate is the pruned model in one pipeline, the dense one in the other."""
    one, other = "[prune,evaluate,retrain]", "[evaluate,prune,retrain]"
    run_well(*words, "-m", "prune.from=start", "retrain.from=evaluate", f"pipeline={one},{other}")
    second = next(path for path in SWEEP.iterdir() if other in path.name)
    assert list(taken_over(second)) == ["02-prune"]
    base = json.loads((second / "03-retrain/model/derived.json").read_text())["base"]
    assert base == str(files.model.resolve())


def test_what_is_damaged_in_one_member_is_not_used_by_another(words):
    run_well(*words, "-m", "pipeline=[prune,retrain]", "retrain.steps=4")
    first, second = (SWEEP / f"pipeline=[prune,retrain],retrain.steps={steps}" for steps in (4, 5))
    weights = first / "01-prune/model/block-00001.safetensors"
    content = bytearray(weights.read_bytes())
    content[-10] ^= 1
    weights.write_bytes(content)
    ended = run_well(*words, "-m", "pipeline=[prune,retrain]", "retrain.steps=5", ranks=2)
    assert "block-00001.safetensors: has checksum" in ended.output and "not taken over" in ended.output
    assert taken_over(second) == {}
    expected = results(lone(words, "pipeline=[prune,retrain]", "retrain.steps=5"))
    assert differences(expected, results(second)) == []
    # The damaged one is mended from the member that is whole now; a lost file as well.
    ended = run_well(*words, "-m", "pipeline=[prune,retrain]", "retrain.steps=4,5")
    assert list(taken_over(first)) == ["01-prune"]
    (second / "01-prune/masks.h5").unlink()
    run_well(*words, "-m", "pipeline=[prune,retrain]", "retrain.steps=5")
    assert differences(expected, results(second)) == []


def test_a_kill_while_a_stage_is_taken_over_leaves_nothing_that_looks_finished(words):
    """The second member's stages are linked in slices of time, until a kill meets one in the middle."""
    command = [*words, "-m", "pipeline=[prune,retrain,compress]"]
    run_well(*command, "compress.budget=0.2")
    member = SWEEP / "compress.budget=0.3,pipeline=[prune,retrain,compress]"
    caught, cut = set(), []
    for _ in range(40):
        shutil.rmtree(member, ignore_errors=True)
        job = Started([*command, "compress.budget=0.3"])
        job.wait_until(lambda: (member / "environment.json").exists())
        while job.process.poll() is None:
            job.signal(signal.SIGSTOP)
            cut = [stage for stage in member.glob("0[12]-*") if not (stage / "manifest.json").exists()]
            if cut:
                break
            job.signal(signal.SIGCONT)
            time.sleep(0.0005)
        job.signal(signal.SIGKILL)
        job.end(timeout=30)
        caught.update(stage.name for stage in cut)
        if caught:
            break
    assert caught, "no kill met a stage that was being taken over"
    for manifest in member.glob("*/manifest.json"):
        for output in json.loads(manifest.read_text())["outputs"]:
            assert (manifest.parent / output["path"]).stat().st_size == output["bytes"]
    run_well(*command, "compress.budget=0.3")
    assert list(taken_over(member)) == ["01-prune", "02-retrain"]
    run_well(*words, "run.dir=lone", "pipeline=[prune,retrain,compress]", "compress.budget=0.3")
    assert differences(results(Path("lone")), results(member)) == []


def test_half_a_stage_that_was_taken_over_is_no_state_to_go_on_from(words):
    """What such a kill leaves, and then the other member is gone."""
    run_well(*words, "-m", "pipeline=[prune]", "run.seed=0")
    first, second = SWEEP / "pipeline=[prune],run.seed=0", Path("lone")
    expected = results(first)
    (second / "01-prune/model").mkdir(parents=True)
    os.link(first / "01-prune/model/block-00000.safetensors", second / "01-prune/model/block-00000.safetensors")
    (second / "01-prune/model/block-00009.safetensors").write_bytes(b"of another model")
    run_well(*words, "run.dir=lone", "pipeline=[prune]", "run.seed=0")
    assert differences(expected, results(second)) == []


def test_a_sweep_that_was_stopped_goes_on_and_one_of_more_members_takes_over_from_it(words):
    command = [*words, "-m", "pipeline=[prune,retrain]", "retrain.checkpoint_every=5"]
    long = SWEEP / "pipeline=[prune,retrain],retrain.checkpoint_every=5,retrain.steps=300"
    job = Started([*command, "retrain.steps=8,300"])
    job.wait_until(lambda: (long / "02-retrain/state/step.h5").exists())
    job.signal(signal.SIGKILL)
    job.end(timeout=30)
    ended = run_well(*command, "retrain.steps=8,300,4", ranks=2)
    assert ended.output.count("done before, kept") == 3, str(ended)
    assert "02-retrain  going on after" in ended.output
    assert list(taken_over(long)) == ["01-prune"]
    assert list(taken_over(long.with_name(long.name.replace("300", "4")))) == ["01-prune"]


def test_neither_an_export_elsewhere_nor_a_sweep_started_anew_takes_over(words, tmp_path):
    own = tmp_path / "mine"
    command = [*words, "-m", "pipeline=[prune,export]", f"export.directory={own}"]
    run_well(*command, "retrain.steps=4,5")
    members = sorted(path.parent.parent for path in SWEEP.glob("**/01-prune/manifest.json"))
    assert [list(taken_over(member)) for member in members] == [[], ["01-prune"]]
    before = [manifest_times(member) for member in members]
    ended = run_well(*command, "retrain.steps=4,5", "run.resume=false")
    after = [manifest_times(member) for member in members]
    assert all(old[name] != new[name] for old, new in zip(before, after) for name in old)
    # Not even the first member takes over what the second has from the earlier command.
    assert [list(taken_over(member)) for member in members] == [[], ["01-prune"]], str(ended)


def test_where_no_links_can_be_made_the_outputs_are_copied(words, tmp_path):
    other_disk = Path("/dev/shm")
    if not os.access(other_disk, os.W_OK) or other_disk.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("skipped: there is no second file system")
    run_well(*words, "-m", "pipeline=[prune,retrain]", "retrain.steps=4")
    first, second = (SWEEP / f"pipeline=[prune,retrain],retrain.steps={steps}" for steps in (4, 5))
    place = other_disk / f"espalier-{os.getpid()}"
    place.mkdir()
    try:
        second.symlink_to(place)
        run_well(*words, "-m", "pipeline=[prune,retrain]", "retrain.steps=5")
        assert list(taken_over(second)) == ["01-prune"]
        masks = second / "01-prune/masks.h5"
        assert not masks.samefile(first / "01-prune/masks.h5")
        assert masks.read_bytes() == (first / "01-prune/masks.h5").read_bytes()
    finally:
        shutil.rmtree(place)


def test_a_run_that_is_no_sweep_takes_nothing_over(words):
    run_well(*words, "-m", "pipeline=[prune]")
    run_well(*words, f"run.dir={SWEEP}/mine", "pipeline=[prune]")
    assert taken_over(SWEEP / "mine") == {}


# ------------------------------------------------------------------------------- over the seeds
@pytest.fixture(scope="module")
def three_seeds(files, tmp_path_factory):
    """A sweep of two learning rates and three seeds: its directory, and what it printed."""
    directory = tmp_path_factory.mktemp("seeds")
    words = configuration(directory, files, pipeline="[evaluate,prune,retrain,evaluate,compress,evaluate]",
                          retrain__steps=6, model__dtype="float32")
    ended = run_well(*words, "-m", "retrain.learning_rate=0.001,0.01", "run.seed=0,1,2", working_directory=directory)
    return directory / SWEEP, ended


def test_the_summary_of_a_sweep_holds_median_mean_and_deviation_over_the_seeds(three_seeds):
    sweep, ended = three_seeds
    summary = json.loads((sweep / "summary.json").read_text())
    assert summary["swept"] == ["retrain.learning_rate"]
    assert [one["settings"]["retrain.learning_rate"] for one in summary["configurations"]] == ["0.001", "0.01"]
    for one in summary["configurations"]:
        rate = one["settings"]["retrain.learning_rate"]
        assert one["seeds"] == [0, 1, 2]
        members = [sweep / f"retrain.learning_rate={rate},run.seed={seed}" for seed in one["seeds"]]
        assert [sweep.parent.parent / member for member in one["members"]] == members
        # Of the last evaluation: the compressed model.
        measured = [json.loads((member / "06-evaluate/metrics.json").read_text()) for member in members]
        expected = {"perplexity": [row["tasks"]["text"]["perplexity"] for row in measured],
                    "nonzeros": [row["model"]["nonzeros"] for row in measured],
                    "bytes": [row["model"]["bytes"] for row in measured]}
        for name, key in (("residual_bytes", "05-compress"), ("trainable_parameters", "03-retrain")):
            field = name.removeprefix("residual_")
            expected[name] = [json.loads((member / key / "metrics.json").read_text())[field] for member in members]
        assert one["tasks"]["text"]["entry"] == "06-evaluate" and one["tasks"]["text"]["leading"] == "perplexity"
        found = {"perplexity": one["tasks"]["text"]["reported"]["perplexity"],
                 **{name: one["figures"][name] for name in expected if name != "perplexity"}}
        assert len(set(expected["perplexity"])) == 3
        for name, values in expected.items():
            assert (found[name]["values"], found[name]["count"]) == (values, 3)
            assert found[name]["median"] == pytest.approx(statistics.median(values), rel=1e-12)
            assert found[name]["mean"] == pytest.approx(statistics.mean(values), rel=1e-12)
            assert found[name]["standard_deviation"] == pytest.approx(statistics.stdev(values), rel=1e-9, abs=1e-12)


def test_the_table_of_a_sweep_has_a_line_a_configuration_and_columns_by_key(three_seeds):
    sweep, ended = three_seeds
    summary = json.loads((sweep / "summary.json").read_text())
    lines = ended.output.splitlines()
    title = next(number for number, line in enumerate(lines) if line.startswith("retrain.learning_rate"))
    assert lines[title].split() == ["retrain.learning_rate", "seeds", "text", "perplexity", "nonzeros", "bytes",
                                    "residual", "trainable"]
    for line, one in zip(lines[title + 1:title + 3], summary["configurations"]):
        figure = one["tasks"]["text"]["reported"]["perplexity"]
        text = f"{figure['median']:.3f} ({figure['mean']:.3f} ± {figure['standard_deviation']:.3f})"
        assert line.split()[:2] == [one["settings"]["retrain.learning_rate"], "3"] and text in line
    assert "standard deviation of a sample, n - 1" in lines[title + 3]


def test_the_comma_separated_summary_reads_back(three_seeds):
    sweep, _ = three_seeds
    summary = json.loads((sweep / "summary.json").read_text())
    with open(sweep / "summary.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for row, one in zip(rows, summary["configurations"], strict=True):
        assert row["retrain.learning_rate"] == one["settings"]["retrain.learning_rate"] and row["seeds"] == "0 1 2"
        for name in ("median", "mean", "standard_deviation"):
            assert float(row[f"text.perplexity.{name}"]) == one["tasks"]["text"]["reported"]["perplexity"][name]
        assert float(row["nonzeros.median"]) == one["figures"]["nonzeros"]["median"]


def test_the_report_of_a_sweep_shows_its_table(three_seeds):
    sweep, _ = three_seeds
    summary = json.loads((sweep / "summary.json").read_text())
    done = subprocess.run([sys.executable, program.SOURCE / "launch/report.py", sweep, "--table"], capture_output=True,
                          text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    html = (sweep / "report.html").read_text()
    for one in summary["configurations"]:
        figure = one["tasks"]["text"]["reported"]["perplexity"]
        text = f"{figure['median']:.2f} ({figure['mean']:.2f} ± {figure['standard_deviation']:.2f})"
        assert text in html and text in done.stdout
    assert "src=" not in html and "href=" not in html


def test_a_sweep_that_is_repeated_by_one_seed_more_summarizes_its_own_members(files, tmp_path):
    words = configuration(tmp_path, files, pipeline="[prune,evaluate]", model__dtype="float32")
    for seeds in ("0,1", "1,2,3"):
        run_well(*words, "-m", f"run.seed={seeds}", working_directory=tmp_path)
        one, = json.loads((tmp_path / SWEEP / "summary.json").read_text())["configurations"]
        assert one["seeds"] == [int(seed) for seed in seeds.split(",")]
        assert one["settings"] == {}


def test_every_member_is_checked_before_the_first_begins(words):
    """row_groups=7 divides no matrix: nothing of the other member may have been spent."""
    ended = program.run(*words, "-m", "retrain.row_groups=4,-7")
    assert ended.code == 2 and "row_groups" in ended.messages[0], ended
    assert not SWEEP.exists() or list(SWEEP.iterdir()) == []


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_member_that_diverges_is_passed_over_by_the_next_start(words, ranks):
    sweep = [*words, "pipeline=[prune,retrain,evaluate]", "-m", "retrain.learning_rate=1e30,1e-3"]
    ended = program.run(*sweep, ranks=ranks)
    assert ended.code == 2 and len(ended.messages) == 1 and "finite" in ended.messages[0], ended
    diverged = next(SWEEP.glob("*1e+30*"))
    assert json.loads((diverged / "failure.json").read_text())["numerical"] is True, ended
    ended = program.run(*sweep, ranks=ranks)
    assert ended.code == 2 and "the sweep is done but for members that have no figures" in ended.errors, ended
    assert str(diverged) in ended.errors and "failure.json" in ended.errors
    rows = json.loads((SWEEP / "summary.json").read_text())["configurations"]
    by_rate = {float(row["settings"]["retrain.learning_rate"]): row["tasks"] for row in rows}
    assert by_rate[1e30] == {} and by_rate[1e-3]["text"]["reported"]["perplexity"]["count"] == 1
    # It is tried again without failure.json, and where what it stands on has changed.
    (diverged / "failure.json").unlink()
    ended = program.run(*sweep, ranks=ranks)
    assert ended.code == 2 and "the sweep is done" not in ended.errors, ended
    failure = json.loads((diverged / "failure.json").read_text())
    (diverged / "failure.json").write_text(json.dumps(failure | {"key": "of other data"}))
    ended = program.run(*sweep, ranks=ranks)
    assert ended.code == 2 and "the sweep is done" not in ended.errors, ended


def test_paths_and_many_words_among_the_overrides_still_name_one_directory_a_member(words, files):
    layers = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
    many = ",".join(f'"model.layers.{block}.{layer}"' for block in range(3) for layer in layers)
    run_well(*words, "pipeline=[prune]", "-m", f"model.path={files.model}", f"prune.exclude=[{many}]",
             "prune.sparsity=0.3,0.4", "prune.pattern=unstructured")
    members = sorted(SWEEP.glob("*/config.yaml"))
    assert len(members) == 2 and all(len(member.parent.name.encode()) <= 255 for member in members)


# ------------------------------------------------------------------------- each member in a start of its own
def start_members(side_by_side: int, *arguments) -> subprocess.Popen:
    """launch/run.sh --side-by-side, with all it says in one stream."""
    command = [program.SOURCE / "launch/run.sh", "--side-by-side", side_by_side, "--threads", 1, *arguments]
    return subprocess.Popen([str(word) for word in command], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True,
                            env=program.ENVIRONMENT | {"ESPALIER_BUILD": str(program.PROGRAM.parent)})


def test_a_member_that_fails_stops_no_other_and_the_same_command_skips_what_is_finished(words):
    sweep = [*words, "pipeline=[prune,retrain,evaluate]", "-m", "retrain.learning_rate=1e30,1e-3,2e-3"]
    members = [Path(line) for line in run_well(*sweep, "--members").output.splitlines()]
    assert len(members) == 3 and not SWEEP.exists()
    job = start_members(2, *sweep)
    output = job.communicate(timeout=120)[0]
    assert job.returncode == 2 and "member 1 failed with code 2" in output, output
    rows = json.loads((SWEEP / "summary.json").read_text())["configurations"]
    assert [row["members"] for row in rows] == [[str(member)] for member in members]
    assert [list(row["tasks"]) for row in rows] == [[], ["text"], ["text"]]
    assert "retrain.learning_rate" in (SWEEP / "report.html").read_text()
    expected = results(lone(words, "pipeline=[prune,retrain,evaluate]", "retrain.learning_rate=2e-3"))
    assert differences(expected, results(members[2])) == []
    times = [manifest_times(member) for member in members[1:]]
    job = start_members(1, *sweep)
    output = job.communicate(timeout=120)[0]
    assert job.returncode == 2 and str(members[0]) in output.rpartition("not finished")[2], output
    assert [manifest_times(member) for member in members[1:]] == times


def test_members_that_are_told_to_stop_are_saved_and_the_same_command_goes_on_with_them(words):
    sweep = [*words, "pipeline=[prune,retrain]", "retrain.steps=100", "-m", "run.seed=0,1,2"]
    members = [Path(line) for line in run_well(*sweep, "--members").output.splitlines()]
    job = start_members(2, *sweep)
    deadline = time.monotonic() + 60
    while not any((member / "02-retrain/state/step.h5").exists() for member in members[:2]):
        assert job.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    job.send_signal(signal.SIGUSR1)
    output = job.communicate(timeout=60)[0]
    assert job.returncode == 75 and not members[2].exists() and not (SWEEP / "summary.json").exists(), output
    job = start_members(2, *sweep)
    output = job.communicate(timeout=120)[0]
    assert job.returncode == 0, output
    for member in members:
        assert [step for step, *_ in losses(member)] == list(range(1, 101))


def test_one_member_is_named_by_its_number_from_one_on(words):
    sweep = [*words, "pipeline=[prune]", "-m", "run.seed=0,1"]
    run_well(*sweep, "--member", 2)
    assert [path.name for path in SWEEP.iterdir() if path.is_dir()] == ["pipeline=[prune],run.seed=1"]
    for number, message in ((3, "members 1 to 2"), (0, "is no number of a member")):
        ended = program.run(*sweep, "--member", number)
        assert ended.code == 2 and message in ended.messages[0], ended
    ended = program.run(*words, "--summary")
    assert ended.code == 2 and "give -m" in ended.messages[0], ended
