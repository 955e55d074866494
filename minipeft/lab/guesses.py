"""Guess a claim's verdict, then see what was computed. Live buttons, or folded verdicts where nothing runs."""

from __future__ import annotations

from collections.abc import Iterable

from minipeft.claims import VERDICTS, Claim, load_claims, subjects
from minipeft.findings import OPEN
from minipeft.lab.kept import Kept
from minipeft.lab.pages import MUTED, Page, marked, table
from minipeft.lab.quizzes import GREEN, RED, with_widget

NAME = "13_fact_check: guesses"
BUTTONS = dict(zip(VERDICTS, ("holds", "wrong", "depends", "nobody can tell"), strict=True))


class Guesses:
    """Claims to be guessed. `guess` makes one. Shown by the notebook as the last value of a cell."""

    def __init__(self, claims: list[Claim]):
        self.claims = claims

    def __repr__(self) -> str:
        return "\n".join(f"{claim.id}  {claim.claim}" for claim in self.claims)

    def page(self) -> str:
        """The static form: each claim, its verdict folded."""
        return "".join(
            f"<div>{_stated(claim)}<details><summary>Verdict</summary>{_revealed(claim)}</details></div>" for claim in self.claims
        )

    def widget(self):
        """The live form: four buttons a claim; the first guess counts, and is kept for another sitting."""
        from ipywidgets import HTML, VBox

        kept, score = Kept(NAME), HTML()
        first = kept.read()

        def show_score() -> None:
            mine = {claim.id: first[claim.id] for claim in self.claims if claim.id in first}
            right = sum(mine[claim.id] == claim.guess for claim in self.claims if claim.id in mine)
            score.value = f'<span style="{MUTED}">{len(mine)} of {len(self.claims)} guessed, {right} right</span>'

        def guessed(claim: Claim, verdict: str) -> None:
            if claim.id not in first:
                first[claim.id] = verdict
                kept.write(claim.id, verdict)
            show_score()

        show_score()
        return VBox([*(_live(claim, first.get(claim.id), guessed) for claim in self.claims), score])

    def _repr_mimebundle_(self, include=None, exclude=None) -> dict:
        return with_widget({"text/plain": repr(self), "text/html": self.page()}, self.widget)


def guess(claims: str | Iterable[Claim]) -> Guesses:
    """Claims to guess: those of one subject, or a list of them. `ValueError` for a subject that has none."""
    return Guesses(load_claims(claims) if isinstance(claims, str) else list(claims))


def guess_score() -> Page:
    """A table of your guesses by subject, from the file in which they are kept."""
    first, rows = Kept(NAME).read(), []
    for subject in subjects():
        claims = load_claims(subject)
        mine = [claim for claim in claims if claim.id in first]
        right = sum(first[claim.id] == claim.guess for claim in mine)
        rows.append({"subject": subject, "claims": len(claims), "guessed": len(mine), "right": right,
                     "percent right": 100 * right / len(mine) if mine else None})
    return table(rows)


def _stated(claim: Claim) -> str:
    return (f'<p style="margin:.9em 0 .2em"><span style="{MUTED}">{claim.id} · {marked(claim.place)}</span><br>'
            f"{marked(claim.claim)}</p>")


def _revealed(claim: Claim) -> str:
    """The verdict, why, how it was tested, and the papers."""
    verdict = claim.shown_verdict()
    colour = {"holds": GREEN, "wrong": RED}.get(verdict, "#57606a")
    how = f"{claim.kind}: {claim.test}" + (f"; `findings.{claim.figure}`" if claim.figure else "")
    papers = f'<div style="{MUTED}">{marked("; ".join(claim.papers))}</div>' if claim.papers else ""
    return (f'<div style="margin-left:1.2em"><b style="color:{colour}">{marked(verdict)}</b>. {marked(claim.explained())}'
            f'<div style="{MUTED}">{marked(how)}</div>{papers}</div>')


def _live(claim: Claim, before: str | None, guessed):
    from ipywidgets import HTML, ToggleButtons, VBox

    revealed = HTML()
    buttons = ToggleButtons(options=[(label, verdict) for verdict, label in BUTTONS.items()], value=None, style={"button_width": "auto"})

    def show(verdict: str) -> None:
        right = verdict == claim.guess
        word = "" if claim.finding().verdict == OPEN else (
            f'<b style="color:{GREEN}">Guessed.</b>' if right else f'<b style="color:{RED}">You said: {verdict}.</b>')
        revealed.value = f'<div style="margin-left:1.2em">{word}</div>{_revealed(claim)}'

    def clicked(change) -> None:
        show(change["new"])
        guessed(claim, change["new"])

    if before in VERDICTS:
        buttons.value = before
        show(before)
    buttons.observe(clicked, names="value")
    return VBox([HTML(_stated(claim)), buttons, revealed])
