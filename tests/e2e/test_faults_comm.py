"""A rank that fails, stops or is killed ends the whole job soon, with one message and its exit code."""

import os
import pathlib
import re
import subprocess
import time

import pytest

PROGRAM = pathlib.Path(os.environ["ESPALIER_BUILD"]) / "tests" / "comm_faults"
RANKS = 3
DEADLINE_SECONDS = 3


class Ended:
    def __init__(self, what, rank, ranks=RANKS, quiet=True):
        command = ["mpirun", "--oversubscribe", "--bind-to", "none", "-n", str(ranks)]
        command += ["-q"] if quiet else []
        command += [str(PROGRAM), what, str(rank), str(DEADLINE_SECONDS)]
        start = time.monotonic()
        # Also fails when a rank survives: it would hold the pipe open.
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
        self.seconds = time.monotonic() - start
        self.code, self.output, self.errors = done.returncode, done.stdout, done.stderr
        self.messages = re.findall(r"^espalier: .*$", self.errors, flags=re.MULTILINE)


def test_an_undisturbed_job_ends_well():
    ended = Ended("none", 0)
    assert (ended.code, ended.errors) == (0, "")
    assert ended.output == "mpi of 3 done\n"


@pytest.mark.parametrize("rank", range(RANKS))
def test_an_error_on_one_rank_ends_all_with_its_message_once(rank):
    ended = Ended("throw", rank)
    assert ended.errors == f"espalier: rank {rank} met what it was told to meet\n"
    assert ended.code == 2
    assert ended.seconds < 10


def test_mpirun_without_quiet_still_shows_one_message_of_ours():
    ended = Ended("throw", 1, quiet=False)
    assert ended.messages == ["espalier: rank 1 met what it was told to meet"]
    assert ended.code == 2


def test_the_same_error_on_all_ranks_is_printed_once():
    ended = Ended("throw_all", 0)
    # Whichever rank comes first tells of it; the others keep silent.
    assert re.fullmatch(r"espalier: rank [012] met what it was told to meet\n", ended.errors)
    assert ended.code == 2
    assert ended.seconds < 10


def test_an_error_ends_a_rank_that_only_computes():
    ended = Ended("throw_busy", 1)
    assert ended.messages == ["espalier: rank 1 met what it was told to meet"]
    assert ended.code == 2
    assert ended.seconds < 10


def test_a_stopped_rank_ends_the_others_by_the_deadline_that_names_the_operation():
    ended = Ended("stop", 2)
    assert len(ended.messages) == 1
    assert re.match(r"espalier: all_reduce_sum: rank [01] of 3 waited 3\.\d seconds", ended.messages[0])
    assert ended.code == 3
    assert DEADLINE_SECONDS <= ended.seconds < DEADLINE_SECONDS + 7


@pytest.mark.parametrize("what, place", [("stop_at_start", "MPI_Init"), ("stop_at_end", "MPI_Finalize")])
def test_a_rank_that_is_stopped_while_mpi_starts_or_ends_ends_the_others_too(what, place):
    ended = Ended(what, 2)
    # Before MPI has started no rank can leave the message to another.
    assert ended.messages and all(re.match(rf"espalier: {place}: a rank waited \d\.\d seconds", message)
                                  for message in ended.messages), ended.errors
    assert ended.code == 3
    assert DEADLINE_SECONDS <= ended.seconds < DEADLINE_SECONDS + 7


def test_a_rank_that_says_that_it_works_is_waited_for():
    ended = Ended("work", 1)
    assert (ended.code, ended.errors) == (0, "")
    assert ended.seconds > 2 * DEADLINE_SECONDS


def test_a_rank_that_works_in_silence_for_too_long_ends_the_others():
    ended = Ended("dawdle", 1)
    assert ended.code == 3
    assert "cluster.timeout_seconds" in ended.messages[0]
    assert ended.seconds < 2 * DEADLINE_SECONDS + 2


def test_a_killed_rank_ends_the_job():
    ended = Ended("kill", 1)
    assert ended.code == 137
    assert ended.messages == []
    assert ended.seconds < 10


def test_a_rank_that_leaves_early_ends_the_others_by_the_deadline():
    ended = Ended("leave", 1)
    assert len(ended.messages) == 1
    assert "cluster.timeout_seconds" in ended.messages[0]
    assert ended.code == 3
    assert ended.seconds < DEADLINE_SECONDS + 7


def test_without_mpirun_an_error_is_one_message_and_the_code():
    done = subprocess.run([PROGRAM, "throw", "0", "3"], capture_output=True, text=True, timeout=10)
    assert done.stderr == "espalier: rank 0 met what it was told to meet\n"
    assert done.returncode == 2
