"""Speed and memory against the plain formulation, on this machine: one table.

    python tests/bench/run.py [--quick] [--whole] [--only prune solves train depth]

--quick takes one small repetition of everything and shows that it works, not how fast it is. --whole prunes
all blocks instead of the first BLOCKS (minutes a repetition). The other side is plain.py, in eager PyTorch
on the same cores; the sides take turns, cells are medians with (smallest-largest). Nothing is asserted.

ESPALIER_BUILD       the build folder, with espalier and tests/bench in it  (<source>/build)
ESPALIER_TEST_MODEL  the checkpoint                       (<work>/models/smollm2-135m)
ESPALIER_TEST_TEXT   a folder with calibration.txt        (<work>/texts, or ESPALIER_TEST_DATA/wikitext-2/valid.txt)
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCE = HERE.parents[1]
WORK = Path(os.environ.get("ESPALIER_WORK", SOURCE / ".espalier"))
BUILD = Path(os.environ.get("ESPALIER_BUILD", SOURCE / "build"))
MODEL = Path(os.environ.get("ESPALIER_TEST_MODEL", WORK / "models/smollm2-135m"))
SECTIONS = ["prune", "solves", "train", "depth"]
THREADS = 2  # of either side: two ranks of one thread each, or one process of two
BLOCKS = 4
GIB = 2 ** 30


class Table:
    def __init__(self):
        self.rows = []

    def add(self, item, plain, ours, ratio, goal):
        self.rows.append((item, plain, ours, f"{ratio:.2f}", goal))
        print(f"  {' | '.join(self.rows[-1])}", file=sys.stderr, flush=True)

    def show(self):
        rows = [("item", "plain", "ours", "ratio", "goal"), *self.rows]
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
        print("\n".join([lines[0], "-+-".join("-" * width for width in widths), *lines[1:]]))


def with_spread(values, unit, digits=2):
    cell = f"{statistics.median(values):.{digits}f}"
    if len(values) > 1:
        cell += f" ({min(values):.{digits}f}-{max(values):.{digits}f})"
    return f"{cell} {unit}"


def gib(count):
    return f"{count / GIB:.2f} GiB"


def take_turns(repetitions, **sides):
    """side -> its results: every repetition runs each side once, so that a slow minute hits all of them."""
    results = {name: [] for name in sides}
    for repetition in range(repetitions):
        for name, measure in sides.items():
            print(f"  {name.replace('_', ' ')}, {repetition + 1} of {repetitions}", file=sys.stderr, flush=True)
            results[name].append(measure())
    return results


def values(results, key="seconds"):
    return [result[key] for result in results]


def carry_out(command, environment=None):
    command = [str(word) for word in command]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=SOURCE)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)}\nfailed with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-3000:]}")
    return done.stdout


def plain(command, *arguments):
    return json.loads(carry_out([sys.executable, HERE / "plain.py", command, "--threads", THREADS, *arguments])
                      .splitlines()[-1])


class Bench:
    """What the sections share: sizes, the token set, a folder for runs."""

    def __init__(self, options, folder):
        self.options, self.folder, self.table = options, folder, Table()
        self.samples = 8 if options.quick else 128
        self.blocks = 2 if options.quick else None if options.whole else BLOCKS
        self.repetitions = options.repetitions or (1 if options.quick else 3)
        self.tokens = folder / "tokens.h5"
        self.products = "not run"
        carry_out([sys.executable, SOURCE / "launch/prepare_data.py", "--tokenizer", MODEL, "--format", "text",
                   "--input", find_text(), "--output", self.tokens])

    def resized(self, blocks):
        """The checkpoint with so many blocks; None: as it is."""
        if blocks is None:
            return MODEL
        directory = self.folder / f"{blocks}-blocks"
        if not directory.exists():
            carry_out([sys.executable, HERE / "resize.py", MODEL, blocks, directory])
        return directory

    def espalier(self, ranks, stage, model, dtype, *overrides):
        """Runs one stage; its manifest, the largest rank's peak, and the tokens per second of each step."""
        directory = self.folder / "run"
        environment = dict(os.environ)
        if os.geteuid() == 0:  # as launch/environment.sh
            environment.update(OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1",
                               OMPI_MCA_btl_vader_single_copy_mechanism="none")
        carry_out(["mpirun", "-n", ranks, "--bind-to", "none", "--oversubscribe", BUILD / "espalier",
                   f"pipeline=[{stage}]", f"run.dir={directory}", f"model.path={model}", f"model.dtype={dtype}",
                   f"data.calibration={self.tokens}", f"data.train={self.tokens}", "cluster.device=cpu",
                   "cluster.threads_per_rank=1", *overrides], environment)
        manifest = json.loads((directory / f"01-{stage}/manifest.json").read_text())
        events = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
        shutil.rmtree(directory)
        self.products = manifest["facts"].get("products", "not recorded")
        return {"seconds": manifest["seconds"], "peak_resident_bytes": max(manifest["peak_resident_bytes"]),
                "tokens_per_second": [event["tokens_per_second"] for event in events if event.get("event") == "step"]}

    def prune(self, ranks, method, dtype, model=None, samples=None, length=512):
        return self.espalier(ranks, "prune", model or self.resized(self.blocks), dtype, f"prune={method}",
                             "prune.pattern=2:4", f"prune.samples={samples or self.samples}",
                             f"prune.sequence_length={length}")

    def plain_prune(self, method, dtype):
        blocks = [] if self.blocks is None else ["--blocks", self.blocks]
        return plain("prune", "--method", method, "--model", MODEL, "--tokens", self.tokens, "--dtype", dtype,
                     "--samples", self.samples, *blocks)


