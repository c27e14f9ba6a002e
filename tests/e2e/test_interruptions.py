"""Ranks that are killed or asked to stop, and a disk that fills: the same command again gives the bits
of an undisturbed run."""

import json
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

import program
from program import Started, differences, results, run_well, settings
from small_model import write_files

BLOCKS = 10
# Enough work in each stage that a signal meets it there.
WORK = dict(pipeline="[prune,retrain,evaluate,compress,export]", prune="sparsegpt", prune__samples=96,
            prune__sequence_length=128, retrain__steps=60, retrain__dropout=0.05)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("deep"), BLOCKS)


@pytest.fixture(scope="module")
def undisturbed(files, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    run_well(*settings(files, run_dir, **WORK), ranks=2)
    return results(run_dir)


def steps_done(run_dir: Path) -> list[int]:
    file = run_dir / "metrics.jsonl"
    if not file.exists():
        return []
    return [json.loads(line)["step"] for line in file.read_text().splitlines(keepends=True)
            if line.endswith("\n") and '"step"' in line and json.loads(line).get("event") == "step"]


def pruning_has_saved(run_dir: Path, count: int) -> bool:
    """At least so many files (without temporary ones) lie in the state of the prune stage."""
    files = [path for path in (run_dir / "01-prune" / "state").rglob("*") if path.is_file()]
    return len([path for path in files if path.suffix in (".h5", ".safetensors", ".json")]) >= count


def training_is_at(run_dir: Path, step: int) -> bool:
    return max(steps_done(run_dir), default=0) >= step


def unfinished(run_dir: Path, stage: str) -> bool:
    return not (run_dir / stage / "manifest.json").exists()


# ------------------------------------------------------------------------------------------ two starts
def test_a_second_start_in_the_same_directory_is_refused_and_disturbs_nothing(files, undisturbed, tmp_path):
    command = settings(files, tmp_path / "run", **WORK)
    first = Started(command, ranks=2)
    first.wait_until(lambda: pruning_has_saved(tmp_path / "run", 2))
    owner = json.loads((tmp_path / "run/run.lock").read_text())
    assert owner["process"] == first.ranks()[0]
    second = program.run(*command, ranks=2)
    assert second.code == 3 and len(second.messages) == 1, str(second)
    for part in (f"process {owner['process']} on {owner['host']}", "last seen", str(tmp_path / "run"), "run.dir"):
        assert part in second.messages[0]
    assert first.end().code == 0
    assert not (tmp_path / "run/run.lock").exists()
    assert differences(undisturbed, results(tmp_path / "run")) == []


# ------------------------------------------------------------------------------------------ kills
@pytest.mark.parametrize("seed", [1, 2])
def test_any_rank_killed_in_prune_and_in_retrain_leaves_the_bits_of_an_undisturbed_run(
        files, undisturbed, tmp_path, seed):
    chance = random.Random(seed)
    run_dir = tmp_path / "run"
    command = settings(files, run_dir, **WORK)

    def kill(condition, stage):
        job = Started(command, ranks=2)
        job.wait_until(condition)
        time.sleep(chance.random() * 0.05)
        job.signal(signal.SIGKILL, [chance.randrange(2)])
        ended = job.end(timeout=30)
        assert ended.code != 0
        assert unfinished(run_dir, stage), f"{stage} was over before the kill: give it more work"

    kill(lambda: pruning_has_saved(run_dir, chance.randint(1, 3)), "01-prune")
    kill(lambda: pruning_has_saved(run_dir, 5), "01-prune")
    kill(lambda: training_is_at(run_dir, 7 + chance.randrange(20)), "02-retrain")
    before = len(steps_done(run_dir))
    kill(lambda: len(steps_done(run_dir)) > before + 10 and training_is_at(run_dir, 30), "02-retrain")
    before = len(steps_done(run_dir))
    run_well(*command, ranks=2)
    # What was saved was used: training went on from its last checkpoint (every 5 steps).
    assert steps_done(run_dir)[before] >= 26
    assert differences(undisturbed, results(run_dir)) == []


def test_a_run_killed_on_two_ranks_goes_on_with_three_and_with_one(files, undisturbed, tmp_path):
    run_dir = tmp_path / "run"
    job = Started(settings(files, run_dir, **WORK), ranks=2)
    job.wait_until(lambda: pruning_has_saved(run_dir, 2))
    job.signal(signal.SIGKILL)
    assert job.end(timeout=30).code != 0
    job = Started(settings(files, run_dir, **WORK), ranks=3)
    job.wait_until(lambda: training_is_at(run_dir, 12))
    job.signal(signal.SIGKILL, [2])
    assert job.end(timeout=30).code != 0
    run_well(*settings(files, run_dir, **WORK, cluster__threads_per_rank=2))
    assert differences(undisturbed, results(run_dir)) == []


# Of each method what the small model asks for; spp, full and moving masks: above, test_retraining, test_full_training.
METHODS = {"dsee": ["retrain.index_sets=random", "retrain.adapter_rank=4"], "lora": [], "lora_masked": [], "lora_star": [],
           "lora_xs": ["retrain.adapter_rank=4"], "vera": ["retrain.adapter_rank=4"], "ether": ["retrain.blocks=4"],
           "ether_plus": ["retrain.blocks=4"], "oft": ["retrain.blocks=4"], "naive": ["retrain.blocks=4"]}


@pytest.mark.parametrize("method", METHODS)
def test_a_training_killed_on_three_ranks_goes_on_with_one_to_the_bits_of_two(files, tmp_path, method):
    def command(name: str) -> list:
        return settings(files, tmp_path / name, pipeline="[prune,retrain]", prune="magnitude", retrain=method,
                        retrain__epochs="null", retrain__steps=40, retrain__micro_batch_size=1,
                        retrain__warmup_steps="null", retrain__dropout=0.1) + METHODS[method]

    run_well(*command("undisturbed"), ranks=2)
    job = Started(command("killed"), ranks=3)
    job.wait_until(lambda: training_is_at(tmp_path / "killed", 7))
    job.signal(signal.SIGKILL, [1])
    assert job.end(timeout=30).code != 0
    assert unfinished(tmp_path / "killed", "02-retrain")
    before = len(steps_done(tmp_path / "killed"))
    run_well(*command("killed"))
    assert steps_done(tmp_path / "killed")[before] > 5  # from its checkpoint on
    assert differences(results(tmp_path / "undisturbed"), results(tmp_path / "killed")) == []


def test_no_state_and_no_temporary_file_is_left_by_a_resumed_run(files, tmp_path):
    run_dir = tmp_path / "run"
    short = {**WORK, "pipeline": "[prune]"}
    job = Started(settings(files, run_dir, **short), ranks=2)
    job.wait_until(lambda: pruning_has_saved(run_dir, 2))
    job.signal(signal.SIGKILL)
    job.end(timeout=30)
    run_well(*settings(files, run_dir, **short), ranks=2)

    def left() -> list[str]:
        names = [str(path.relative_to(run_dir)) for path in run_dir.rglob("*") if path.is_file()]
        return [name for name in names if "/state/" in name or "tmp" in name or "temporary" in name]

    assert not left()
    # As a kill between the manifest and the end of state/ leaves it.
    (run_dir / "01-prune/state").mkdir()
    (run_dir / "01-prune/state/key").write_text("of a finished stage")
    run_well(*settings(files, run_dir, **short), ranks=2)
    assert not left()


# ---------------------------------------------------------------------------------------- signals
def test_sigterm_saves_and_asks_for_requeue_and_the_run_goes_on(files, undisturbed, tmp_path):
    run_dir = tmp_path / "run"
    command = settings(files, run_dir, **WORK)

    def stop(condition, stage, send):
        job = Started(command, ranks=2)
        job.wait_until(condition)
        send(job)
        ended = job.end(timeout=30)
        assert ended.code == 75, str(ended)
        assert len(ended.messages) == 1, str(ended)
        assert unfinished(run_dir, stage)

    stop(lambda: pruning_has_saved(run_dir, 2), "01-prune", lambda job: job.signal(signal.SIGTERM))
    # Slurm's notice: mpirun hands USR1 on to every rank.
    stop(lambda: training_is_at(run_dir, 7), "02-retrain", lambda job: os.kill(job.process.pid, signal.SIGUSR1))
    reached = max(steps_done(run_dir))
    before = len(steps_done(run_dir))
    # One rank alone hears of it; all stop.
    stop(lambda: len(steps_done(run_dir)) > before + 5, "02-retrain", lambda job: job.signal(signal.SIGTERM, [1]))
    # Nothing that was done is done again: the step of the signal is saved, not only every fifth.
    assert steps_done(run_dir)[before] == reached + 1
    run_well(*command, ranks=2)
    assert sorted(set(steps_done(run_dir))) == list(range(1, 61))
    assert len(steps_done(run_dir)) == 60
    assert differences(undisturbed, results(run_dir)) == []


def test_a_run_stopped_after_its_last_block_still_tells_what_it_did_before(files, undisturbed, tmp_path):
    short = {**WORK, "pipeline": "[prune]"}
    # The signal has to arrive while the last block is at work; a machine's speed says when that is.
    for delay in (0.03, 0.02, 0.01, 0.005, 0.04, 0.0):
        run_dir = tmp_path / f"{delay}"
        job = Started(settings(files, run_dir, **short), ranks=2)
        job.wait_until(lambda: pruning_has_saved(run_dir, BLOCKS - 1))
        time.sleep(delay)
        job.signal(signal.SIGTERM)
        ended = job.end(timeout=30)
        if ended.code == 75 and f"{BLOCKS} of {BLOCKS}" in ended.messages[0]:
            break
    else:
        pytest.skip("skipped: no signal met the last block")
    run_well(*settings(files, run_dir, **short), ranks=2)
    expected = {name: value for name, value in undisturbed.items() if name.startswith("01-prune/")}
    assert differences(expected, results(run_dir)) == []


# -------------------------------------------------------------------------------------- full disk
@pytest.fixture
def small_disk(tmp_path):
    """A function that makes a disk of so many bytes."""
    mounted = []

    def make(size: int) -> Path:
        directory = tmp_path / f"disk{len(mounted)}"
        directory.mkdir()
        if os.geteuid() != 0 or shutil.which("mount") is None:
            pytest.skip("skipped: only root mounts a small tmpfs")
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", directory], capture_output=True,
                              text=True)
        if done.returncode != 0:
            pytest.skip(f"skipped: no tmpfs can be mounted here: {done.stderr.strip()}")
        mounted.append(directory)
        return directory

    yield make
    for directory in mounted:
        subprocess.run(["umount", "-l", directory], check=True)


