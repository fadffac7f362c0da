"""How workers on any node note their tries, and how the driver hears of what they did.

Starts of workers are noted at the desk, an actor beside the driver. Tries of batches are many more. Where the run lies
on disk each process notes its own in a file of the session, which outlives it and costs microseconds; the process that
takes its place reads what it left, and the driver follows all of them. In S3 there is no such file: there every try is
noted at the desk too.

Ray gives a dead worker's batches to the process that takes its place, and to no other: so a process needs to know only
what was left by those whose place it took.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ipvg_ray.pipeline.ledger import Event, Ledger, TryLedger, Who
from ipvg_ray.pipeline.store import TRIES, Store
from ipvg_ray.storage import StorageError

_POLL_SECONDS = 0.5
_log = logging.getLogger(__name__)


@ray.remote(num_cpus=0)
class _Desk(TryLedger):
    """The ledger as an actor on the driver's node; it also keeps what it hears until the driver asks for it."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.notices: set[str] = set()
        # A node with a notice ends its workers itself, while the cluster still counts it.
        super().__init__(lambda node: node in self.notices or _node_lost(node))

    def leaving(self, node: str) -> None:
        self.notices.add(node)

    def is_lost(self, node: str) -> bool:
        return self.node_lost(node)

    def lost(self) -> dict[str, int]:
        return {"batches": self.lost_tries, "notices": len(self.notices)}

    def loading_on(self) -> list[str]:
        return [who.node for workers in self.loading.values() for who in workers]

    def begin(self, event: Event, who: Who) -> list[Who]:
        self.events.append(event)
        return super().begin(event, who)

    def end(self, event: Event) -> None:
        self.events.append(event)
        super().end(event)

    def take(self) -> list[Event]:
        events, self.events = self.events, []
        return events


def _node_lost(node: str) -> bool:
    return not any(n["NodeID"] == node and n["Alive"] for n in ray.nodes())


