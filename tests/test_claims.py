"""The claims of the articles: the file is whole, code and verdicts agree, and every key of the examination is right."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest
import yaml

import minipeft as mp
from minipeft import claims, examination, findings, lab
from minipeft.lab import exams, guesses
from minipeft.lab.kept import Kept

REPO = Path(__file__).resolve().parent.parent
BOOK = claims.load_claims()
RAW = yaml.safe_load((mp.data.data_folder() / "claims.yaml").read_text(encoding="utf-8"))
# What `make results` has still to measure. A claim not named here must have its figure.
MAY_BE_OPEN = {"2.10b", "3.50a", "3.84a", "3.33a", "3.34a", "3.35a", "3.97c", "3.63a", "2.60c", "2.64d", "3.86a"}


# ---------------------------------------------------------------------------- code and verdict agree


@pytest.mark.parametrize("claim", [c for c in BOOK if c.figure], ids=lambda c: c.id)
def test_the_code_finds_the_verdict_that_the_file_has(claim):
    found = claim.finding()
    if found.verdict == findings.OPEN:
        assert claim.id in MAY_BE_OPEN, found.figures
        return
    assert found.verdict == claim.guess, (claim.claim, found)
    assert claim.explained() and "{" not in claim.explained()


def test_a_verdict_that_the_code_does_not_find_is_not_shown():
    claim = next(c for c in BOOK if c.id == "2.34b")
    changed = claims.Claim(**{name: getattr(claim, name) for name in claim.__dataclass_fields__} | {"claimed": [2, 3]})
    assert claim.shown_verdict() == "wrong" and changed.finding().verdict == "holds" == changed.shown_verdict()


@pytest.mark.parametrize("id, claimed, verdict", [
    ("2.70a", 41_943_040, "holds"), ("2.14b", 81_921, "wrong"), ("2.24b", 0.2, "holds"), ("3.58a", 48, "holds"), ("3.21b", 140, "holds"),
    ("1.43c", 30, "wrong"), ("3.9a", 150, "wrong"), ("3.24a", [1 / 20, 1 / 10], "holds"), ("2.91a", 6, "holds"), ("3.11d", [5, 50], "holds"),
    ("2.32c", 90_000, "wrong"), ("2.78a", 80, "holds"), ("2.78a", 16, "wrong"), ("1.18a", 0.1, "holds"), ("3.17b", 3_000_000, "holds"),
])  # fmt: skip
def test_another_printed_number_gets_another_verdict(id, claimed, verdict):
    claim = next(c for c in BOOK if c.id == id)
    assert findings.FINDINGS[claim.figure](claimed).verdict == verdict


def test_measured_verdicts_follow_the_measurement(monkeypatch):
    sweep = {"best": {"LoRA": {"rate": 1e-4, "loss": 1.0}, "full fine-tuning": {"rate": 4e-4}}, "LoRA": {"0.0004": 2.0}, "quarter": 1.0}

    def measured(notebook, *keys):
        value = {"rates": sweep, "places": {"q, v, as many numbers as the reference": 0.3, "feed-forward, as many numbers": 0.4}}
        for key in keys:
            value = value[key]
        return value

    monkeypatch.setattr(findings, "measured", measured)
    for figure, claimed in (("learning_rate", [3, 5]), ("lora_at_the_full_rate", None), ("where_lora_pays", None)):
        assert findings.FINDINGS[figure](claimed).verdict == "holds"


def test_a_figure_that_is_not_there_is_said_to_be_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(findings, "data_folder", lambda: tmp_path)
    claim = next(c for c in claims.load_claims() if c.id == "3.24a")
    assert claim.shown_verdict() == "not measured yet" and "05_lora: rates.best" in claim.explained()


# ---------------------------------------------------------------------------- the file


def test_the_file_has_the_claims_and_their_sources():
    assert len(BOOK) >= 60 and len({c.id for c in BOOK}) == len(BOOK)
    assert {c.source for c in BOOK} == {a["file"] for a in RAW["articles"].values()}
    assert Counter(c.id[0] for c in BOOK).most_common()[-1][1] >= 20
    assert set(RAW["papers"]) == {paper for entry in RAW["claims"] for paper in entry.get("papers", {})}  # none is idle
    assert set(findings.FINDINGS) == {c.figure for c in BOOK if c.figure}


def test_a_reason_types_no_number_that_the_code_can_compute():
    names = r"4-bit|16-bit|[\w-]*\d+B\b|Llama-3(-\d+B)?|NF4|GPT-\d|SmolLM2-135M|GSM8K|BERT-base|3\.6 %"
    for claim in (c for c in BOOK if c.kind == "arithmetic"):
        bare = re.sub(names, "", re.sub(r"\{[^}]*\}", "", claim.reason))
        assert not re.search(r"\d{4}|\d,\d{3}|\d\.\d", bare), (claim.id, bare)


def test_papers_are_cited_with_year_and_place():
    for claim in BOOK:
        for paper in claim.papers:
            known, _, part = paper.rpartition(", ")
            assert part and (re.search(r"\b(19|20)\d\d", paper) or "PEFT" in paper), paper


GOOD = {"id": "1.5a", "place": "p", "subject": "s", "claim": "c", "kind": "arithmetic", "figure": "prompt_count", "claimed": 1,
        "test": "t", "verdict": "wrong", "reason": "{trained}"}


@pytest.mark.parametrize("change, message", [
    ({"verdict": "maybe"}, "verdict is 'maybe'"), ({"verdict": "depends on"}, "verdict is 'depends on'"), ({"kind": "rumour"}, "kind is 'rumour'"),
    ({"figure": ""}, "no figure"), ({"figure": "prompt_cuont"}, "no function"), ({"id": "4.5a"}, "article.line"), ({"id": "1.5"}, "article.line"),
    ({"reason": " "}, "reason is ' '"), ({"why": "x"}, "has 'why'"), ({"papers": {"nobody2020": "page 1"}}, "cites 'nobody2020'"),
    ({"kind": "literature", "figure": ""}, "no paper is named"), ({"kind": "not checkable", "figure": ""}, "but the verdict"),
    ({"kind": "literature", "figure": "", "papers": {"lora": "table 1"}, "reason": "{share}"}, "'s' reason|the reason has"),
])  # fmt: skip
def test_a_claim_that_is_not_in_order_is_named(change, message, tmp_path):
    path = tmp_path / "claims.yaml"
    path.write_text(yaml.safe_dump({"articles": RAW["articles"], "papers": RAW["papers"], "claims": [GOOD | change]}), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        claims.load_claims(path=path)


def test_two_claims_cannot_have_one_id(tmp_path):
    path = tmp_path / "claims.yaml"
    path.write_text(yaml.safe_dump({"articles": RAW["articles"], "papers": RAW["papers"], "claims": [GOOD, GOOD]}), encoding="utf-8")
    with pytest.raises(ValueError, match="two claims have the id '1.5a'"):
        claims.load_claims(path=path)
    with pytest.raises(ValueError, match="no claims about 'cooking'"):
        claims.load_claims("cooking")


# ---------------------------------------------------------------------------- guessing


@pytest.fixture
def elsewhere(tmp_path, monkeypatch) -> Path:
    path = tmp_path / "answers.json"
    monkeypatch.setenv("MINIPEFT_PROGRESS", str(path))
    return path


SHORT = [c for c in BOOK if c.id in ("2.14b", "2.70a")]


def test_a_claim_is_stated_openly_and_its_verdict_is_folded():
    page = lab.guess(SHORT)._repr_mimebundle_()["text/html"]
    for part in page.split("<details>")[:1]:
        assert SHORT[0].claim in part and "holds" not in part and "81,920." not in part
    assert page.count("<details>") == 2 and "rank 32" in page and "findings.lora_8b" in page


def test_the_first_guess_counts_and_is_there_again_in_another_sitting(elsewhere):
    box = lab.guess(SHORT).widget()
    rows, score = box.children[:-1], box.children[-1]
    assert rows[0].children[2].value == "" and dict(rows[0].children[1].options)["nobody can tell"] == "not checkable here"
    rows[0].children[1].value = "wrong"
    assert "You said: wrong" in rows[0].children[2].value and "81,920" in rows[0].children[2].value
    rows[0].children[1].value = "holds"
    assert "Guessed." in rows[0].children[2].value and "1 of 2 guessed, 0 right" in score.value
    again = lab.guess(SHORT).widget()
    assert "You said: wrong" in again.children[0].children[2].value and "1 of 2 guessed, 0 right" in again.children[-1].value
    assert Kept(guesses.NAME).read() == {"2.14b": "wrong"}
    assert "soft prompts" in repr(lab.guess_score()) and re.search(r"soft prompts +\d+ +1 +0", repr(lab.guess_score()))


# ---------------------------------------------------------------------------- the examination


def test_the_checklist_and_the_scenarios_are_all_asked_about():
    parts = examination.parts()
    assert [title[0] for title, _ in parts] == list("123456") and parts[-1][1] == examination.scenarios()
    assert all(len(questions) >= 3 for _, questions in parts) and len(examination.scenarios()) == 6
    for _, questions in parts:
        for q in questions:
            assert len(q["choices"]) >= 4 and q["right"] in q["choices"]


# The questions whose answer is a number, each worked out here by hand from the published shapes.
LAYERS, WIDTH, INNER = 32, 4096, 11008
KEYS = {
    "A prompt of 20 tokens in a model of width": f"{20 * WIDTH:,}",
    "A prefix of 10 positions in Llama-3-8B": f"{10 * 2 * LAYERS * 8 * 128:,}",
    "Adapters of 64, two in each of the 12 layers": f"{100 * 24 * (2 * 64 * 768 + 64 + 768) / 109_482_240:.1f} %",
    "How many matrix products do two adapters add": "4",
    "One number each: W = 3": f"{3 + 4 // 2 * -1 * 2}",
    "A Llama of 32 layers": f"1/{LAYERS * 2 * 8 * 2 * WIDTH / (LAYERS * (2 * WIDTH + INNER)):.0f} of it",
    "The fewest trained numbers on a 7B Llama": "a prompt of 20 tokens",
    "A model of 65 billion numbers and one card of 48 GB": "QLoRA",
}


@pytest.mark.parametrize("begins, right", KEYS.items(), ids=lambda x: x[:24])
def test_a_computed_key_of_the_examination_is_what_a_second_computation_gives(begins, right):
    [question] = [q for _, part in examination.parts() for q in part if q["question"].startswith(begins)]
    assert question["right"] == right


def test_every_key_that_is_a_number_is_among_those_worked_out():
    for _, part in examination.parts():
        for q in part:
            if re.fullmatch(r"[-\d.,/ %]+(of it)?", q["right"]):
                assert any(q["question"].startswith(begins) for begins in KEYS), q["question"]


def test_the_smallest_and_what_fits_are_so_by_count():
    counts = {"a prompt of 20 tokens": 20 * WIDTH, "(IA)³": LAYERS * (2 * WIDTH + INNER), "LoRA of rank 1 on query and value": LAYERS * 2 * 2 * WIDTH}
    assert min(counts, key=counts.get) == "a prompt of 20 tokens"
    linears = 80 * (4 * 8192**2 + 3 * 8192 * 22016)
    four_bits, rest = linears * 4.127 / 8, 2 * 2 * 32000 * 8192
    assert 24e9 < four_bits + rest < 48e9 < 2 * linears


def test_a_kept_examination_goes_on_where_it_stopped(elsewhere):
    part = lab.exam().sections[0][1]
    question = part.questions[0]
    box = part.widget()
    rows = {row.children[1].value: row.children[0] for row in box.children[0].children[1:-1]}
    rows[next(text for text in rows if text.startswith(question["right"][:20]))].click()
    again = lab.exam().sections[0][1].widget()
    assert "Right." in again.children[0].children[-1].value and "1 of 1 right" in again.children[-1].value


@pytest.mark.parametrize("text", ["", "[]", "{broken", '{"x": 3}'])
def test_a_file_of_answers_that_is_broken_is_begun_anew(elsewhere, text):
    elsewhere.write_text(text)
    assert Kept("x").read() == {}
    Kept("x").write("question", "answer")
    assert Kept("x").read() == {"question": "answer"} and Kept("y").read() == {}


def test_answers_of_two_quizzes_do_not_mix_and_a_place_that_cannot_be_written_is_no_error(elsewhere, monkeypatch, tmp_path):
    Kept("x").write("q", "a")
    Kept("y").write("q", "b")
    assert (Kept("x").read(), Kept("y").read()) == ({"q": "a"}, {"q": "b"})
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MINIPEFT_PROGRESS", str(tmp_path / "file" / "below.json"))
    Kept("x").write("q", "a")
    assert Kept("x").read() == {}


def test_the_printed_examination_has_boxes_to_tick_and_the_answers_on_another_page(tmp_path):
    questions, answers = (path.read_text(encoding="utf-8") for path in lab.exam().write(tmp_path / "exam"))
    count = lab.exam().count
    assert count >= 20 and questions.count('class="question"') == answers.count('class="question"') == count
    assert "☒" not in questions and answers.count("☒") == count and "Name:" in questions
    assert "$" not in questions and "$" not in answers  # nothing here needs MathJax
    assert all(page.startswith("<!doctype html>") and "@page" in page for page in (questions, answers))


def test_a_sample_is_another_paper_for_another_seed():
    def asked(seed):
        return [q["question"] for _, part in lab.exam(sample=2, seed=seed).sections for q in part.questions]

    assert len(asked(1)) == 12 and asked(1) == asked(1) and asked(1) != asked(2)
    with pytest.raises(ValueError, match="sample is 0"):
        exams.exam(sample=0)


@pytest.mark.parametrize("lora, larger, verdict", [(0, 8, "holds"), (4, 8, "holds"), (6, 8, "wrong"), (0, 4, "depends on")])
def test_numbers_are_the_reason_only_if_as_few_of_them_are_no_better_elsewhere(lora, larger, verdict, monkeypatch):
    rows = [{"kind": kind, "trained": n, "facts kept": kept, "of": 8}
            for kind, n, kept in (("prompt", 10, 1), ("prefix", 10, 4), ("LoRA", 10, lora), ("prefix", 40, larger), ("LoRA", 40, 8))]
    monkeypatch.setattr(findings, "measured", lambda *where: rows)
    assert findings.facts_at_equal_size(None).verdict == verdict


@pytest.mark.parametrize("dora, verdict", [(0.95, "holds"), (0.8, "depends on"), (0.6, "wrong")])
def test_a_method_that_is_far_behind_makes_the_claim_wrong(dora, verdict, monkeypatch):
    monkeypatch.setattr(findings, "measured", lambda *where: {"tested": 400, "LoRA": {"accuracy": 0.8}, "DoRA": {"accuracy": dora}})
    assert findings.dora_against_lora(None).verdict == verdict


def test_readme_counts_the_verdicts_as_the_chapter_recorded_them_and_as_they_are():
    kept = json.loads((REPO / "data" / "results" / "13_fact_check.json").read_text())["figures"]
    now = Counter(claim.finding().verdict if claim.figure else claim.guess for claim in BOOK)
    assert kept["verdicts"] == dict(now) and kept["claims"] == len(BOOK), "make run NB=13, then python notebooks/tools.py keep 13"
    line = "{} claims of the three articles: {holds} hold, {wrong} are wrong, {depends on} depend, {not checkable here} cannot be checked here"
    assert line.format(len(BOOK), **now) in (REPO / "README.md").read_text(encoding="utf-8")
