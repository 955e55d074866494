import json
import re

import pytest

import minipeft as mp
from minipeft import data
from minipeft.data import DATASETS, SENTIMENT, SPLITS, data_folder, load_data, score_cards

RATED = {"movies": 10605, "products": 3708, "editorials": 5190, "tweets": 4200}  # Hutto & Gilbert 2014


def all_of(name):
    return {split: load_data(name, split) for split in SPLITS}


@pytest.mark.parametrize("name", DATASETS)
def test_a_split_is_the_same_at_every_call_and_yours_to_change(name):
    first = load_data(name, "test")
    kept = json.dumps(first)
    first[0].clear()
    first.clear()
    assert json.dumps(load_data(name, "test")) == kept
    assert load_data(name) == load_data(name, "train")


@pytest.mark.parametrize(
    "name, near",
    [("sentiment/movie", "sentiment/movies"), ("drugcards", "drug_cards"), ("tweets", "sentiment/tweets")],
)
def test_an_unknown_dataset_gets_the_nearest_name_and_the_list(name, near):
    with pytest.raises(ValueError, match=f"no dataset is called '{name}'; did you mean '{near}'.*editorials"):
        load_data(name)


@pytest.mark.parametrize("split, near", [("val", "validation"), ("training", "train"), ("tests", "test")])
def test_an_unknown_split_gets_the_nearest_name_and_the_list(split, near):
    with pytest.raises(ValueError, match=f"no split is called '{split}'; did you mean '{near}'.*train, validation"):
        load_data("drug_cards", split)


def test_the_data_folder_of_a_wheel_comes_before_that_of_a_checkout(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "__file__", str(tmp_path / "minipeft" / "data.py"))
    assert data_folder() == tmp_path / "data"
    (tmp_path / "minipeft" / "_data").mkdir(parents=True)
    assert data_folder() == tmp_path / "minipeft" / "_data"


# Drug cards


@pytest.fixture
def two_cards(tmp_path, monkeypatch):
    """Two cards, one phrasing a split and direction, two in test."""
    cards = [
        {"name": "amoxicillin", "class": "penicillin antibiotic", "treats": "bacterial infections",
         "route": "by mouth", "caution": "penicillin allergy"},
        {"name": "timolol", "class": "beta blocker", "treats": "glaucoma", "route": "eye drops", "caution": "asthma"},
    ]  # fmt: skip
    (tmp_path / "drug_cards.jsonl").write_text("".join(json.dumps(card) + "\n" for card in cards))
    phrasings = {
        "forward": {"train": ["What is {name}?"], "validation": ["{name}?"], "test": ["Tell {name}.", "And {name}?"]},
        "reverse": {"train": ["{class} {treats} {route} {caution}?"], "validation": ["{class}?"], "test": ["{treats}?"]},
    }
    (tmp_path / "drug_cards_phrasings.json").write_text(json.dumps(phrasings))
    monkeypatch.setattr(data, "data_folder", lambda: tmp_path)


def test_every_card_is_asked_under_every_phrasing_in_both_directions(two_cards):
    assert load_data("drug_cards", "train") == [
        {"prompt": "What is amoxicillin?\n", "card": "amoxicillin", "direction": "forward",
         "completion": " amoxicillin | penicillin antibiotic | bacterial infections | by mouth | penicillin allergy"},
        {"prompt": "penicillin antibiotic bacterial infections by mouth penicillin allergy?\n",
         "card": "amoxicillin", "direction": "reverse", "completion": " amoxicillin"},
        {"prompt": "What is timolol?\n", "card": "timolol", "direction": "forward",
         "completion": " timolol | beta blocker | glaucoma | eye drops | asthma"},
        {"prompt": "beta blocker glaucoma eye drops asthma?\n",
         "card": "timolol", "direction": "reverse", "completion": " timolol"},
    ]  # fmt: skip
    assert len(load_data("drug_cards", "test")) == 6


def test_no_wording_of_a_question_is_in_two_splits():
    prompts = {split: {example["prompt"] for example in examples} for split, examples in all_of("drug_cards").items()}
    assert not prompts["train"] & prompts["test"]
    assert not prompts["train"] & prompts["validation"]
    assert not prompts["validation"] & prompts["test"]


def test_every_card_is_in_every_split_in_both_directions():
    asked = [{(e["card"], e["direction"]) for e in examples} for examples in all_of("drug_cards").values()]
    assert asked[0] == asked[1] == asked[2]
    assert {direction for _, direction in asked[0]} == {"forward", "reverse"}


def test_the_right_answers_get_full_marks():
    for split, examples in all_of("drug_cards").items():
        scores = score_cards(examples, [example["completion"] for example in examples])
        assert scores == {"format": 1, "name": 1, "facts": 1, "all_facts": 1, "recall": 1}, split


RIGHT = "timolol | beta blocker | glaucoma | eye drops | asthma"