def make_desk() -> Any:
    """The desk that workers report to, for one execution; it dies with the driver."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return _Desk.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined]


def lost(desk: Any) -> dict[str, int]:
    """How many batches were in work on nodes that were lost, and how many nodes left after a notice."""
    try:
        return dict(ray.get(desk.lost.remote(), timeout=10))
    except ray.exceptions.RayError:
        return {}


def loading(desk: Any) -> list[str]:
    """Nodes on which workers are loading, one for each; those of lost nodes may be among them."""
    try:
        return list(ray.get(desk.loading_on.remote(), timeout=10))
    except ray.exceptions.RayError:
        return []


def ledger_at(desk: Any, store: Store) -> Ledger:
    """The ledger as a worker of a session calls it."""
    folder = store.session_dir / TRIES
    return _Noted(desk, folder) if isinstance(folder, Path) else _AtDesk(desk)


class _AtDesk:
    """Everything is noted at the desk; see `Ledger`."""

    def __init__(self, desk: Any) -> None:
        self.desk = desk

    def begin_setup(self, stage: str, who: Who) -> tuple[list[Who], int]:
        found: tuple[list[Who], int] = ray.get(self.desk.begin_setup.remote(stage, who))
        return found

    def end_setup(self, stage: str, who: Who) -> None:
        self.desk.end_setup.remote(stage, who)

    def begin(self, event: Event, who: Who) -> list[Who]:
        found: list[Who] = ray.get(self.desk.begin.remote(event, who))
        return found

    def end(self, event: Event) -> None:
        self.desk.end.remote(event)


class _Noted(_AtDesk):
    """Tries are noted in a file of this process, `tries/<worker>-<process>.jsonl`; starts at the desk."""

    def __init__(self, desk: Any, folder: Path) -> None:
        super().__init__(desk)
        self.folder = folder
        # Asked anew at each try that others made before: a node is known to be lost some time after its workers are.
        self.tries = TryLedger(lambda node: bool(ray.get(self.desk.is_lost.remote(node))))
        self.lock = threading.Lock()

    def begin_setup(self, stage: str, who: Who) -> tuple[list[Who], int]:
        worked = False
        for earlier in ray.get(self.desk.predecessors.remote(who)):
            events = _read(self._place(earlier))
            for event in events:
                self.tries.take_in(event, earlier)
            worked = any(event.closed for event in events)
        self.tries.lost_tries = 0  # they were told by those who met them
        if worked:
            self.desk.worked.remote([stage])  # the driver says so too, but perhaps too late
        self.file = os.open(self._place(who), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        return super().begin_setup(stage, who)

    def _place(self, who: Who) -> Path:
        return self.folder / f"{who.worker}-{who.process}.jsonl"

    def begin(self, event: Event, who: Who) -> list[Who]:
        self._note(event)
        with self.lock:
            died = self.tries.begin(event, who)
            lost, self.tries.lost_tries = self.tries.lost_tries, 0
        if lost:
            self.desk.lose.remote(lost)
        return died

    def end(self, event: Event) -> None:
        self._note(event)
        with self.lock:
            self.tries.end(event)

    def _note(self, event: Event) -> None:
        try:
            os.write(self.file, f"{json.dumps(vars(event))}\n".encode())  # appended by one call, so lines do not mix
        except OSError as error:
            raise StorageError(f"cannot note a try in {self.folder}: {error}") from error


def _read(file: Path) -> list[Event]:
    with contextlib.suppress(FileNotFoundError):  # it died before it had any
        return _events(file.read_bytes())[0]
    return []


def _events(lines: bytes) -> tuple[list[Event], int]:
    """The events of the whole lines, and the bytes these take; the last line may still be on its way."""
    whole = lines[: lines.rfind(b"\n") + 1]
    return [Event(**json.loads(line)) for line in whole.splitlines()], len(whole)


class _Followed:
    """The files of all processes of a session, followed as they grow."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.read: dict[str, int] = defaultdict(int)

    def take(self) -> list[Event]:
        """What was noted since the last call."""
        events: list[Event] = []
        with contextlib.suppress(FileNotFoundError):  # another start may have closed the session
            for entry in os.scandir(self.folder):
                if entry.stat().st_size > self.read[entry.name]:
                    with open(entry.path, "rb") as stream:
                        stream.seek(self.read[entry.name])
                        told, size = _events(stream.read())
                    self.read[entry.name] += size
                    events += told
        return events


@contextlib.contextmanager
def listening(desk: Any, store: Store, on_events: Callable[[Sequence[Event]], None]) -> Iterator[None]:
    """Hand on what workers tell, about twice a second and in a thread of its own, until the block ends."""
    take = _taker(desk, store)
    stop = threading.Event()

    def hear() -> None:
        try:
            on_events(take())
        except Exception as error:  # what people see may lag; the run itself goes on
            _log.warning("cannot tell how the run goes on: %s", error)

    def poll() -> None:
        while not stop.wait(_POLL_SECONDS):
            hear()

    thread = threading.Thread(target=poll, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(timeout=10)
        hear()


def _taker(desk: Any, store: Store) -> Callable[[], list[Event]]:
    folder = store.session_dir / TRIES
    if not isinstance(folder, Path):
        return _Heard(desk).take
    followed = _Followed(folder)
    followed.take()  # what an earlier execution of the session told has been heard

    def take() -> list[Event]:
        events = followed.take()
        if worked := {event.stage for event in events if event.closed}:
            desk.worked.remote(list(worked))
        return events

    return take


class _Heard:
    """What the desk hears. An answer that comes late is waited for again: the desk has forgotten what it told."""

    def __init__(self, desk: Any) -> None:
        self.desk = desk
        self.asked: Any = None

    def take(self) -> list[Event]:
        """What was told since the last call; nothing where the desk does not answer now."""
        asked, self.asked = self.asked or self.desk.take.remote(), None
        try:
            return list(ray.get(asked, timeout=10))
        except ray.exceptions.GetTimeoutError:
            self.asked = asked
        except ray.exceptions.RayError:
            pass  # the counts on the screen lag; the run itself does not depend on them
        return []
