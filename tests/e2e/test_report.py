"""launch/report.py on made-up runs: what the page must show, and that missing parts are left out."""

import json
import math
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

SOURCE = Path(os.environ.get("ESPALIER_SOURCE", Path(__file__).resolve().parents[2]))
KINDS = {"self_attn.q_proj": (576, 576), "self_attn.k_proj": (192, 576), "self_attn.v_proj": (192, 576),
         "self_attn.o_proj": (576, 576), "mlp.gate_proj": (1536, 576), "mlp.up_proj": (1536, 576),
         "mlp.down_proj": (576, 1536)}
BLOCKS = 30
PERPLEXITIES = {1: 18.4988, 3: 107.81, 5: 27.94, 7: 28.31}


def write(file: Path, values) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(values if isinstance(values, str) else json.dumps(values), encoding="utf-8")


def manifest(stage: str, seconds: float, peak: int) -> dict:
    return {"stage": stage, "key": "0123abcd", "status": "finished", "seconds": seconds,
            "peak_resident_bytes": [peak, peak - 1000], "bytes_sent": [41_000_000, 40_000_000], "outputs": [],
            "facts": {"device": "cpu", "backend": "mpi", "ranks": 2, "threads_per_rank": 1, "products": "oneDNN bfloat16"}}


def matrices(**values) -> list[dict]:
    """One record a matrix; a value may be a function of (block, position of its kind)."""
    records = []
    for block in range(BLOCKS):
        for position, (kind, (rows, columns)) in enumerate(KINDS.items()):
            record = {"name": f"model.layers.{block}.{kind}.weight", "rows": rows, "columns": columns}
            record |= {key: value(block, position) if callable(value) else value for key, value in values.items()}
            records.append(record)
    return records


def evaluation(perplexity: float, nonzeros: int) -> dict:
    return {"tasks": {"text": {"perplexity": perplexity, "tokens": 40940, "segments": 20, "sequence_length": 2048,
                               "dtype": "bfloat16"}},
            "model": {"nonzeros": nonzeros, "parameters": 134515008, "bytes": 269030016}}


def make_run(directory: Path) -> Path:
    write(directory / "config.yaml", "run:\n  name: two of four\n  seed: 7\nmodel:\n  path: /models/<tiny>\n  dtype: bfloat16\n"
                                     "retrain:\n  method: spp\n")
    write(directory / "environment.json", {"hostname": "node1", "libtorch": "2.15.0"})
    for position, perplexity in PERPLEXITIES.items():
        write(directory / f"{position:02d}-evaluate/manifest.json", manifest("evaluate", 21.4, 610_000_000))
        write(directory / f"{position:02d}-evaluate/metrics.json",
              evaluation(perplexity, 134515008 if position == 1 else 81430848))
    write(directory / "02-prune/manifest.json", manifest("prune", 83.2, 720_000_000))
    write(directory / "02-prune/metrics.json", {
        "method": "wanda", "pattern": "2:4", "damping": 0.01,
        "matrices": matrices(zeros=lambda _, kind: math.prod(list(KINDS.values())[kind]) // 2, sparsity=0.5,
                             relative_error=lambda block, kind: 0.05 + 0.004 * block + 0.01 * kind)})
    write(directory / "04-retrain/manifest.json", manifest("retrain", 262.5, 2_410_000_000))
    write(directory / "04-retrain/metrics.json", {
        "method": "spp", "steps": 120, "tokens": 245760, "trainable_parameters": 1244160, "nonzeros_before": 81430848,
        "nonzeros_after": 81430848, "loss_first": 4.6, "loss_last": 3.3})
    steps = [{"stage": "04-retrain", "step": step, "loss": 3.2 + 1.4 * math.exp(-step / 20) + 0.1 * math.sin(step * 1.7),
              "learning_rate": 4e-3 * min(1, (step + 1) / 4) * (1 - step / 120), "tokens_per_second": 930 + step % 7, "time": step}
             for step in range(120)]
    write(directory / "metrics.jsonl", "\n".join(map(json.dumps, steps)) + '\n{"stage": "04-ret')
    write(directory / "06-compress/manifest.json", manifest("compress", 48.9, 530_000_000))
    write(directory / "06-compress/metrics.json", {
        "method": "ere", "bytes": 13_451_000, "share": 0.05, "certificate": {"energy": 400.0, "lost_energy": 30.0, "gap": 2.0},
        "matrices": matrices(truncation_rank=lambda block, kind: 8 + (block * 7 + kind * 11) % 60,
                             energy_kept=lambda block, kind: 0.8 + 0.004 * block,
                             quantization_error=lambda block, kind: 0.004 + 0.0001 * block * (kind + 1))})
    write(directory / "08-export/manifest.json", manifest("export", 1.9, 300_000_000))
    write(directory / "08-export/metrics.json", {"directory": "08-export/model", "bytes": 272_600_000, "files": 6})
    return directory


def render(directory: Path, *arguments: str) -> tuple[str, str]:
    done = subprocess.run([sys.executable, SOURCE / "launch/report.py", directory, *arguments], capture_output=True,
                          text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return (directory / "report.html").read_text(encoding="utf-8"), done.stdout


class Page(HTMLParser):
    """Tags that must be balanced, addresses that would leave the page, and the words a person reads."""

    VOID = {"meta", "br", "hr", "img", "link", "input"}

    def __init__(self, text: str):
        super().__init__()
        self.open_tags, self.addresses, self.words, self.pictures = [], [], [], 0
        self.feed(text)
        assert not self.open_tags, f"never closed: {self.open_tags}"
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attributes):
        self.pictures += tag == "svg"
        self.addresses += [value for name, value in attributes
                           if name in ("src", "href", "xlink:href") and not (value or "").startswith("#")]
        if tag not in self.VOID:
            self.open_tags.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open_tags.pop()

    def handle_endtag(self, tag):
        assert self.open_tags and self.open_tags[-1] == tag, f"</{tag}> closes {self.open_tags[-1:]}"
        self.open_tags.pop()

    def handle_data(self, data):
        if not self.open_tags or self.open_tags[-1] != "style":
            self.words.append(data)


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    directory = make_run(tmp_path_factory.mktemp("run"))
    html, printed = render(directory, "--table")
    return directory, html, Page(html), printed


