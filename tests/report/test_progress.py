"""Progress on a terminal and in a log file, and the table of results."""

from __future__ import annotations

import io

import pytest

from ray_det.report.progress import ProgressPrinter, duration, results_table


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def state(step: int, **more) -> dict:
    base = dict(epoch=0, epochs=2, step=step, steps=100, global_step=step, total_steps=200, phase="training")
    return base | dict(loss=0.5, lr=5e-5, images_per_s=31.04, eta_s=3725.0) | more


def printer(stream: io.StringIO) -> tuple[ProgressPrinter, list[float]]:
    now = [0.0]
    return ProgressPrinter(stream, clock=lambda: now[0]), now


def test_plain_lines_come_every_ten_seconds_and_at_the_epochs_end():
    out = io.StringIO()
    progress, now = printer(out)
    for step in range(1, 101):
        now[0] += 0.5  # 50 s
        progress.update(state(step))
    progress.close()
    lines = out.getvalue().splitlines()
    assert [line.split("step ")[1].split("/")[0] for line in lines] == ["1", "21", "41", "61", "81", "100"]
    assert lines[-1] == (
        "[##########..........] 100/200  epoch 1/2  step 100/100  loss 0.5000  lr 5.00e-05  31.0 img/s  ETA 1:02:05"
    )
    assert not set(out.getvalue()) & {"\r", "\x1b"}


def test_a_change_of_phase_and_a_message_are_shown_at_once():
    out = io.StringIO()
    progress, _ = printer(out)
    progress.update(state(1))
    progress.update(state(2))
    progress.update(state(2, phase="validating"))
    progress.update({"message": "epoch 1: val/AP 0.41"})
    lines = out.getvalue().splitlines()
    assert len(lines) == 3
    assert "validating" in lines[1]
    assert lines[2] == "epoch 1: val/AP 0.41"


def test_a_terminal_has_one_line_that_is_rewritten(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    out = Terminal()
    progress, now = printer(out)
    for step in range(1, 4):
        now[0] += 1
        progress.update(state(step))
    assert "\n" not in out.getvalue()
    assert out.getvalue().count("\r\x1b[K") == 3
    assert all(len(part) < 60 for part in out.getvalue().split("\r\x1b[K"))
    progress.update({"message": "epoch 1: val/AP 0.41"})
    assert out.getvalue().endswith("\r\x1b[Kepoch 1: val/AP 0.41\n")
    progress.update(state(4, global_step=5))
    now[0] += 1
    progress.update(state(5))
    progress.close()
    progress.close()
    assert out.getvalue().count("\n") == 2


def test_missing_numbers_leave_gaps_not_errors():
    out = io.StringIO()
    progress, _ = printer(out)
    progress.update({"phase": "testing", "loss": None, "eta_s": float("nan")})
    assert out.getvalue() == "testing\n"


def test_results_table_has_val_and_test_side_by_side():
    summary = {"val/AP": 0.51234, "val/AP50": 0.86, "val/AP_small": -1.0, "test/AP": 0.4, "test/AR_100": None}
    header, _, val, test = results_table(summary).splitlines()
    assert header.split() == ["AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large", "AR_100"]
    assert val.split() == ["val", "0.512", "0.860", "-", "-", "-", "-", "-"]
    assert test.split() == ["test", "0.400", "-", "-", "-", "-", "-", "-"]
    assert len({len(line) for line in (header, val, test)}) == 1
    assert results_table({}) == "no evaluation results"
    summary |= {"test/best_f1": 0.7, "test/best_f1_threshold": 0.4321}
    *same, best = results_table(summary).splitlines()
    assert same == [header, _, val, test] and best == "best F1 on test: 0.700, of detections with a score from 0.432"


@pytest.mark.parametrize("seconds, text", [(0, "0:00"), (65, "1:05"), (3725, "1:02:05"), (59.9, "1:00")])
def test_duration(seconds, text):
    assert duration(seconds) == text
