"""launch/submit.sh in a real Slurm: two nodes on this machine, started here and stopped at the end."""

import getpass
import json
import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

import pytest

import program
from program import configuration, differences, losses, results, run_well, settings
from small_model import write_files

PATH = os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/sbin"])
NODES = ("node1", "node2")
SECONDS_BETWEEN_CHECKS = 30  # of time limits by slurmctld; fixed when it is built


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


class Slurm:
    """munged, slurmctld and a slurmd for each node, with all their files in one directory."""

    def __init__(self, directory: Path):
        self.directory, self.processes = directory, []
        self.environment = {key: value for key, value in program.ENVIRONMENT.items() if not key.startswith("SLURM_")}
        self.environment |= {"PATH": PATH, "SLURM_CONF": str(directory / "slurm.conf"),
                             "ESPALIER_BUILD": str(program.PROGRAM.parent)}

    def start(self) -> None:
        for name in ("state", *NODES):
            (self.directory / name).mkdir()
        self.write_configuration()
        key = self.directory / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        # --force: pytest's directories are closed to other users, which munged would not have.
        self.serve("munged", "--foreground", "--force", f"--key-file={key}",
                   *(f"--{name}-file={self.directory}/munged.{name}" for name in ("pid", "log", "seed")),
                   f"--socket={self.directory}/munge.socket")
        self.wait_until(lambda: (self.directory / "munge.socket").exists(), "munged makes no socket")
        self.started = time.time()
        self.serve("slurmctld", "-D")
        for node in NODES:
            self.serve("slurmd", "-D", "-N", node)
        self.wait_until(lambda: self.ask("sinfo", "--noheader", "--Node", "--format=%T").split() == ["idle"] * len(NODES),
                        "the nodes are not ready")

    def write_configuration(self) -> None:
        host = socket.gethostname().partition(".")[0]
        controller, *ports = free_ports(1 + len(NODES))
        user, directory = getpass.getuser(), self.directory
        nodes = "".join(f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=1\n"
                        for node, port in zip(NODES, ports))
        (directory / "slurm.conf").write_text(f"""
ClusterName=espalier
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser={user}
SlurmdUser={user}
# A requeued job begins again when its old credential has run out, else after two minutes.
AuthInfo=socket={directory}/munge.socket,cred_expire=5
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/%n.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdLogFile={directory}/%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=1,batch_sched_delay=0
KillWait=2
{nodes}PartitionName=all Nodes={",".join(NODES)} Default=YES State=UP
""")

    def serve(self, *command: str) -> None:
        with open(self.directory / "servers.txt", "a") as log:
            self.processes.append(subprocess.Popen(command, env=self.environment, stdin=subprocess.DEVNULL, stdout=log,
                                                   stderr=log))

    def stop(self) -> None:
        try:
            if len(self.processes) > 1 and self.processes[1].poll() is None:  # slurmctld
                self.ask("scancel", "--user", getpass.getuser())
                self.wait_until(lambda: not self.ask("squeue", "--noheader").strip(), "jobs are still there")
        finally:
            for process in reversed(self.processes):
                process.terminate()
                try:
                    process.wait(timeout=10)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()

    def ask(self, *command: str) -> str:
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60).stdout

    def wait_until(self, condition, complaint: str, timeout: float = 30) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            ended = [process.args for process in self.processes if process.poll() is not None]
            if ended or time.monotonic() > deadline:
                logs = "\n".join(file.read_text(errors="replace")[-2000:] for file in self.directory.glob("*.[lt]*"))
                raise AssertionError(f"{complaint}; ended: {ended}\n{logs}")
            time.sleep(0.1)

    def submit(self, *arguments, working_directory: Path) -> None:
        """By launch/submit.sh; returns when no job is left."""
        done = subprocess.run([program.SOURCE / "launch/submit.sh", *map(str, arguments)], env=self.environment,
                              cwd=working_directory, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        self.wait_until(lambda: not self.ask("squeue", "--noheader").strip(), "jobs are still there", timeout=150)

    def job(self, name: str) -> list[dict[str, str]]:
        """What Slurm says of the jobs of that name, in the order of their numbers."""
        lines = [dict(word.partition("=")[::2] for word in line.split())
                 for line in self.ask("scontrol", "--oneliner", "show", "job").splitlines()]
        return sorted((job for job in lines if job.get("JobName") == name), key=lambda job: int(job["JobId"]))

    def wait_for_a_check_in(self, seconds: float) -> None:
        """Until slurmctld looks at time limits so many seconds from now."""
        time.sleep((self.started - time.time() - seconds) % SECONDS_BETWEEN_CHECKS)


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    missing = [name for name in ("munged", "slurmctld", "slurmd", "sbatch") if shutil.which(name, path=PATH) is None]
    if missing:
        pytest.skip(f"skipped: no {', '.join(missing)} here; launch/setup.sh --tests installs slurm-wlm and munge")
    slurm = Slurm(tmp_path_factory.mktemp("slurm"))
    try:
        slurm.start()
        yield slurm
    finally:
        slurm.stop()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("small"), blocks=6)


