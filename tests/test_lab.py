"""The notebooks' figures, quizzes and tables: right where they compute, readable where nothing runs."""

import json
import math
import sys
import subprocess

import pytest
import torch

from minipeft import lab
from minipeft.quant import nf4

QUESTION = {
    "question": "How many numbers does LoRA of rank $r$ train in a layer of $m \\times n$, if $r<m$?",
    "choices": {"$r(m+n)$": "`A` has $rn$, `B` has $mr$.", "$rmn$": "That is more than full fine-tuning."},
    "right": "$r(m+n)$",
}


def test_importing_the_lab_loads_neither_matplotlib_nor_widgets():
    code = "import sys, minipeft.lab; print([m for m in ('matplotlib', 'ipywidgets', 'IPython') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_every_name_of_the_lab_exists():
    for name in lab.__all__:
        assert getattr(lab, name) is not None


# ---------------------------------------------------------------------------- parts to put in order

PARTS = {"squeeze": "`W_down`, $d \\to m$.", "bend": "$\\sigma$ comes between.", "widen": "Back to $d$ numbers."}


def test_an_ordering_has_a_static_form_that_folds_the_order_and_the_reasons():
    bundle = lab.ordering("Draw it.", PARTS, {"softmax": "Nothing is chosen here."})._repr_mimebundle_()
    assert set(bundle) == {"text/plain", "text/html"}
    before, answer = bundle["text/html"].split("<details>")
    assert all(part in before for part in (*PARTS, "softmax")) and "comes between" not in before
    assert answer.index("squeeze") < answer.index("bend") < answer.index("widen") < answer.index("softmax")
    assert "Nothing is chosen" in answer and "<code>W_down</code>" in answer


def test_a_live_ordering_takes_only_the_next_part_and_says_why_not_another():
    box = lab.ordering("Draw it.", PARTS, {"softmax": "Nothing is chosen here."}).widget()
    *rows, verdict, drawing = box.children[1:]
    buttons = {row.children[1].value: row.children[0] for row in rows}
    buttons["bend"].click()
    assert "something else comes first" in verdict.value and drawing.value == ""
    buttons["softmax"].click()
    assert "Nothing is chosen" in verdict.value
    for part in PARTS:
        buttons[part].click()
    assert "Done" in verdict.value and "2 wrong" in verdict.value
    assert drawing.value.index("squeeze") < drawing.value.index("bend") < drawing.value.index("widen")


def test_an_ordering_refuses_parts_without_a_reason():
    with pytest.raises(ValueError, match="'bend' has no reason"):
        lab.ordering("Draw it.", {"squeeze": "first", "bend": " "})
    with pytest.raises(ValueError, match="'bend' is both"):
        lab.ordering("Draw it.", PARTS, {"bend": "no"})


# ---------------------------------------------------------------------------- quizzes


def test_a_quiz_has_a_static_form_with_every_reason_folded_and_formulas_whole():
    bundle = lab.quiz([QUESTION])._repr_mimebundle_()
    assert set(bundle) == {"text/plain", "text/html"}  # no kernel here, so no widget
    page = bundle["text/html"]
    before, answers = page.split("<details>")
    assert "Right." not in before and "Right." in answers
    assert "$rn$" in answers and "more than full fine-tuning" in answers
    assert "$r&lt;m$" in page and "<code>A</code>" in page  # escaped for HTML, which MathJax reads back


def test_a_live_quiz_says_why_an_answer_is_wrong_and_counts_first_tries():
    box = lab.quiz([QUESTION, QUESTION]).widget()
    first, second, score = box.children
    buttons = [{row.children[1].value: row.children[0] for row in box.children[1:3]} for box in (first, second)]
    right, wrong = (buttons[0][choice] for choice in QUESTION["choices"])
    wrong.click()
    assert "Not right." in first.children[-1].value and "full fine-tuning" in first.children[-1].value
    right.click()
    assert "Right." in first.children[-1].value
    buttons[1][QUESTION["right"]].click()
    assert "1 of 2 right at the first try" in score.value


