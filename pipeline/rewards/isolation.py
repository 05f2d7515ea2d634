"""Process settings of a custom reward, kept apart from those of training.

A custom reward may change any setting of its process. Training's numbers depend on torch's settings; its files,
messages and signals depend on those of Python and the system. So each reward has its own settings: they are applied
before its import and each call, and training's are restored afterwards. What a reward sets stays set for its later
calls.

Restored for training, but not kept for the reward: random numbers, timers, the file descriptors of stdin, stdout and
stderr.

Not isolated: state inside C code, torch's interop threads (they can be set only once), the default tensor type of CUDA
(deprecated), functions of other modules that the reward replaces, files that it deletes, hard limits that it lowers,
threads and processes that it leaves running.
"""

import contextlib
import gc
import hashlib
import locale
import logging
import os
import random
import resource
import signal
import socket
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TextIO

import numpy as np
import torch

UNREADABLE = object()  # such as a deleted working directory, or precisions that contradict each other
TIMERS = (signal.ITIMER_REAL, signal.ITIMER_VIRTUAL, signal.ITIMER_PROF)


class Setting(NamedTuple):
    """One setting of the process. `write` restores what `read` returned."""

    read: Callable[[], Any]
    write: Callable[[Any], object]


def _attribute(owner: Any, name: str) -> Setting:
    return Setting(lambda: getattr(owner, name), lambda value: setattr(owner, name, value))


def _in_place(values: list[Any]) -> Setting:
    """A list that other code holds too, such as sys.path: its content is replaced."""
    return Setting(lambda: list(values), lambda new: values.__setitem__(slice(None), new))


def _set_environment(wanted: dict[str, str]) -> None:
    for name in os.environ.keys() - wanted.keys():
        del os.environ[name]
    os.environ.update({name: value for name, value in wanted.items() if os.environ.get(name) != value})


def _umask() -> int:
    mask = os.umask(0o077)  # it can only be read by setting it
    os.umask(mask)
    return mask


def _set_warning_filters(filters: list[Any]) -> None:
    warnings.resetwarnings()  # clears Python's cache of decisions
    warnings.filters[:] = filters  # type: ignore[index]  # typeshed has a Sequence; it is a list


def _set_handler(number: int) -> Setting:
    # None: a handler that was not set from Python; Python cannot restore it
    return Setting(
        lambda: signal.getsignal(number),
        lambda handler: signal.signal(number, handler) if handler is not None else None,
    )


def _limit(which: int) -> Setting:
    """A soft limit, capped at the hard limit, which cannot be raised again."""

    def write(soft: int) -> None:
        hard = resource.getrlimit(which)[1]
        above = hard != resource.RLIM_INFINITY and (soft == resource.RLIM_INFINITY or soft > hard)
        resource.setrlimit(which, (hard if above else soft, hard))

    return Setting(lambda: resource.getrlimit(which)[0], write)


def _set_default_device(device: torch.device) -> None:
    torch.set_default_device(None)
    while torch.get_default_device() != torch.device("cpu"):  # a `with torch.device(...)` that was not left
        torch.device("cpu").__exit__(None, None, None)
    if device != torch.device("cpu"):
        torch.set_default_device(device)


_inference_modes: list[Any] = []  # kept, since a mode ends when it is collected


def _set_inference_mode(on: bool) -> None:
    _inference_modes.append(torch.inference_mode(on))
    _inference_modes[-1].__enter__()


def _autocast_depth() -> int:
    torch.autocast_increment_nesting()
    return torch.autocast_decrement_nesting()


def _set_autocast_depth(depth: int) -> None:
    while _autocast_depth() < depth:
        torch.autocast_increment_nesting()
    while _autocast_depth() > depth:
        torch.autocast_decrement_nesting()
    torch.clear_autocast_cache()  # it may hold outdated weights


def _flushes_denormals() -> bool:
    half = 0.5
    return sys.float_info.min * half == 0


def _precision(backend: str, operation: str) -> Setting:
    """torch.backends.*.fp32_precision, by private functions: torch 2.13 has no public setter for cuda's rnn, and the
    one for all of mkldnn sets the generic precision."""
    return Setting(
        lambda: torch._C._get_fp32_precision_getter(backend, operation),
        lambda value: torch._C._set_fp32_precision_setter(backend, operation, value),
    )


