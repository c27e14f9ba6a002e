#!/usr/bin/env python3
"""Prints the finished members of a sweep as rows of a Markdown table, seeds together.

    table_rows.py SWEEP_DIR [--where KEY=VALUE...] [--evaluation N] [--figures NAME...] [--curves | --losses N]

A row is what its members' overrides have in common; run.seed is averaged over (mean ± standard deviation, and how
many where they are not as many as elsewhere), and a task chosen by task=... is a column of its own. --where keeps
members with these overrides (KEY= keeps those that have KEY, KEY!= those that have not). --evaluation counts the
pipeline's evaluations from 1, -1 is the last. --figures adds figures of the metrics that the stages left, as
ENTRY.NAME: retrain.weight_distance, compress.share, seconds. Learning curves instead: --curves prints the validations
of training, one column an epoch, --losses N the training's mean loss in N equal parts of its steps.
"""

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

SEED, TASK = "run.seed", "task"
METRICS = ["perplexity", "accuracy", "matthews", "f1", "pearson", "spearman"]


# ------------------------------------------------------------------------------- members
def overrides_of(name: str) -> dict[str, str]:
    """"a=1,b=[x,y]" taken apart: commas inside brackets and quotes are no separators."""
    parts, depth, quote, start = [], 0, "", 0
    for position, sign in enumerate(name):
        if quote:
            quote = "" if sign == quote else quote
        elif sign in "'\"":
            quote = sign
        elif sign in "[{(":
            depth += 1
        elif sign in "]})":
            depth -= 1
        elif sign == "," and depth == 0:
            parts.append(name[start:position])
            start = position + 1
    parts.append(name[start:])
    return dict(part.split("=", 1) for part in parts if "=" in part)


@dataclass
class Member:
    directory: Path
    overrides: dict[str, str]
    tasks: list[str]  # in the configuration's order
    stages: list[tuple[str, dict]]  # entry of the pipeline, its metrics
    seconds: float

    @property
    def cell(self) -> tuple[tuple[str, str], ...]:
        return tuple((key, value) for key, value in self.overrides.items() if key not in (SEED, TASK))

    def evaluations(self) -> list[dict]:
        return [metrics for entry, metrics in self.stages if "tasks" in metrics and entry.startswith("evaluate")]

    def scores(self, evaluation: int) -> dict[str, tuple[str, float]]:
        """By column its metric and the value. GLUE's tasks are all called labels: there the column is the task."""
        all_of = self.evaluations()
        index = evaluation - 1 if evaluation > 0 else evaluation
        if not -len(all_of) <= index < len(all_of):
            return {}
        tasks = all_of[index]["tasks"]
        return {(self.overrides.get(TASK, name) if len(tasks) == 1 else name): leading(tasks[name])
                for name in sorted(tasks, key=self.tasks.index)}

    def figure(self, name: str) -> float | None:
        """ENTRY.KEY.KEY of the last entry that has it."""
        if name == "seconds":
            return self.seconds
        entry, _, path = name.partition(".")
        for stage, metrics in reversed(self.stages):
            value: Any = metrics
            for key in path.split("."):
                value = value.get(key) if isinstance(value, dict) else None
            if stage.partition("#")[0] == entry and isinstance(value, (int, float)):
                return float(value)
        return None

    def events(self, kind: str) -> dict[int, dict]:
        """By step: a step that was repeated after a kill stands there once."""
        lines = [json.loads(line) for line in (self.directory / "metrics.jsonl").read_text().splitlines(keepends=True)
                 if line.endswith("\n")]
        return {line["step"]: line for line in sorted(lines, key=lambda line: line.get("step", 0))
                if line.get("event") == kind}

    def losses(self, parts: int) -> list[float]:
        steps = self.events("step")
        last = max(steps, default=0)
        groups: list[list[float]] = [[] for _ in range(parts)]
        for step, line in steps.items():
            groups[(step - 1) * parts // last].append(line["loss"])
        return [statistics.mean(group) for group in groups if group]

    def curve(self) -> list[float]:
        metric = next((metrics["validation"]["metric"] for _, metrics in self.stages if "validation" in metrics), None)
        return [line[metric] for line in self.events("validation").values()]


def leading(values: dict) -> tuple[str, float]:
    """The metric that the task reports first, else the first known one."""
    name = next(name for name in [*values.get("reported", []), *METRICS] if name in values)
    return name, values[name]


def read_member(directory: Path) -> Member | None:
    """None when it is not finished."""
    config = directory / "config.yaml"
    if not config.exists():
        return None
    composed = yaml.safe_load(config.read_text(encoding="utf-8"))
    stages, seconds = [], 0.0
    for number, entry in enumerate(composed["pipeline"], 1):
        stage = directory / f"{number:02d}-{entry}"
        if not (stage / "manifest.json").exists():
            return None
        seconds += json.loads((stage / "manifest.json").read_text()).get("seconds", 0)
        stages.append((entry, json.loads((stage / "metrics.json").read_text())))
    return Member(directory, overrides_of(directory.name), list(composed["evaluate"]["tasks"]), stages, seconds)


def wanted(member: Member, conditions: list[str]) -> bool:
    for condition in conditions:
        key, _, value = condition.partition("=")
        if key.endswith("!"):
            if key[:-1] in member.overrides and value in ("", member.overrides[key[:-1]]):
                return False
        elif key not in member.overrides or value not in ("", member.overrides[key]):
            return False
    return True


# ------------------------------------------------------------------------------- rows
def natural(text: str) -> list:
    """Numbers in a text sort as numbers."""
    return [(0, float(part), "") if re.fullmatch(r"[\d.]+(e-?\d+)?", part) and part != "." else (1, 0.0, part)
            for part in re.split(r"([\d.]+(?:e-?\d+)?)", text) if part]


def label(cell: tuple[tuple[str, str], ...]) -> str:
    """The choice of a cell alone, keys by their last part."""
    words = [value for key, value in cell if key == "cell"]
    words += [f"{key.rpartition('.')[2]} {value}" for key, value in cell if key != "cell" and value != "null"]
    return ", ".join(words) or "as configured"


def number_text(name: str, value: float) -> str:
    if name.endswith(".share"):
        return f"{100 * value:.2f} %"
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:.4f}" if 0.001 <= abs(value) < 10 else f"{value:.4g}"


