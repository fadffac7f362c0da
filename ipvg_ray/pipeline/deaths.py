"""A worker's last words: what a process that dies can still write, and how the next one reads it.

Fatal signals (a segmentation fault, an abort of CUDA) and rows that take too long leave the Python stack they died
in; `os._exit` leaves its code. SIGKILL leaves nothing: then there is only the kernel's count of out-of-memory kills.
"""

from __future__ import annotations

import faulthandler
import os
import re
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NoReturn

from ipvg_ray.pipeline.ledger import Who
from ipvg_ray.storage import RunPath

_EXIT = "exit code "
_FATAL = re.compile(r"Fatal Python error: (.+)")
_SIGNALS = {
    "Segmentation fault": "SIGSEGV, a segmentation fault",
    "Aborted": "SIGABRT, an abort",
    "Bus error": "SIGBUS, a bus error",
    "Floating point exception": "SIGFPE, a floating-point exception",
    "Illegal instruction": "SIGILL, an illegal instruction",
}


@dataclass(frozen=True)
class Death:
    """How a worker died: in words, whether it took too long, and its Python stack where it left one."""

    words: str
    hung: bool
    stack: str


class LastWords:
    """Makes this process write down how it dies, from now on, into one file.

    Args:
        trace: the file.
    """

    def __init__(self, trace: str) -> None:
        Path(trace).parent.mkdir(parents=True, exist_ok=True)
        self.file: IO[str] = open(trace, "w")  # noqa: SIM115 - open as long as the process lives
        self.process = os.getpid()
        self.lock = threading.Lock()
        self.deadlines: dict[int, float] = {}
        self.pauses = 0
        self.paused_since = 0.0
        self.paused_s = 0.0
        self.exit = os._exit
        faulthandler.enable(self.file, all_threads=False)
        os._exit = self._exit  # type: ignore[assignment]

    def _exit(self, status: int) -> NoReturn:
        self.leave(status, "".join(traceback.format_stack()[:-1]))

    def leave(self, status: int, stack: str) -> NoReturn:
        """End this process now, with the given exit code and stack as its last words."""
        if os.getpid() == self.process:  # forked helpers end this way too, and are nobody's death
            self.file.write(f"{_EXIT}{status}\n{stack}")
            self.file.flush()
        self.exit(status)
        raise AssertionError("unreachable")

    @contextmanager
    def time_limit(self, seconds: float) -> Iterator[None]:
        """End this process if the block takes longer than `seconds` (0: no limit), leaving the stacks of all threads.

        Blocks of several threads may overlap. The watch is faulthandler's own C thread, so that it also ends code that
        hangs while it holds the interpreter.
        """
        if not seconds:
            yield
            return
        mark = threading.get_ident()
        with self.lock:
            self.deadlines[mark] = self._now() + seconds
            self._watch()
        try:
            yield
        finally:
            with self.lock:
                del self.deadlines[mark]
                self._watch()

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Count the time of the block towards no limit: what is waited for is no row's fault, and all rows wait."""
        with self.lock:
            self.paused_since = self._now()
            self.pauses += 1
            self._watch()
        try:
            yield
        finally:
            with self.lock:
                self.pauses -= 1
                if not self.pauses:
                    self.paused_s = time.monotonic() - self.paused_since
                self._watch()

    def _now(self) -> float:
        """Seconds on a clock that stands still in pauses."""
        return self.paused_since if self.pauses else time.monotonic() - self.paused_s

    def _watch(self) -> None:
        if self.deadlines and not self.pauses:
            left = max(min(self.deadlines.values()) - self._now(), 0.001)
            faulthandler.dump_traceback_later(left, exit=True, file=self.file)
        else:
            faulthandler.cancel_dump_traceback_later()


def oom_kills() -> int:
    """Processes that this machine's kernel has killed for memory since its start; 0 where it does not tell."""
    try:
        found = re.search(r"^oom_kill (\d+)", Path("/proc/vmstat").read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(found[1]) if found else 0


def inquest(who: Who, host: str, traces: RunPath) -> Death:
    """How a worker died, from what it left.

    Args:
        host: where this is asked, as only there its kernel can be asked.
        traces: the session's own folder of traces, where `keep_traces` puts them.
    """
    trace = ""
    for place in (Path(who.trace), traces / Path(who.trace).name):
        with suppress(OSError):
            trace = trace or place.read_text(errors="replace")
    fatal = _FATAL.search(trace)
    if trace.startswith("Timeout ("):
        return Death("it took too long", True, trace)
    if fatal:
        return Death(f"signal {_SIGNALS.get(fatal[1], fatal[1])}", False, trace)
    if trace.startswith(_EXIT):
        code, _, stack = trace.removeprefix(_EXIT).partition("\n")
        return Death(f"it ended itself with exit code {code}", False, stack)
    if who.host == host and oom_kills() > who.oom_kills:
        return Death(f"killed, and the kernel of {host} has killed for want of memory since", False, "")
    return Death("it left no trace, as after SIGKILL, which is how the kernel ends processes out of memory", False, "")


def keep_traces(session_dir: RunPath) -> None:
    """Where a run lies in S3, put the last words of this machine's dead into it, for workers on others to read."""
    folder = trace_folder(session_dir)
    if not isinstance(session_dir, Path) and folder.is_dir():
        for trace in folder.iterdir():
            if trace.stat().st_size:
                (session_dir / "traces" / trace.name).write_bytes(trace.read_bytes())


def trace_folder(session_dir: RunPath) -> Path:
    """Where a session's workers leave their last words: in the run where it lies on disk, else on their own machine."""
    if isinstance(session_dir, Path):
        return session_dir / "traces"
    return Path(tempfile.gettempdir()) / f"ipvg_ray-{session_dir.name}" / "traces"