def test_a_chain_of_jobs_begins_anew_once_and_its_later_jobs_find_everything_done(slurm, files, tmp_path):
    words = settings(files, tmp_path / "run", pipeline="[prune,evaluate]", run__resume="false")
    slurm.submit("--chain", 2, "--job-name", "chain", "--output", tmp_path / "%j.txt", "--threads", 1, *words,
                 working_directory=tmp_path)
    first, second = slurm.job("chain")
    assert [job["JobState"] for job in (first, second)] == ["COMPLETED"] * 2
    outputs = [Path(job["StdOut"]).read_text() for job in (first, second)]
    assert [output.count("done before, kept") for output in outputs] == [0, 2], outputs


def test_a_sweep_as_an_array_goes_on_behind_a_member_that_fails_and_says_so(slurm, files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = configuration(tmp_path, files, pipeline="[prune,retrain,evaluate]", model__dtype="float32", retrain__steps=4)
    slurm.submit("--array", "--side-by-side", 2, "--job-name", "sweep", "--output", tmp_path / "%j.txt", *words,
                 "-m", "retrain.learning_rate=1e30,1e-3", working_directory=tmp_path)
    tasks = {job["ArrayTaskId"]: job for job in slurm.job("sweep") if "ArrayTaskId" in job}
    summary, = (job for job in slurm.job("sweep") if "ArrayTaskId" not in job)
    assert {number: (job["JobState"], job["ExitCode"]) for number, job in tasks.items()} == {
        "1": ("FAILED", "2:0"), "2": ("COMPLETED", "0:0")}
    said = Path(summary["StdOut"]).read_text()
    assert (summary["JobState"], summary["ExitCode"]) == ("FAILED", "2:0"), said
    assert "not finished" in said and "finite" in said
    sweep = Path("outputs/small-sweep")
    rows = json.loads((sweep / "summary.json").read_text())["configurations"]
    assert [row["tasks"].get("text", {}).get("leading") for row in rows] == [None, "perplexity"]
    assert "retrain.learning_rate" in (sweep / "report.html").read_text()
    run_well(*words, "run.dir=lone", "retrain.learning_rate=1e-3")
    assert differences(results(Path("lone")), results(sweep / "retrain.learning_rate=0.001")) == []


def test_a_job_over_two_nodes_is_requeued_at_its_time_limit_and_ends_with_the_bits_of_an_undisturbed_run(
        slurm, files, tmp_path):
    work = dict(pipeline="[prune,retrain,evaluate,compress,export]", prune="sparsegpt", retrain__steps=160,
                retrain__dropout=0.05)
    run_well(*settings(files, tmp_path / "undisturbed", **work))
    training = json.loads((tmp_path / "undisturbed/02-retrain/manifest.json").read_text())["seconds"]
    for attempt in range(3):
        run_dir = tmp_path / f"run{attempt}"
        # The limit is a minute and the notice half of one: the next check sends it, in the midst of the training,
        # which takes half as long on two nodes, after two seconds of starting.
        slurm.wait_for_a_check_in(2 + training / 4)
        slurm.submit("--nodes", 2, "--time", 1, "--notice", 30, "--interface", "lo", "--job-name", run_dir.name,
                     "--output", tmp_path / f"{run_dir.name}.txt", *settings(files, run_dir, **work),
                     working_directory=tmp_path)
        job, = slurm.job(run_dir.name)
        if "stopped after step" in Path(job["StdOut"]).read_text():
            break
    output = Path(job["StdOut"]).read_text()
    assert (job["JobState"], job["NodeList"]) == ("COMPLETED", "node[1-2]"), output
    # On a slow machine the second start may meet the limit too.
    assert output.count("the job goes back into the queue") == int(job["Restarts"]) >= 1, output
    assert "02-retrain  going on after" in output
    facts = json.loads((run_dir / "02-retrain/manifest.json").read_text())["facts"]
    assert (facts["ranks"], facts["threads_per_rank"]) == (2, 1)
    assert [step for step, *_ in losses(run_dir)] == list(range(1, 161))
    assert differences(results(tmp_path / "undisturbed"), results(run_dir)) == []
