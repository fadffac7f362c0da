"""Processes of this machine that must end when told to, even where they are stopped or hang in a kernel call."""

from __future__ import annotations

import logging
import os
import select
import signal
import time
from collections.abc import Sequence
from contextlib import suppress

logger = logging.getLogger(__name__)

_GONE_SECONDS = 20.0


class Processes:
    """Some processes of this machine, held by handles that no later process can take over, as a bare pid could.

    Where the system has no such handles (Linux 5.3 does) this does nothing, and Ray's own way of ending is all.
    """

    def __init__(self) -> None:
        self.handles: list[int] = []

    def watch(self, pids: Sequence[int]) -> None:
        """Take these processes on, in place of any before."""
        self.release()
        if hasattr(os, "pidfd_open"):
            for pid in pids:
                with suppress(ProcessLookupError):
                    self.handles.append(os.pidfd_open(pid))

    def end(self) -> None:
        """Kill them all, and come back when the kernel has taken back what they held."""
        for handle in self.handles:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(handle, signal.SIGKILL)
        deadline = time.monotonic() + _GONE_SECONDS
        for handle in self.handles:
            poll = select.poll()
            poll.register(handle, select.POLLIN)
            if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                logger.warning("a killed rank is still there after %g s; the kernel holds it", _GONE_SECONDS)
        self.release()

    def release(self) -> None:
        """Give the handles back."""
        for handle in self.handles:
            os.close(handle)
        self.handles = []
