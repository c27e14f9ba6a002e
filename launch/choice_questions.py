"""Questions with choices out of records: the prompts of EleutherAI's evaluation harness (lm-eval 0.4.13).

A question is, for every choice, a context and what is to follow it; the two are joined by a space, which belongs to
what follows. Instruction records ("Please choose the correct answer to the question: ... Answer1: ... Answer2: ...")
are taken apart into their question and choices first.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Question:
    contexts: list[str]  # one a choice: they differ where the choice stands before the end (WinoGrande)
    continuations: list[str]
    answer: int

    def pairs(self) -> list[tuple[str, str]]:
        return [(context, joined(context, continuation))
                for context, continuation in zip(self.contexts, self.continuations)]

    def solved(self) -> str:
        context, continuation = self.pairs()[self.answer]
        return context + continuation


def joined(context: str, continuation: str) -> str:
    """The space between them is part of the continuation's first token."""
    return continuation if context.endswith("\n") else " " + continuation


def one_context(context: str, choices: list[str], answer: int) -> Question:
    return Question([context] * len(choices), choices, answer)


# ------------------------------------------------------------------------------- context, choices, answer
def answer_number(answer: object, choices: list[str]) -> int:
    """A number from 0, one of the letters A, B, ..., or the choice itself."""
    if isinstance(answer, str) and answer in choices:
        return choices.index(answer)
    if isinstance(answer, str) and len(answer) == 1 and answer.isascii() and answer.isalpha():
        answer = ord(answer.upper()) - ord("A")
    if isinstance(answer, str) and answer.strip().isdecimal():
        answer = int(answer)
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise ValueError(f"answer {answer!r} names none of the {len(choices)} choices")
    return answer


def plain_question(record: dict, context_field: str, template: str) -> Question:
    choices = record.get("choices")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c.strip(" ") for c in choices):
        raise ValueError("'choices' is no list of two or more texts")
    contexts = record.get(context_field)
    if isinstance(contexts, str):
        contexts = [contexts] * len(choices)
    if not isinstance(contexts, list) or len(contexts) != len(choices) or not all(
            isinstance(context, str) for context in contexts):
        raise ValueError(f"'{context_field}' is neither a text nor one text a choice")
    return Question([template.format(context).rstrip(" ") for context in contexts], [c.strip(" ") for c in choices],
                    answer_number(record.get("answer"), choices))


# ------------------------------------------------------------------------------- instruction records
ANSWER_FORMAT = re.compile(r"\s*Answer format:\s*(\S+)\s*$")


def take_apart(record: dict) -> tuple[str, list[str], int]:
    """The question, the choices and the number of the right one: "...: QUESTION Answer1: A Answer2: B ... Answer
    format: answer1/answer2"; the mark may be another word (Solution1:, Option1:), and without marks the format's
    words are the choices (true/false)."""
    instruction, answer = record.get("instruction"), record.get("answer")
    if not isinstance(instruction, str) or not isinstance(answer, str):
        raise ValueError("has no text under 'instruction' and 'answer'")
    form = ANSWER_FORMAT.search(instruction)
    if not form or ": " not in instruction:
        raise ValueError("'instruction' is not of the form 'INSTRUCTION: QUESTION ... Answer format: a/b'")
    names = form.group(1).split("/")
    if answer.strip() not in names:
        raise ValueError(f"answer {answer!r} is none of {', '.join(names)}")
    question = instruction[instruction.index(": ") + 2:form.start()]
    number = names.index(answer.strip())
    if not names[0].endswith("1"):
        return question.strip(), names, number
    choices = []
    for name in reversed(names):  # from the last, so that each text ends where the next mark begins
        mark = f"{name.capitalize()}:"
        place = question.rfind(mark)
        if place <= 0 or not question[place - 1].isspace():
            raise ValueError(f"'instruction' has no '{mark}'")
        choices.insert(0, question[place + len(mark):].strip())
        question = question[:place]
    if not all(choices):
        raise ValueError("has an empty choice")
    return question.strip(), choices, number


def asked(form: str) -> Callable[[dict], Question]:
    def question(record: dict) -> Question:
        text, choices, answer = take_apart(record)
        return one_context(form.format(text), choices, answer)
    return question


def yes_or_no(record: dict) -> Question:
    """BoolQ. The harness puts the passage before the question; records that have none are asked without."""
    text, choices, answer = take_apart(record)
    if sorted(choices) != ["false", "true"]:
        raise ValueError("boolq's answers are true and false")
    passage = record.get("input")
    context = f"{passage}\n" if isinstance(passage, str) and passage else ""
    return one_context(f"{context}Question: {text.removesuffix('?')}?\nAnswer:", ["no", "yes"],
                       int(choices[answer] == "true"))


def blank(record: dict) -> Question:
    """WinoGrande: the sentence up to the blank with each choice in it, and the rest of the sentence to follow."""
    text, choices, answer = take_apart(record)
    before, mark, after = text.partition("_")
    if not mark or not after.strip():
        raise ValueError("the sentence has no blank '_' with text behind it")
    return Question([before + choice for choice in choices], [after.strip()] * len(choices), answer)


RECORD_TEMPLATES: dict[str, Callable[[dict], Question]] = {
    "arc": asked("Question: {}\nAnswer:"),
    "obqa": asked("{}"),
    "boolq": yes_or_no,
    "siqa": asked("Q: {}\nA:"),
    "piqa": asked("Question: {}\nAnswer:"),
    "winogrande": blank,
}


# ------------------------------------------------------------------------------- GLUE's RTE as a question
def entailment_question(premise: str, hypothesis: str, label: int) -> Question:
    return one_context(f"{premise}\nQuestion: {hypothesis} True or False?\nAnswer:", ["True", "False"], label)