def test_a_disk_too_small_is_refused_before_any_work_with_the_numbers(files, small_disk):
    disk = small_disk(64 << 10)
    ended = program.run(*settings(files, disk / "run", **WORK), ranks=2)
    assert ended.code == 3, str(ended)
    assert len(ended.messages) == 1, str(ended)
    assert str(disk / "run") in ended.messages[0]
    assert "free" in ended.messages[0] or "space" in ended.messages[0]
    assert not list(disk.rglob("manifest.json"))


@pytest.mark.parametrize("stage", ["prune", "retrain"])
def test_a_disk_that_fills_up_ends_the_run_and_loses_nothing(files, undisturbed, small_disk, stage):
    disk = small_disk(64 << 20)
    run_dir = disk / "run"
    command = settings(files, run_dir, **WORK)
    job = Started(command, ranks=2)
    job.wait_until(lambda: pruning_has_saved(run_dir, 2) if stage == "prune" else training_is_at(run_dir, 7))
    filler = disk / "filler"
    try:
        with open(filler, "wb", buffering=0) as out:
            while out.write(b"\0" * (1 << 16)):
                pass
    except OSError:  # the disk is full
        pass
    ended = job.end(timeout=60)
    assert ended.code == 3, str(ended)
    assert len(ended.messages) == 1, str(ended)
    assert str(run_dir) in ended.messages[0]
    assert "space" in ended.messages[0]
    filler.unlink()
    run_well(*command, ranks=2)
    assert differences(undisturbed, results(run_dir)) == []
