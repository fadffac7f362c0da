"""Spot nodes: hear the cloud's notice that a node will be taken away, and have the node leave in good order.

AWS gives two minutes' notice, Google Cloud half a minute; both tell it at a metadata address that only the node itself
can reach. A node with a notice takes no new work: Ray is told to drain it, so that nothing is started there and the
autoscaler fetches another; workers finish the batches they have begun, and end.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime

ADDRESS = "http://169.254.169.254"
"""Where both clouds answer their nodes. The environment variable IPVG_RAY_METADATA names another, or is `off`."""
EVERY = 5.0
"""Seconds between two looks, as AWS recommends."""
_GOOGLE_S = 30.0
_PARTING = 1.0
"""Seconds in which the answer to the last batch gets on its way, before the process ends."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Notice:
    """A node will be taken away: by which cloud, when (seconds since 1970), and which; None for whoever hears it."""

    cloud: str
    deadline: float
    node: str | None = None


class Metadata:
    """The metadata address of the node that this process runs on.

    Args:
        address: where it is.
        timeout: seconds that an answer may take; the address is on the node itself.
    """

    def __init__(self, address: str, timeout: float = 2.0) -> None:
        self.address = address.rstrip("/")
        self.timeout = timeout

    def cloud(self) -> str | None:
        """`aws`, `gcp`, or None where nobody answers as either would."""
        if self._token() is not None:
            return "aws"
        return "gcp" if self._google() is not None else None

    def notice(self, cloud: str) -> Notice | None:
        """The notice, if one was given."""
        if cloud == "gcp":
            return Notice("gcp", time.time() + _GOOGLE_S) if self._google() == "TRUE" else None
        token = self._token()
        said = self._ask("/latest/meta-data/spot/instance-action", {"X-aws-ec2-metadata-token": token or ""})
        if said is None:
            return None
        when = datetime.fromisoformat(json.loads(said)["time"].replace("Z", "+00:00"))
        return Notice("aws", when.timestamp())

    def _token(self) -> str | None:
        return self._ask("/latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": "60"}, "PUT")

    def _google(self) -> str | None:
        return self._ask("/computeMetadata/v1/instance/preempted", {"Metadata-Flavor": "Google"})

    def _ask(self, path: str, headers: dict[str, str], method: str = "GET") -> str | None:
        request = urllib.request.Request(self.address + path, headers=headers, method=method)
        # Never through a proxy: the address stands for the node itself.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=self.timeout) as answer:
                return str(answer.read().decode()).strip()
        except (OSError, ValueError):
            return None


class Ear:
    """Hears the notice of the node that this process runs on. Where no cloud gives any, nobody is asked again.

    Args:
        address: of the metadata; None for the environment's, which may turn this off.
    """

    def __init__(self, address: str | None = None) -> None:
        if address is None:
            address = os.environ.get("IPVG_RAY_METADATA", ADDRESS)
            off = os.environ.get("AWS_EC2_METADATA_DISABLED", "").lower() == "true" and address == ADDRESS
            address = "off" if off else address
        self.metadata = None if address == "off" else Metadata(address)
        self.cloud: str | None = None

    def notice(self) -> Notice | None:
        """The notice, if one was given."""
        if self.metadata is not None and self.cloud is None:
            self.cloud = self.metadata.cloud()
            self.metadata = self.metadata if self.cloud else None
        return self.metadata.notice(self.cloud) if self.metadata and self.cloud else None

    @property
    def deaf(self) -> bool:
        """Whether no notice will ever be heard."""
        return self.metadata is None


class Watch:
    """Looks for a notice in a thread of its own, where this node belongs to a cloud that gives any; and has the process
    leave when one was given.

    Args:
        on_notice: called once, in that thread. Where it raises, the process stays, and is lost with its node.
        leave: called after it, when no batch is in work; to end the process.
        address: of the metadata; None for the environment's, which may turn the watch off.
        every: seconds between two looks.
        others: tells the notice of another node without which this process cannot go on; asked as often.
    """

    def __init__(
        self,
        on_notice: Callable[[Notice], object],
        leave: Callable[[], object],
        address: str | None = None,
        every: float = EVERY,
        others: Callable[[], Notice | None] | None = None,
    ) -> None:
        self.on_notice = on_notice
        self.leave = leave
        self.every = every
        self.others = others
        self.leaving = False
        self.working = 0
        self.changed = threading.Condition()
        ear = Ear(address)
        if not ear.deaf or others is not None:
            threading.Thread(target=self._look, args=(ear,), name="spot", daemon=True).start()

    def _look(self, ear: Ear) -> None:
        while (notice := ear.notice() or (self.others() if self.others else None)) is None:
            if ear.deaf and self.others is None:
                return
            time.sleep(self.every)
        try:
            self.on_notice(notice)
        except Exception as error:
            _log.warning("a node will be taken away, and cannot be left in good order: %s", error)
            return
        with self.changed:
            self.leaving = True
            self.changed.wait_for(lambda: self.working == 0)
        time.sleep(_PARTING)
        self.leave()

    @contextmanager
    def batch(self) -> Iterator[None]:
        """Around a batch. One that comes when the process is about to leave waits until Ray gives it to another."""
        with self.changed:
            self.changed.wait_for(lambda: not self.leaving)
            self.working += 1
        try:
            yield
        finally:
            with self.changed:
                self.working -= 1
                self.changed.notify_all()


def drain(node: str, notice: Notice) -> None:
    """Tell Ray that a node will be taken away: it starts nothing there any more, and the autoscaler fetches another.

    By the call that Ray's own `drain-node` command makes; there is no public one (ray < 2.64).
    """
    import ray
    from ray.core.generated.autoscaler_pb2 import DrainNodeReason  # type: ignore[attr-defined] # made at run time

    gcs = ray._raylet.GcsClient(address=ray.get_runtime_context().gcs_address)  # type: ignore[attr-defined]
    reason = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    gcs.drain_node(node, reason, f"taken away by {notice.cloud}", int(notice.deadline * 1000))
