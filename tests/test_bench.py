"""Statements about tests/bench.py: its rows and its file. It measures nothing here."""

import argparse
import json
import subprocess

import pytest

from . import bench


def turns(**sides):
    return {side: [{"seconds": s, "peak": 2**30 * s, "above_loaded": 2**30 * s} for s in seconds] for side, seconds in sides.items()}


def test_dora_is_held_against_peft_and_against_our_lora():
    rows = bench.rows_of("dora", turns(ours=[1.2, 9.0, 1.0], peft=[1.1, 1.1, 1.1], lora=[1.0, 1.0, 0.1]))
    assert [(r["beside"], r["unit"], r["asked"]) for r in rows] == [
        *[("peft", unit, 1.0) for unit in ("s", "GiB", "GiB")], *[("our LoRA", unit, 1.25) for unit in ("s", "GiB", "GiB")]]
    assert [r["reached"] for r in rows] == [False, False, False, True, True, True]  # medians: 1.2, 1.1 and 1.0
    assert {round(r["ratio"], 3) for r in rows} == {round(1.2 / 1.1, 3), 1.2}


def test_measuring_again_replaces_the_rows_of_that_and_keeps_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "REPOSITORY", tmp_path)
    chosen = argparse.Namespace(repeats=1, steps=2)
    for date, what, ours in [("day 1", "prompt", 3.0), ("day 1", "attach", 0.05), ("day 2", "prompt", 2.0)]:
        monkeypatch.setattr(bench.time, "strftime", lambda _, date=date: date)
        results = turns(ours=[ours], peft=[1.0])
        bench.write(what, bench.rows_of(what, results), results, chosen)
    kept = json.loads((tmp_path / "data" / "results" / "bench.json").read_text())
    assert [(r["of"], r["date"], r["ours"]) for r in kept["rows"]] == [
        ("attach", "day 1", 0.05), *[("prompt", "day 2", 2.0)] * 3]
    assert {what: found["date"] for what, found in kept["details"].items()} == {"prompt": "day 2", "attach": "day 1"}


def test_four_bits_are_held_against_the_faster_compute_type_and_what_is_not_measured_has_no_row():
    sides = turns(ours=[0.6], peft=[1.0], peft_bf16=[3.0])
    assert [(r["beside"], r["ratio"], r["reached"]) for r in bench.rows_of("qlora", sides)] == [("peft", 0.6, True)] * 2
    measured = {f"rows {n}": 0.4 for n in (1, 8, 32, 512)}
    rows = bench.rows_of("product", {"ours": [measured], "bnb": [dict.fromkeys(measured, 1.0)], "float32": [measured]})
    assert [r["what"].split(", ")[-1] for r in rows] == ["rows 1", "rows 8", "rows 32", "rows 1", "rows 512"]
    assert [r["reached"] for r in rows] == [True, True, True, False, True]


def test_every_measurement_has_a_worker_for_each_side():
    for what, sides in bench.SIDES.items():
        assert sides[0] == "ours"
        if what in bench.WHOLE:
            assert all(callable(getattr(bench, f"{what}_{side}")) for side in sides)
        elif what not in bench.TRAINED:
            assert callable(getattr(bench, f"{what}_turns"))


def test_of_two_compute_types_the_faster_one_counts_and_memory_is_measured_apart(monkeypatch):
    answers = {"product_turns": {"rows 1": {"ours": [1.0], "float32": [3.0], "bnb torch.float32": [2.0, 2.2], "bnb torch.bfloat16": [5.0, 0.1]}},
               "steps_turns:prompt": {"ours": [1.0, 2.0], "peft": [4.0, 4.0]}}
    monkeypatch.setattr(bench, "measure", lambda worker, steps, seed: answers.get(worker, {"peak": 7.0, "above_loaded": len(worker)}))
    assert bench.take_turns("product", 2, 1) == {"ours": [{"rows 1": 1.0}], "bnb": [{"rows 1": 2.0}, {"rows 1": 2.2}], "float32": [{"rows 1": 3.0}]}
    found = bench.take_turns("prompt", 2, 1)
    assert [(r["ours"], r["theirs"]) for r in bench.rows_of("prompt", found)][0] == (1.5, 4.0)
    assert found["peft"][0] == {"peak": 7.0, "above_loaded": len("steps_memory:prompt,peft")}


def test_jobs_take_turns_and_the_first_two_rounds_do_not_count():
    done = []
    taken = bench.in_turns({name: lambda name=name: done.append(name) for name in "abc"}, 4)
    assert "".join(done) == "abcbcacababcbcacab" and {len(t) for t in taken.values()} == {4}


def test_serving_is_held_against_peft_against_one_shared_adapter_and_loading_against_the_first_loads():
    sides = {"ours": {"decode": 1.2, "forward": 1.2, "switch": 9e-4, "load": 0.1}, "first": {"load": 0.08},
             "peft": {"decode": 5.0, "forward": 1.5, "switch": 0.1, "load": 1.1}, "shared": {"decode": 1.0, "forward": 0.9}}
    rows = bench.rows_of("serve", {side: [{figure: s} for figure, s in figures.items()] for side, figures in sides.items()})
    assert [(r["what"].split(": ")[1], r["beside"], r["reached"]) for r in rows] == [
        ("a decoding step", "peft", True), ("16 tokens", "peft", False), ("choosing another", "peft", True),
        ("loading the last", "peft", True), ("a decoding step", "one shared", True), ("16 tokens", "one shared", False),
        ("loading the last", "our first", False)]
    assert [r["asked"] for r in rows] == [1 / 4, 1 / 1.35, 1e-3, 0.1, 1.25, 1.25, 1.1]


def test_of_rivals_a_slow_one_leaves_after_its_first_turn(monkeypatch):
    clock, takes = [0.0], {"ours": 5.0, "one": 2.0, "other": 3.1, "third": 2.9}

    def job(name):
        return lambda: clock.__setitem__(0, clock[0] + takes[name])
    monkeypatch.setattr(bench.time, "perf_counter", lambda: clock[0])
    taken = bench.in_turns({name: job(name) for name in takes}, 2, ("one", "other", "third"))
    assert {name: [round(t, 3) for t in seconds] for name, seconds in taken.items()} == {
        "ours": [5.0, 5.0], "one": [2.0, 2.0], "third": [2.9, 2.9]}
    rows = bench.rows_of("qlora", turns(ours=[1.0], peft=[2.0], peft_bf16=[]))
    assert [r["ratio"] for r in rows] == [0.5, 0.5]


def test_readme_shows_every_figure_as_it_was_measured():
    if subprocess.run(["git", "diff", "--quiet", "HEAD", "--", "data/results/bench.json"], cwd=bench.REPOSITORY).returncode == 1:
        pytest.skip("the benchmark was run here after the figures that README shows")
    rows = json.loads((bench.REPOSITORY / "data" / "results" / "bench.json").read_text())["rows"]
    shown = (bench.REPOSITORY / "README.md").read_text().splitlines()
    missing = [line for line in bench.markdown(rows).splitlines() if line not in shown]
    assert rows and not missing, f"python tests/bench.py --table has what README should show: {missing}"
