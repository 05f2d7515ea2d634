"""A custom reward may do what Python can: start processes, change its process, hang. Training's settings stay."""

import ctypes
import gc
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.errors import UserError
from pipeline.rewards import isolation, watchdog
from pipeline.rewards.custom import custom_reward
from pipeline.runs.signals import caught_signals
from tests.asking import asking
from tests.project import ROOT

Score = Callable[..., list[float]]


@pytest.fixture
def custom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Score]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.dont_write_bytecode", True)  # a rewritten file must be read again

    def make(code: str, file: str = "mine.py", **params: Any) -> Score:
        path = tmp_path / "custom" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(code)
        return asking(custom_reward(f"custom/{file}:reward", params))

    return make


# --- processes

IN_PROCESSES = """
import asyncio, multiprocessing, os, pickle, subprocess, sys, tempfile, threading
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
import helper
from custom import another

@dataclass
class Score:
    value: float

def one(completion):
    return Score(float(len(completion) + helper.ONE + another.ONE))

class Scorer:
    def __call__(self, prompts, completions, how):
        folder = os.getcwd()
        assert folder == ROOT or "tmp" in folder
        os.chdir(tempfile.mkdtemp())
        kind, _, method = how.partition(" ")
        if kind == "pool":
            with multiprocessing.get_context(method).Pool(2) as pool:
                scores = pool.map(one, completions)
        elif kind == "executor":
            with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context(method)) as pool:
                scores = list(pool.map(one, completions))
        elif kind == "threads":
            with ThreadPoolExecutor(2) as pool:
                scores = list(pool.map(one, completions))
        elif kind == "asyncio":
            async def every():
                return await asyncio.gather(*(asyncio.to_thread(one, completion) for completion in completions))
            scores = asyncio.run(every())
        else:  # a program that imports the module by its name
            program = "import pickle, sys; sys.path[:0] = [sys.argv[1]]; print(pickle.load(sys.stdin.buffer).value)"
            scores = []
            for completion in completions:
                command = [sys.executable, "-c", program, ROOT + "/custom/my-games"]
                said = subprocess.check_output(command, input=pickle.dumps(one(completion)), cwd=ROOT)
                scores.append(Score(float(said)))
        thread = threading.Thread(target=sys.exit)
        thread.start()
        thread.join()
        return [score.value for score in scores]

ROOT = os.getcwd()
reward = Scorer()
"""
WAYS = [f"{kind} {method}" for kind in ("pool", "executor") for method in ("spawn", "fork", "forkserver")]
# as in training: SIGTERM is caught, by which a pool ends its workers, and the main module takes long to import
RUN = """
import json, sys
import pipeline.rewards.isolation
from pipeline.runs.signals import caught_signals
from pipeline.rewards.custom import custom_reward
from tests.asking import asking

if __name__ != "__main__":
    raise SystemExit("a child process imports the main module")
with caught_signals():
    for how in sys.argv[1:]:
        score = asking(custom_reward("custom/my-games/my-reward.py:reward", {"how": how}))
        print(json.dumps([how, score(["", ""], ["a", "abc"])]))
"""


def test_a_reward_may_start_threads_and_processes_of_every_kind(tmp_path: Path) -> None:
    """Its module lies in a folder, has a dash in its name and imports others; its functions and classes are pickled."""
    folder = tmp_path / "custom/my-games"
    folder.mkdir(parents=True)
    (folder / "my-reward.py").write_text(IN_PROCESSES)
    (folder / "helper.py").write_text("ONE = 1\n")
    (tmp_path / "custom/another.py").write_text("ONE = 1\n")
    (tmp_path / "main.py").write_text(RUN)
    ways = [*WAYS, "threads", "asyncio", "program"]
    done = subprocess.run(
        [sys.executable, "main.py", *ways], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [json.loads(line) for line in done.stdout.splitlines()] == [[how, [3.0, 5.0]] for how in ways]
    assert "stopping" not in done.stderr


def test_a_process_that_was_just_forked_ends_at_sigterm() -> None:
    """As a multiprocessing.Pool wants it that ends its workers as soon as it has started them."""
    with caught_signals() as caught:
        for _ in range(30):
            child = os.fork()
            if not child:
                while True:
                    signal.pause()
            os.kill(child, signal.SIGTERM)
            deadline, ended = time.monotonic() + 20, 0
            while not ended and time.monotonic() < deadline:
                ended, status = os.waitpid(child, os.WNOHANG)
                time.sleep(0.001)
            if not ended:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
            assert ended, "the signal was lost"
            assert os.WTERMSIG(status) == signal.SIGTERM
        assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
        assert caught == []


def test_the_second_signal_does_what_it_would_do_without_us() -> None:
    received: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: received.append(-number))
    try:
        with caught_signals() as caught:
            signal.raise_signal(signal.SIGTERM)
            assert (caught, received) == ([15], [])
            signal.raise_signal(signal.SIGTERM)
            assert (caught, received) == ([15], [-15])
    finally:
        signal.signal(signal.SIGTERM, before)


