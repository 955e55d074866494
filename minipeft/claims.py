"""The claims of three articles about PEFT, each with a verdict: data/claims.yaml, read and checked.

    for claim in load_claims():
        print(claim.id, claim.claim, claim.verdict)
        print(claim.explained())                 # the reason, its figures computed now

A claim whose kind is "arithmetic" or "measurable here" names a function of findings.py. It returns the figures, and a
verdict: tests/test_claims.py fails where that is another than the one in the file. Where data/results does not have
the figure yet, `Claim.finding()` says "not measured yet".
"""

from __future__ import annotations

import string
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path

from .data import data_folder
from .findings import DEPENDS, FINDINGS, HOLDS, OPEN, WRONG, Finding, NotMeasured

KINDS = ("arithmetic", "measurable here", "literature", "not checkable")
COMPUTED = KINDS[:2]
NOT_CHECKABLE = "not checkable here"
VERDICTS = (HOLDS, WRONG, DEPENDS, NOT_CHECKABLE)          # what a reader can guess
NEEDED = ("id", "place", "subject", "claim", "kind", "test", "verdict", "reason")
ALLOWED = (*NEEDED, "claimed", "figure", "papers", "numbers")


@dataclass(frozen=True)
class Claim:
    """One claim. `verdict` is the whole of it ("depends on the batch"), `guess` the kind that a reader can guess."""

    id: str
    source: str                      # the article's file
    place: str
    subject: str
    claim: str
    kind: str
    test: str
    verdict: str
    reason: str
    claimed: object = None
    figure: str = ""
    papers: tuple[str, ...] = ()     # cited in full, with the place in them
    numbers: dict = field(default_factory=dict)

    @property
    def guess(self) -> str:
        """The verdict without what it depends on: one of `VERDICTS`."""
        return DEPENDS if self.verdict.startswith(DEPENDS) else self.verdict

    @cached_property
    def _found(self) -> Finding:
        if not self.figure:
            return Finding(self.guess, **self.numbers)
        return FINDINGS[self.figure](self.claimed)

    def finding(self) -> Finding:
        """What the code finds: a verdict and figures. "not measured yet", and what is missing, where a result is not there."""
        try:
            return self._found
        except NotMeasured as missing:
            return Finding(OPEN, missing=str(missing))

    def shown_verdict(self) -> str:
        """The verdict to show: the file's, where the code agrees with it; otherwise the code's."""
        found = self.finding().verdict
        return self.verdict if found == self.guess else found

    def explained(self) -> str:
        """The reason, with its figures."""
        found = self.finding()
        if found.verdict == OPEN:
            return f"Not measured yet ({found.figures['missing']})."
        return self.reason.format(**found.figures)


@lru_cache
def _read(path: Path) -> dict:
    import yaml

    return yaml.safe_load(path.read_text(encoding="utf-8"))


def load_claims(subject: str | None = None, *, path: Path | None = None) -> list[Claim]:
    """All claims, or those of one subject, in the order of the file.

    ValueError where the file is not in order: a claim without a verdict, a figure that no function computes, …
    """
    book = _read(path or data_folder() / "claims.yaml")
    claims = [_claim(entry, book) for entry in book["claims"]]
    seen = set()
    for claim in claims:
        if claim.id in seen:
            raise ValueError(f"two claims have the id {claim.id!r}")
        seen.add(claim.id)
    if subject is None:
        return claims
    if subject not in {c.subject for c in claims}:
        raise ValueError(f"no claims about {subject!r} (subjects: {', '.join(subjects(claims))})")
    return [c for c in claims if c.subject == subject]


def subjects(claims: Iterable[Claim] | None = None) -> list[str]:
    """The subjects, in the order of the file."""
    return list(dict.fromkeys(c.subject for c in (load_claims() if claims is None else claims)))


def _claim(entry: dict, book: dict) -> Claim:
    """A claim from its entry; `ValueError` names the claim and what is wrong with it."""
    where = f"claim {entry.get('id', entry)!r}"

    def refuse(why: str):
        raise ValueError(f"{where}: {why}")

    for name in NEEDED:
        if not (isinstance(entry.get(name), str) and entry[name].strip()):
            refuse(f"{name} is {entry.get(name)!r}; a text is needed")
    if surplus := sorted(set(entry) - set(ALLOWED)):
        refuse(f"has {surplus[0]!r}; accepted: {', '.join(ALLOWED)}")
    article, _, line = entry["id"].partition(".")
    if article not in map(str, book["articles"]) or not (line[:-1].isdigit() and line[-1].isalpha()):
        refuse("an id is article.line and a letter, such as 2.14b")
    if entry["kind"] not in KINDS:
        refuse(f"kind is {entry['kind']!r}; accepted are {', '.join(map(repr, KINDS))}")
    verdict, figure = entry["verdict"], entry.get("figure", "")
    if not (verdict in (HOLDS, WRONG, NOT_CHECKABLE) or verdict.startswith(DEPENDS + " ")):
        refuse(f"verdict is {verdict!r}; accepted are 'holds', 'wrong', 'not checkable here' and 'depends on …'")
    if (entry["kind"] == "not checkable") != (verdict == NOT_CHECKABLE):
        refuse(f"kind is {entry['kind']!r} but the verdict {verdict!r}")
    if entry["kind"] in COMPUTED and not figure:
        refuse(f"kind is {entry['kind']!r}, but no figure is named that computes it")
    if figure and figure not in FINDINGS:
        refuse(f"figure is {figure!r}, which no function of findings.py computes")
    papers = entry.get("papers", {})
    if entry["kind"] == "literature" and not papers:
        refuse("kind is 'literature' but no paper is named")
    for paper in papers:
        if paper not in book["papers"]:
            refuse(f"cites {paper!r}, which is not among the papers")
    for _, name, _, _ in string.Formatter().parse(entry["reason"]):
        if name and not figure and name not in entry.get("numbers", {}):
            refuse(f"the reason has {{{name}}}, which is not among its numbers")
    file = book["articles"][int(article)]["file"]
    cited = tuple(f"{book['papers'][paper]}, {part}" for paper, part in papers.items())
    return Claim(source=file, papers=cited, **{k: v for k, v in entry.items() if k != "papers"})