def score_text(metric: str, values: list[float], usual: int) -> str:
    """Perplexities as they are, every other metric in percent."""
    if not values:
        return "–"
    scale, places = (1, 2) if metric == "perplexity" else (100, 1)
    text = f"{scale * statistics.mean(values):.{places}f}"
    if len(values) > 1:
        text += f" ± {scale * statistics.stdev(values):.{places}f}"
    return text + (f" ({len(values)})" if len(values) != usual else "")


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def score_table(cells: dict, arguments: argparse.Namespace) -> str:
    scores: dict = {}
    metrics: dict[str, str] = {}  # of each column
    for cell, members in cells.items():
        for member in members:
            for column, (metric, value) in member.scores(arguments.evaluation).items():
                scores.setdefault(cell, {}).setdefault(column, []).append(value)
                metrics.setdefault(column, metric)
    if not scores:
        sys.exit(f"espalier: --evaluation {arguments.evaluation}: no member has so many evaluations")
    usual = statistics.mode([len(values) for of_cell in scores.values() for values in of_cell.values()])
    rows = []
    for cell, of_cell in scores.items():
        row = [label(cell)] + [score_text(metric, of_cell.get(column, []), usual) for column, metric in metrics.items()]
        for name in arguments.figures:
            values = [value for member in cells[cell] if (value := member.figure(name)) is not None]
            row.append(number_text(name, statistics.mean(values)) if values else "–")
        rows.append(row)
    unknown = [name for name in arguments.figures if all(member.figure(name) is None for members in cells.values()
                                                         for member in members)]
    if unknown:
        sys.exit(f"espalier: --figures {' '.join(unknown)}: no member has it; names are ENTRY.KEY of metrics.json "
                 f"(retrain.trainable_parameters), and seconds")
    names = [name.rpartition(".")[2].replace("_", " ") for name in arguments.figures]
    return table(["cell", *metrics, *names], rows)


def curve_table(cells: dict, column: str, points_of: Callable[[Member], list[float]],
                text: Callable[[float], str]) -> str:
    rows = []
    for cell, members in cells.items():
        for task in dict.fromkeys(member.overrides.get(TASK, "") for member in members):
            curves = [points_of(member) for member in members if member.overrides.get(TASK, "") == task]
            means = [statistics.mean(points) for points in zip(*filter(None, curves))]
            if means:
                rows.append([label(cell), task, *map(text, means)])
    if not rows:
        sys.exit("espalier: no member that --where keeps has a learning curve")
    width = max(map(len, rows))
    return table(["cell", "task", *[f"{column} {i}" for i in range(1, width - 1)]],
                 [row + [""] * (width - len(row)) for row in rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", type=Path, metavar="SWEEP_DIR")
    parser.add_argument("--where", nargs="+", default=[], metavar="KEY=VALUE")
    parser.add_argument("--evaluation", type=int, default=-1, metavar="N")
    parser.add_argument("--figures", nargs="+", default=[], metavar="NAME")
    parser.add_argument("--curves", action="store_true")
    parser.add_argument("--losses", type=int, default=0, metavar="N")
    arguments = parser.parse_args()
    if not arguments.sweep.is_dir():
        sys.exit(f"espalier: {arguments.sweep} is no directory; launch/tables.sh makes outputs/table_*-sweep")
    members = [member for directory in sorted(arguments.sweep.iterdir()) if (member := read_member(directory))]
    cells: dict = {}
    for member in members:
        if wanted(member, arguments.where):
            cells.setdefault(member.cell, []).append(member)
    if not cells:
        sys.exit(f"espalier: {arguments.sweep} holds no finished member that --where keeps")
    cells = dict(sorted(cells.items(), key=lambda item: natural(label(item[0]))))
    if arguments.losses > 0:
        print(curve_table(cells, "part", lambda member: member.losses(arguments.losses), "{:.3f}".format))
    elif arguments.curves:
        print(curve_table(cells, "epoch", Member.curve, lambda value: f"{100 * value:.1f}"))
    else:
        print(score_table(cells, arguments))


if __name__ == "__main__":
    main()