def find_text():
    folder = Path(os.environ.get("ESPALIER_TEST_TEXT", WORK / "texts"))
    candidates = [folder / "calibration.txt"]
    if "ESPALIER_TEST_DATA" in os.environ:
        candidates.append(Path(os.environ["ESPALIER_TEST_DATA"]) / "wikitext-2/valid.txt")
    for file in candidates:
        if file.exists():
            return file
    raise SystemExit(f"no text to calibrate on ({', '.join(map(str, candidates))}): run launch/make_example.sh, or set "
                     "ESPALIER_TEST_TEXT to a folder with calibration.txt")


# ------------------------------------------------------------------------------------------ sections


def bench_prune(bench):
    table = bench.table
    amount = f"{bench.samples}x512 tokens, {bench.blocks or 'all'} blocks"
    single = take_turns(bench.repetitions, plain_float32=lambda: bench.plain_prune("wanda", "float32"),
                        ours_float32=lambda: bench.prune(2, "wanda", "float32"),
                        plain_bfloat16=lambda: bench.plain_prune("wanda", "bfloat16"),
                        ours_bfloat16=lambda: bench.prune(2, "wanda", "bfloat16"),
                        ours_on_1_rank=lambda: bench.prune(1, "wanda", "bfloat16"))
    for ours, other, goal in (("float32", "float32", ">= 1.8"), ("bfloat16", "bfloat16", ">= 4"),
                              ("bfloat16", "float32", "(none)")):
        theirs, mine = values(single[f"plain_{other}"]), values(single[f"ours_{ours}"])
        kind = ours if ours == other else f"{ours}, plain in {other}"
        table.add(f"Wanda 2:4, {kind} ({amount})", with_spread(theirs, "s"), with_spread(mine, "s"),
                  statistics.median(theirs) / statistics.median(mine), goal)
    one, two = values(single["ours_on_1_rank"]), values(single["ours_bfloat16"])
    table.add("Wanda 2:4, bfloat16, 2 ranks against 1", f"1 rank: {with_spread(one, 's')}", with_spread(two, "s"),
              statistics.median(one) / statistics.median(two), ">= 1.8")

    solved = {dtype: take_turns(1, plain_sparsegpt=lambda: bench.plain_prune("sparsegpt", dtype),
                                ours_sparsegpt=lambda: bench.prune(2, "sparsegpt", dtype))
              for dtype in (["bfloat16"] if bench.options.quick else ["float32", "bfloat16"])}
    for dtype, both in solved.items():
        theirs, mine = values(both["plain_sparsegpt"])[0], values(both["ours_sparsegpt"])[0]
        table.add(f"SparseGPT 2:4, {dtype} ({amount}), once", f"{theirs:.2f} s", f"{mine:.2f} s", theirs / mine, "(none)")
    for dtype in ("float32", "bfloat16"):
        add_peaks(bench, f"Wanda, {dtype}", single[f"plain_{dtype}"], single[f"ours_{dtype}"])
    for dtype, both in solved.items():
        add_peaks(bench, f"SparseGPT, {dtype}", both["plain_sparsegpt"], both["ours_sparsegpt"])


def add_peaks(bench, item, plain_results, our_results):
    theirs, mine = (max(values(side, "peak_resident_bytes")) for side in (plain_results, our_results))
    bench.table.add(f"peak of a rank, {item}", gib(theirs), gib(mine), mine / theirs, "< 0.60")


def block_shapes():
    """The seven matrices of a block as NAME:ROWSxINPUTS:STATISTIC; those of one statistic read the same input."""
    config = json.loads((MODEL / "config.json").read_text())
    hidden, inner, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    head = config.get("head_dim") or hidden // heads
    keys = config.get("num_key_value_heads", heads) * head
    return [f"q_proj:{heads * head}x{hidden}:0", f"k_proj:{keys}x{hidden}:0", f"v_proj:{keys}x{hidden}:0",
            f"o_proj:{hidden}x{heads * head}:1", f"gate_proj:{inner}x{hidden}:2", f"up_proj:{inner}x{hidden}:2",
            f"down_proj:{hidden}x{inner}:3"]


def bench_solves(bench):
    program = BUILD / "tests/bench"
    if not program.is_file():
        raise SystemExit(f"{program} is not built: cmake --build {BUILD} --target bench")
    for pattern in ("2:4", "unstructured"):
        results = take_turns(
            bench.repetitions,
            plain_solves=lambda: plain("solves", "--pattern", pattern, "--shapes", *block_shapes()),
            our_solves=lambda: json.loads(carry_out([program, pattern, THREADS, 1, *block_shapes()])))
        theirs, mine = ([1000 * result["seconds"][0] for result in side] for side in results.values())
        bench.table.add(f"seven SparseGPT solves of a block, {pattern}", with_spread(theirs, "ms", 0),
                        with_spread(mine, "ms", 0), statistics.median(theirs) / statistics.median(mine), ">= 3")


