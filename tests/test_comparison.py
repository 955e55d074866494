"""The one comparison: what is run, what is kept, what is made of it. Nothing is trained here but two steps of one LoRA."""

import importlib.util
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from minipeft import lab
from minipeft.lab import contest

REPO = Path(__file__).resolve().parents[1]
spec = importlib.util.spec_from_file_location("compare", REPO / "notebooks" / "compare.py")
compare = sys.modules["compare"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(compare)

BUDGET = compare.CPU
RECORDS = REPO / "data" / "results" / "comparison_runs.json"
CODE = {name: compare.code_of(name) for name in (*compare.CONTESTANTS, "latency")}
VERSIONS = {"torch": "2", "minipeft": "0"}


def record(run, loss=1.0, score=0.7, **more):
    settings = compare.contestant(run.method, run.task, run.changes)
    what = {"cards": dict.fromkeys(("format", "name", "facts", "all_facts", "recall"), score) | {"plain loss": 3.0},
            "sentiment": {"commoner": 0.55, "old skill": 0.9}}[run.task]
    return {"settings": repr(settings) if settings else None, "trained": 10, "total": 100, "percent": 10.0, "first": [3.0, 2.0, 1.5], "loss": loss,
            "score": score, "wall": 10.0, "seconds": 8.0, "s a step": 0.1, "peak GiB": 1.0, "file MB": 2.0, **what,
            **asdict(run), "budget": asdict(BUDGET), "code": CODE[run.method], "date": "2026-01-01", "device": "a machine",
            "versions": VERSIONS} | more  # fmt: skip


def latency_rows(name):
    rows = [{"model": m, "forward / base": 1.1} for m in ("base", "LoRA", "LoRA, merged", "prompt of 1", "prompt of 20")]
    return {"rows": rows, "batch": 1, "tokens": 64, "wall": 60.0, "budget": asdict(BUDGET), "code": CODE["latency"], "date": "2026-01-01",
            "device": "a machine", "versions": VERSIONS}  # fmt: skip


def everything(answer=record):
    """The records of a whole comparison, each run done when the plan asks for it."""
    records = {}
    while ready := [run for run, known in compare.Plan(records, BUDGET).missing() if known]:
        for run in ready:
            if isinstance(run, str):
                records[run] = latency_rows(run)
            elif (run.task, run.method) == ("cards", "BitFit"):
                records[run.key] = record(run) | {"refused": "no bias"}
            else:
                records[run.key] = answer(run)
    return records


def bowl(run):
    """A loss that is least at rate 3e-3, wherever the grid stands, and a score of each method's own."""
    import math

    loss = 1 + abs(math.log10(run.rate / 3e-3)) if run.rate else 1.0
    return record(run, loss=loss, score=0.4 + 0.01 * list(compare.CONTESTANTS).index(run.method) + 0.002 * run.seed)


@pytest.fixture(scope="module")
def records():
    return everything(bowl)


def test_every_method_gets_a_sweep_three_seeds_and_four_domains(records):
    plan = compare.Plan(records, BUDGET)
    assert not plan.missing() and len(plan.runs()) == len(records)
    for task in compare.TASKS:
        for method in compare.CONTESTANTS:
            if (task, method) == ("cards", "BitFit") or task == "cards" and method in ("frozen base", "hard prompt"):
                continue
            sweep, best = plan.sweep(task, method)
            assert len(sweep) >= 3 and best == min((run.rate for run in sweep), key=lambda r: abs(compare.math.log10(r / 3e-3)))
            finals = plan.finals(task, method, best)
            assert len({(r.seed, r.domain) for r in finals}) == (3 if task == "cards" else 12) and all(plan.has(r) for r in finals)


def test_a_best_rate_at_the_edge_is_followed_two_steps_and_no_further(records):
    plan = compare.Plan(records, BUDGET)
    assert [run.rate for run in plan.sweep("sentiment", "PiSSA")[0]] == [3e-4, 1e-3, 3e-3, 1e-2]
    assert [run.rate for run in plan.sweep("sentiment", "prompt tuning")[0]] == [1e-3, 3e-3, 1e-2, 3e-2, 1e-1]
    assert [run.rate for run in plan.sweep("sentiment", "LoRA")[0]] == [1e-3, 3e-3, 1e-2]
    assert [run.rate for run in plan.sweep("cards", "PiSSA")[0]][:5] == [1e-4, 3e-4, 1e-3, 3e-3, 1e-2]
    assert compare.next_rate(3e-3, True) == 1e-2 and compare.next_rate(1e-2, False) == 3e-3 and compare.next_rate(1e-5, False) == 3e-6


def test_on_the_cards_the_rates_halfway_are_tried_and_all_seeds_choose_between_the_two_best(records):
    def runs(found, method):
        sweep, best = compare.Plan(found, BUDGET).sweep("cards", method)
        return [(run.rate, run.seed) for run in sweep], best

    coarse = [(1e-3, 0), (3e-3, 0), (1e-2, 0)]
    assert runs(records, "LoRA") == ([*coarse, (2e-3, 0), (5e-3, 0), (3e-3, 1), (3e-3, 2), (2e-3, 1), (2e-3, 2)], 3e-3)
    assert [compare.halfway(*pair) for pair in ((1e-3, 3e-3), (3e-3, 1e-2), (1e-2, 3e-2))] == [2e-3, 5e-3, 2e-2]

    def fickle(run):                                            # best on the first seed, and lost on the others
        loss = {2e-3: 0.2, 3e-3: 0.1 if run.seed == 0 else 3.0}.get(run.rate, 1.0)
        return record(run, loss=loss) if run.task == "cards" else bowl(run)

    assert runs(everything(fickle), "LoRA")[1] == 2e-3
    row = compare.method_row(compare.Plan(everything(fickle), BUDGET), "cards", "LoRA")
    assert row["rate"] == 2e-3 and row["rates"]["0.003"] == 0.1 and row["mean losses"] == pytest.approx({"0.003": 6.1 / 3, "0.002": 0.2})
    nothing = {k: r for k, r in records.items() if k != "cards / LoRA / rate 0.002 / seed 2"}
    assert runs(nothing, "LoRA")[1] is None                     # not before all of them are there


def test_a_rate_that_diverged_is_not_taken_and_counts_as_tried():
    def lost(run):
        return record(run, loss=None, diverged="the loss is nan") if run.rate and run.rate > 3e-3 else bowl(run)

    plan = compare.Plan(everything(lost), BUDGET)
    assert [run.rate for run in plan.sweep("cards", "(IA)³")[0]][:5] == [1e-3, 3e-3, 1e-2, 3e-2, 1e-1]  # all of its own diverged: lower ones
    sweep, best = plan.sweep("cards", "LoRA")
    assert best == 3e-3 and {run.rate for run in sweep if run.seed} == {2e-3, 3e-3}


def test_the_test_questions_choose_nothing(records):
    """Turn the scores round: the rates that are taken stay."""
    turned = {k: r | {"score": 1 - r["score"]} if "score" in r else r for k, r in records.items()}
    for method in ("LoRA", "prompt tuning"):
        assert compare.Plan(turned, BUDGET).sweep("sentiment", method) == compare.Plan(records, BUDGET).sweep("sentiment", method)


def test_another_budget_or_other_settings_are_another_run(records):
    key = next(k for k in records if " / LoRA / " in k)
    for changed in ({"budget": asdict(replace(BUDGET, steps=61))}, {"settings": "LoRA(rank=9)"}):
        plan = compare.Plan(records | {key: records[key] | changed}, BUDGET)
        assert key in [run.key for run, _ in plan.missing()]


def test_comments_and_docstrings_do_not_make_figures_stale_and_code_does(records, tmp_path, monkeypatch):
    folder = tmp_path / "minipeft" / "methods"
    folder.mkdir(parents=True)
    for file in (*compare.COMMON, "methods/lora"):
        (tmp_path / "minipeft" / f"{file}.py").write_text((REPO / "minipeft" / f"{file}.py").read_text())
    monkeypatch.setattr(compare, "ROOT", tmp_path)
    before, lora = compare.code_of("LoRA"), folder / "lora.py"
    text = lora.read_text()
    lora.write_text(text.replace('"""', '"""Other words. ', 1) + "\n# a comment\n")
    assert compare.code_of("LoRA") == before
    lora.write_text(text.replace("self.alpha / ", "2 * self.alpha / "))
    assert compare.code_of("LoRA") != before and compare.code_of("full fine-tuning") == compare.code_of("frozen base")


def test_runs_go_side_by_side_as_many_as_fit_and_latencies_alone(monkeypatch):
    monkeypatch.setattr(compare, "CORES", 4)
    monkeypatch.setattr(compare.psutil, "virtual_memory", lambda: SimpleNamespace(total=16 * 2**30))
    card, text = compare.Run("cards", "LoRA", 1e-3), compare.Run("sentiment", "LoRA", 1e-3, 0, "movies")
    assert (compare.slots("cards"), compare.slots("sentiment")) == (2, 4)
    assert compare.may_start(card, [card]) and not compare.may_start(card, [card, card])
    assert compare.may_start(text, [text] * 3) and not compare.may_start(text, [text] * 4) and not compare.may_start(text, [card])
    assert compare.may_start("latency / cards", []) and not compare.may_start("latency / cards", [card])
    assert not compare.may_start(card, ["latency / cards"])


class Bench(compare.Bench):
    """Without processes: each run's answer is made up."""

    def __init__(self, path, answer=lambda run: {}):
        self.answer = answer
        self.path, self.budget, self.heads, self.records = path, BUDGET, path.parent, compare.read_records(path)
        self.about = {"date": "2026-01-02", "device": "a machine", "versions": VERSIONS}
        self.code = CODE

    def alone(self, work, run, *args):
        return self.answer(run)


def test_each_run_is_on_disk_when_it_is_done_and_is_not_done_again(tmp_path):
    run = compare.Run("sentiment", "LoRA", 1e-3, 0, "movies")
    made = record(run)
    bench = Bench(tmp_path / "runs.json", lambda run: {k: made[k] for k in ("settings", "score", "loss", "first", "trained", "wall")})
    bench.do(run)
    again = compare.read_records(tmp_path / "runs.json")
    assert list(again) == [run.key] and again[run.key]["date"] == "2026-01-02"
    assert run.key not in [r.key for r, _ in compare.Plan(again, BUDGET).missing() if not isinstance(r, str)]
    assert compare.run_of(again[run.key]) == run and [p.name for p in tmp_path.iterdir()] == ["runs.json"]


def test_a_second_one_at_the_same_records_does_not_begin(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compare, "ROOT", tmp_path)
    (tmp_path / "build").mkdir()
    monkeypatch.setattr(compare, "work", lambda *args: 7)
    with compare.FileLock(tmp_path / "build" / "comparison-cpu.lock"):
        assert compare.main([]) == 1 and compare.main(["--list"]) == 7 and compare.main(["--profile", "smoke"]) == 7
    assert "another notebooks/compare.py is at work" in capsys.readouterr().err
    assert compare.main([]) == 7


@pytest.mark.parametrize("losses, kept", [([3.0, 2.0001, 1.5], True), ([3.0, 2.1, 1.5], False), ([3.0], False), ([], False)])
def test_records_of_older_code_stay_only_where_the_first_steps_are_the_same(tmp_path, losses, kept):
    runs = [compare.Run("sentiment", "LoRA", 1e-3, seed, "movies") for seed in (0, 1)]
    compare.write_records(tmp_path / "runs.json", {run.key: record(run, code="of yesterday") for run in runs})
    assert compare.stale(compare.read_records(tmp_path / "runs.json")) == [run.key for run in runs]
    bench = Bench(tmp_path / "runs.json", lambda run: {"first": losses})
    bench.settle()
    left = compare.read_records(tmp_path / "runs.json")
    assert (len(left) == 2 and not compare.stale(left)) if kept else not left


def test_only_takes_tasks_methods_and_questions_together(records):
    def asked(*only):
        return [run for run, _ in compare.Plan({}, BUDGET, set(only)).runs()]

    assert {r.method for r in asked("LoRA", "cards")} == {"LoRA"} and {r.task for r in asked("LoRA", "cards")} == {"cards"}
    assert asked("latency", "cards") == ["latency / cards"]
    assert {r.method for r in asked("ranks")} == {"LoRA"} and all(not isinstance(r, str) for r in asked("sentiment", "DoRA"))
    assert compare.Plan({}, BUDGET).minutes() < 240
    without = {k: r for k, r in records.items() if k.startswith("latency") or r["method"] != "DoRA"}
    assert 0 < compare.Plan(without, BUDGET).minutes() < 60     # latencies are there already, and are no runs of a method


# ---------------------------------------------------------------------------- the tables


def test_the_tables_are_made_of_the_records(records):
    found = compare.summarise(records, BUDGET)
    cards = {r["method"]: r for r in found["cards"]}
    sentiment = {r["method"]: r for r in found["sentiment"]}
    place = list(compare.CONTESTANTS).index("LoRA")
    assert cards["LoRA"]["score"] == pytest.approx(0.4 + 0.01 * place + 0.002) and cards["LoRA"]["spread"] == pytest.approx(0.002)
    assert sentiment["LoRA"]["runs"] == 12 and set(sentiment["LoRA"]["domains"]) == set(compare.DOMAINS)
    assert cards["LoRA"]["of full"] == pytest.approx(cards["LoRA"]["score"] / cards["full fine-tuning"]["score"])
    assert cards["LoRA"]["forgetting"] == 0 and cards["BitFit"]["refused"] == "no bias" and found["missing runs"] == 0
    assert set(found["questions"]) == set(compare.QUESTIONS) and set(found["questions"]["ranks"]) == {"1", "2", "4", "8", "16", "32", "64"}
    assert found["questions"]["starts"]["LoRA"]["n"] == 6


def test_a_seed_that_diverged_is_counted_and_not_forgotten(records):
    rate = compare.Plan(records, BUDGET).sweep("sentiment", "LoRA")[1]
    key = compare.Run("sentiment", "LoRA", rate, 2, "tweets").key
    lost = {k: v for k, v in records[key].items() if k != "score"} | {"diverged": "the loss is nan", "loss": None}
    row = next(r for r in compare.summarise(records | {key: lost}, BUDGET)["sentiment"] if r["method"] == "LoRA")
    assert row["diverged"] == 1 and row["runs"] == 11


def test_the_lab_draws_what_there_is_and_names_the_command_for_what_is_not(records):
    results = compare.summarise(records, BUDGET)
    for task in compare.TASKS:
        text = repr(contest.comparison_table(task, results))
        assert "QLoRA" in text and "1.1" in text and "make results, 2026-01-01, a machine" in text
        assert contest.comparison_figure(task, results)._repr_png_()[:4] == b"\x89PNG"
        assert len(contest.sweep_figure(task, results).axes[0].lines) >= 13
    for name in compare.QUESTIONS:
        assert contest.question_figure(name, results)._repr_png_()[:4] == b"\x89PNG"
    for shown in (contest.comparison_table("cards", {}), contest.comparison_figure("cards", {}), contest.sweep_figure("cards", {}),
                  contest.question_figure("ranks", {})):  # fmt: skip
        assert "make results" in repr(shown)
    with pytest.raises(ValueError, match="no question is called 'rank'"):
        lab.question_figure("rank")


def test_one_run_gives_the_same_first_losses_twice_and_what_the_tables_need(tmp_path):
    run, small = compare.Run("sentiment", "LoRA", 3e-3, 0, "movies"), replace(compare.SMOKE, steps=4)
    first = compare.measure(run, small, str(tmp_path))
    again = compare.measure(run, small, str(tmp_path), True)       # the head comes from its file now
    assert len(first["first"]) == 3 and first["first"] == pytest.approx(again["first"], rel=1e-4)
    assert {"score", "loss", "commoner", "old skill", "trained", "seconds", "peak GiB", "file MB", "wall"} <= set(first) and "score" not in again
    assert first["trained"] < 0.05 * first["total"] and 0 < first["file MB"] < 5


@pytest.mark.skipif(not RECORDS.exists(), reason="the comparison has not been measured: make results")
def test_the_published_comparison_is_what_the_code_gives():
    found = compare.read_records(RECORDS)
    old = compare.stale(found)
    assert not old, f"{len(old)} figures are older than the code they were measured with, for example {old[0]!r}: run make results"
    published = json.loads((RECORDS.parent / "comparison.json").read_text())
    assert published == json.loads(json.dumps(compare.summarise(found, BUDGET))), "comparison.json is not made of comparison_runs.json: run make results"


def test_readme_shows_the_students_own_comparison_as_chapter_12_recorded_it():
    own = json.loads((RECORDS.parent / "12_choosing.json").read_text())["figures"]["own"]
    share = {row["method"]: f"{row['of full']:.2f}" for row in own["rows"]}
    assert own["ratio"] == 10 and not {"LoRA", "full fine-tuning"} & set(own["at an edge"])
    line = f"LoRA has {share['LoRA']} of full fine-tuning's score at ten times its rate, (IA)³ {share['(IA)³']}, the head alone {share['head only']};"
    assert line in (REPO / "README.md").read_text(encoding="utf-8")
