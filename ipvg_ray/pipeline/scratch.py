"""Work in progress beside the run: small files that another worker, or another start of the run, goes on from."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from ipvg_ray.media.names import safe_name
from ipvg_ray.pipeline.store import Store
from ipvg_ray.storage import RunPath, folders, remove_folder

FOLDER = "scratch"


def owner_of(stage: str, fingerprint: str) -> str:
    """Whose work in progress it is: a stage that is configured otherwise must not go on from it."""
    return f"{stage}-{fingerprint}"


def tidy(store: Store, fingerprints: Mapping[str, str], finished: Collection[str]) -> None:
    """Remove work that nobody will go on from; call when no worker of the run is left.

    What rows left that were set aside stays: tried again with `--retry-failures` they go on from it.

    Args:
        fingerprints: of the stages as they are configured now; their work under other ones is removed.
        finished: those of them of which every row is finished.
    """
    wanted = {safe_name(owner_of(name, made)) for name, made in fingerprints.items() if name not in finished}
    for folder in folders(store.engine_dir / FOLDER):
        if folder.rpartition("-")[0] in fingerprints and folder not in wanted:
            remove_folder(store.engine_dir / FOLDER / folder)


@dataclass(frozen=True)
class RunScratch:
    """The scratch of one stage as it is configured; see `ipvg_ray.pipeline.stage.Scratch`.

    Attributes:
        store: the session's hand on the run; a session that was cut off can write nothing here either.
        owner: see `owner_of`.
    """

    store: Store
    owner: str

    def _place(self, name: str) -> RunPath:
        return self.store.engine_dir / FOLDER / safe_name(self.owner) / safe_name(name)

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
