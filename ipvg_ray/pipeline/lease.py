"""One process at a time in a run directory: a file lock on disk, a lease in S3.

On disk the system itself frees the lock when its holder dies. In S3 the holder renews an object every few seconds by
conditional writes; whoever finds it unrenewed for `TTL` seconds by the store's own clock, or its process dead on the
same machine, takes it over. A holder that finds it taken, or cannot renew it for as long, has lost it and must end.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, Protocol

from ipvg_ray.errors import UserError
from ipvg_ray.pipeline.store import ENGINE
from ipvg_ray.storage import RunPath, S3Path, StorageError

TTL = 60.0
"""Seconds after which a lease that nobody renewed is free."""
_RENEWALS = 4
"""Times a lease is renewed within its TTL."""
_log = logging.getLogger(__name__)


class RunLockedError(UserError):
    """Another process is running in this directory."""


class Held(Protocol):
    """A run directory that this process holds until `close`."""

    def close(self) -> None:
        """Let go."""
        ...


def lock(run_dir: RunPath, on_lost: Callable[[], None] = lambda: None, ttl: float = TTL) -> Held:
    """Hold a run directory for this process.

    Args:
        on_lost: called in another thread if a lease is lost while it is held; never for a file lock.
        ttl: seconds a lease lives unrenewed.

    Raises:
        RunLockedError: where another process holds it.
    """
    return _Lease(run_dir, on_lost, ttl) if isinstance(run_dir, S3Path) else _flock(run_dir)


def holder(run_dir: RunPath) -> str | None:
    """Who is at work in a run directory, or None."""
    if isinstance(run_dir, S3Path):
        found = (run_dir / ENGINE / "lock").read_tagged()
        if found is None:
            return None
        said = json.loads(found[0])
        return None if _free(said, found[2]) else str(said["who"])
    path = run_dir / ENGINE / "lock"
    if not path.is_file():
        return None
    with path.open("rb") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return handle.read().decode(errors="replace").strip() or "another process"
    return None


def _who() -> str:
    return f"process {os.getpid()} on {os.uname().nodename}"


def _flock(run_dir: Path) -> IO[bytes]:
    (run_dir / ENGINE).mkdir(parents=True, exist_ok=True)
    handle = (run_dir / ENGINE / "lock").open("a+b")
    for patience in (0.2, 0.2, 0.2, 0.0):  # `holder` takes the lock for an instant to see whether it is free
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError:
            time.sleep(patience)
    else:
        handle.close()
        raise RunLockedError(f"{run_dir} is in use by {holder(run_dir)}; wait for it or stop it")
    handle.truncate(0)
    handle.write(_who().encode())
    handle.flush()
    return handle


class _Lease:
    """A lease that a thread renews until `close`."""

    def __init__(self, run_dir: S3Path, on_lost: Callable[[], None], ttl: float) -> None:
        self.place = run_dir / ENGINE / "lock"
        self.ttl = ttl
        self.on_lost = on_lost
        self.token = uuid.uuid4().hex
        self.tag = self._acquire()
        self.renewed = time.monotonic()
        self.closing = threading.Event()
        self.thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self.thread.start()

    def _said(self) -> bytes:
        said = {"who": _who(), "token": self.token, "machine": _machine(), "pid": os.getpid(), "ttl": self.ttl}
        return json.dumps(said | {"at": time.time()}).encode()  # the time makes every renewal another version

    def _acquire(self) -> str:
        """Take a lease that is free; one that nobody renews becomes free while this watches it."""
        seen: str | None = None
        while True:
            found = self.place.read_tagged()
            if found is None:
                tag = self._put(None)
            else:
                said, version, age = json.loads(found[0]), found[1], found[2]
                if not _free(said, age):
                    if seen not in (None, version):
                        raise RunLockedError(f"{self.place.parent.parent} is in use by {said['who']}; wait or stop it")
                    seen = version
                    # Longer than a living holder would let pass without renewing it.
                    time.sleep(min(max(said["ttl"] - age, 0.1), said["ttl"] / _RENEWALS * 1.5))
                    continue
                tag = self._put(version)
            if tag is not None:
                return tag

    def _put(self, version: str | None) -> str | None:
        tag = self.place.put_if(self._said(), version)
        if tag is None and (found := self.place.read_tagged()) and json.loads(found[0])["token"] == self.token:
            return found[1]  # our own write, whose answer got lost and which was sent again
        return tag

    def _renew(self) -> None:
        while not self.closing.wait(self.ttl / _RENEWALS):
            try:
                tag = self._put(self.tag)
            except StorageError as error:
                _log.warning("cannot renew the run's lease: %s", error)
                if time.monotonic() - self.renewed < self.ttl * 0.75:
                    continue
                tag = None
            if tag is None:
                self.on_lost()
                return
            self.tag, self.renewed = tag, time.monotonic()

    def close(self) -> None:
        """Let go, so that the next start need not wait."""
        self.closing.set()
        self.thread.join(timeout=self.ttl)
        try:
            found = self.place.read_tagged()
            if found and json.loads(found[0])["token"] == self.token:
                self.place.unlink()
        except (StorageError, OSError) as error:
            _log.warning("the run's lease was not given back and lasts %g s more: %s", self.ttl, error)


def _free(said: dict[str, Any], age: float) -> bool:
    """Whether a lease that was renewed `age` seconds ago can be taken over."""
    return age > said["ttl"] or (said["machine"] == _machine() and not _alive(said["pid"]))


def _machine() -> str:
    """This machine since its last boot, and the process ids that are seen in it: containers have their own."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{os.uname().nodename} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"unknown {uuid.uuid4().hex}"  # no other is ever taken for this one


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
