"""The statistics against published and hand-computed values, and accuracy on a model whose replies are known."""
import math

import pytest
import scipy.stats

from demo.evaluation import Score, evaluate, mcnemar_p, wilson_interval
from demo.models import load_model
from demo.tasks import Problem


@pytest.mark.parametrize("successes, trials", [(0, 10), (1, 10), (75, 200), (160, 200), (200, 200)])
def test_wilson_interval_matches_scipy(successes, trials):
    expected = scipy.stats.binomtest(successes, trials).proportion_ci(0.95, method="wilson")
    assert wilson_interval(successes, trials) == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_wilson_interval_is_never_a_point():
    low, high = wilson_interval(200, 200)
    assert low < 0.99 and high == pytest.approx(1.0)


def score(pattern: str) -> Score:
    return Score(tuple(c == "1" for c in pattern))


def test_mcnemar_is_the_sign_test_of_the_problems_that_differ():
    # 1 problem only a solved, 7 only b solved: 2 (C(8, 0) + C(8, 1)) / 2^8
    a, b = score("1" + "0" * 7 + "11"), score("0" + "1" * 7 + "11")
    assert mcnemar_p(a, b) == pytest.approx(2 * 9 / 256)
    assert mcnemar_p(a, b) == pytest.approx(scipy.stats.binomtest(1, 8).pvalue)
    assert mcnemar_p(b, a) == mcnemar_p(a, b)


def test_mcnemar_of_equal_scores_is_one():
    assert mcnemar_p(score("1010"), score("1010")) == 1.0
    assert mcnemar_p(score("10"), score("01")) == 1.0


def test_mcnemar_needs_the_same_problems():
    with pytest.raises(ValueError, match="same problems, found 2 and 3"):
        mcnemar_p(score("10"), score("101"))


def test_evaluate_scores_each_reply_against_its_own_problem():
    model = load_model("tiny")
    prompts = [f"{a}{b:02}_____=" for a in range(10) for b in range(13)]  # more than one batch
    greedy = evaluate(model, [Problem(prompt, lambda reply: 0.0) for prompt in prompts], 1.0, 12).replies
    assert len(set(greedy)) > 1

    problems = [
        Problem(prompt, lambda reply, own=own: float(reply == own)) for prompt, own in zip(prompts, greedy, strict=True)
    ]
    found = evaluate(model, problems, 1.0, 12)
    assert found.greedy.accuracy == 1.0 and found.replies == greedy
    assert found.greedy.lengths == tuple(map(len, greedy))  # a character is a token, the end's included
    assert found.greedy.length == sum(map(len, greedy)) / len(greedy)
    assert 0.0 < found.sampled.accuracy < 1.0
    assert all(math.isfinite(bound) for bound in found.sampled.interval)


def test_evaluate_is_repeatable():
    model = load_model("tiny")
    problems = [Problem(f"{a}{a}3_____=", lambda reply: float(reply.endswith("#5."))) for a in range(10)]
    assert evaluate(model, problems, 1.0, 12, seed=3) == evaluate(model, problems, 1.0, 12, seed=3)
