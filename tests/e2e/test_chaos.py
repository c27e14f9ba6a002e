"""Ranks that are killed, stopped or asked to stop at any moment of the whole job, one start after the other: the
same command comes to the bits of an undisturbed run, no start hangs, and nothing is left that does not belong there.

ESPALIER_TEST_CHAOS: rounds (10). ESPALIER_TEST_CHAOS_RECORD: a file for the figures that the last test prints (-s)."""

import json
import os
import random
import signal
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pytest

from program import Ended, Started, differences, results, run_well, settings
from small_model import write_files

ROUNDS = int(os.environ.get("ESPALIER_TEST_CHAOS", "10"))
RECORD = os.environ.get("ESPALIER_TEST_CHAOS_RECORD")
TIMEOUT_SECONDS = 5
# A rank that was stopped is missed after TIMEOUT_SECONDS; two more until MPI_Abort, one until mpirun kills.
LONGEST_ENDING_SECONDS = TIMEOUT_SECONDS + 11
WORK = dict(pipeline="[evaluate,discover,prune,evaluate,retrain,compress,evaluate,export]", prune="sparsegpt",
            prune__samples=48, retrain__steps=16, retrain__dropout=0.05, retrain__checkpoint_every=3,
            discover__targets="['*q_proj','*v_proj']", discover__cardinality=16)
# What mpirun ends with; 0 where a signal comes after the last unit. A TERM may come before the program can hear it (143), a STOP when no
# rank waits any more (0).
CODES = {signal.SIGKILL: {137, 0}, signal.SIGTERM: {75, 143, 0}, signal.SIGSTOP: {3, 0}}


@dataclass
class Disturbance:
    signal: str
    ranks: int
    rank: int
    stage: str  # "start", an entry's name, or "end"
    code: int
    seconds: float  # from the signal to the end of the start


@dataclass
class Round:
    number: int
    starts: int = 0
    disturbances: list[Disturbance] = field(default_factory=list)


@dataclass
class Undisturbed:
    seconds: float
    stages: dict[str, float]  # seconds of each stage's directory
    results: dict
    files: set[str]


def files_of(run_dir: Path) -> set[str]:
    return {str(path.relative_to(run_dir)) for path in run_dir.rglob("*")}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("chaos"), blocks=4)


@pytest.fixture(scope="module")
def undisturbed(files, tmp_path_factory) -> Undisturbed:
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    seconds = run_well(*settings(files, run_dir, **WORK), ranks=2).seconds
    stages = {file.parent.name: json.loads(file.read_text())["seconds"] for file in run_dir.glob("*/manifest.json")}
    return Undisturbed(seconds, stages, results(run_dir), files_of(run_dir))


@pytest.fixture(scope="module")
def rounds() -> list[Round]:
    return []


def seconds_to_come(undisturbed: Undisturbed, run_dir: Path) -> float:
    """What a start takes that finds these stages finished."""
    finished = [name for name in undisturbed.stages if (run_dir / name / "manifest.json").exists()]
    return undisturbed.seconds - sum(undisturbed.stages[name] for name in finished)


def is_at_work(run_dir: Path, job: Started) -> bool:
    try:
        return json.loads((run_dir / "run.lock").read_text())["process"] == job.ranks().get(0)
    except (OSError, ValueError):  # none, or not for long
        return False


def first_due(undisturbed: Undisturbed, run_dir: Path) -> str:
    due = [name for name in sorted(undisturbed.stages) if not (run_dir / name / "manifest.json").exists()]
    return due[0][3:] if due else "end"


def ending_of(job: Started, disturbed: float, stopped: int | None) -> tuple[Ended, float]:
    """Waits for the end. A rank that was stopped when all others had ended is waited for by mpirun alone: it is
    continued. One that is missed is killed by mpirun."""
    while job.process.poll() is None and time.monotonic() - disturbed < LONGEST_ENDING_SECONDS:
        if stopped is not None and list(job.ranks()) == [stopped]:
            job.signal(signal.SIGCONT)
        time.sleep(0.02)
    if job.process.poll() is None:
        job.signal(signal.SIGCONT)
    ended = job.end(timeout=2)
    return ended, time.monotonic() - disturbed


