"""The table fits a terminal, and the verdict says what the numbers say."""
from demo import report
from demo.evaluation import Evaluation, Score


def evaluation(solved: int, trials: int = 200) -> Evaluation:
    score = Score(tuple(i < solved for i in range(trials)))
    return Evaluation(score, score, tuple("x" for _ in range(trials)))


def test_table_fits_and_shows_accuracy_interval_and_bytes():
    trained = report.Row("TinyLoRA, 840 numbers", 840, evaluation(160), 1234.0)
    rows = [report.Row("base model", 0, evaluation(75)), trained]
    control = report.RandomControl(840, 0.9, [evaluation(60), evaluation(100)], 12.0)
    lines = report.table(rows, control, 0.7).splitlines()
    assert max(map(len, lines)) <= report.WIDTH and len(lines) == 6
    assert "37.5% [31.1,  44.4]" in lines[2]
    assert "840" in lines[3] and "3,360" in lines[3] and "80.0% [73.9,  85.0]" in lines[3] and "1234 s" in lines[3]
    assert "best of 2" in lines[4] and "50.0%" in lines[4]
    assert "mean of 2" in lines[5] and "40.0%" in lines[5]
    columns = [line.index("%") for line in lines[2:]]
    assert len(set(columns)) == 1  # aligned


def test_perfect_scores_stay_in_their_column():
    rows = [report.Row("all", 1, evaluation(200)), report.Row("none", 1, evaluation(0))]
    lines = report.table(rows, None, 1.0).splitlines()
    assert max(map(len, lines)) <= report.WIDTH and lines[2].rindex("[") == lines[3].rindex("[")


def test_verdict_is_clear_only_with_points_and_significance():
    assert "NOT clear" not in report.verdict(evaluation(160), evaluation(75), "lr 0")
    assert "+42.5 points" in report.verdict(evaluation(160), evaluation(75), "lr 0")
    assert "NOT clear" in report.verdict(evaluation(120), evaluation(75), "lr 0")  # 22.5 points
    assert "NOT clear" in report.verdict(evaluation(75), evaluation(160), "lr 0")
    assert "NOT clear" in report.verdict(evaluation(4, 10), evaluation(0, 10), "lr 0")  # 40 points, p = 0.125
