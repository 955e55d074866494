"""Quizzes: live buttons where ipywidgets run, folded answers on GitHub and in the HTML reports."""

from __future__ import annotations

import difflib
import random
import sys
from collections.abc import Iterable, Mapping

from minipeft.lab.pages import MUTED, marked

GREEN, RED = "#009E73", "#D55E00"  # from the colour-blind-safe palette of `plots`; words say it too
LETTERS = "ABCDEFGHIJ"


class Quiz:
    """Multiple-choice questions; `quiz` makes and checks them. Shown by the notebook as the last value of a cell."""

    def __init__(self, questions: list[dict], keep: str = ""):
        self.questions = questions
        self.keep = keep

    def __repr__(self) -> str:
        lines = []
        for number, q in enumerate(self.questions, start=1):
            lines.append(f"{number}. {q['question']}")
            lines += [f"   {letter}. {choice}" for letter, choice in zip(LETTERS, q["choices"], strict=False)]
        return "\n".join(lines)

    def page(self) -> str:
        """The static form: each question with its choices, the answers folded."""
        return "".join(_folded_question(number, q) for number, q in enumerate(self.questions, start=1))

    def widget(self):
        """The live form, an ipywidgets box."""
        from ipywidgets import HTMLMath, VBox

        from minipeft.lab.kept import Kept

        score = HTMLMath()
        kept = Kept(self.keep) if self.keep else None
        before = kept.read() if kept else {}  # question -> the answer of an earlier sitting
        first: dict[int, str] = {}  # number -> the first answer
        for number, q in enumerate(self.questions, start=1):
            if before.get(q["question"]) in q["choices"]:
                first[number] = before[q["question"]]

        def show_score() -> None:
            right = sum(choice == self.questions[number - 1]["right"] for number, choice in first.items())
            score.value = f'<span style="{MUTED}">{right} of {len(first)} right at the first try</span>' if first else ""

        def answered(number: int, choice: str) -> None:
            if number not in first:
                first[number] = choice
                if kept:
                    kept.write(self.questions[number - 1]["question"], choice)
            show_score()

        show_score()
        boxes = [_live_question(number, q, answered, first.get(number)) for number, q in enumerate(self.questions, start=1)]
        return VBox([*boxes, score])

    def _repr_mimebundle_(self, include=None, exclude=None) -> dict:
        static = {"text/plain": repr(self), "text/html": self.page()}
        return with_widget(static, self.widget)


def quiz(questions: Iterable[Mapping], *, keep: str = "") -> Quiz:
    """A quiz to be shown. Each question is a dict:

    question   the text; `code` in backticks and $formulas$ are shown as such
    choices    {choice: why it is right or wrong}, a reason for every choice
    right      the right choice, word for word

    The choices are shown in an order drawn from the question's text: always the same for a question,
    and no hint, however they were written down.

    keep   a name under which the first answers are kept in a file (kept.py), to go on in another sitting

    ValueError where a reason is missing, or `right` is none of the choices.
    """
    checked = []
    for number, given in enumerate(questions, start=1):
        where = f"question {number}"
        for name in ("question", "choices", "right"):
            if name not in given:
                raise ValueError(f"{where} has no {name!r}; it needs 'question', 'choices' and 'right'")
        if surplus := sorted(set(given) - {"question", "choices", "right"}):
            raise ValueError(f"{where} has {surplus[0]!r}; accepted: 'question', 'choices' and 'right'")
        choices = {str(choice): reason for choice, reason in dict(given["choices"]).items()}
        right = str(given["right"])
        if not 2 <= len(choices) <= len(LETTERS):
            raise ValueError(f"{where} has {len(choices)} choices; accepted: 2 to {len(LETTERS)}")
        for choice, reason in choices.items():
            if not (isinstance(reason, str) and reason.strip()):
                raise ValueError(f"{where}: the choice {choice!r} has no reason")
        if right not in choices:
            near = difflib.get_close_matches(right, choices, 1)
            did_you_mean = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{where}: the right answer {right!r} is none of its choices{did_you_mean}")
        order = list(choices)
        random.Random(str(given["question"])).shuffle(order)
        checked.append({"question": str(given["question"]), "choices": {c: choices[c] for c in order}, "right": right})
    if not checked:
        raise ValueError("a quiz needs at least one question")
    return Quiz(checked, keep)


def _folded_question(number: int, q: dict) -> str:
    choices = "".join(f"<li>{marked(choice)}</li>" for choice in q["choices"])
    reasons = "".join(
        f"<li>{'<b>Right.</b>' if choice == q['right'] else 'Not right.'} {marked(reason)}</li>"
        for choice, reason in q["choices"].items()
    )
    style = 'type="A" style="list-style-type:upper-alpha"'
    return (
        f"<div><p><b>{number}.</b> {marked(q['question'])}</p><ol {style}>{choices}</ol>"
        f"<details><summary>Answer</summary><ol {style}>{reasons}</ol></details></div>"
    )


def _live_question(number: int, q: dict, answered, before: str | None = None):
    """One question with a button a choice, `before` pressed already. HTMLMath shows the formulas, which buttons cannot."""
    from ipywidgets import Button, HBox, HTMLMath, Layout, VBox

    verdict = HTMLMath()
    rows, buttons = [], []
    for letter, (choice, reason) in zip(LETTERS, q["choices"].items(), strict=False):
        button = Button(description=letter, tooltip=f"Answer {letter}", layout=Layout(width="3em", min_width="3em"))
        buttons.append(button)

        def show(pressed, choice=choice, reason=reason):
            right = choice == q["right"]
            colour, word = (GREEN, "Right.") if right else (RED, "Not right.")
            verdict.value = f'<span style="color:{colour}"><b>{word}</b></span> {marked(reason)}'
            for other in buttons:
                other.button_style = ""
            pressed.button_style = "success" if right else "warning"

        def clicked(pressed, choice=choice, show=show):
            show(pressed)
            answered(number, choice)

        button.on_click(clicked)
        if choice == before:
            show(button)
        rows.append(HBox([button, HTMLMath(marked(choice))], layout=Layout(align_items="center")))
    title = HTMLMath(f"<b>{number}.</b> {marked(q['question'])}")
    return VBox([title, *rows, verdict], layout=Layout(margin="0 0 1.2em 0"))


def with_widget(static: dict, make) -> dict:
    """`static`, a mime bundle, with the live widget beside it where one can run.

    Front ends show the widget while the kernel lives and the static form otherwise. Colab would show
    both, so there it is the widget alone. Needs a kernel and ipywidgets; without them, static only.
    """
    from importlib.util import find_spec

    if not in_kernel() or find_spec("ipywidgets") is None:
        return static
    live = make()._repr_mimebundle_()
    return live if "google.colab" in sys.modules else {**static, **live, "text/plain": static["text/plain"]}


def in_kernel() -> bool:
    """Whether this code runs in a Jupyter kernel, where widgets and displays exist."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return shell is not None and getattr(shell, "kernel", None) is not None
