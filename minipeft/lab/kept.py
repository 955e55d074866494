"""What a reader answered, kept between sittings in one small JSON file.

It is `minipeft_progress.json` in the folder where the notebook runs, or, where nothing can be written there, in the
cache folder (~/.cache/minipeft). `MINIPEFT_PROGRESS` names another file, for example one on a mounted drive of Colab.
Delete the file to begin again.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

FILE = "minipeft_progress.json"


def progress_file() -> Path:
    """Where the answers are kept."""
    from minipeft.fetch import cache_folder

    named = os.environ.get("MINIPEFT_PROGRESS")
    if named:
        return Path(named)
    return Path(FILE) if os.access(".", os.W_OK) else cache_folder() / FILE


class Kept:
    """The answers under one name: {question: answer}. A file that cannot be read or written keeps nothing, silently:
    a quiz must work without it."""

    def __init__(self, name: str):
        self.name = name
        self.path = progress_file()

    def _all(self) -> dict:
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def read(self) -> dict[str, str]:
        answers = self._all().get(self.name, {})
        return {q: a for q, a in answers.items() if isinstance(a, str)} if isinstance(answers, dict) else {}

    def write(self, question: str, answer: str) -> None:
        book = self._all()
        book[self.name] = self.read() | {question: answer}
        beside = self.path.with_suffix(".new")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            beside.write_text(json.dumps(book, ensure_ascii=False, indent=1), encoding="utf-8")
            beside.replace(self.path)  # whole or not at all
        except OSError:
            pass