def test_the_right_choice_stands_anywhere_but_always_at_the_same_place():
    def places():
        quiz = lab.quiz({"question": f"{i} + 1?", "choices": {c: "because" for c in "abcd"}, "right": "a"} for i in range(40))
        return [list(q["choices"]).index(q["right"]) for q in quiz.questions]

    assert set(places()) == {0, 1, 2, 3} and places() == places()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"right": "$r(m+m)$"}, "none of its choices; did you mean"),
        ({"choices": {"a": "because", "b": " "}, "right": "a"}, "the choice 'b' has no reason"),
        ({"choices": {"a": "because"}, "right": "a"}, "has 1 choices"),
        ({"answer": "a"}, "has 'answer'; accepted"),
    ],
)
def test_a_quiz_refuses_a_question_that_cannot_be_answered(change, message):
    with pytest.raises(ValueError, match=message):
        lab.quiz([QUESTION | change])


# ---------------------------------------------------------------------------- figures


def test_the_rank_slider_counts_r_times_in_plus_out_and_keeps_what_the_best_update_keeps():
    generator = torch.Generator().manual_seed(1)
    delta = torch.randn(7, 3, generator=generator) @ torch.randn(3, 12, generator=generator)
    slider = lab.rank_slider(delta, ranks=(1, 2, 3, 5))
    assert slider.count(5) == 5 * (7 + 12)
    assert slider.kept(3) == pytest.approx(1) and slider.kept(1) < 0.99
    u, s, v = torch.linalg.svd(delta)
    best = u[:, :2] @ s[:2].diag() @ v[:2]
    assert slider.kept(2) == pytest.approx((1 - (delta - best).square().sum() / delta.square().sum()).item(), abs=1e-5)


def test_the_rank_slider_has_a_picture_where_no_kernel_runs_and_moves_where_one_does():
    slider = lab.rank_slider(shape=(20, 30), ranks=(1, 4, 8))
    assert slider._repr_mimebundle_()["image/png"].startswith(b"\x89PNG")
    control, picture = slider.widget().children
    before = picture.value
    control.value = 8
    assert picture.value != before and bytes(picture.value).startswith(b"\x89PNG")


def test_the_rank_slider_refuses_a_rank_above_the_smaller_side():
    with pytest.raises(ValueError, match="accepted for a weight of \\(20, 30\\): 1 to 20"):
        lab.rank_slider(shape=(20, 30), ranks=(1, 21))


def test_the_block_slider_counts_the_bytes_that_are_stored_and_the_error_that_is_left():
    W = torch.randn(3, 1000, generator=torch.Generator().manual_seed(2))
    slider = lab.block_slider(W, sizes=(64, 1024))
    assert slider.bits(64, double=False) == 4 + 32 * math.ceil(3000 / 64) / 3000
    assert slider.bits(64) == 4 + (8 * 47 + 32 + 32) / 3000  # a byte a block, one second scale, the mean
    q = nf4.quantize(W, 1024, double_quant=True)
    assert slider.errors[1024] == pytest.approx(((nf4.dequantize(q) - W).norm() / W.norm()).item())
    assert slider.shares[64].abs().view(-1, 64).amax(1).eq(1).all() and len(slider.shares[1024]) == 2048


def test_the_block_slider_has_a_picture_where_no_kernel_runs_and_moves_where_one_does():
    slider = lab.block_slider(torch.randn(40, 30))
    assert slider.sizes == (32, 64, 128, 256, 512, 1024) and "blocks of   64: 4." in repr(slider)
    assert slider._repr_mimebundle_()["image/png"].startswith(b"\x89PNG")
    control, picture = slider.widget().children
    before = picture.value
    control.value = 512
    assert picture.value != before and bytes(picture.value).startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="block_size is 48"):
        lab.block_slider(torch.randn(40, 30), sizes=(48,))
    with pytest.raises(ValueError, match="a weight of 1,200 numbers"):
        lab.block_slider(torch.randn(40, 30), sizes=(2048,))


