"""Starts the built program under mpirun as a person does, and reads what a run left."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import h5py
import yaml

from small_model import Files

SOURCE = Path(os.environ.get("ESPALIER_SOURCE", Path(__file__).resolve().parents[2]))
PROGRAM = Path(os.environ.get("ESPALIER_BUILD", SOURCE / "build")).resolve() / "espalier"
ENVIRONMENT = {**os.environ, "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
               "OMPI_MCA_btl_vader_single_copy_mechanism": "none"}
WHOLE = "[evaluate,prune,evaluate,retrain,evaluate,compress,evaluate,export]"


def settings(files: Files, run_dir: Path, **changes) -> list[str]:
    """Overrides of a whole run on the small model; `changes` writes prune.samples as prune__samples."""
    values = {
        "pipeline": WHOLE, "run.dir": run_dir, "model.path": files.model, "data.calibration": files.calibration,
        "data.train": files.train, "evaluate.tasks.text.data": files.held_out,
        "evaluate.tasks.text.sequence_length": 64, "prune": "wanda", "prune.pattern": "2:4", "prune.samples": 12,
        "prune.sequence_length": 64, "retrain.steps": 20, "retrain.batch_size": 4, "retrain.sequence_length": 64,
        "retrain.checkpoint_every": 5, "compress.budget": 0.2, "cluster.threads_per_rank": 1}
    values.update({key.replace("__", "."): value for key, value in changes.items()})
    return [f"{key}={value}" for key, value in values.items()]


def configuration(directory: Path, files: Files, **changes) -> list[str]:
    """The same as a configuration of its own, which a sweep names its directories without: the words that choose it."""
    configs = directory / "configs"
    shutil.copytree(SOURCE / "configs", configs)
    groups, values = [], {}
    for word in settings(files, directory / "unused", **changes):
        key, _, value = word.partition("=")
        if (configs / key).is_dir():
            groups.append({f"override /{key}": value})
        elif key != "run.dir":
            *nodes, last = key.split(".")
            place = values
            for node in nodes:
                place = place.setdefault(node, {})
            place[last] = value if last == "pattern" else yaml.safe_load(value)
    values["defaults"] = ["default", *groups, "_self_"]
    values["run"] = {"name": "small", **values.get("run", {})}
    (configs / "small.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    return ["--config-dir", configs, "--config-name", "small"]


class Ended:
    """A program that has ended, and what it said."""

    def __init__(self, code: int, output: str, errors: str, seconds: float):
        self.code, self.output, self.errors, self.seconds = code, output, errors, seconds
        self.messages = re.findall(r"^espalier: .*$", errors, flags=re.MULTILINE)

    def __str__(self) -> str:
        return f"exit code {self.code} after {self.seconds:.1f} s\n{self.output}\n{self.errors}"


class Started:
    """A program at work under mpirun."""

    def __init__(self, arguments: list, ranks: int = 1, working_directory: Path | None = None):
        command = ["mpirun", "-q", "--oversubscribe", "--bind-to", "none", "-n", ranks, PROGRAM, *arguments]
        self.start = time.monotonic()
        self.process = subprocess.Popen([str(word) for word in command], env=ENVIRONMENT, cwd=working_directory,
                                        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                        text=True)

    def end(self, timeout: float = 120) -> Ended:
        try:
            output, errors = self.process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            self.process.terminate()
            output, errors = self.process.communicate(timeout=30)
            raise AssertionError(f"still at work after {timeout} s\n{output}\n{errors}") from None
        return Ended(self.process.returncode, output, errors, time.monotonic() - self.start)

    def ranks(self) -> dict[int, int]:
        """Process id of each rank: mpirun's children that are the program by now."""
        found = {}
        for entry in Path("/proc").iterdir():
            try:
                if not entry.name.isdigit() or (entry / "exe").resolve() != PROGRAM.resolve():
                    continue
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                variables = (entry / "environ").read_bytes().split(b"\0")
            except (OSError, IndexError):  # it ended meanwhile
                continue
            rank = [int(line.partition(b"=")[2]) for line in variables if line.startswith(b"OMPI_COMM_WORLD_RANK=")]
            if parent == self.process.pid and rank:
                found[rank[0]] = int(entry.name)
        return found

    def signal(self, number: int, ranks: list[int] | None = None) -> None:
        """To all ranks, or to those named."""
        for rank, process in self.ranks().items():
            if ranks is None or rank in ranks:
                os.kill(process, number)

    def wait_until(self, condition: Callable[[], bool], timeout: float = 60) -> None:
        while not condition():
            if self.process.poll() is not None:
                raise AssertionError(f"it ended before it could be disturbed: {self.end()}")
            assert time.monotonic() - self.start < timeout, "what was waited for has not come"
            time.sleep(0.002)


