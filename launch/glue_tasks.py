"""The tasks of GLUE: which columns of their TSV files hold what, and the order of their classes (that of the
Hugging Face data sets)."""

from dataclasses import dataclass


@dataclass(frozen=True)
class GlueTask:
    """Columns by name of the header line; CoLA's file has none, so there by position."""

    sentences: tuple[str, ...]
    label: str
    classes: tuple[str, ...] | None  # None: a number (regression)


GLUE_TASKS = {
    "CoLA": GlueTask(("3",), "1", ("0", "1")),
    "SST-2": GlueTask(("sentence",), "label", ("0", "1")),
    "MRPC": GlueTask(("#1 String", "#2 String"), "Quality", ("0", "1")),
    "QQP": GlueTask(("question1", "question2"), "is_duplicate", ("0", "1")),
    "STS-B": GlueTask(("sentence1", "sentence2"), "score", None),
    "MNLI": GlueTask(("sentence1", "sentence2"), "gold_label", ("entailment", "neutral", "contradiction")),
    "QNLI": GlueTask(("question", "sentence"), "label", ("entailment", "not_entailment")),
    "RTE": GlueTask(("sentence1", "sentence2"), "label", ("entailment", "not_entailment")),
    "WNLI": GlueTask(("sentence1", "sentence2"), "label", ("0", "1")),
}


def glue_label(cells: list[str], column: int, task: GlueTask) -> float:
    # The label's column may be the last one: a cut line must not be read as an unknown label.
    text = cells[column].strip()
    if task.classes is None:
        return float(text)
    if text not in task.classes:
        raise ValueError(f"label {text!r} is none of {', '.join(task.classes)}")
    return task.classes.index(text)
