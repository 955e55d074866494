"""Exercise checks, one file a chapter. Notebooks use `from minipeft.checks import ch05_lora as check`.

`exercises()` lists all of them by id. How a check works is in `frame.py`.
"""

from importlib import import_module
from pkgutil import iter_modules

from minipeft.checks.frame import _EXERCISES, Case, Check, Draw, Exercise, NotHere, Refused, exercise

__all__ = ["Case", "Check", "Draw", "Exercise", "NotHere", "Refused", "exercise", "exercises"]


def exercises(chapter: str | None = None) -> dict[str, Exercise]:
    """Every exercise of the course by id, or those of one chapter such as `"ch05_lora"`."""
    chapters = sorted(module.name for module in iter_modules(__path__) if module.name.startswith("ch"))
    if chapter is not None and chapter not in chapters:
        raise ValueError(f"no chapter {chapter!r} has checks; accepted: {', '.join(chapters)}")
    for name in chapters:
        import_module(f"{__name__}.{name}")
    return {id: e for id, e in sorted(_EXERCISES.items()) if e.chapter.startswith("ch") and chapter in (None, e.chapter)}