def bench_train(bench):
    """SPP on the dense model: a step costs the same there. The first step, which warms up, is left out."""
    steps = 3 if bench.options.quick else 5

    def ours(ranks):
        return bench.espalier(ranks, "retrain", MODEL, "bfloat16", f"retrain.steps={steps}", "retrain.batch_size=4",
                              "retrain.sequence_length=512", "retrain.dropout=0", "retrain.warmup_ratio=null",
                              "retrain.checkpoint_every=1000")

    def theirs(recompute):
        return plain("train", "--model", MODEL, "--tokens", bench.tokens, "--steps", steps, "--recompute", recompute)

    results = take_turns(bench.repetitions, plain_recomputing_blocks=lambda: theirs("block"),
                         plain_recomputing_products=lambda: theirs("added"), ours=lambda: ours(2),
                         ours_on_1_rank=lambda: ours(1))
    speed = {name: [statistics.median(result["tokens_per_second"][1:]) for result in side]
             for name, side in results.items()}
    rates = {name: with_spread(rate, "tokens/s", 0) for name, rate in speed.items()}
    middle = {name: statistics.median(rate) for name, rate in speed.items()}
    for what in ("blocks", "products"):
        name = f"plain_recomputing_{what}"
        part = "each block" if what == "blocks" else "the added product"
        bench.table.add(f"SPP 4x512, bfloat16; plain recomputes {part}", rates[name], rates["ours"],
                        middle["ours"] / middle[name], ">= 2.5")
    bench.table.add("SPP 4x512, bfloat16, 2 ranks against 1", f"1 rank: {rates['ours_on_1_rank']}", rates["ours"],
                    middle["ours"] / middle["ours_on_1_rank"], ">= 1.8")
    for what in ("blocks", "products"):
        add_peaks(bench, f"SPP, bfloat16; plain recomputes {what}", results[f"plain_recomputing_{what}"], results["ours"])


def bench_depth(bench):
    """The same width at two depths, pruned with few short sequences."""
    shallow, deep = (8, 16) if bench.options.quick else (30, 120)
    for method in ("wanda", "sparsegpt"):
        peaks = {}
        for blocks in (shallow, deep):
            print(f"  {method} at {blocks} blocks", file=sys.stderr, flush=True)
            result = bench.prune(1, method, "bfloat16", bench.resized(blocks), samples=4, length=64)
            peaks[blocks] = result["peak_resident_bytes"]
        bench.table.add(f"peak of {method} at {deep} blocks against {shallow}", f"{shallow} blocks: {gib(peaks[shallow])}",
                        f"{deep} blocks: {gib(peaks[deep])}", peaks[deep] / peaks[shallow], "no growth: 1")


def describe_machine(bench):
    with open("/proc/cpuinfo") as file:
        information = dict(line.split(":", 1) for line in file.read().split("\n\n")[0].splitlines())
    information = {key.strip(): value.strip() for key, value in information.items()}
    wanted = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
    flags = [flag for flag in wanted if flag in information.get("flags", "").split()]
    with open("/proc/meminfo") as file:
        memory = int(file.readline().split()[1]) * 1024
    torch = carry_out([sys.executable, "-c", "import torch; print(torch.__version__)"]).strip()
    return (f"{information.get('model name', 'unknown processor')}, {os.cpu_count()} cores ({' '.join(flags)}), "
            f"{memory / GIB:.0f} GiB; load {os.getloadavg()[0]:.1f} at the end\n"
            f"plain: PyTorch {torch}, {THREADS} threads; ours: 2 ranks of 1 thread, products {bench.products}\n"
            f"{MODEL.name}, median (smallest-largest) of {bench.repetitions}; speed: plain / ours, memory: ours / plain")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one small repetition: does it work?")
    parser.add_argument("--whole", action="store_true", help=f"prune all blocks, not the first {BLOCKS}")
    parser.add_argument("--repetitions", type=int, help="of each side (3)")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS)
    options = parser.parse_args()
    if not (BUILD / "espalier").exists():
        raise SystemExit(f"{BUILD}/espalier is not there: run launch/build.sh, or set ESPALIER_BUILD")
    if not (MODEL / "config.json").exists():
        raise SystemExit(f"{MODEL} holds no checkpoint: run launch/make_example.sh, or set ESPALIER_TEST_MODEL")
    functions = {"prune": bench_prune, "solves": bench_solves, "train": bench_train, "depth": bench_depth}
    with tempfile.TemporaryDirectory(prefix="espalier-bench-") as folder:
        bench = Bench(options, Path(folder))
        for section in options.only:
            print(f"{section}:", file=sys.stderr, flush=True)
            functions[section](bench)
        print(describe_machine(bench))
        bench.table.show()


if __name__ == "__main__":
    main()
