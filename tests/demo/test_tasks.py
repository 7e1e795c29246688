"""Every task: held-out problems never appear in training, and the checker tells right from wrong."""
import re
from itertools import islice

import pytest

from demo.tasks import TASKS, last_number, task


@pytest.mark.parametrize("name", TASKS)
def test_no_held_out_problem_is_trained_on(name):
    problems = task(name)
    held_out = {problem.prompt for problem in problems.held_out}
    assert len(held_out) == len(problems.held_out) >= 200
    training = {problem.prompt for problem in islice(problems.training(0), 2000)}
    assert training and not training & held_out


@pytest.mark.parametrize("name", TASKS)
def test_training_depends_on_the_seed_alone(name):
    def prompts(seed):
        return [problem.prompt for problem in islice(task(name).training(seed), 50)]

    assert prompts(1) == prompts(1) != prompts(2)
    assert [p.prompt for p in task(name).held_out] == [p.prompt for p in task(name).held_out]


def test_addition_splits_both_orders_of_a_sum_together():
    problems = task("addition")
    held_out = {problem.prompt for problem in problems.held_out}
    assert len(held_out) == 200
    training = {problem.prompt for problem in islice(problems.training(0), 200)}
    assert len(training) == 200  # every pair once before any twice
    for a in range(1, 21):
        for b in range(1, 21):
            both = {f"What is {x} + {y}? Answer with only the number." for x, y in ((a, b), (b, a))}
            assert both <= held_out or both <= training


def test_addition_checks_the_last_number():
    problem = next(p for p in task("addition").held_out if p.prompt.startswith("What is 3 + 7?"))
    assert problem.score("10") == problem.score("3 + 7 = 10.") == 1.0
    assert problem.score("10 is 3 + 7") == problem.score("") == problem.score("ten") == problem.score("100") == 0.0


def test_digit_sums_needs_the_right_digit_and_an_end():
    problem = task("digit-sums").held_out[0]
    digits = [int(c) for c in problem.prompt if c.isdigit()]
    answer = sum(digits) % 10
    assert problem.score(f"12#{answer}.") == 1.0
    assert problem.score(f"12#{answer}") == problem.score(f"12#{(answer + 1) % 10}.") == problem.score("") == 0.0


@pytest.mark.parametrize(
    "text, number", [("12", 12), ("-3.", -3), ("1,234 apples", 1234), ("3 + 4 = 7", 7), ("none", None), ("", None)]
)
def test_last_number(text, number):
    assert last_number(text) == number


def test_unknown_task_names_the_known_ones():
    with pytest.raises(ValueError, match="expected one of addition, .* found 'sums'"):
        task("sums")


def test_reasoning_gym_tasks_verify_with_their_own_dataset():
    pytest.importorskip("reasoning_gym", reason="optional: pip install reasoning-gym")
    problems = task("reasoning_gym:chain_sum")
    held_out = {problem.prompt for problem in problems.held_out}
    training = list(islice(problems.training(0), 20))
    assert len(problems.held_out) == 200 and not held_out & {problem.prompt for problem in training}
    question = training[0].prompt.splitlines()[0]  # "State the final answer to the following ... problem: 4 + 3 ="
    result = eval(question.split(":")[1].rstrip("= "))
    assert training[0].score(f"so it is\n{result}") == 1.0
    assert training[0].score(f"So {result} is it.") == 1.0  # the last number, where the answer is one
    assert training[0].score(str(result + 1)) < 1.0
    with pytest.raises(ValueError, match="no dataset 'no_such'"):
        task("reasoning_gym:no_such")


def test_training_streams_of_reasoning_gym_are_separate():
    """Its problem i of seed s is problem i - 1 of seed s + 1: neighbouring seeds would train on the same ones."""
    pytest.importorskip("reasoning_gym", reason="optional: pip install reasoning-gym")
    problems = task("reasoning_gym:chain_sum(min_terms=5)")  # so many problems that none comes twice by chance
    streams = [{problem.prompt for problem in islice(problems.training(seed), 300)} for seed in (0, 1, 2)]
    assert len(set.union(*streams)) == 900


def test_reasoning_gym_datasets_take_options():
    pytest.importorskip("reasoning_gym", reason="optional: pip install reasoning-gym")
    problems = task("reasoning_gym:chain_sum(min_terms=2, max_terms=2, min_digits=1, max_digits=2)")
    assert all(len(re.findall(r"\d+", problem.prompt)) == 2 for problem in problems.held_out)
    with pytest.raises(ValueError, match="no problems left to train on"):
        next(task("reasoning_gym:gcd(max_value=3)").training(0))
    for wrong in ("chain_sum(2)", "chain_sum(min_terms=print)", "chain_sum(no_such=1)", "a b"):
        with pytest.raises(ValueError, match="TASK: "):
            task(f"reasoning_gym:{wrong}")
