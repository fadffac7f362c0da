"""A lock that many share or one has alone."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Turns:
    """Threads enter together, or one by itself. Who wants to be alone is not kept waiting by those who come later."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.inside = 0
        self.waiting = 0
        self.taken = False

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Beside others that share."""
        with self.changed:
            self.changed.wait_for(lambda: not self.taken and not self.waiting)
            self.inside += 1
        try:
            yield
        finally:
            with self.changed:
                self.inside -= 1
                self.changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """With nobody else inside."""
        with self.changed:
            self.waiting += 1
            self.changed.wait_for(lambda: not self.taken and not self.inside)
            self.waiting -= 1
            self.taken = True
        try:
            yield
        finally:
            with self.changed:
                self.taken = False
                self.changed.notify_all()
