"""A situation to be filled in, and the method for it: the widget around `mp.recommend`."""

from __future__ import annotations

from collections.abc import Sequence

from minipeft.choosing import GOALS, MODELS, Recommendation, recommend
from minipeft.lab.pages import table
from minipeft.lab.quizzes import with_widget

MEMORY = {"any": None, "8 GB": 8, "16 GB": 16, "24 GB": 24, "48 GB": 48, "80 GB": 80}
SHOWN = (  # the static form
    {"model": "smollm2-135m", "memory": 8, "goal": "facts"},
    {"model": "minilm-l6", "goal": "classification"},
    {"model": "7B", "memory": 24},
    {"model": "7B", "memory": 8},
    {"model": "7B", "memory": 24, "tasks": 10},
    {"model": "7B", "budget": 0.01},
    {"model": "7B", "weights": False},
)


class Advisor:
    """`mp.recommend` with things to choose from. `advisor()` makes one."""

    def __init__(self, situations: Sequence[dict]):
        self.situations = list(situations)

    def answers(self) -> list[Recommendation]:
        """The answers of the static form, one a situation."""
        return [recommend(**situation) for situation in self.situations]

    def rows(self) -> list[dict]:
        """The table's rows: the situation in words, the method, its memory, the first reason."""
        found = []
        for answer in self.answers():
            asked = ", ".join(f"{k} {v}" for k, v in answer.situation.items() if (k, v) not in (("tasks", 1), ("goal", "general")))
            gb = answer.bill.total / 1e9 if answer.bill else None
            found.append({"situation": asked, "method": answer.method, "GB for a step": gb, "merge": answer.merged, "first reason": answer.reasons[0].text})
        return found

    def widget(self):
        """The live form: choose, press the button, read the answer. (A bill of a new size takes seconds.)"""
        from ipywidgets import HTML, Button, Checkbox, Dropdown, FloatText, HBox, IntText, VBox

        wide = {"style": {"description_width": "9em"}}
        chosen = {
            "model": Dropdown(options=MODELS, value="smollm2-135m", description="model", **wide),
            "memory": Dropdown(options=MEMORY, value=None, description="memory", **wide),
            "goal": Dropdown(options=GOALS, value="general", description="goal", **wide),
            "tasks": IntText(value=1, description="tasks", **wide),
            "examples": IntText(value=1000, description="examples", **wide),
            "budget": FloatText(value=100, description="at most trained, %", **wide),
            "weights": Checkbox(value=True, description="you have the weights", **wide),
            "latency": Checkbox(value=False, description="no time to spare", **wide),
            "any_cost": Checkbox(value=False, description="quality at any cost", **wide),
        }
        button, answer = Button(description="Which method?", button_style="primary"), HTML()

        def ask(_):
            situation = {name: box.value for name, box in chosen.items()}
            if situation["budget"] >= 100:
                situation["budget"] = None
            answer.value = "…"
            try:
                answer.value = recommend(**situation)._repr_html_()
            except ValueError as error:
                answer.value = f"<p>{error}</p>"

        button.on_click(ask)
        boxes = list(chosen.values())
        return VBox([HBox([VBox(boxes[:3]), VBox(boxes[3:6]), VBox(boxes[6:])]), button, answer])

    def __repr__(self) -> str:
        return repr(table(self.rows()))

    def _repr_mimebundle_(self, include=None, exclude=None) -> dict:
        shown = table(self.rows(), "mp.recommend for some situations")
        return with_widget({"text/plain": repr(shown), "text/html": shown._repr_html_()}, self.widget)


def advisor(situations: Sequence[dict] = SHOWN) -> Advisor:
    """Say what you have and what you need, and read which method fits and why.

    situations   arguments of `mp.recommend`: the table that stands where nothing can be moved
    """
    return Advisor(situations)