def test_ctrl_c_leaves_the_processes_of_a_reward_to_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal sends it to all of them. Without their work the step in progress would not end."""
    with caught_signals() as caught:
        monkeypatch.setattr(os, "getpid", lambda: -1)  # as in a process that was forked
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        assert caught == []


def test_what_is_no_plain_function(custom: Callable[..., Score]) -> None:
    function = "import functools\ndef f(prompts, completions, by): return [by] * len(completions)\n"
    assert custom(function + "reward = functools.partial(f, by=2)")(["", ""], ["a", "b"]) == [2, 2]
    code = "import asyncio\nasync def reward(completions):\n    await asyncio.sleep(0)\n    return [1.0]\n"
    assert custom(code)([""], ["a"]) == [1.0]


def test_a_file_that_python_would_not_import_is_refused(custom: Callable[..., Score], tmp_path: Path) -> None:
    """A package of the same name comes before it: child processes would import that one."""
    (tmp_path / "custom/mine").mkdir(parents=True)
    (tmp_path / "custom/mine/__init__.py").write_text("")
    message = r"Python imports .*mine/__init__.py as custom.mine, not custom/mine.py; rename"
    with pytest.raises(UserError, match=message):
        custom(does())


# --- settings: what a reward does -> what tells that it did

CHANGES = {
    "folder": ("os.chdir('/')", "os.getcwd()"),
    "environment": ("os.environ['ANOTHER'] = 'x'; del os.environ['PATH']", "dict(os.environ)"),
    "umask": ("os.umask(0o777)", "(mask := os.umask(0), os.umask(mask))[0]"),
    "locale": (
        "locale.setlocale(locale.LC_ALL, 'C.UTF-8' if locale.setlocale(locale.LC_ALL) == 'C' else 'C')",
        "locale.setlocale(locale.LC_ALL)"),
    "signal": ("signal.signal(signal.SIGTERM, signal.SIG_IGN)", "signal.getsignal(signal.SIGTERM)"),
    "blocked": (
        "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])", "signal.pthread_sigmask(signal.SIG_BLOCK, [])"),
    "limit": (
        "resource.setrlimit(resource.RLIMIT_NOFILE, (99, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))",
        "resource.getrlimit(resource.RLIMIT_NOFILE)"),
    "sockets": ("socket.setdefaulttimeout(1)", "socket.getdefaulttimeout()"),
    "path": ("sys.path.insert(0, '/nowhere')", "'/nowhere' in sys.path"),
    "arguments": ("sys.argv[:] = ['x']", "list(sys.argv)"),
    "recursion": ("sys.setrecursionlimit(4321)", "sys.getrecursionlimit()"),
    "output": ("sys.stdout = sys.stderr = io.StringIO()", "(type(sys.stdout).__name__, type(sys.stderr).__name__)"),
    "warnings": ("warnings.simplefilter('ignore')", "list(warnings.filters)"),
    "logging": (
        "logging.disable(); logging.basicConfig(force=True, level=1)",
        "(logging.root.manager.disable, logging.root.level)"),
    "collector": ("gc.disable()", "gc.isenabled()"),
    "numpy": ("np.seterr(all='ignore')", "np.geterr()"),
    "threads": ("torch.set_num_threads(torch.get_num_threads() + 1)", "torch.get_num_threads()"),
    "dtype": ("torch.set_default_dtype(torch.float64)", "torch.zeros(1).dtype"),
    "device": ("torch.set_default_device('meta')", "torch.zeros(1).device"),
    "device left open": ("torch.device('meta').__enter__()", "torch.zeros(1).device"),
    "gradient": ("torch.set_grad_enabled(not torch.is_grad_enabled())", "torch.is_grad_enabled()"),
    "inference": (
        "global mode; mode = torch.inference_mode(); mode.__enter__()",
        "(torch.is_inference_mode_enabled(), torch.is_grad_enabled())"),
    "anomaly": ("torch.autograd.set_detect_anomaly(True)", "torch.is_anomaly_enabled()"),
    "deterministic": (
        "torch.use_deterministic_algorithms(not torch.are_deterministic_algorithms_enabled())",
        "torch.are_deterministic_algorithms_enabled()"),
    "precision": (
        "torch.set_float32_matmul_precision('medium')",
        "(torch.get_float32_matmul_precision(), torch.backends.mkldnn.matmul.fp32_precision)"),
    "precision of all": (
        "torch.backends.fp32_precision = 'tf32'",
        "(torch.backends.fp32_precision, torch.backends.mkldnn.conv.fp32_precision)"),
    "autocast": (
        "global cast; cast = torch.autocast('cpu', torch.bfloat16); cast.__enter__()",
        "(torch.ones(1, 1) @ torch.ones(1, 1)).dtype"),
    "denormals": ("torch.set_flush_denormal(True)", "5e-324 * float('1') == 0"),
    "onednn": ("torch.backends.mkldnn.enabled = not torch.backends.mkldnn.enabled", "torch.backends.mkldnn.enabled"),
    "attention": (
        "torch.backends.cuda.enable_flash_sdp(not torch.backends.cuda.flash_sdp_enabled())",
        "torch.backends.cuda.flash_sdp_enabled()"),
}  # fmt: skip
IMPORTS = """
import gc, io, locale, logging, os, random, resource, signal, socket, sys, tempfile, warnings
import numpy as np, torch
"""


def does(*lines: str, returns: str = "[1.0]") -> str:
    """The code of a reward that does this."""
    body = "".join(f"    {line}\n" for line in lines)
    return f"{IMPORTS}\ndef reward(prompts, completions):\n{body}    return {returns}\n"


def _value(expression: str) -> Any:
    names: dict[str, Any] = {}
    exec(IMPORTS, names)
    return eval(expression, names)  # noqa: S307  # our own text


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("when", ["import", "call"])
def test_what_a_reward_sets_stays_set_for_it_alone(custom: Callable[..., Score], name: str, when: str) -> None:
    change, expression = CHANGES[name]
    lines = f"    if not seen:\n        {change}\n    seen.append({expression})\n"
    code = f"{IMPORTS}seen = []\ndef act():\n{lines}\n{'act()' if when == 'import' else ''}\n"
    before = _value(expression)
    score = custom(code + "def reward(prompts, completions):\n    act()\n    return [1.0]\n")
    for _ in range(2):
        assert score([""], ["a"]) == [1]
        assert _value(expression) == before
    seen = sys.modules["custom.mine"].seen
    assert seen[0] != before
    assert seen[1:] == [seen[0]] * (len(seen) - 1)
    assert _value("torch.zeros(1, requires_grad=True).exp().requires_grad")


def test_a_reward_s_open_autocast_keeps_no_rounded_weights(custom: Callable[..., Score]) -> None:
    """Inside autocast a weight is rounded once and kept until the outermost one ends, which would be never."""
    score = custom(does("cast.__enter__()", returns="[(one @ weight).item()]"))
    one, weight = torch.ones(1, 1), torch.ones(1, 1, requires_grad=True)
    vars(sys.modules["custom.mine"]).update(one=one, weight=weight, cast=torch.autocast("cpu", torch.bfloat16))
    assert score([""], ["a"]) == [1]
    with torch.no_grad():
        weight.fill_(3)
    with torch.autocast("cpu", torch.bfloat16):
        assert (one @ weight).item() == 3


def test_a_mode_that_a_dropped_reward_held_open_does_not_end_in_training(custom: Callable[..., Score]) -> None:
    """torch puts the modes of before back when such an object dies: here, gradients off, in the middle of training."""
    code = "import torch\ntorch.set_grad_enabled(False)\nheld = torch.inference_mode()\nheld.__enter__()\n"
    custom(code + does())
    custom(does())  # takes its place
    gc.collect()
    assert torch.is_grad_enabled()


def test_settings_are_put_back_after_an_exception(custom: Callable[..., Score]) -> None:
    folder = os.getcwd()
    code = does("os.chdir('/')", "torch.set_grad_enabled(False)", "raise ValueError")
    with pytest.raises(UserError, match=r"raised ValueError: \(line 8 of custom/mine.py\)"):
        custom(code)([""], ["a"])
    assert (os.getcwd(), torch.is_grad_enabled()) == (folder, True)


def test_a_folder_that_a_reward_deletes_below_itself_is_left(custom: Callable[..., Score]) -> None:
    code = does("with tempfile.TemporaryDirectory() as folder:", "    os.chdir(folder)")
    score, folder = custom(code), os.getcwd()
    assert score([""], ["a"]) == score([""], ["a"]) == [1]
    assert os.getcwd() == folder


def test_an_alarm_that_a_reward_leaves_behind_does_not_ring(custom: Callable[..., Score]) -> None:
    custom(does("signal.signal(signal.SIGALRM, print)", "signal.setitimer(signal.ITIMER_REAL, 1000, 10)"))([""], ["a"])
    assert _value("signal.getitimer(signal.ITIMER_REAL)") == (0, 0)
    assert _value("signal.getsignal(signal.SIGALRM)") == _value("signal.SIG_DFL")


@pytest.mark.parametrize("how", ["sys.stdout.close(); sys.stderr.close()", "os.close(1); os.close(2)"])
def test_a_reward_may_close_the_output(tmp_path: Path, how: str) -> None:
    (tmp_path / "custom").mkdir()
    (tmp_path / "custom/mine.py").write_text(does("print('said')", how))
    run = (
        "import sys; from pipeline.rewards.custom import custom_reward; from tests.asking import asking\n"
        "print('before')\n"
        "asking(custom_reward('custom/mine.py:reward', {}))([''], ['a'])\n"
        "print('after'); print('after', file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", run], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True,
        text=True, timeout=300,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "before\nsaid\nafter\n", "after\n")


# --- random numbers

DRAWS = "[random.random() + float(np.random.rand()) + float(torch.rand(())) for _ in completions]"


def test_the_same_call_gives_the_same_random_numbers(custom: Callable[..., Score]) -> None:
    """Whatever was called before it, so that a run that goes on from a saved step has those of an undisturbed one."""
    code = f"{IMPORTS}at_import = random.random()\ndef reward(prompts, completions, scale=1):\n    return {DRAWS}\n"
    score = custom(code)
    first, other = score(["p", "p"], ["a", "b"]), score(["p", "p"], ["a", "c"])
    _value(DRAWS.replace("completions", "'abc'"))  # training's own, which the reward's do not depend on
    assert score(["p", "p"], ["a", "b"]) == first != other
    assert first[0] != first[1]
    imported = sys.modules["custom.mine"].at_import
    assert custom(code + "\n", scale=2)(["p", "p"], ["a", "b"]) != first
    assert sys.modules["custom.mine"].at_import == imported


def test_a_reward_s_random_numbers_are_not_training_s(custom: Callable[..., Score]) -> None:
    score, draw = custom(does(returns=DRAWS)), DRAWS.replace("completions", "'abc'")
    _value("(random.seed(7), np.random.seed(7), torch.manual_seed(7))")
    expected = _value(draw)
    _value("(random.seed(7), np.random.seed(7), torch.manual_seed(7))")
    score([""], ["a"])
    assert _value(draw) == expected


# --- hanging


def test_a_reward_that_takes_long_says_where_it_stands(
    custom: Callable[..., Score], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In C, in a function of another file: the line is the user's. It ends as soon as this was said three times."""
    (Path.cwd() / "custom").mkdir()
    (Path.cwd() / "custom/waiting.py").write_text("def wait(event):\n    event.wait(60)\n")
    said, threads = [], set(threading.enumerate())
    score = custom("from custom import waiting\n" + does("waiting.wait(event)"))
    event = sys.modules["custom.mine"].event = threading.Event()  # type: ignore[attr-defined]

    def write(line: str, file: Any) -> None:
        said.append(line)
        if len(said) == 3:
            event.set()

    monkeypatch.setattr(watchdog, "PATIENCE", 0.01)
    monkeypatch.setattr(watchdog.tqdm, "write", write)
    assert score([""], ["a"]) == [1]
    assert event.is_set()
    line = r"reward custom/mine.py:reward has been running for \d+ s, now in line 2 of custom/waiting.py"
    assert re.fullmatch(line, said[0])
    assert set(threading.enumerate()) == threads


def test_a_reward_whose_c_code_keeps_the_interpreter_is_seen_too(
    custom: Callable[..., Score], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """As a regular expression does: no thread of Python's runs meanwhile."""
    score = custom(does("keep()"))
    sys.modules["custom.mine"].keep = lambda: ctypes.PyDLL(None).usleep(300_000)  # type: ignore[attr-defined]
    monkeypatch.setattr(watchdog, "PATIENCE", 0.02)
    monkeypatch.setattr(watchdog, "GRACE", 0.02)
    score([""], ["a"])
    assert 'custom/mine.py", line 6 in reward' in capfd.readouterr().err


def test_a_quick_reward_says_nothing(custom: Callable[..., Score], capfd: pytest.CaptureFixture[str]) -> None:
    assert custom(does())([""], ["a"]) == [1]
    assert capfd.readouterr() == ("", "")
    assert not [thread for thread in threading.enumerate() if thread.name == "watchdog"]


def test_every_setting_can_be_read_and_written_back() -> None:
    for name, setting in isolation.SETTINGS.items():
        value = setting.read()
        setting.write(value)
        assert setting.read() == value, name