def test_every_measured_perplexity_is_in_the_page_and_in_the_terminals_table(complete):
    _, _, page, printed = complete
    for shown in ("18.50", "107.81", "27.94", "28.31"):
        assert shown in page.text
        assert shown in printed


def test_every_stage_is_a_row_with_its_time_bytes_and_memory(complete):
    _, _, page, printed = complete
    lines = [line for line in printed.splitlines() if re.match(r"0\d ", line)]
    assert [line.split()[:2] for line in lines] == [
        ["01", "evaluate"], ["02", "prune"], ["03", "evaluate"], ["04", "retrain"], ["05", "evaluate"],
        ["06", "compress"], ["07", "evaluate"], ["08", "export"]]
    assert "1 min 23 s" in lines[1] and "720.0 MB" in lines[1] and "41.0 MB" in lines[1] and "wanda 2:4" in lines[1]
    assert "4 min 22 s" in lines[3] and "2.41 GB" in lines[3] and "spp, 120 steps" in lines[3]
    assert "13.5 MB (5.0 %)" in lines[5]
    assert "after prune" in lines[2] and "after retrain" in lines[4] and "after compress" in lines[6]
    assert "81.4 M (60.5 %)" in lines[2]
    for text in ("1 min 23 s", "2.41 GB", "13.5 MB (5.0 %)"):
        assert text in page.text


def test_numbers_stand_in_columns_of_one_width(complete):
    printed = complete[3].splitlines()
    rule = next(line for line in printed if set(line.strip()) == {"-", " "})
    ends = [match.end() for match in re.finditer(r"-+", rule)]
    for line in printed[printed.index(rule) + 1:printed.index(rule) + 9]:
        assert all(end >= len(line) or line[end] == " " for end in ends)


def test_the_page_has_a_picture_of_each_kind_and_needs_nothing_from_outside(complete):
    _, html, page, _ = complete
    for title in ("Perplexity on text", "Sparsity by layer and matrix: 02-prune", "Loss: 04-retrain",
                  "Chosen ranks and quantization error: 06-compress", "Time and memory"):
        assert title in page.text
    # bars, sparsity, error, loss, ranks, quantization error, time, memory
    assert page.pictures == 8
    assert page.addresses == []
    assert "<script" not in html and "@import" not in html
    assert not re.search(r"url\((?!#)", html)


def test_every_matrix_is_listed_with_its_exact_figures(complete):
    page = complete[2]
    assert page.text.count("model.layers.29.mlp.down_proj.weight") == 2  # pruned, compressed
    assert "442,368" in page.text  # zeros of a 576 x 1536 matrix at 2:4
    assert page.text.count("210 matrices") == 2


def test_text_from_the_run_cannot_become_markup(complete):
    _, html, page, _ = complete
    assert "/models/<tiny>" in page.text
    assert "<tiny>" not in html


def test_the_pictures_take_their_colours_from_the_page(complete):
    html = complete[1]
    used = set(re.findall(r"var\((--[\w-]+)\)", html))
    defined = set(re.findall(r"(--[\w-]+):", html))
    assert {"--ink", "--first", "--second", "--shade-0", "--shade-8"} <= used <= defined
    assert not re.search(r"#0101", html)


def test_a_failed_run_shows_where_and_why(tmp_path):
    directory = make_run(tmp_path / "run")
    for folder in ("05-evaluate", "06-compress", "07-evaluate", "08-export"):
        for file in (directory / folder).iterdir():
            file.unlink()
        (directory / folder).rmdir()
    (directory / "04-retrain/manifest.json").unlink()
    (directory / "04-retrain/metrics.json").unlink()
    message = "step 41: the loss is not finite; lower retrain.learning_rate <now 4>"
    write(directory / "failure.json", {"stage": "04-retrain", "message": message, "rank": 0, "time": "2026-01-02T03:04:05Z"})
    html, printed = render(directory, "--table")
    page = Page(html)
    assert "The run failed in 04-retrain" in page.text and message in page.text and "rank 0" in page.text
    assert f"failed in 04-retrain: {message}" in printed
    assert "retrain (not finished)" in printed
    assert "Loss: 04-retrain" in page.text
    assert "Chosen ranks" not in page.text


def test_an_empty_run_directory_and_damaged_files_still_give_a_page(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    Page(render(empty)[0])
    damaged = make_run(tmp_path / "damaged")
    write(damaged / "02-prune/metrics.json", '{"method": "wanda", "matrices": [{"name": "model.lay')
    write(damaged / "06-compress/metrics.json", {"bytes": None, "share": "much", "matrices": [3, {"rows": None}]})
    write(damaged / "04-retrain/manifest.json", [])
    write(damaged / "config.yaml", "run: [")
    page = Page(render(damaged)[0])
    assert "18.50" in page.text and "Sparsity by layer" not in page.text


def test_what_is_no_directory_is_refused_with_what_to_give(tmp_path):
    done = subprocess.run([sys.executable, SOURCE / "launch/report.py", tmp_path / "none"], capture_output=True, text=True)
    assert done.returncode != 0 and "give the run.dir of a run" in done.stderr
