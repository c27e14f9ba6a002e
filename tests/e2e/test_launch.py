"""The scripts of launch/ up to where the engine starts: texts without overlap, clear refusals."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(os.environ.get("ESPALIER_SOURCE", Path(__file__).resolve().parents[2]))
PARTS = ("calibration", "train", "heldout")


def make_text(directory: Path, *arguments, code: int = 0) -> str:
    done = subprocess.run([sys.executable, SOURCE / "launch/make_text.py", directory, *arguments], capture_output=True,
                          text=True, timeout=300)
    assert done.returncode == code, done.stderr
    return done.stderr


def paragraphs(file: Path) -> list[str]:
    return [text.strip() for text in file.read_text(encoding="utf-8").split("\n\n") if text.strip()]


def test_a_persons_text_is_split_into_three_parts_that_hold_every_paragraph_once(tmp_path):
    whole = [f"Paragraph {number} tells of tree {number * 7919 % 1000},\nof its espalier and of naïve café № {number}."
             for number in range(2000)]
    (tmp_path / "text.txt").write_text("\ufeff" + "\n\n\n".join(whole), encoding="utf-8")
    make_text(tmp_path / "out", "--text", tmp_path / "text.txt")
    parts = {part: paragraphs(tmp_path / f"out/{part}.txt") for part in PARTS}
    assert sorted(sum(parts.values(), [])) == sorted(whole)
    for part, share in (("calibration", 0.25), ("train", 0.60), ("heldout", 0.15)):
        assert abs(len(parts[part]) / len(whole) - share) < 0.15
    # Paragraphs that follow each other in the text follow each other in a part, but at sections' ends.
    following = sum(whole.index(after) == whole.index(before) + 1 for before, after in zip(parts["train"], parts["train"][1:]))
    assert following > 0.9 * len(parts["train"])


def test_the_same_documents_give_the_same_parts_without_overlap(tmp_path):
    sources = tmp_path / "sources"
    for number in range(60):
        file = sources / f"folder{number % 3}/{number:02d}.rst.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"Title {number}\n========\n\n.. _label-{number}:\n\nSee :func:`~tree.prune` and ``tie``. " + f"word{number} " * 200)
    for name in ("one", "two"):
        make_text(tmp_path / name, "--sources", sources)
    contents = {part: (tmp_path / f"one/{part}.txt").read_text() for part in PARTS}
    assert contents == {part: (tmp_path / f"two/{part}.txt").read_text() for part in PARTS}
    words = [set(re.findall(r"word\d+", text)) for text in contents.values()]
    assert sum(map(len, words)) == len(set.union(*words)) == 60
    assert "See tree.prune and tie." in contents["train"]
    assert "label-" not in contents["train"] and "====" not in contents["train"]


def test_a_text_too_short_to_split_and_one_that_is_not_utf8_are_refused(tmp_path):
    (tmp_path / "short.txt").write_text("One line.\n")
    assert "too few to split" in make_text(tmp_path / "out", "--text", tmp_path / "short.txt", code=1)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n\n" * 100)
    assert "not UTF-8 at byte 3" in make_text(tmp_path / "out", "--text", tmp_path / "latin.txt", code=1)
    assert not (tmp_path / "out").exists()


def script(name: str, *arguments, **variables) -> subprocess.CompletedProcess:
    return subprocess.run([SOURCE / "launch" / name, *map(str, arguments)], capture_output=True, text=True, timeout=120,
                          env=os.environ | {key: str(value) for key, value in variables.items()})


def test_the_check_names_what_is_missing_and_changes_nothing(tmp_path):
    done = script("setup.sh", "--check", "--tests", CXX="no-such-compiler", ESPALIER_VENV=tmp_path / "venv",
                  ESPALIER_WORK=tmp_path / "work", ESPALIER_LIBTORCH="")
    assert done.returncode == 1
    assert "missing: g++ (the C++20 compiler)" in done.stdout
    assert f"missing: virtual environment {tmp_path / 'venv'}" in done.stdout
    assert "missing: the packages of launch/requirements-torch.txt" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_libtorch_that_is_none_is_refused(tmp_path):
    done = script("setup.sh", "--check", ESPALIER_LIBTORCH=tmp_path)
    assert done.returncode == 1 and "has no include/ATen/ATen.h" in done.stderr


def test_with_a_libtorch_of_ones_own_and_an_own_model_no_torch_is_asked_for(tmp_path):
    (tmp_path / "torch/include/ATen").mkdir(parents=True)
    (tmp_path / "torch/include/ATen/ATen.h").touch()
    done = script("setup.sh", "--check", "--own-model", ESPALIER_LIBTORCH=tmp_path / "torch", ESPALIER_VENV=tmp_path / "venv")
    assert "launch/requirements.txt" in done.stdout
    assert "requirements-torch" not in done.stdout and "requirements-model" not in done.stdout


@pytest.mark.parametrize("name,arguments,message", [
    ("quickstart.sh", ["--model", "nowhere"], "has no config.json"),
    ("quickstart.sh", ["--text", "nowhere.txt"], "cannot be read"),
    ("quickstart.sh", ["wanda"], "is no override"),
    ("quickstart.sh", ["--colour"], "none of --model, --text, --ranks"),
    ("make_example.sh", ["--all"], "is not --tests"),
    ("run.sh", ["-n", "2"], "launch/build.sh make it"),
    ("run.sh", ["--side-by-side", "0"], "no number of members"),
    ("run.sh", ["--side-by-side", "2", "--hostfile", "hosts"], "share one machine"),
    ("submit.sh", ["--chain", "2", "--array"], "exclude each other"),
    ("submit.sh", ["--notice", "2m"], "--notice 2m: a whole number"),
    ("submit.sh", ["prune=wanda", "--nodes", "2"], "--nodes is of the job"),
    ("setup.sh", ["--everything"], "none of --own-model, --tests, --check")])
def test_a_wrong_call_ends_in_one_line_before_any_work(tmp_path, name, arguments, message):
    done = script(name, *arguments, ESPALIER_BUILD=tmp_path / "build", ESPALIER_WORK=tmp_path / "work",
                  ESPALIER_VENV=tmp_path / "venv")
    assert done.returncode == 1
    assert message in done.stderr and done.stderr.count("\n") == 1 and done.stdout == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("ending,advice", [
    ("exit 2", "code 2 after [0-9]+ s: mend what the message names, then start it again"),
    ("exit 3", "code 3 .*: mend what the message names of this machine; then the same command goes on where it stopped"),
    ("exit 4", "code 4 .*: this is a defect of espalier; .*"),
    ("exit 75", "code 75 .*: its state is saved; the same command goes on where it stopped"),
    ("kill -9 $$", r"code 137 .*: a rank was ended by signal 9 .*; the same command goes on where it stopped")])
def test_the_quickstarts_last_line_says_what_to_do_after_each_kind_of_failure(tmp_path, ending, advice):
    def write(file: str, content: str = "") -> None:
        (tmp_path / file).write_text(f"#!/bin/sh\n{content}\n")
        (tmp_path / file).chmod(0o755)
    (tmp_path / "launch").mkdir()
    for name in ("quickstart.sh", "run.sh", "environment.sh"):
        shutil.copy(SOURCE / "launch" / name, tmp_path / "launch")
    for name in ("setup.sh", "build.sh", "make_example.sh"):  # all done
        write(f"launch/{name}")
    (tmp_path / "build").mkdir()
    write("build/espalier", f"echo 'espalier: its message' >&2\n{ending}")
    done = script(tmp_path / "launch/quickstart.sh", "--ranks", "1", ESPALIER_BUILD=tmp_path / "build",
                  ESPALIER_WORK=tmp_path / "work", ESPALIER_VENV=tmp_path / "venv")
    assert done.returncode == 1
    message, last = done.stderr.splitlines()[-2:]  # nothing of mpirun's between them
    assert message == "espalier: its message"
    assert re.fullmatch(f"espalier: the run ended with {advice}", last), last


def test_ranks_of_a_host_file_share_a_machines_cores_and_keep_to_the_interface(tmp_path):
    """A program in espalier's place prints what it was given by the real mpirun."""
    (tmp_path / "espalier").write_text('#!/bin/sh\necho "$@" $OMPI_MCA_btl_tcp_if_include $OMPI_MCA_oob_tcp_if_include '
                                       '$NCCL_SOCKET_IFNAME\n')
    (tmp_path / "espalier").chmod(0o755)
    (tmp_path / "hosts").write_text("# this machine alone\nlocalhost slots=2\n")
    done = script("run.sh", "-n", 2, "--hostfile", tmp_path / "hosts", "--interface", "lo", "prune=wanda",
                  ESPALIER_BUILD=tmp_path)
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    assert done.stdout.splitlines() == [f"cluster.threads_per_rank={threads} prune=wanda lo lo lo"] * 2, done.stderr
