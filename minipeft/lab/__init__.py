"""What the notebooks show: figures, widgets, quizzes, tables, and what this machine can do.

    from minipeft import lab

Every interactive part has a static fallback, so that it also shows on GitHub and in the HTML
reports. Names are imported when they are first used: matplotlib and ipywidgets only when needed.
"""

from importlib import import_module

_WHERE = {
    "computer": ("machine", "Machine", "seed_everything"),
    "pages": ("Page", "hint", "record", "runtime_box", "table"),
    "quizzes": ("quiz", "Quiz"),
    "plots": ("COLOURS", "live_curve", "LiveCurve", "new_figure", "smooth", "style", "three_sockets_figure"),
    "charts": ("bill_figure", "heat_map"),
    "contest": ("comparison", "comparison_table", "comparison_figure", "sweep_figure", "question_figure"),
    "advice": ("Advisor", "advisor"),
    "widgets": ("block_slider", "BlockSlider", "ordering", "Ordering", "rank_slider", "RankSlider"),
    "course": ("chapters",),
    "guesses": ("guess", "guess_score", "Guesses"),
    "exams": ("exam", "Exam"),
}
# No file bears a public function's name: importing it would hide the function behind the module.
_MODULE_OF = {name: module for module, names in _WHERE.items() for name in names}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str):
    if name in _MODULE_OF:
        value = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'minipeft.lab' has no name {name!r}")


def __dir__():
    return __all__