def run(*arguments, ranks: int = 1, working_directory: Path | None = None, timeout: float = 120) -> Ended:
    return Started(list(arguments), ranks, working_directory).end(timeout)


def run_well(*arguments, ranks: int = 1, **others) -> Ended:
    ended = run(*arguments, ranks=ranks, **others)
    assert ended.code == 0, str(ended)
    return ended


# ------------------------------------------------------------------------------- what a run left
def stage_directory(run_dir: Path, name: str, occurrence: int = 0) -> Path:
    found = sorted(run_dir.glob(f"[0-9][0-9]-{name}"))
    assert len(found) > occurrence, f"{run_dir} holds {sorted(path.name for path in run_dir.iterdir())}"
    return found[occurrence]


def perplexities(run_dir: Path) -> list[float]:
    """Of every evaluation, in the order of the pipeline."""
    def of(value) -> list[float]:
        if not isinstance(value, dict):
            return []
        own = [value["perplexity"]] if isinstance(value.get("perplexity"), float) else []
        return own + [number for inner in value.values() for number in of(inner)]
    figures = [of(json.loads((directory / "metrics.json").read_text()))
               for directory in sorted(run_dir.glob("[0-9][0-9]-evaluate"))]
    assert all(len(of_stage) == 1 for of_stage in figures), figures
    return [of_stage[0] for of_stage in figures]


def _timeless(value, run_dir: Path):
    """JSON without times and memory, and without the place of the run directory."""
    if isinstance(value, dict):
        measured = ("seconds", "per_second", "resident", "time")
        return {key: _timeless(inner, run_dir) for key, inner in value.items()
                if not any(word in key for word in measured)}
    if isinstance(value, list):
        return [_timeless(inner, run_dir) for inner in value]
    return value.replace(str(run_dir), "RUN") if isinstance(value, str) else value


def _hdf5(file: Path) -> dict:
    """Every data set and attribute, bit for bit."""
    content = {}
    def visit(name, node):
        for key, value in node.attrs.items():
            content[f"{name}@{key}"] = repr(value)
        if isinstance(node, h5py.Dataset):
            values = node[()]
            content[name] = (str(node.dtype), node.shape, hashlib.sha256(values.tobytes()).hexdigest())
    with h5py.File(file) as opened:
        visit("/", opened)
        opened.visititems(visit)
    return content


def results(run_dir: Path) -> dict:
    """What must be the same bits: every output of every stage, by its name."""
    found = {}
    for file in sorted(run_dir.glob("[0-9][0-9]-*/**/*")):
        name = str(file.relative_to(run_dir))
        if not file.is_file() or file.name == "manifest.json" or "/state/" in name:
            continue
        if file.suffix == ".h5":
            found[name] = _hdf5(file)
        elif file.suffix == ".json":
            found[name] = _timeless(json.loads(file.read_text()), run_dir)
        else:
            found[name] = hashlib.sha256(file.read_bytes()).hexdigest()
    return found


def differences(one: dict, other: dict) -> list[str]:
    """Names of the outputs that differ; the figures themselves where they are few."""
    report = []
    for name in sorted(one.keys() | other.keys()):
        if one.get(name) != other.get(name):
            left, right = one.get(name), other.get(name)
            inner = (sorted(key for key in left.keys() | right.keys() if left.get(key) != right.get(key))
                     if isinstance(left, dict) and isinstance(right, dict) else [])
            report.append(f"{name} {[(key, left.get(key), right.get(key)) for key in inner[:3]]}")
    return report


def losses(run_dir: Path) -> list[tuple]:
    """(step, loss, gradient norm) of each training step, in the order in which they were written."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["gradient_norm"]) for line in lines if line.get("event") == "step"]


def manifest_times(run_dir: Path) -> dict[str, int]:
    return {file.parent.name: file.stat().st_mtime_ns for file in sorted(run_dir.glob("[0-9][0-9]-*/manifest.json"))}
