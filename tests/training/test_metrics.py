"""metrics.csv: rows, columns and continuation."""

import csv

from src.training.metrics import MetricsCSV


def table(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_metrics_of_one_step_share_a_row(tmp_path):
    log = MetricsCSV(tmp_path / "metrics.csv")
    log.log_metrics({"a": 1.0}, step=1)
    log.log_metrics({"a": 2.0, "b": 0.1}, step=2)
    log.log_metrics({"c": 3.0}, step=2)
    log.log_metrics({"b": 5.0}, step=3)
    assert table(log.path) == [
        {"step": "1", "a": "1.0", "b": "", "c": ""},
        {"step": "2", "a": "2.0", "b": "0.1", "c": "3.0"},
        {"step": "3", "a": "", "b": "5.0", "c": ""},
    ]


def test_values_keep_all_their_digits(tmp_path):
    log = MetricsCSV(tmp_path / "metrics.csv")
    log.log_metrics({"a": 1 / 3}, step=1)
    assert float(table(log.path)[0]["a"]) == 1 / 3


def test_a_row_is_on_disk_as_soon_as_it_is_logged(tmp_path):
    log = MetricsCSV(tmp_path / "metrics.csv")
    for step in range(1, 4):
        log.log_metrics({"a": step}, step=step)
        assert len(table(log.path)) == step


def test_a_continued_log_drops_what_is_done_again(tmp_path):
    path = tmp_path / "metrics.csv"
    log = MetricsCSV(path)
    for step in range(1, 6):
        log.log_metrics({"a": step}, step=step)
    continued = MetricsCSV(path, from_step=3)
    continued.log_metrics({"a": 40}, step=4)
    continued.log_metrics({"b": 41}, step=4)
    assert [(row["step"], row["a"], row.get("b")) for row in table(path)] == [
        ("1", "1.0", ""),
        ("2", "2.0", ""),
        ("3", "3.0", ""),
        ("4", "40.0", "41.0"),
    ]


def test_the_last_row_can_be_completed_after_a_continuation(tmp_path):
    path = tmp_path / "metrics.csv"
    MetricsCSV(path).log_metrics({"a": 1, "b": 2}, step=1)
    MetricsCSV(path, from_step=1).log_metrics({"b": 3}, step=1)
    assert table(path) == [{"step": "1", "a": "1.0", "b": "3.0"}]
