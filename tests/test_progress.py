"""What is seen while something takes its time: how far it is, what it took and will take, and no traceback at
Ctrl-C."""

import os
import pty
import re
import subprocess
import sys
import termios
import time

import pytest

from pipeline.errors import run_stage
from pipeline.rl.state import TrainState
from pipeline.runs.progress import progress


def test_where_no_terminal_is_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter([0.0, 0.0, 9.0, 10.0, 60.0, 61.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    assert list(progress(range(5), "calibration")) == [0, 1, 2, 3, 4]
    # 10 s for two, so 15 s for three; 60 s for three, so 40 s for two
    assert capsys.readouterr().out.splitlines() == [
        "calibration: 5 to do",
        "calibration: 2 of 5, 00:15 left",
        "calibration: 3 of 5, 00:40 left",
    ]


def test_one_process_of_several_shows_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress("ab", "calibration", show=False)) == ["a", "b"]
    assert capsys.readouterr() == ("", "")


def test_a_step_s_line_has_its_seconds_and_the_time_left() -> None:
    row = {"step": 1, "baseline": 0.0, "reward_mean": 0.0, "reward_std_within": 0.0}
    timings = [{"seconds_sample": 10.0, "seconds_update": 10.0}, {"seconds_sample": 3.0, "seconds_update": 37.0}]
    rows, samples = [{**row, "step": 0}, row], [{"step": 1, "completion": "a"}]
    run = TrainState(rows=rows, samples=samples, timings=timings)
    assert re.match(r"Step: 1 \(40\.0 s, 04:00 left\) Baseline", run.progress_line(10))  # 8 more of 30 s


def test_ctrl_c_is_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def main() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("sys.argv", ["train"])
    with pytest.raises(SystemExit) as ended:
        run_stage(main)
    assert ended.value.code == 130
    assert capsys.readouterr().err == "interrupted; the same command goes on\n"


def in_a_terminal(program: str, **environment: str) -> bytes:
    """What a program writes to a terminal of its own."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    environment = {name: value for name, value in os.environ.items() if name != "JPY_PARENT_PID"} | environment
    subprocess.run(
        [sys.executable, "-c", program], stdin=theirs, stdout=theirs, stderr=theirs, env=environment, check=True
    )
    os.close(theirs)
    written = b""
    try:
        while chunk := os.read(ours, 65536):
            written += chunk
    except OSError:  # Linux ends a closed terminal so
        pass
    os.close(ours)
    return written.replace(b"\r\n", b"\n")


def test_a_notebook_s_cell_has_lines_and_no_bars() -> None:
    """Jupyter gives what `!` starts a terminal, and keeps every redrawing."""
    program = (
        "import sys; sys.argv = ['x']\n"
        "from tqdm import tqdm\nfrom pipeline.errors import run_stage\nfrom pipeline.runs.progress import progress\n"
        "def main(): list(progress(range(3), 'calibration')); list(tqdm(range(3), 'steps', disable=None))\n"
        "run_stage(main)"
    )
    assert in_a_terminal(program, JPY_PARENT_PID="1") == b"calibration: 3 to do\n"
    assert b"\rsteps" in in_a_terminal(program)
