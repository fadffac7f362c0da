"""Where stages under test publish their media."""

from __future__ import annotations

from pathlib import Path


class Folder:
    """Publishes into a plain folder, as the run's store does."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def publish(self, folder: str, identity_id: str, name: str, suffix: str, data: bytes) -> str:
        path = self.root / folder / identity_id / f"{name}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return str(path.relative_to(self.root))
