"""The closing self-examination of the course, to answer in a notebook and to print.

    lab.exam()                              the questions, part by part; answers are kept between sittings
    lab.exam().write("exam")                two pages to print: exam/questions.html and exam/answers.html
    python -m minipeft.lab.exams FOLDER     the same, for a teacher at a command line
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

from minipeft.examination import parts
from minipeft.lab.pages import marked
from minipeft.lab.quizzes import LETTERS, Quiz, quiz, with_widget

TITLE = "Parameter-efficient fine-tuning: a self-examination"
NAME = "13_fact_check: examination"
PRINT = """body { font: 11pt/1.4 Georgia, serif; max-width: 44em; margin: 2em auto; color: #000 }
h1 { font-size: 17pt } h2 { font-size: 13pt; margin-top: 1.6em; break-after: avoid }
.question { break-inside: avoid; margin: 1em 0 } ol.choices { list-style: none; padding-left: 1em; margin: .3em 0 }
.why { color: #333; font-size: 10pt } .right { font-weight: bold }
@page { margin: 18mm }"""


class Exam:
    """Quizzes, one a part. `exam` makes one."""

    def __init__(self, sections: list[tuple[str, Quiz]]):
        self.sections = sections

    @property
    def count(self) -> int:
        """How many questions there are."""
        return sum(len(part.questions) for _, part in self.sections)

    def __repr__(self) -> str:
        return "\n\n".join(f"{title}\n{part!r}" for title, part in self.sections)

    def page(self) -> str:
        return "".join(f"<h4>{marked(title)}</h4>{part.page()}" for title, part in self.sections)

    def widget(self):
        from ipywidgets import HTML, VBox

        boxes = []
        for title, part in self.sections:
            boxes += [HTML(f"<h4>{marked(title)}</h4>"), part.widget()]
        return VBox(boxes)

    def _repr_mimebundle_(self, include=None, exclude=None) -> dict:
        return with_widget({"text/plain": repr(self), "text/html": self.page()}, self.widget)

    def printed(self, *, answers: bool = False) -> str:
        """A page of HTML to print: boxes to tick, or, with `answers`, the right choice and why each is right or wrong."""
        body, number = [], 0
        for title, part in self.sections:
            body.append(f"<h2>{marked(title)}</h2>")
            for q in part.questions:
                number += 1
                body.append(f'<div class="question"><b>{number}.</b> {marked(q["question"])}{_choices(q, answers)}</div>')
        heading = TITLE + (": answers" if answers else "")
        name = "" if answers else "<p>Name: ______________________________ &nbsp; Date: ______________</p>"
        return (f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{heading}</title><style>{PRINT}</style></head>'
                f"<body><h1>{heading}</h1>{name}{''.join(body)}</body></html>\n")

    def write(self, folder: str | Path) -> list[Path]:
        """Write questions.html and answers.html into a folder, which is made if need be."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        pages = [folder / "questions.html", folder / "answers.html"]
        for path in pages:
            path.write_text(self.printed(answers=path.stem == "answers"), encoding="utf-8")
        return pages


def _choices(q: dict, answers: bool) -> str:
    items = []
    for letter, (choice, why) in zip(LETTERS, q["choices"].items(), strict=False):
        right = answers and choice == q["right"]
        box = "☒" if right else "☐"
        said = f'<span class="right">{marked(choice)}</span>' if right else marked(choice)
        items.append(f"<li>{box} {letter}. {said}" + (f'<div class="why">{marked(why)}</div>' if answers else "") + "</li>")
    return f'<ol class="choices">{"".join(items)}</ol>'


def exam(sample: int | None = None, *, seed: int = 0) -> Exam:
    """The whole examination, or `sample` questions of each part, drawn from a seed: another paper for another group."""
    sections = []
    for title, questions in parts():
        if sample is not None:
            if sample < 1:
                raise ValueError(f"sample is {sample}; accepted is a whole number from 1")
            questions = random.Random(f"{seed} {title}").sample(questions, min(sample, len(questions)))
        sections.append((title, quiz(questions, keep=NAME)))
    return Exam(sections)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m minipeft.lab.exams FOLDER")
    for written in exam().write(sys.argv[1]):
        print(written)
