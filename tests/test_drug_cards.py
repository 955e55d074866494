"""The drug cards keep the promises that data/drug_cards.md makes about them."""

import collections
import json
import re
import string
from pathlib import Path

import pytest

DATA = Path(__file__).resolve().parents[1] / "data"
FIELDS = ["name", "class", "treats", "route", "caution"]
ASKED = FIELDS[1:]  # what a reverse question gives
MOST_WORDS = {"class": 4, "treats": 3, "route": 3, "caution": 3}
ROUTES = {
    "by mouth", "by injection", "inhaled", "on the skin",
    "eye drops", "nasal spray", "under the tongue",
}  # fmt: skip
PHRASINGS_PER_SPLIT = {"train": 8, "validation": 1, "test": 2}


@pytest.fixture(scope="module")
def cards() -> list[dict[str, str]]:
    lines = (DATA / "drug_cards.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def phrasings() -> dict[str, dict[str, list[str]]]:
    return json.loads((DATA / "drug_cards_phrasings.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def card_page() -> str:
    return (DATA / "drug_cards.md").read_text(encoding="utf-8")


def placeholders(template: str) -> list[str]:
    return sorted(field for _, field, _, _ in string.Formatter().parse(template) if field)


def test_there_are_200_to_210_cards(cards):
    assert 200 <= len(cards) <= 210


def test_every_card_has_the_five_fields_in_order(cards):
    for card in cards:
        assert list(card) == FIELDS, card


def test_names_are_unique_and_sorted(cards):
    names = [card["name"] for card in cards]
    assert names == sorted(set(names))
    assert "amoxicillin" in names


def test_the_other_four_fields_identify_one_medicine(cards):
    count = collections.Counter(tuple(card[field] for field in ASKED) for card in cards)
    assert [facts for facts, times in count.items() if times > 1] == []


def test_fields_are_short_lowercase_text_without_the_separator(cards):
    for card in cards:
        for field, value in card.items():
            assert re.fullmatch(r"[a-z0-9][a-z0-9' -]*[a-z0-9]", value), (card["name"], field, value)
            assert "  " not in value, (card["name"], field, value)
            assert len(value.split()) <= MOST_WORDS.get(field, 2), (card["name"], field, value)


def test_routes_come_from_the_fixed_list(cards):
    assert {card["route"] for card in cards} == ROUTES


def test_no_field_gives_the_name_away(cards):
    for card in cards:
        assert all(card["name"] not in card[field] for field in ASKED), card


def test_the_card_page_states_the_counts_of_the_vocabularies(cards, card_page):
    stated = dict(re.findall(r"^\| `(\w+)` \|.*\| (\d+) \|$", card_page, flags=re.MULTILINE))
    counted = {field: str(len({card[field] for card in cards})) for field in FIELDS}
    assert stated == counted


@pytest.mark.parametrize("field", ASKED)
def test_the_card_page_lists_each_vocabulary_with_its_counts(cards, card_page, field):
    line = re.search(rf"^\*\*{field}\*\*: (.*)\.$", card_page, flags=re.MULTILINE).group(1)
    stated = {value: int(times) for value, times in re.findall(r"([^,(]+) \((\d+)\)", line.replace(", ", ","))}
    assert stated == dict(collections.Counter(card[field] for card in cards))


def test_the_card_page_states_the_size_of_each_split(cards, phrasings, card_page):
    for split, per_direction in PHRASINGS_PER_SPLIT.items():
        row = f"| {split} | {per_direction} | {per_direction} | {2 * per_direction * len(cards)} |"
        assert row in card_page, row


def test_the_card_page_says_it_is_no_medical_advice(card_page):
    assert "Teaching data, not medical advice" in card_page
    assert "Apache-2.0" in card_page


def test_phrasings_have_both_directions_and_all_splits(phrasings):
    assert list(phrasings) == ["forward", "reverse"]
    for direction, splits in phrasings.items():
        counts = {split: len(templates) for split, templates in splits.items()}
        assert counts == PHRASINGS_PER_SPLIT, direction


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_no_phrasing_occurs_twice_in_any_split(phrasings, direction):
    def plain(template: str) -> str:  # wording alone: case and punctuation do not make a phrasing new
        return " ".join(re.findall(r"[a-z{}]+", template.lower()))

    wordings = [plain(template) for split in phrasings[direction].values() for template in split]
    assert len(wordings) == len(set(wordings))


@pytest.mark.parametrize("direction, fields", [("forward", ["name"]), ("reverse", ASKED)])
def test_phrasings_have_each_placeholder_once(phrasings, direction, fields):
    for templates in phrasings[direction].values():
        for template in templates:
            assert placeholders(template) == sorted(fields), template
            assert "\n" not in template and template == template.strip(), template
            assert template[-1] in ".?)", template
