"""Statements about tests/bench.py: its rows and its file. It measures nothing here."""

import argparse
import json

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
