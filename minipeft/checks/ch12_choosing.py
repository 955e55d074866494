"""Checks of chapter 12, choosing: a comparison that is fair, a difference that is real, a cost that is counted."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from minipeft.checks.frame import Case, Draw, exercise


def _mean(values) -> float:
    values = list(values)
    return math.fsum(values) / len(values)


# ---------------------------------------------------------------------------- which rate


def _scored(trials: list[dict], rate_of: Callable[[list[dict]], float], score: Callable[[list[float]], float] = _mean) -> dict[str, float]:
    """method -> the score of the trials at the rate that `rate_of` picks among the method's own."""
    found = {}
    for method in {t["method"]: None for t in trials}:
        own = [t for t in trials if t["method"] == method]
        found[method] = score([t["test"] for t in own if t["rate"] == rate_of(own)])
    return found


def _by(key: Callable[[list[dict]], float], best=min) -> Callable[[list[dict]], float]:
    """A choice of the rate: the one with the best `key` of its trials."""
    return lambda own: best({t["rate"]: None for t in own}, key=lambda rate: key([t for t in own if t["rate"] == rate]))


@exercise("honest-scores", points=2)
def honest_scores(draw: Draw) -> Iterator[Case]:
    """`fn(trials) -> {method: score}`: every method at the rate with the lowest mean validation loss; its mean test score there.

    A trial is {"method", "rate", "seed", "validation" (a loss), "test" (a share right)}; all seeds of a rate count.
    """
    for methods, rates, seeds in ((2, 3, 3), (1, 4, 2), (3, 3, draw.integer(3, 5)), (4, 5, 3)):
        trials = []
        for m in range(methods):
            grid = [10.0 ** -draw.integer(1, 2) * 3**i for i in range(rates)]
            right, lucky = draw.integer(0, rates - 1), draw.integer(1, rates - 1)
            lucky = (right + lucky) % rates                      # another rate: lowest single loss, and the best on the test
            for i, rate in enumerate(grid):
                for seed in range(seeds):
                    loss = 0.5 + 0.1 * (i != right) + draw.uniform(0, 0.02)
                    if i == lucky:
                        loss = 0.3 if seed == 0 else 1.2
                    test = (0.9 if i == lucky else 0.6) + draw.uniform(0, 0.05)
                    trials.append({"method": f"method {m}", "rate": rate, "seed": seed, "validation": loss, "test": test})
        trials = [trials[i] for i in sorted(range(len(trials)), key=lambda _: draw.uniform(0, 1))]
        mean_loss = _by(lambda at: _mean(t["validation"] for t in at))
        shared = _by(lambda at: _mean(t["validation"] for t in at))(trials)
        yield Case(
            given={"trials": trials},
            want=_scored(trials, mean_loss),
            mistakes={
                "the rate is chosen by the test score: then the test is not unseen any more": _scored(trials, _by(lambda at: _mean(t["test"] for t in at), max)),
                "the rate of the single best run is taken: one lucky seed decides": _scored(trials, _by(lambda at: min(t["validation"] for t in at))),
                "the best seed is reported, not the mean": _scored(trials, mean_loss, max),
                "the mean over all rates": {m: _mean(t["test"] for t in trials if t["method"] == m) for m in {t["method"] for t in trials}},
                "the highest validation loss is taken for the best": _scored(trials, _by(lambda at: _mean(t["validation"] for t in at), max)),
                "one rate for all methods": {m: _mean(found) if (found := [t["test"] for t in trials if t["method"] == m and t["rate"] == shared]) else 0.0
                                             for m in {t["method"] for t in trials}},
                "the best test score of all runs": {m: max(t["test"] for t in trials if t["method"] == m) for m in {t["method"] for t in trials}},
            },
        )


# ---------------------------------------------------------------------------- is it a difference


def _variance(values: list[float], minus: int = 1) -> float:
    return math.fsum((v - _mean(values)) ** 2 for v in values) / (len(values) - minus)


@exercise("lead-and-error")
def lead_and_error(draw: Draw) -> Iterator[Case]:
    """`fn(a, b) -> (lead, error)`: how far a's mean lies above b's, and the standard error of that difference.

    a, b: scores over seeds, not necessarily equally many. error = √(s_a²/n_a + s_b²/n_b), s² with n - 1 below.
    """
    for n_a, n_b in ((3, 5), (2, 4), (draw.integer(4, 7), 3), (6, 2)):
        a = [draw.uniform(0.6, 0.8) for _ in range(n_a)]
        b = [draw.uniform(0.3, 0.5) for _ in range(n_b)]
        lead, va, vb = _mean(a) - _mean(b), _variance(a), _variance(b)
        yield Case(
            given={"a": a, "b": b},
            want=(lead, math.sqrt(va / n_a + vb / n_b)),
            mistakes={
                "the spread of single runs, not of the means: divide each s² by its n": (lead, math.sqrt(va + vb)),
                "the errors are added; it is their squares that add": (lead, math.sqrt(va / n_a) + math.sqrt(vb / n_b)),
                "n where n - 1 belongs: few seeds then look surer than they are": (lead, math.sqrt(_variance(a, 0) / n_a + _variance(b, 0) / n_b)),
                "the root is missing": (lead, va / n_a + vb / n_b),
                "b's lead over a": (-lead, math.sqrt(va / n_a + vb / n_b)),
                "only a's error is counted": (lead, math.sqrt(va / n_a)),
                "the best seeds are compared": (max(a) - max(b), math.sqrt(va / n_a + vb / n_b)),
                "s is divided by n, not by its root": (lead, math.sqrt(va / n_a**2 + vb / n_b**2)),
            },
        )


