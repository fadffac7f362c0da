"""A crew: one process for each rank of a group, at work or in reserve, and the leader's hold on them.

Nothing of a crew outlives its leader: each process holds a connection to it, and ends itself when that breaks.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import ray

from ipvg_ray.pipeline.processes import Processes
from ipvg_ray.pipeline.spot import Ear, Notice
from ipvg_ray.pipeline.stage import RankContext, Ranks
from ipvg_ray.pipeline.staging import take_models

_CONNECT_SECONDS = 60.0


@dataclass(frozen=True)
class Seat:
    """Where one rank works: Ray's options that put its process there, and what that finds in its environment."""

    options: dict[str, Any]
    env: dict[str, str] = field(default_factory=dict)


class Whereabouts(NamedTuple):
    """Of a process: its id, and its node's address."""

    pid: int
    address: str


@ray.remote(  # type: ignore[call-overload]
    num_cpus=0, max_restarts=0, max_task_retries=0, concurrency_groups={"watch": 1, "spot": 1}
)
class RankProcess:
    """One rank's process. Only methods of the groups `watch` and `spot` are answered while it works."""

    def __init__(self, rank: int, env: dict[str, str], leader: tuple[str, int]) -> None:
        os.environ.update(env)  # before torch is imported, which reads the cards and the threads once
        self.rank = rank
        self.steps, self.words = 0, "starting"
        self.asked: Ranks
        self.before = Processes()
        self.ear = Ear()
        self.target: Any = None
        connection = socket.create_connection(leader, timeout=_CONNECT_SECONDS)
        threading.Thread(target=_die_with, args=(connection,), daemon=True).start()

    def take_on(self, asked: Ranks, before: Whereabouts | None) -> None:
        """Learn what is wanted, and import what that needs; neither models nor cards are touched.

        Args:
            before: who has this one's card until then.
        """
        self.asked = asked
        if before is not None and before.address == ray.util.get_node_ip_address():
            self.before.watch([before.pid])
        if asked.warm is not None:
            asked.warm()

    def open(self, host: str) -> Any:
        """Open the place where the ranks meet; rank 0 alone."""
        return self.asked.rendezvous.open(host, self.asked.size) if self.asked.rendezvous else None

    def setup(self, place: Any, device: str, threads: int) -> None:
        """Have the card and the models on this node, meet the others and make the object that works."""
        self.before.end()
        if self.asked.stage is not None:
            take_models([self.asked.stage])
        context = RankContext(self.rank, self.asked.size, device, threads, self._alive)
        if self.asked.rendezvous is not None:
            self.asked.rendezvous.join(place, context)
        self.target = self.asked.make(context)

    def call(self, method: str, args: tuple[Any, ...]) -> Any:
        """Call a method of the object; only rank 0's answer travels."""
        self._alive(method)
        answer = getattr(self.target, method)(*args)
        return answer if self.rank == 0 else None

    def _alive(self, words: str) -> None:
        self.steps, self.words = self.steps + 1, words

    @ray.method(concurrency_group="watch")
    def progress(self) -> tuple[int, str]:
        """How many signs of life it has given, and the last one."""
        return self.steps, self.words

    @ray.method(concurrency_group="spot")  # outside of clouds the first answer takes seconds
    def notice(self) -> Notice | None:
        """The notice of its node, if one was given."""
        notice = self.ear.notice()
        return replace(notice, node=ray.get_runtime_context().get_node_id()) if notice else None

    @ray.method(concurrency_group="watch")
    def process(self) -> Whereabouts:
        """Where it runs."""
        return Whereabouts(os.getpid(), ray.util.get_node_ip_address())


def _die_with(leader: socket.socket) -> None:
    """End this process when the leader's does: the kernel then closes the connection, however it ended."""
    leader.settimeout(None)
    leader.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # for a leader whose whole node is lost
    try:
        leader.recv(1)
    finally:
        os._exit(1)


class Crew:
    """Processes for all ranks of a group. They start at once, and import; cards are theirs only from `setup` on.

    Args:
        asked: what the stage wants.
        seats: where each works.
        host: this node's address, as its processes reach it.
        before: the ranks that stand, where this crew is their reserve. On other nodes, where the leader cannot wait for
            the end of a process, each sees to the end of the one before it.
    """

    def __init__(self, asked: Ranks, seats: Sequence[Seat], host: str, before: Sequence[Whereabouts] = ()) -> None:
        # The kernel takes connections up to the backlog without being asked, and breaks them with the door; so they
        # need not be accepted one by one, while nobody knows which of the processes will ever come.
        self.door = socket.create_server((host, 0), backlog=len(seats))
        self.processes = Processes()
        leader = self.door.getsockname()
        self.ranks = [
            RankProcess.options(**seat.options).remote(i, seat.env, leader)  # type: ignore[attr-defined]
            for i, seat in enumerate(seats)
        ]
        self.told: list[Whereabouts] = []
        for i, rank in enumerate(self.ranks):
            rank.take_on.remote(asked, before[i] if before and asked.across_nodes else None)

    def present(self, told: list[Whereabouts], here: bool) -> None:
        """Know where all are; `here`: on this node."""
        self.told = told
        if here:
            self.processes.watch([process.pid for process in told])

    def end(self) -> None:
        """End all processes, and come back when those that worked are gone and their cards free."""
        for rank in self.ranks:
            ray.kill(rank, no_restart=True)
        with suppress(OSError):
            self.door.close()
        self.processes.end()
        self.ranks = []
