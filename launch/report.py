#!/usr/bin/env python3
"""Renders RUN_DIR/report.html, one self-contained page, from the files that a run or a sweep left.

    report.py RUN_DIR [--table]     --table also prints the table of stages for the terminal

Of a sweep's directory (outputs/NAME-sweep): its configurations, from summary.json. Of a run's: reads config.yaml, environment.json, metrics.jsonl and failure.json of the run, manifest.json and
metrics.json of each stage. What is not there is left out; a run that failed shows where and why.
"""

import argparse
import json
import math
import os
import re
import sys
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup

import report_pictures as pictures

METRICS = ["perplexity", "accuracy", "matthews", "f1", "pearson", "spearman"]
NOTHING = "–"


# ------------------------------------------------------------------------------- what the run left
def read_json(file: Path) -> Any:
    """None when the file is not there or cut off: the report shows what there is."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def read_lines(file: Path) -> list[dict]:
    if not file.exists():
        return []
    records = []
    for line in file.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            record = json.loads(line)
        except ValueError:  # the last line of a run that was killed
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


def mapping(value: Any) -> dict:
    return value if isinstance(value, dict) else {}


def mappings(value: Any) -> list[dict]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def number(value: Any) -> float | None:
    usable = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return value if usable else None


def numbers(value: Any) -> list[float]:
    return [item for item in value if number(item) is not None] if isinstance(value, list) else []


class Stage:
    """One folder NN-name with what its two files say."""

    def __init__(self, folder: Path):
        self.folder = folder.name
        self.position, _, self.name = folder.name.partition("-")
        self.manifest = mapping(read_json(folder / "manifest.json"))
        self.metrics = mapping(read_json(folder / "metrics.json"))
        self.facts = mapping(self.manifest.get("facts"))
        self.finished = self.manifest.get("status") == "finished"
        self.seconds = number(self.manifest.get("seconds"))
        self.peak_bytes = max(numbers(self.manifest.get("peak_resident_bytes")), default=None)
        self.sent_bytes = max(numbers(self.manifest.get("bytes_sent")), default=None)
        self.matrices = mappings(self.metrics.get("matrices"))
        self.tasks = {name: mapping(task) for name, task in mapping(self.metrics.get("tasks")).items()}
        self.model = mapping(self.metrics.get("model"))

    @property
    def kind(self) -> str:
        """What the stage does, told by its metrics: an entry may have any name."""
        if self.tasks:
            return "evaluate"
        if "trainable_parameters" in self.metrics or "loss_last" in self.metrics:
            return "retrain"
        if "share" in self.metrics or "certificate" in self.metrics:
            return "compress"
        if "pattern" in self.metrics:
            return "prune"
        return "export" if "directory" in self.metrics else self.name


class Run:
    def __init__(self, directory: Path):
        self.directory = directory
        self.config_text = ""
        if (directory / "config.yaml").exists():
            self.config_text = (directory / "config.yaml").read_text(encoding="utf-8", errors="replace")
        try:
            self.config = mapping(yaml.safe_load(self.config_text))
        except yaml.YAMLError:
            self.config = {}
        self.environment = mapping(read_json(directory / "environment.json"))
        self.failure = mapping(read_json(directory / "failure.json"))
        self.steps = read_lines(directory / "metrics.jsonl")
        folders = [folder for folder in directory.iterdir() if folder.is_dir() and re.match(r"\d\d+-", folder.name)]
        self.stages = [Stage(folder) for folder in sorted(folders, key=lambda item: (int(item.name.split("-")[0]), item.name))]
        self.name = str(mapping(self.config.get("run")).get("name") or directory.name)

    def setting(self, *keys: str) -> Any:
        value: Any = self.config
        for key in keys:
            value = mapping(value).get(key)
        return value

    def measured_model(self, position: int) -> str:
        """Which model the evaluation at this position measured: the one of the last stage that made one."""
        for stage in reversed(self.stages[:position]):
            if stage.kind not in ("evaluate", "export"):
                return f"after {stage.name}"
        return "start"


# ------------------------------------------------------------------------------- numbers for people
def bytes_text(value: float | None) -> str:
    if value is None:
        return NOTHING
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            return f"{value / size:.{2 if unit == 'GB' else 1}f} {unit}"
    return f"{value:.0f} B"


def count_text(value: float | None) -> str:
    if value is None:
        return NOTHING
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.1f} {unit}"
    return f"{value:.0f}"


def seconds_text(value: float | None) -> str:
    if value is None:
        return NOTHING
    if value < 60:
        return f"{value:.1f} s"
    minutes, seconds = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"


def share_text(value: float | None) -> str:
    return NOTHING if value is None else f"{100 * value:.1f} %"


def metric_text(name: str, value: float | None) -> str:
    if value is None:
        return NOTHING
    if name == "perplexity":
        return f"{value:.2f}" if value < 1e5 else f"{value:.3g}"
    return f"{value:.4f}"


# ------------------------------------------------------------------------------- the table
def task_metrics(run: Run) -> list[tuple[str, str]]:
    """(task, its leading metric) in the order of appearance."""
    found: dict[str, str] = {}
    for stage in run.stages:
        for task, values in stage.tasks.items():
            named = values.get("reported") if isinstance(values.get("reported"), list) else []
            metric = next((name for name in [*named, *METRICS] if number(values.get(str(name))) is not None), None)
            if metric and task not in found:
                found[task] = metric
    return list(found.items())


def what_it_did(run: Run, position: int) -> str:
    stage = run.stages[position]
    said = stage.metrics
    method = said.get("method") or run.setting(stage.name, "method")
    if stage.kind == "evaluate":
        return run.measured_model(position)
    if stage.kind == "prune":
        return " ".join(str(part) for part in (method, said.get("pattern")) if part)
    if stage.kind == "retrain":
        steps = number(said.get("steps"))
        return ", ".join(str(part) for part in (method, f"{steps:.0f} steps" if steps is not None else None) if part)
    if stage.kind == "export":
        return str(run.setting(stage.name, "format") or "")
    return str(method or "")


def nonzeros_text(stage: Stage) -> str:
    kept, total = number(stage.model.get("nonzeros")), number(stage.model.get("parameters"))
    if kept is not None and total:
        return f"{count_text(kept)} ({share_text(kept / total)})"
    if stage.kind == "prune":
        zeros = sum(number(matrix.get("zeros")) or 0 for matrix in stage.matrices)
        places = sum((number(matrix.get("rows")) or 0) * (number(matrix.get("columns")) or 0) for matrix in stage.matrices)
        return f"{count_text(places - zeros)} of {count_text(places)}" if places else NOTHING
    return count_text(number(stage.metrics.get("nonzeros_after")))


def bytes_of(stage: Stage) -> str:
    value = number(stage.model.get("bytes")) if stage.kind == "evaluate" else number(stage.metrics.get("bytes"))
    share = number(stage.metrics.get("share"))
    return bytes_text(value) + (f" ({share_text(share)})" if share is not None and value is not None else "")


def flops_text(stage: Stage) -> str:
    """Of one sequence, by the first task: all stored weights, and those that are not 0 where that is less."""
    for task in stage.tasks.values():
        dense, nonzero = number(task.get("flops")), number(task.get("flops_of_nonzeros"))
        if dense is not None:
            fewer = nonzero is not None and nonzero < 0.999 * dense
            return count_text(dense) + (f", {count_text(nonzero)} of nonzeros" if fewer else "")
    return NOTHING


def stage_table(run: Run) -> tuple[list[str], list[list[str]]]:
    tasks = task_metrics(run)
    titles = [metric if len(tasks) == 1 else f"{metric}: {task}" for task, metric in tasks]
    header = ["", "stage", "what", *titles, "nonzeros", "FLOPs", "bytes", "time", "peak memory", "sent"]
    rows = []
    for position, stage in enumerate(run.stages):
        measured = [metric_text(metric, number(mapping(stage.tasks.get(task)).get(metric))) for task, metric in tasks]
        rows.append([stage.position, stage.name + ("" if stage.finished else " (not finished)"), what_it_did(run, position),
                     *measured, nonzeros_text(stage), flops_text(stage), bytes_of(stage), seconds_text(stage.seconds),
                     bytes_text(stage.peak_bytes), bytes_text(stage.sent_bytes)])
    return header, rows


def terminal_table(header: list[str], rows: list[list[str]], text_columns: int = 3) -> str:
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = []
    for row in [header, ["-" * width for width in widths], *rows]:
        cells = [cell.ljust(width) if column < text_columns else cell.rjust(width)
                 for column, (cell, width) in enumerate(zip(row, widths))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


# ------------------------------------------------------------------------------- the sections
def block_and_kind(name: str) -> tuple[int | None, str]:
    """'model.layers.7.mlp.up_proj.weight' is (7, 'mlp.up_proj')."""
    match = re.search(r"\.(\d+)\.", name)
    if not match:
        return None, name.removesuffix(".weight")
    return int(match.group(1)), name[match.end():].removesuffix(".weight")


def by_block(matrices: list[dict], key: str) -> dict[str, list[float | None]]:
    """Rows for pictures.grid: matrix kind to its value in every block."""
    places = [(*block_and_kind(str(matrix.get("name", ""))), number(matrix.get(key))) for matrix in matrices]
    places = [(block, kind, value) for block, kind, value in places if block is not None and value is not None]
    blocks = max((block for block, _, _ in places), default=-1) + 1
    if not 0 < blocks <= 4096:
        return {}
    rows: dict[str, list[float | None]] = {}
    for block, kind, value in places:
        rows.setdefault(kind, [None] * blocks)[block] = value
    return rows


def grid_of(stage: Stage, key: str, title: str, percent: bool) -> dict | None:
    rows = by_block(stage.matrices, key)
    if not rows:
        return None
    return {"picture": Markup(pictures.grid(rows, title, f"{stage.name}: {title} by block and matrix", percent))}


def matrix_table(stage: Stage, columns: list[tuple[str, str, Any]]) -> dict:
    """Every matrix with its exact figures; columns no matrix has are left out."""
    present = [column for column in columns if any(number(matrix.get(column[0])) is not None for matrix in stage.matrices)]
    return {"header": ["matrix", "shape", *(title for _, title, _ in present)],
            "rows": [[str(matrix.get("name", "")), f"{matrix.get('rows', '?')} × {matrix.get('columns', '?')}",
                      *(NOTHING if number(matrix.get(key)) is None else write(matrix[key]) for key, _, write in present)]
                     for matrix in stage.matrices]}


def evaluation_section(run: Run) -> list[dict]:
    sections = []
    for task, metric in task_metrics(run):
        found = [(run.measured_model(position), number(mapping(stage.tasks.get(task)).get(metric)))
                 for position, stage in enumerate(run.stages) if stage.kind == "evaluate"]
        found = [(name, value) for name, value in found if value is not None]
        if not found:
            continue
        details = next(stage.tasks[task] for stage in run.stages if number(mapping(stage.tasks.get(task)).get(metric)) is not None)
        parts = [f"{details['segments']:,} segments" if number(details.get("segments")) is not None else "",
                 f"of {details['sequence_length']:,} tokens" if number(details.get("sequence_length")) is not None else "",
                 f"in {details['dtype']}" if details.get("dtype") else ""]
        better = "lower is better" if metric == "perplexity" else "higher is better"
        picture = pictures.bars([name for name, _ in found], [value for _, value in found],
                                [metric_text(metric, value) for _, value in found], f"{metric} on {task} by stage")
        sections.append({"title": f"{metric.capitalize()} on {task}", "picture": Markup(picture),
                         "note": ", ".join(filter(None, [" ".join(filter(None, parts)), better]))})
    return sections


def prune_sections(run: Run) -> list[dict]:
    sections = []
    for stage in run.stages:
        if stage.kind != "prune" or not stage.matrices:
            continue
        damping = stage.metrics.get("damping")
        sections.append({
            "title": f"Sparsity by layer and matrix: {stage.folder}",
            "note": f"damping {damping}" if number(damping) is not None else "",
            "grids": list(filter(None, [grid_of(stage, "sparsity", "share of zeros", True),
                                        grid_of(stage, "relative_error", "relative error of the output", True)])),
            "table": matrix_table(stage, [("zeros", "zeros", "{:,.0f}".format), ("sparsity", "sparsity", "{:.4f}".format),
                                          ("relative_error", "relative error", "{:.4f}".format)]),
        })
    return sections


def retrain_sections(run: Run) -> list[dict]:
    by_stage: dict[str, dict[int, dict]] = {}
    for record in run.steps:
        if number(record.get("loss")) is not None and number(record.get("step")) is not None:
            # A resumed run tells some steps twice; the later line is the one that counted.
            by_stage.setdefault(str(record.get("stage", "")), {})[int(record["step"])] = record
    sections = []
    for name, by_step in by_stage.items():
        if len(by_step) < 2:
            continue
        steps = sorted(by_step)
        losses = [by_step[step]["loss"] for step in steps]
        speeds = sorted(speed for step in steps if (speed := number(by_step[step].get("tokens_per_second"))) is not None)
        said = next((stage.metrics for stage in run.stages if stage.folder == name), {})
        notes = [f"{said['tokens']:,.0f} tokens" if number(said.get("tokens")) is not None else "",
                 f"{count_text(said['trainable_parameters'])} trainable parameters"
                 if number(said.get("trainable_parameters")) is not None else "",
                 f"{speeds[len(speeds) // 2]:,.0f} tokens a second (median)" if speeds else "",
                 f"nonzeros {said['nonzeros_before']:,.0f} before, {said['nonzeros_after']:,.0f} after the merge"
                 if number(said.get("nonzeros_before")) is not None and number(said.get("nonzeros_after")) is not None else ""]
        picture = pictures.loss_curve(steps, losses, [number(by_step[step].get("learning_rate")) for step in steps],
                                      f"loss of {name} from {losses[0]:.3f} to {losses[-1]:.3f}")
        sections.append({"title": f"Loss: {name}", "picture": Markup(picture), "note": "; ".join(filter(None, notes))})
    return sections


def certificate_text(certificate) -> str:
    """What the allocation left behind, and how far from the optimum it can be (greedy alone knows)."""
    if not isinstance(certificate, dict):
        return ""
    energy, lost, gap = (number(certificate.get(key)) for key in ("energy", "lost_energy", "gap"))
    text = f"{100 * lost / energy:.1f} % of the difference's energy is cut off" if energy and lost is not None else ""
    if gap is not None and energy:
        text += f", at most {100 * gap / energy:.2g} % of it more than the best allocation cuts"
    return text


def compress_sections(run: Run) -> list[dict]:
    sections = []
    for stage in run.stages:
        if stage.kind != "compress" or not stage.matrices:
            continue
        share = number(stage.metrics.get("share"))
        notes = [f"{bytes_of(stage)} of the fine-tuned checkpoint's bytes" if share is not None else "",
                 certificate_text(stage.metrics.get("certificate"))]
        sections.append({
            "title": f"Chosen ranks and quantization error: {stage.folder}",
            "note": "; ".join(filter(None, notes)),
            "grids": list(filter(None, [grid_of(stage, "truncation_rank", "truncation rank", False),
                                        grid_of(stage, "quantization_error", "quantization error", True)])),
            "table": matrix_table(stage, [("truncation_rank", "truncation rank", "{:.0f}".format),
                                          ("energy_kept", "energy kept", "{:.4f}".format),
                                          ("quantization_error", "quantization error", "{:.4f}".format)]),
        })
    return sections


def cost_section(run: Run) -> dict | None:
    timed = [stage for stage in run.stages if stage.seconds is not None]
    if not timed:
        return None
    grids = [{"title": "Time", "picture": Markup(pictures.bars(
        [stage.folder for stage in timed], [stage.seconds for stage in timed],
        [seconds_text(stage.seconds) for stage in timed], "time of each stage"))}]
    weighed = [stage for stage in timed if stage.peak_bytes is not None]
    if weighed:
        grids.append({"title": "Peak resident memory of the largest rank", "picture": Markup(pictures.bars(
            [stage.folder for stage in weighed], [stage.peak_bytes for stage in weighed],
            [bytes_text(stage.peak_bytes) for stage in weighed], "peak memory of each stage", pictures.SECOND))})
    return {"title": "Time and memory", "note": f"together {seconds_text(sum(stage.seconds for stage in timed))}", "grids": grids}


def run_facts(run: Run) -> list[tuple[str, str]]:
    shown: dict[str, str] = {}

    def tell(name: str, value: Any) -> None:
        if value is not None and value != "" and name not in shown:
            shown[name] = ", ".join(map(str, value)) if isinstance(value, list) else str(value)

    tell("model", run.setting("model", "path"))
    model = next((stage.model for stage in run.stages if stage.model), {})
    if number(model.get("parameters")) is not None:
        tell("parameters", f"{model['parameters']:,.0f}")
    tell("type of the products", run.setting("model", "dtype"))
    facts = next((stage.facts for stage in run.stages if stage.facts), {})
    for name, value in facts.items():
        if isinstance(value, (str, int, float)):
            tell(name.replace("_", " "), value)
    tell("seed", run.setting("run", "seed"))
    tell("calibration", run.setting("data", "calibration"))
    tell("training", run.setting("data", "train"))
    exported = next((stage.metrics.get("directory") for stage in reversed(run.stages) if stage.kind == "export"), None)
    tell("exported to", exported)
    return list(shown.items())


# ------------------------------------------------------------------------------- a sweep
FIGURES = {"nonzeros": ("nonzeros", count_text), "bytes": ("bytes", bytes_text),
           "residual_bytes": ("residual", bytes_text), "trainable_parameters": ("trainable", count_text)}


def figure_text(figure: dict, write: Any) -> str:
    """One value, or of several seeds "median (mean ± standard deviation)"."""
    median, mean, deviation = (number(figure.get(key)) for key in ("median", "mean", "standard_deviation"))
    values = figure.get("values") if isinstance(figure.get("values"), list) else []
    if median is None or len(set(map(str, values))) < 2:
        return write(median)
    missing = f"; {len(numbers(values))} of {len(values)}" if len(numbers(values)) < len(values) else ""
    return f"{write(median)} ({write(mean)}{'' if deviation is None else f' ± {write(deviation)}'}{missing})"


class Sweep:
    """summary.json of a sweep."""

    def __init__(self, directory: Path):
        self.name = directory.name
        summary = mapping(read_json(directory / "summary.json"))
        self.swept = [str(key) for key in summary.get("swept") or []]
        self.configurations = mappings(summary.get("configurations"))
        self.tasks = sorted({(name, str(mapping(task).get("leading"))) for configuration in self.configurations
                             for name, task in mapping(configuration.get("tasks")).items()})
        self.figures = [name for name in FIGURES
                        if any(name in mapping(one.get("figures")) for one in self.configurations)]

    def label(self, configuration: dict) -> list[str]:
        return [str(mapping(configuration.get("settings")).get(key, "")) for key in self.swept]

    @staticmethod
    def measured(configuration: dict, task: str, metric: str) -> dict:
        return mapping(mapping(mapping(mapping(configuration.get("tasks")).get(task)).get("reported")).get(metric))

    def table(self) -> tuple[list[str], list[list[str]]]:
        header = [*self.swept, "seeds", *(f"{metric}: {task}" for task, metric in self.tasks),
                  *(FIGURES[name][0] for name in self.figures)]
        rows = [[*self.label(one), str(len(one.get("seeds") or [])),
                 *(figure_text(self.measured(one, task, metric), lambda value, metric=metric: metric_text(metric, value))
                   for task, metric in self.tasks),
                 *(figure_text(mapping(mapping(one.get("figures")).get(name)), FIGURES[name][1]) for name in self.figures)]
                for one in self.configurations]
        return header, rows

    def sections(self) -> list[dict]:
        sections = []
        for task, metric in self.tasks:
            found = [(", ".join(self.label(one)) or self.name, number(self.measured(one, task, metric).get("median")))
                     for one in self.configurations]
            found = [(label, value) for label, value in found if value is not None]
            if found:
                picture = pictures.bars([label for label, _ in found], [value for _, value in found],
                                        [metric_text(metric, value) for _, value in found],
                                        f"{metric} on {task} by configuration")
                sections.append({"title": f"{metric.capitalize()} on {task}", "picture": Markup(picture),
                                 "note": "the median over the seeds of each configuration"})
        return sections


# ------------------------------------------------------------------------------- the page
def page(**content: Any) -> str:
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template("report.html.j2").render(**content)


def render_sweep(sweep: Sweep) -> str:
    header, rows = sweep.table()
    several = any(len(one.get("seeds") or []) > 1 for one in sweep.configurations)
    return page(name=sweep.name, table="Configurations", header=header, rows=rows, text_columns=len(sweep.swept),
                note="of several seeds: median (mean ± standard deviation of a sample, n − 1)" if several else "",
                sections=sweep.sections())


def render(run: Run) -> str:
    header, rows = stage_table(run)
    cost = cost_section(run)
    return page(
        name=run.name, table="Stages", text_columns=3, failure=run.failure, facts=run_facts(run), header=header, rows=rows,
        sections=[*evaluation_section(run), *prune_sections(run), *retrain_sections(run), *compress_sections(run),
                  *([cost] if cost else [])],
        config=run.config_text, environment=json.dumps(run.environment, indent=2, ensure_ascii=False) if run.environment else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    if not arguments.run_dir.is_dir():
        sys.exit(f"espalier: {arguments.run_dir} is no directory; give the run.dir of a run")
    swept = (arguments.run_dir / "summary.json").exists()
    run = Sweep(arguments.run_dir) if swept else Run(arguments.run_dir)
    target = arguments.run_dir / "report.html"
    scratch = target.with_name(f".report.html.{os.getpid()}")
    scratch.write_text(render_sweep(run) if swept else render(run), encoding="utf-8")
    scratch.rename(target)
    if arguments.table:
        print(terminal_table(*run.table(), text_columns=len(run.swept)) if swept else terminal_table(*stage_table(run)))
        if not swept and run.failure:
            print(f"failed in {run.failure.get('stage', '?')}: {run.failure.get('message', '')}")
    print(f"report: {target.resolve()}")


if __name__ == "__main__":
    main()
