"""The whole chain on SmolLM2 itself, small in samples and steps: the same bits however it is distributed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from program import SOURCE, differences, losses, results, run_well, settings
from small_model import Files

MODEL = Path(os.environ.get("ESPALIER_TEST_MODEL", "absent"))
TEXTS = Path(os.environ.get("ESPALIER_TEST_TEXT", "absent"))
pytestmark = pytest.mark.skipif(not (MODEL / "config.json").exists() or not (TEXTS / "calibration.txt").exists(),
                                reason="skipped: no data (ESPALIER_TEST_MODEL and ESPALIER_TEST_TEXT name none)")
LAYOUTS = {"2_ranks": (2, 1), "3_ranks": (3, 1), "1_rank_of_2_threads": (1, 2)}
# The quickstart in sizes that take half a minute a layout.
SMALL = dict(pipeline="[prune,retrain,compress,evaluate]", prune__samples=4, prune__sequence_length=128,
             retrain__steps=2, retrain__sequence_length=128, retrain__checkpoint_every=0, compress__budget=0.01)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokens")
    for part in ("calibration", "heldout"):
        subprocess.run([sys.executable, SOURCE / "launch/prepare_data.py", "--tokenizer", MODEL, "--format", "text",
                        "--input", TEXTS / f"{part}.txt", "--output", directory / f"{part}.h5"], check=True)
    calibration, held_out = directory / "calibration.h5", directory / "heldout.h5"
    return Files(model=MODEL, calibration=calibration, train=calibration, held_out=held_out)


def carry_out(files: Files, directory: Path, ranks: int, threads: int) -> Path:
    run_well(*settings(files, directory, **SMALL, cluster__threads_per_rank=threads),
             "evaluate.tasks.text.sequence_length=256", "evaluate.tasks.text.segments=2", ranks=ranks, timeout=400)
    return directory


@pytest.fixture(scope="module")
def on_one_rank(files, tmp_path_factory):
    return carry_out(files, tmp_path_factory.mktemp("one") / "run", 1, 1)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_smollm2_gives_the_same_bits_on_any_ranks_and_threads(on_one_rank, files, layout, tmp_path):
    directory = carry_out(files, tmp_path / "run", *LAYOUTS[layout])
    expected = results(on_one_rank)
    assert {name.rpartition("/")[2] for name in expected} >= {"masks.h5", "adapters.h5", "residual.h5"}
    assert differences(expected, results(directory)) == []
    assert losses(on_one_rank) == losses(directory) != []
