"""`espalier status`, from another process, of runs and sweeps at work, ended, stopped and failed."""

import json
import shutil
import signal
import time
from pathlib import Path

import pytest

from program import Started, configuration, run, run_well, settings
from small_model import write_files


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("small"))


def status(path: Path) -> dict:
    return json.loads(run_well("status", path, "--json").output)


def lines(path: Path) -> dict[str, str]:
    """The text's facts by their names."""
    facts = [line.split("  ", 1) for line in run_well("status", path).output.split("\n\n")[0].splitlines()]
    return {name: value.strip() for name, value in facts}


def steps_done(run_dir: Path) -> int:
    """By the run's own losses."""
    file = run_dir / "metrics.jsonl"
    return file.read_text().count('"event":"step"') if file.exists() else 0


def test_a_run_at_work_tells_its_step_rate_and_time_left_and_a_stopped_one_where_it_is(files, tmp_path):
    run_dir, steps = tmp_path / "run", 100000
    job = Started(settings(files, run_dir, pipeline="[prune,retrain,evaluate]", retrain__steps=steps,
                           retrain__checkpoint_every=steps))
    job.wait_until(lambda: steps_done(run_dir) > 30)
    time.sleep(1.2)  # it is told once a second
    before, begun = steps_done(run_dir), time.monotonic() - job.start
    said = status(run_dir)
    after = steps_done(run_dir)
    assert said["state"] == "working" and f"process {job.ranks()[0]} on" in said["in_use_by"]
    assert said["stage"] == "02-retrain" and [row["status"] for row in said["stages"]] == [
        "finished", "unfinished", "due"]
    progress = said["progress"]
    assert progress["phase"] == "steps" and progress["total"] == steps and 0 < progress["done"] <= after
    assert progress["told_seconds_ago"] < 5 and 0 < progress["seconds"] < time.monotonic() - job.start
    assert progress["per_second"] > before / begun / 2  # of the training alone: faster than since the start
    assert progress["seconds_left"] == pytest.approx((steps - progress["done"]) / progress["per_second"])
    assert "loss" in progress["detail"]
    text = lines(run_dir)
    assert text["state"] == "working" and f" of {steps} steps, " in text["progress"] and " left, " in text["progress"]

    job.signal(signal.SIGTERM)
    assert job.end().code == 75
    reached, said = steps_done(run_dir), status(run_dir)
    assert said["state"] == "stopped" and said["stage"] == "02-retrain" and "in_use_by" not in said
    assert said["progress"]["done"] == reached and "seconds_left" not in said["progress"]


def test_a_killed_run_is_stopped_and_the_finished_one_has_no_progress(files, tmp_path):
    run_dir = tmp_path / "run"
    command = settings(files, run_dir, pipeline="[prune,evaluate]", prune__samples=600)
    job = Started(command, ranks=2)
    job.wait_until((run_dir / "progress.json").exists)
    job.signal(signal.SIGKILL)
    job.end()
    said = status(run_dir)
    assert said["state"] == "stopped" and said["in_use_by"].endswith("it is gone") and said["stage"] == "01-prune"
    run_well(*command, ranks=2)
    said = status(run_dir)
    assert said["state"] == "finished" and "progress" not in said and "stage" not in said
    assert [row["status"] for row in said["stages"]] == ["finished", "finished"]
    assert not (run_dir / "progress.json").exists()


def test_a_sweep_tells_which_members_are_finished_failed_at_work_and_due(files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = configuration(tmp_path, files, pipeline="[prune,retrain]", model__dtype="float32", retrain__steps=24)
    sweep, rates = Path("outputs/small-sweep"), ["0.001", "1e30", "0.002", "0.003"]
    command = [*words, "-m", f"retrain.learning_rate={','.join(rates)}"]
    run(*command)  # ends with the second member, whose loss leaves the finite range
    said = status(sweep)
    assert {state: said[state] for state in ("finished", "failed", "working", "due")} == {
        "finished": 1, "failed": 1, "working": 0, "due": 2}
    assert [row["state"] for row in said["members"]] == ["finished", "failed", "due", "due"]
    failed = said["members"][1]
    assert failed["failure"].startswith("02-retrain: ") and (failed["finished"], failed["stages"]) == (1, 2)
    assert "retrain.learning_rate=0.003" in run_well("status", sweep).output

    job = Started(command)
    third = sweep / "retrain.learning_rate=0.002"
    job.wait_until((third / "progress.json").exists)
    job.signal(signal.SIGSTOP)
    said = status(sweep)
    job.signal(signal.SIGCONT)
    row = said["members"][2]
    assert (row["name"], row["state"]) == (third.name, "working") and row["stage"] in ("01-prune", "02-retrain")
    assert said["members"][3]["state"] == "due" and said["members"][0]["state"] == "finished"
    job.end()
    assert status(sweep)["finished"] == 3 and status(sweep)["due"] == 0


def test_damaged_files_end_in_no_message_and_what_is_no_run_is_refused_by_name(files, tmp_path):
    run_dir = tmp_path / "run"
    run_well(*settings(files, run_dir, pipeline="[evaluate]"))
    shutil.rmtree(run_dir / "01-evaluate")
    for content in ("", "[]", '{"stage": 3, "phase": [], "done": "x", "total": {}, "per_second": null}'):
        (run_dir / "progress.json").write_text(content)
        assert status(run_dir)["state"] == "stopped" and lines(run_dir)["stage"] == "01-evaluate"
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", files.model, tmp_path / "absent"):
        ended = run("status", path)
        assert ended.code == 2 and len(ended.messages) == 1 and str(path) in ended.messages[0], str(ended)
    assert run("status").code == 2 and run("status", run_dir, "--jsno").code == 2