def disturbed_start(command: list[str], undisturbed: Undisturbed, run_dir: Path, ranks: int,
                    chance: random.Random) -> tuple[Ended, Disturbance | None]:
    """A start that one of its ranks does not end as it would; None when it was over before."""
    moment = chance.random() * seconds_to_come(undisturbed, run_dir)
    rank, kind = chance.randrange(ranks), chance.choice(list(CODES))
    # Short only where it is waited for: a loaded machine may keep healthy ranks longer.
    deadline = [f"cluster.timeout_seconds={TIMEOUT_SECONDS}"] if kind == signal.SIGSTOP else []
    job = Started(command + deadline, ranks)
    begun = False
    # In MPI_Init a rank is missed after ten minutes only, as no configuration has been read: no STOP there.
    while time.monotonic() - job.start < moment or rank not in job.ranks() or (kind == signal.SIGSTOP and not begun):
        if job.process.poll() is not None:
            return job.end(), None
        begun = begun or is_at_work(run_dir, job)
        time.sleep(0.02)
    stage = first_due(undisturbed, run_dir) if begun or is_at_work(run_dir, job) else "start"
    job.signal(kind, [rank])
    ended, seconds = ending_of(job, time.monotonic(), rank if kind == signal.SIGSTOP else None)
    return ended, Disturbance(kind.name, ranks, rank, stage, ended.code, seconds)


@pytest.mark.parametrize("number", range(ROUNDS))
def test_ranks_that_go_at_any_moment_leave_the_bits_of_an_undisturbed_run(files, undisturbed, rounds, tmp_path, number):
    chance = random.Random(number)
    run_dir = tmp_path / "run"
    command = settings(files, run_dir, **WORK)
    this = Round(number)
    rounds.append(this)
    ranks = 2 + number % 2
    for _ in range(chance.choice((1, 1, 2, 3))):
        this.starts += 1
        ended, disturbance = disturbed_start(command, undisturbed, run_dir, ranks, chance)
        if disturbance is None:
            assert ended.code == 0, str(ended)
            break
        this.disturbances.append(disturbance)
        assert ended.code in CODES[signal.Signals[disturbance.signal]], f"{disturbance}\n{ended}"
        assert len(ended.messages) <= 1, f"{disturbance}\n{ended}"
        assert disturbance.seconds < LONGEST_ENDING_SECONDS, f"{disturbance}\n{ended}"
        if disturbance.signal == "SIGSTOP" and ended.code == 3:
            assert "cluster.timeout_seconds" in ended.messages[0], f"{disturbance}\n{ended}"
        ranks = chance.choice((2, 3))
    this.starts += 1
    run_well(*command, ranks=ranks)
    assert differences(undisturbed.results, results(run_dir)) == []
    assert files_of(run_dir) == undisturbed.files


def test_the_rounds_were_disturbed(undisturbed, rounds):
    """Says what the rounds met: by how much they were disturbed is no one's but the clock's."""
    if not rounds:
        pytest.skip("skipped: no round was run")
    met = [disturbance for one in rounds for disturbance in one.disturbances]
    print(f"\n{'round':>5}  starts  disturbances")
    for one in rounds:
        said = [f"{d.signal} to rank {d.rank} of {d.ranks} in {d.stage}, ended with {d.code} after {d.seconds:.1f} s"
                for d in one.disturbances]
        print(f"{one.number:>5}  {one.starts:>6}  {'; '.join(said)}")
    figures = {"rounds": len(rounds), "starts": sum(one.starts for one in rounds),
               "signals": Counter(d.signal for d in met), "stages": Counter(d.stage for d in met),
               "longest_ending_seconds": max((d.seconds for d in met), default=0.0),
               "undisturbed_seconds": undisturbed.seconds}
    print(", ".join(f"{key} {dict(value) if isinstance(value, Counter) else value}" for key, value in figures.items()))
    if RECORD:
        Path(RECORD).write_text(json.dumps({**figures, "of_rounds": [asdict(one) for one in rounds]}, indent=2) + "\n")
    # A faster machine may be through before a signal comes, but not in most rounds.
    assert sum(bool(one.disturbances) for one in rounds) > len(rounds) / 2
