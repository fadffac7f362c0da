"""Work in progress beside the run: small files that another worker, or another start of the run, goes on from."""

from __future__ import annotations

from dataclasses import dataclass

from ipvg_ray.media.names import safe_name
from ipvg_ray.pipeline.store import Store
from ipvg_ray.storage import RunPath


@dataclass(frozen=True)
class RunScratch:
    """The scratch of one stage as it is configured; see `ipvg_ray.pipeline.stage.Scratch`.

    Attributes:
        store: the session's hand on the run; a session that was cut off can write nothing here either.
        owner: stage and fingerprint: a stage that is configured otherwise must not go on from this work.
    """

    store: Store
    owner: str

    def _place(self, name: str) -> RunPath:
        return self.store.engine_dir / "scratch" / safe_name(self.owner) / safe_name(name)

    def read(self, name: str) -> bytes | None:
        """See `Scratch.read`."""
        try:
            return self._place(name).read_bytes()
        except FileNotFoundError:
            return None

    def write(self, name: str, data: bytes) -> None:
        """See `Scratch.write`. Raises FencedError, StorageError."""
        self.store.publish_bytes(self._place(name), data)

    def remove(self, name: str) -> None:
        """See `Scratch.remove`."""
        self._place(name).unlink(missing_ok=True)
