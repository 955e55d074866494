"""The course's datasets, as plain lists of dicts, and the score for drug cards.

Each dataset has a card in `data/` that says what it is, where it comes from, its licence and its
splits. `drug_cards` lies in the package; the four `sentiment` domains are fetched once (fetch.py).
"""

from __future__ import annotations

import hashlib
import html
import json
from difflib import get_close_matches
from pathlib import Path

from .fetch import fetch

SPLITS = ("train", "validation", "test")
SENTIMENT = {  # domain: its table
    "sentiment/movies": "movieReviewSnippets_GroundTruth.txt",
    "sentiment/products": "amazonReviewSnippets_GroundTruth.txt",
    "sentiment/editorials": "nytEditorialSnippets_GroundTruth.txt",
    "sentiment/tweets": "tweets_GroundTruth.txt",
}
DATASETS = ("drug_cards", *SENTIMENT)
FIELDS = ("name", "class", "treats", "route", "caution")  # of a drug card, in this order
NEUTRAL = 0.25  # a mean rating closer to 0 than this is no label


def data_folder() -> Path:
    """The folder with the project's own data and the cards: in the package, or in a checkout."""
    package = Path(__file__).parent
    inside = package / "_data"
    return inside if inside.exists() else package.parent / "data"


def load_data(name: str, split: str = "train") -> list[dict]:
    """The examples of one split ("train", "validation" or "test"), always in the same order.

    "drug_cards"        {"prompt": str, "completion": str, "card": str, "direction": str}
                        every card under every phrasing of that split, in two directions:
                        "forward" asks for the card of a name, "reverse" for the name of a card
    "sentiment/movies"  {"text": str, "label": 0 or 1, "score": float}; so are
                        "sentiment/products", "sentiment/editorials" and "sentiment/tweets";
                        score is the raters' mean, from -4 to 4, and label is 1 if it is positive

    Each call gives a new list: change it as you like. Raises `ValueError` for an unknown name or
    split, `minipeft.fetch.FetchError` when a sentiment domain cannot be fetched.
    """
    _check("dataset", name, DATASETS)
    _check("split", split, SPLITS)
    return _drug_cards(split) if name == "drug_cards" else _sentiment(name, split)


def _check(what: str, value: str, accepted: tuple[str, ...]) -> None:
    if value not in accepted:
        near = get_close_matches(str(value), accepted, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"no {what} is called {value!r}; {hint}({what}s: {', '.join(accepted)})")


# Drug cards


def _drug_cards(split: str) -> list[dict]:
    folder = data_folder()
    lines = (folder / "drug_cards.jsonl").read_text(encoding="utf-8").splitlines()
    cards = [json.loads(line) for line in lines]
    phrasings = json.loads((folder / "drug_cards_phrasings.json").read_text(encoding="utf-8"))
    examples = []
    for card in cards:
        answers = {
            "forward": " " + " | ".join(card[field] for field in FIELDS),
            "reverse": " " + card["name"],
        }
        for direction, answer in answers.items():
            for phrasing in phrasings[direction][split]:
                examples.append(
                    {
                        "prompt": f"{phrasing.format(**card)}\n",
                        "completion": answer,
                        "card": card["name"],
                        "direction": direction,
                    }
                )
    return examples


def score_cards(examples: list[dict], answers: list[str]) -> dict[str, float]:
    """How good `answers` are to the drug-card `examples`, one each: shares from 0 to 1.

    Only the first line of an answer counts, without the space around it. "Exact" is letter for
    letter. For the forward examples, where the answer's fields are what stands between " | ":

    format      answers with exactly five fields, none empty, and a route that some card has
    name        answers whose first field is exactly the name
    facts       the other four fields, each at its place: exact ones among all that were asked for
    all_facts   answers with all four of them exact

    so that an answer may know the name without keeping the format, or the other way round.
    For the reverse examples:

    recall      answers that are exactly the name

    A direction without examples has no entry. Raises `ValueError` if the lengths differ.
    """
    if len(examples) != len(answers):
        raise ValueError(f"{len(examples)} examples but {len(answers)} answers; one each is needed")
    lines = (data_folder() / "drug_cards.jsonl").read_text(encoding="utf-8").splitlines()
    routes = {json.loads(line)["route"] for line in lines}
    marks: dict[str, list[float]] = {}
    for example, answer in zip(examples, answers):
        line = (answer.strip().splitlines() or [""])[0].strip()
        expected = example["completion"].strip()
        if example["direction"] == "reverse":
            marks.setdefault("recall", []).append(line == expected)
            continue
        got, right = line.split(" | "), expected.split(" | ")
        facts = [a == b for a, b in zip(got[1:], right[1:])]  # fields that are not there are wrong
        parses = len(got) == 5 and all(field.strip() for field in got) and got[3] in routes
        marks.setdefault("format", []).append(parses)
        marks.setdefault("name", []).append(got[0] == right[0])
        marks.setdefault("facts", []).append(sum(facts) / 4)
        marks.setdefault("all_facts", []).append(sum(facts) == 4)
    return {name: sum(values) / len(values) for name, values in marks.items()}


# Sentiment (Hutto & Gilbert 2014)


def _sentiment(name: str, split: str) -> list[dict]:
    """Lines of `id <tab> mean rating <tab> text`. Near-neutral and repeated snippets are left out."""
    table = (fetch("sentiment") / SENTIMENT[name]).read_text(encoding="utf-8")
    examples, seen = [], set()
    for line in table.strip().split("\n"):
        identity, mean, text = line.split("\t", 2)
        text, score = _clean(text), float(mean)
        if abs(score) < NEUTRAL or text in seen:
            continue
        seen.add(text)
        if _split_of(name, identity) == split:
            examples.append({"text": text, "label": int(score > 0), "score": score})
    return examples


def _clean(text: str) -> str:
    """`&amp;` and its like, some of them escaped twice, become characters; blanks become one."""
    return " ".join(html.unescape(html.unescape(text)).split())


def _split_of(name: str, identity: str) -> str:
    """80, 10 and 10 % by a hash. Sentence 3 of article 12, `12_3`, goes where article 12 goes."""
    source = f"{name.removeprefix('sentiment/')}/{identity.split('_')[0]}"  # "editorials/12"
    tenth = int(hashlib.sha256(source.encode()).hexdigest(), 16) % 10
    return SPLITS[max(0, tenth - 7)]
