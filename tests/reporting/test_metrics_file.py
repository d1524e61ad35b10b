"""metrics.csv as a report reads it: what is not whole is left out and said, and curves are thinned by means."""

import math

import pytest

from src.reporting.metrics_file import read_metrics, thin

WHOLE = "step,train/loss,val/loss_ema\n1,0.5,\n2,0.25,0.75\n3,0.125,\n"


def read(tmp_path, text):
    (tmp_path / "metrics.csv").write_text(text)
    return read_metrics(tmp_path / "metrics.csv")


def test_a_whole_file_is_read_to_the_bit(tmp_path):
    found = read(tmp_path, WHOLE.replace("0.125", repr(1 / 3)))
    assert found.steps == [1, 2, 3]
    assert found.cells == {"train/loss": [0.5, 0.25, 1 / 3], "val/loss_ema": [None, 0.75, None]}
    assert found.curve("val/loss_ema") == ([2.0], [0.75])
    assert found.last("train/loss") == 1 / 3
    assert found.notes == ()


@pytest.mark.parametrize("cut", range(1, len("3,0.125,\n")))
def test_a_torn_last_line_is_left_out_wherever_it_is_torn(tmp_path, cut):
    """Also where what is left reads as a number, as 0.12 of 0.125 does."""
    found = read(tmp_path, WHOLE[:-cut])
    assert found.steps == [1, 2]
    assert found.notes == (("the last line of metrics.csv is torn, and left out",) if cut < 9 else ())


@pytest.mark.parametrize("line", ["2,0.25", "2,0.25,0.75,9", "2,0.x5,0.75", "x,0.25,0.75", "", "\x00\x00,1,2", "1,1,1"])
def test_a_damaged_line_in_the_middle_is_left_out_alone(tmp_path, line):
    """The last: a step that does not rise."""
    found = read(tmp_path, WHOLE.replace("2,0.25,0.75", line))
    assert found.steps == [1, 3]
    assert found.cells["train/loss"] == [0.5, 0.125]
    assert found.notes == ("1 damaged line of metrics.csv is left out",)


@pytest.mark.parametrize("text", ["", "ste", "garbage\n1,2\n"])
def test_a_file_without_a_header_has_no_rows(tmp_path, text):
    found = read(tmp_path, text)
    assert (found.steps, found.cells, found.curve("train/loss"), found.last("train/loss")) == ([], {}, ([], []), None)


def test_there_may_be_no_file(tmp_path):
    assert read_metrics(tmp_path / "metrics.csv").steps == []


def test_a_loss_that_is_no_number_is_a_gap_and_is_said(tmp_path):
    found = read(tmp_path, "step,train/loss,val/loss_ema,train/lr\n1,nan,1.0,nan\n2,0.5,inf,1.0\n3,0.5,1.0,1.0\n")
    assert math.isnan(found.curve("train/loss")[1][0])
    (note,) = found.notes
    assert note.startswith("train/loss, val/loss_ema are not a finite number at some steps")
    fine = read(tmp_path, "step,train/loss,train/lr\n1,1.0,nan\n")
    assert fine.notes == ()


def test_thinning_takes_means_of_neighbours():
    points = [(float(i), 10.0 * i) for i in range(10)]
    assert thin(points, 10) == points
    assert thin(points, 4) == [(1.0, 10.0), (4.0, 40.0), (7.0, 70.0), (9.0, 90.0)]
    assert sum(y for _, y in thin([(float(i), 1.0) for i in range(12_345)], 1000)) == 950  # 13 each, and the rest


def test_a_mean_with_a_gap_is_a_gap():
    """Catches means that leave out what is not a number, as if it had not been."""
    assert thin([(0.0, 1.0), (1.0, math.nan), (2.0, 3.0), (3.0, 5.0)], 2) == [(0.5, None), (2.5, 4.0)]