# ---------------------------------------------------------------------------- score against cost


def _unbeaten(rows: list[tuple], beats: Callable) -> set[str]:
    return {name for name, score, cost in rows if not any(beats(s, score, c, cost) for n, s, c in rows if n != name)}


@exercise("not-beaten")
def not_beaten(draw: Draw) -> Iterator[Case]:
    """`fn(rows) -> set of names`: the methods that no other one beats. A row is (name, score, cost).

    One beats another if it scores at least as high and costs at most as much, and is better in one of the two.
    """
    for more in (2, 4, 1, draw.integer(3, 8)):
        rows, score, cost = [], 10, 100
        for i in range(3 + more):                                # the ones not beaten: more score for more cost
            score, cost = score + draw.integer(5, 9), cost + draw.integer(50, 90)
            rows.append((f"m{i}", score, cost))
        name, s, c = rows[1]
        rows += [("same score, dearer", s, c + 7), ("as dear, worse", s - 1, c), ("twin", s, c), ("worst", 1, 10 * cost)]
        rows.append(("between", rows[2][1] - 1, rows[2][2] + 1))
        rows = [rows[i] for i in sorted(range(len(rows)), key=lambda _: draw.uniform(0, 1))]
        yield Case(
            given={"rows": rows},
            want=_unbeaten(rows, lambda s, own, c, cost: s >= own and c <= cost and (s > own or c < cost)),
            mistakes={
                "a tie beats: then twins beat each other": _unbeaten(rows, lambda s, own, c, cost: s >= own and c <= cost),
                "only one that is better in both beats": _unbeaten(rows, lambda s, own, c, cost: s > own and c < cost),
                "the cost is not asked": _unbeaten(rows, lambda s, own, c, cost: s > own),
                "the score is not asked": _unbeaten(rows, lambda s, own, c, cost: c < cost),
                "a high cost counts as good": _unbeaten(rows, lambda s, own, c, cost: s >= own and c >= cost and (s > own or c > cost)),
                "a low score counts as good": _unbeaten(rows, lambda s, own, c, cost: s <= own and c <= cost and (s < own or c < cost)),
                "those that are beaten": {r[0] for r in rows} - _unbeaten(rows, lambda s, own, c, cost: s >= own and c <= cost and (s > own or c < cost)),
                "only the one with the most score for its cost": {max(rows, key=lambda r: r[1] / r[2])[0]},
            },
        )


# ---------------------------------------------------------------------------- what it takes


@exercise("standing-bytes")
def standing_bytes(draw: Draw) -> Iterator[Case]:
    """`fn(frozen, trained, bits) -> float`: bytes that training holds all the time, activations left out.

    The frozen numbers take `bits` bits each. A trained number is a float32, with a gradient and AdamW's two states in float32.
    """
    for bits in (16.0, 4.127, 32.0, draw.uniform(3, 9)):
        frozen, trained = draw.integer(5000, 9000), draw.integer(2000, 4000)
        base = frozen * bits / 8
        yield Case(
            given={"frozen": frozen, "trained": trained, "bits": bits},
            want=base + 16.0 * trained,
            mistakes={
                "eight bits are a byte": frozen * bits + 16.0 * trained,
                "three of four are counted: the number, its gradient, two states": base + 12.0 * trained,
                "AdamW has two states, not one; and the number itself is missing": base + 8.0 * trained,
                "the gradients and states are missing": base + 4.0 * trained,
                "the frozen numbers have no gradient and no states": 4 * base + 16.0 * trained,
                "the trained numbers are kept in float32, not in the base's bits": base + 4 * trained * bits / 8,
                "the frozen base is missing": 16.0 * trained,
                "that is counted in 1024s": (base + 16.0 * trained) / 1024,
            },
        )


@exercise("how-to-serve")
def how_to_serve(draw: Draw) -> Iterator[Case]:
    """`fn(weights, adapter, tasks, memory) -> "merged", "unmerged" or "neither"`: all tasks ready at once.

    Merged is as fast as the base, but each task is a whole model: take it if all of them fit. Else one base and an
    adapter a task, if that fits. Sizes in one unit; what just fits, fits.
    """
    for kind, more in (("merged", 0), ("unmerged", 0), ("neither", 0), ("merged", 1), ("unmerged", 1), ("merged", 0), ("unmerged", 0)):
        weights, tasks = draw.integer(50, 90), draw.integer(3, 6)
        adapter = draw.integer(5, 9)
        memory = {"merged": tasks * weights + more * draw.integer(0, 20),
                  "unmerged": weights + tasks * adapter + more * draw.integer(0, weights // 2),
                  "neither": weights + tasks * adapter - 1}[kind]

        def answer(merged: int, unmerged: int, memory=memory) -> str:
            return "merged" if merged <= memory else "unmerged" if unmerged <= memory else "neither"

        m, u = tasks * weights, weights + tasks * adapter
        yield Case(
            given={"weights": weights, "adapter": adapter, "tasks": tasks, "memory": memory},
            want=answer(m, u),
            mistakes={
                "the base is not needed beside merged models": answer(m + weights, u),
                "the adapters need their base": answer(m, tasks * adapter),
                "one base, but an adapter for every task": answer(m, weights + adapter),
                "a merged model has no adapter beside it": answer(m + tasks * adapter, u),
                "unmerged is taken although the merged ones fit": "unmerged" if u <= memory else "neither",
                "what just fits, fits": "merged" if m < memory else "unmerged" if u < memory else "neither",
                "merged models share nothing: one for each task": answer(weights, u),
                "each task needs a base of its own only when merged": answer(m, tasks * (weights + adapter)),
            },
        )