def _cuda_device() -> int | None:
    return torch.cuda.current_device() if torch.cuda.is_initialized() else None


def _settings() -> dict[str, Setting]:
    """The isolated settings, in the order in which they are restored."""
    root = logging.getLogger()
    system = {
        # training uses relative paths and reads environment variables
        "working directory": Setting(os.getcwd, os.chdir),
        "environment": Setting(lambda: dict(os.environ), _set_environment),
        "umask": Setting(_umask, os.umask),
        "locale": Setting(
            lambda: locale.setlocale(locale.LC_ALL), lambda value: locale.setlocale(locale.LC_ALL, value)
        ),
        "socket timeout": Setting(socket.getdefaulttimeout, socket.setdefaulttimeout),  # MLflow's client
        # training saves its state on SIGTERM and Ctrl-C
        "blocked signals": Setting(
            lambda: signal.pthread_sigmask(signal.SIG_BLOCK, ()),
            lambda blocked: signal.pthread_sigmask(signal.SIG_SETMASK, blocked),
        ),
        **{
            number.name: _set_handler(number)
            for number in map(signal.Signals, signal.valid_signals() & set(signal.Signals))
            if number not in (signal.SIGKILL, signal.SIGSTOP)
        },
        # a sandbox may limit memory, time or files
        **{name: _limit(getattr(resource, name)) for name in dir(resource) if name.startswith("RLIMIT_")},
    }
    if hasattr(os, "sched_getaffinity"):
        system["cpus"] = Setting(lambda: os.sched_getaffinity(0), lambda cpus: os.sched_setaffinity(0, cpus))
    python = {
        **{f"sys.{name}": _attribute(sys, name) for name in ("stdin", "stdout", "stderr", "excepthook")},
        "sys.path": _in_place(sys.path),
        "sys.argv": _in_place(sys.argv),
        "__main__": Setting(
            lambda: sys.modules["__main__"], lambda module: sys.modules.__setitem__("__main__", module)
        ),
        "recursion limit": Setting(sys.getrecursionlimit, sys.setrecursionlimit),
        "garbage collection": Setting(gc.isenabled, lambda on: gc.enable() if on else gc.disable()),
        "warnings": Setting(lambda: list(warnings.filters), _set_warning_filters),
        "showwarning": _attribute(warnings, "showwarning"),
        "log handlers": _in_place(root.handlers),
        "log level": Setting(lambda: root.level, root.setLevel),
        "logging.disable": Setting(lambda: root.manager.disable, logging.disable),
        "numpy errors": Setting(np.geterr, lambda errors: np.seterr(**errors)),
    }
    backends = torch.backends
    switches = (
        (backends.mkldnn, ("enabled", "deterministic")),
        (backends.cudnn, ("enabled", "benchmark", "deterministic")),
        (backends.cuda.matmul, ("allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction")),
        (torch.utils.deterministic, ("fill_uninitialized_memory",)),
    )
    numeric = {
        "default device": Setting(torch.get_default_device, _set_default_device),
        "default dtype": Setting(torch.get_default_dtype, torch.set_default_dtype),
        "cuda device": Setting(_cuda_device, lambda device: None if device is None else torch.cuda.set_device(device)),
        "threads": Setting(torch.get_num_threads, torch.set_num_threads),
        "flush denormals": Setting(_flushes_denormals, torch.set_flush_denormal),
        # before the gradient mode, which it also sets
        "inference mode": Setting(torch.is_inference_mode_enabled, _set_inference_mode),
        "gradient mode": Setting(torch.is_grad_enabled, torch.set_grad_enabled),
        "anomaly mode": Setting(
            lambda: (torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()),
            lambda mode: torch.set_anomaly_enabled(*mode),
        ),
        "deterministic algorithms": Setting(
            lambda: (
                torch.are_deterministic_algorithms_enabled(),
                torch.is_deterministic_algorithms_warn_only_enabled(),
            ),
            lambda mode: torch.use_deterministic_algorithms(mode[0], warn_only=mode[1]),
        ),
        "autocast depth": Setting(_autocast_depth, _set_autocast_depth),
        "autocast cache": Setting(torch.is_autocast_cache_enabled, torch.set_autocast_cache_enabled),
        "matmul precision": Setting(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    }
    for kind in ("cpu", "cuda"):
        numeric[f"{kind} autocast"] = Setting(
            lambda kind=kind: torch.is_autocast_enabled(kind),  # type: ignore[misc]
            lambda on, kind=kind: torch.set_autocast_enabled(kind, on),  # type: ignore[misc]
        )
        numeric[f"{kind} autocast dtype"] = Setting(
            lambda kind=kind: torch.get_autocast_dtype(kind),  # type: ignore[misc]
            lambda dtype, kind=kind: torch.set_autocast_dtype(kind, dtype),  # type: ignore[misc]
        )
    for backend in ("generic", "mkldnn", "cuda"):
        for operation in ("all",) if backend == "generic" else ("all", "matmul", "conv", "rnn"):
            numeric[f"{backend} {operation} precision"] = _precision(backend, operation)
    for kernel in ("flash", "mem_efficient", "math", "cudnn"):
        numeric[f"{kernel} attention"] = Setting(
            getattr(backends.cuda, f"{kernel}_sdp_enabled"), getattr(backends.cuda, f"enable_{kernel}_sdp")
        )
    for owner, names in switches:
        numeric |= {f"{owner} {name}": _attribute(owner, name) for name in names}
    return system | python | numeric


SETTINGS = _settings()


def _read(setting: Setting) -> Any:
    try:
        return setting.read()
    except Exception:
        return UNREADABLE


class OwnSettings:
    """The settings of one custom reward module."""

    def __init__(self, first_path: str, last_path: str) -> None:
        """first_path and last_path: folders to put at the start and the end of its sys.path."""
        self.own: dict[str, Any] = {
            "sys.path": [first_path, *sys.path, last_path],
            # a child process imports its parent's __main__; that of training would take seconds
            "__main__": types.ModuleType("__main__"),
            "sys.stdout": _unclosable(sys.stdout),
            "sys.stderr": _unclosable(sys.stderr),
        }

    @contextlib.contextmanager
    def in_place(self, seed: str) -> Iterator[None]:
        """Inside, these settings hold, and random, numpy and torch are seeded from `seed`."""
        outside = {name: _read(setting) for name, setting in SETTINGS.items()}
        timers = {timer: signal.getitimer(timer) for timer in TIMERS}
        _flush()
        with _file_descriptors(), _random_state(seed):
            _put(self.own)
            try:
                yield
            finally:
                for timer, values in timers.items():  # first, so that no alarm of the reward finds training's handler
                    signal.setitimer(timer, *values)
                _flush()
                inside = {name: _read(setting) for name, setting in SETTINGS.items()}
                self.own = {
                    name: value for name, value in inside.items() if value is not UNREADABLE and value != outside[name]
                }
                _put(outside)


def _put(wanted: dict[str, Any]) -> None:
    for name, setting in SETTINGS.items():
        if name in wanted and wanted[name] is not UNREADABLE and _read(setting) != wanted[name]:
            setting.write(wanted[name])


@contextlib.contextmanager
def _random_state(seed: str) -> Iterator[None]:
    number = int.from_bytes(hashlib.sha256(seed.encode("utf-8", "surrogatepass")).digest()[:8], "big") >> 1
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    random.seed(number)
    np.random.seed(number % 2**32)
    torch.manual_seed(number)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])
        if cuda:
            torch.cuda.set_rng_state_all(cuda)


@contextlib.contextmanager
def _file_descriptors() -> Iterator[None]:
    """Restore those of stdin, stdout and stderr. If one stayed closed, the next opened file would receive what is
    printed."""
    kept = {}
    for number in (0, 1, 2):
        with contextlib.suppress(OSError):  # already closed
            kept[number] = os.dup(number)
    try:
        yield
    finally:
        for number, copy in kept.items():
            os.dup2(copy, number)
            os.close(copy)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):  # closed, or a class of the reward's
            stream.flush()


def _unclosable(stream: TextIO) -> TextIO:
    """A stream to the same file descriptor that stays open if the reward closes it."""
    try:
        return open(stream.fileno(), "w", 1, stream.encoding, stream.errors, closefd=False)
    except (OSError, AttributeError, ValueError):  # None, or without a file descriptor
        return stream