@pytest.mark.parametrize(
    "answer, scores",
    [
        (RIGHT, (1, 1, 1, 1)),
        (f"  {RIGHT} \nQ: What else?", (1, 1, 1, 1)),  # only the first line counts
        (f"\n {RIGHT}", (1, 1, 1, 1)),
        ("Timolol | beta blocker | glaucoma | eye drops | asthma", (1, 0, 1, 1)),  # letter for letter
        ("timolol | beta blocker | glaucoma | by mouth | asthma", (1, 1, 0.75, 0)),  # a known, wrong route
        ("timolol | beta blocker | glaucoma | by bus | asthma", (0, 1, 0.75, 0)),  # no route at all
        ("timolol | beta blocker | glaucoma | eye drops", (0, 1, 0.75, 0)),
        (f"{RIGHT} | bradycardia", (0, 1, 1, 1)),
        ("timolol |  | glaucoma | eye drops | asthma", (0, 1, 0.75, 0)),  # five fields, one empty
        ("timolol | glaucoma | beta blocker | eye drops | asthma", (1, 1, 0.5, 0)),  # each at its place
        ("timolol|beta blocker|glaucoma|eye drops|asthma", (0, 0, 0, 0)),
        ("Timolol is a beta blocker.", (0, 0, 0, 0)),
        ("timolol", (0, 1, 0, 0)),
        ("", (0, 0, 0, 0)),
        (" \n ", (0, 0, 0, 0)),
        ("amoxicillin | penicillin antibiotic | bacterial infections | by mouth | penicillin allergy", (1, 0, 0, 0)),
    ],
)
def test_an_answer_is_marked_for_format_name_and_facts(two_cards, answer, scores):
    example = load_data("drug_cards", "validation")[2]
    assert example["card"] == "timolol" and example["direction"] == "forward"
    assert score_cards([example], [answer]) == dict(zip(("format", "name", "facts", "all_facts"), scores))


@pytest.mark.parametrize(
    "answer, recall",
    [(" timolol", 1), ("timolol\nasthma", 1), ("Timolol", 0), ("timolol.", 0), ("timolol | beta blocker", 0), ("", 0)],
)
def test_a_name_is_recalled_when_it_is_the_whole_first_line(two_cards, answer, recall):
    example = load_data("drug_cards", "validation")[3]
    assert score_cards([example], [answer]) == {"recall": recall}


def test_scores_are_shares_over_the_examples_of_a_direction(two_cards):
    examples = load_data("drug_cards", "validation")  # forward and reverse of either card
    answers = [examples[0]["completion"], "?", "timolol | beta blocker | glaucoma | by bus | asthma", " timolol"]
    assert score_cards(examples, answers) == {
        "format": 0.5, "name": 1.0, "facts": 0.875, "all_facts": 0.5, "recall": 0.5,
    }  # fmt: skip
    assert score_cards([], []) == {}


def test_answers_that_do_not_match_the_examples_in_number_are_refused(two_cards):
    with pytest.raises(ValueError, match="4 examples but 1 answers"):
        score_cards(load_data("drug_cards", "validation"), ["timolol"])


# Sentiment


def rows(name):
    folder = mp.fetch.fetch("sentiment")
    return [line.split("\t", 2) for line in (folder / SENTIMENT[name]).read_text(encoding="utf-8").strip().split("\n")]


@pytest.mark.parametrize("domain", RATED)
def test_a_domain_has_every_rated_snippet_but_the_neutral_and_the_repeated(domain):
    name = f"sentiment/{domain}"
    table = rows(name)
    assert len(table) == RATED[domain] == len({row[0] for row in table})
    assert all(len(row) == 3 and -4 <= float(row[1]) <= 4 for row in table)
    examples = [example for split in SPLITS for example in load_data(name, split)]
    assert len(examples) == len({example["text"] for example in examples})
    scores = sorted(float(row[1]) for row in table if abs(float(row[1])) >= 0.25)
    assert len(scores) - 70 <= len(examples) <= len(scores)
    assert {example["score"] for example in examples} <= set(scores)


@pytest.mark.parametrize("name", SENTIMENT)
def test_a_snippet_is_a_clean_line_with_a_label_that_agrees_with_its_score(name):
    for examples in all_of(name).values():
        for example in examples:
            assert set(example) == {"text", "label", "score"}
            assert example["label"] == (example["score"] > 0) and abs(example["score"]) >= 0.25
            text = example["text"]
            assert text and text == " ".join(text.split()) and not re.search(r"&(amp|lt|gt|quot);|\ufeff", text)


@pytest.mark.parametrize("name", ["sentiment/products", "sentiment/editorials"])
def test_the_snippets_of_one_article_are_in_one_split(name):
    split_of = {example["text"]: split for split, examples in all_of(name).items() for example in examples}
    articles = {}
    for identity, _, text in rows(name):
        if split := split_of.get(data._clean(text)):
            articles.setdefault(identity.split("_")[0], set()).add(split)
    shared = [splits for splits in articles.values() if len(splits) > 1]
    assert len(articles) > 250 and len(shared) < 20  # a snippet that two articles have keeps the first's


def test_the_splits_never_move():
    """The hash decides, so a new version of minipeft must not change which text is in which split."""
    movies = [data._split_of("sentiment/movies", str(i)) for i in range(1, 25)]
    assert [i for i, split in enumerate(movies, 1) if split == "validation"] == [4, 7, 14]
    assert [i for i, split in enumerate(movies, 1) if split == "test"] == [16, 20]
    assert data._split_of("sentiment/editorials", "12_3") == data._split_of("sentiment/editorials", "12_40")


def test_the_card_states_the_counts_that_the_code_makes():
    card = (data_folder() / "sentiment.md").read_text(encoding="utf-8")
    for domain, rated in RATED.items():
        splits = all_of(f"sentiment/{domain}")
        counts = [len(examples) for examples in splits.values()]
        positive = [sum(e["label"] for e in examples) / len(examples) for examples in splits.values()]
        shares = [f"{100 * max(share, 1 - share):.1f} %" for share in positive]
        cells = [domain, f"{rated:,}", *(f"{count:,}" for count in counts), *shares]
        assert f"| {' | '.join(cells)} |" in card