def test_a_live_curve_without_a_point_can_be_drawn():
    lab.live_curve().draw()


def test_the_live_curve_draws_at_most_once_a_second_and_keeps_every_point(monkeypatch):
    curve = lab.live_curve()
    drawn = []
    monkeypatch.setattr(curve, "_show", lambda: drawn.append(len(curve.runs[-1])))
    for step in range(1, 40):
        curve({"step": step, "loss": 1 / step, "lr": 1e-3, "tokens_per_s": 10.0, "memory": 2**30})
    assert 1 <= len(drawn) < 10 and drawn[0] == 1
    curve({"step": 1, "loss": 2.0, "eval_loss": 3.0})  # another run
    curve.draw()
    assert [len(run) for run in curve.runs] == [39, 1]
    labels = [text.get_text() for text in curve.figure.axes[0].get_legend().get_texts()]
    assert "run 1" in labels and "run 2" in labels


def test_the_three_sockets_are_drawn_with_their_formulas():
    figure = lab.three_sockets_figure()
    text = " ".join(t.get_text() for t in figure.axes[0].texts)
    for socket in ("embedding socket", "key/value socket", "module socket"):
        assert socket in text
    assert figure._repr_png_().startswith(b"\x89PNG")


# ---------------------------------------------------------------------------- pages and the machine


def test_a_table_aligns_numbers_and_shows_what_is_missing():
    page = lab.table([{"method": "LoRA", "trained": 9216, "loss": 0.51234}, {"method": "<none>", "trained": 0}])
    lines = repr(page).splitlines()
    assert lines[1].split() == ["LoRA", "9,216", "0.5123"]
    assert lines[2].split() == ["<none>", "0", "–"]
    assert "&lt;none&gt;" in page._repr_html_()


def test_record_writes_plain_json_for_the_runner_and_refuses_what_is_not_finite(tmp_path, monkeypatch):
    lab.record(ignored=1)  # outside a runner: nothing to write to
    monkeypatch.setenv("MINIPEFT_RECORD", str(tmp_path / "record"))
    lab.record(exact=torch.tensor(0.5), losses=torch.tensor([1.0, 2.0]), by={"a": (1, 2)})
    assert json.loads((tmp_path / "record").read_text()) == {"exact": 0.5, "losses": [1.0, 2.0], "by": {"a": [1, 2]}}
    with pytest.raises(ValueError, match="the figure 'loss' is nan"):
        lab.record(loss=float("nan"))
    with pytest.raises(TypeError, match="is a Page; accepted"):
        lab.record(page=lab.hint("x"))


def test_the_runtime_box_shows_what_was_measured_and_admits_what_was_not(tmp_path, monkeypatch):
    monkeypatch.setattr("minipeft.data.data_folder", lambda: tmp_path)
    assert repr(lab.runtime_box("05_lora")).count("not measured yet") == 2
    entry = {"minutes": 7.25, "peak_memory_gib": 2.5, "device": "2 cores", "date": "2025-01-02"}
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "notebooks.json").write_text(json.dumps({"05_lora": {"cpu": entry}}))
    text = repr(lab.runtime_box("05_lora"))
    assert "7.2 minutes, 2.5 GiB at its peak (2 cores; 2025-01-02)" in text and text.count("not measured yet") == 1


def test_the_machine_is_described_without_its_name():
    import platform

    machine = lab.machine()
    assert machine.cores >= 1 and machine.memory_gib > 0.1
    assert platform.node() not in machine.summary and "/" not in machine.summary
    assert "this machine" in machine._repr_html_()


def test_one_seed_repeats_everything():
    import random

    import numpy

    def draw():
        lab.seed_everything(5)
        return random.random(), numpy.random.rand(), torch.rand(()).item()

    assert draw() == draw()
