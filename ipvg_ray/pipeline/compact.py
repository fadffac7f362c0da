"""Merge a run's small part files into larger ones; readers see every row once at every moment.

A merged part is published before the parts it replaces are removed, and it names them in its metadata. In between a row
stands in two files: this package's readers take the first of each key, and a start that finds such leftovers of a kill
removes them before it looks at anything.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator, Sequence

import pyarrow.parquet as pq

from ipvg_ray import tables
from ipvg_ray.pipeline.lease import RunLockedError, lock
from ipvg_ray.pipeline.scratch import FOLDER
from ipvg_ray.pipeline.store import FINGERPRINT, MERGED, MERGED_FROM, Store, batch_digest, new_session
from ipvg_ray.storage import RunPath, parquet, remove_folder

_SMALL = 0.5
"""Parts below this share of the wanted size are merged; larger ones are left alone."""


def compact(run_dir: RunPath, part_bytes: int = 256 << 20) -> dict[str, tuple[int, int]]:
    """Merge the small parts of every table of a run that nobody is working in.

    Of a run that has come to its end work in progress is removed too: rows that were set aside begin anew if they are
    tried again.

    Args:
        part_bytes: size that merged parts are to reach, about; compressed bytes.

    Returns:
        Per table, the number of parts before and after.

    Raises:
        NotARunError: where the folder is no run.
        RunLockedError: where another process is at work in it.
    """
    tables.read_run(run_dir)  # a folder that is no run must not get a lock
    lost = threading.Event()
    with contextlib.closing(lock(run_dir, lost.set)):
        run = tables.read_run(run_dir)
        names = [*run["stages"], "failures"]
        complete = (run.get("sessions") or [{}])[-1].get("outcome") == "complete"
        store = Store(run_dir.resolve(), new_session())
        store.begin()
        try:
            found = {name: _compact_table(store, name, part_bytes, lost) for name in names}
            if complete and not lost.is_set():
                remove_folder(store.engine_dir / FOLDER)
            return found
        finally:
            store.end()


def _compact_table(store: Store, name: str, part_bytes: int, lost: threading.Event) -> tuple[int, int]:
    before = tables.parts(store.run_dir, name)
    for group in groups([(part, part.stat().st_size) for part in before], part_bytes):
        merged = _merge(store, name, group)
        if lost.is_set():
            merged.unlink()
            raise RunLockedError(f"{store.run_dir} was taken over by a run; nothing of it was removed")
        for part in group:
            part.unlink()
    return len(before), len(tables.parts(store.run_dir, name))


def groups(parts: Sequence[tuple[RunPath, int]], part_bytes: int) -> Iterator[list[RunPath]]:
    """Runs of small parts that together make about `part_bytes`; no group of one."""
    group: list[RunPath] = []
    filled = 0
    for part, size in parts:
        if size >= part_bytes * _SMALL:
            continue
        if group and filled + size > part_bytes:
            if len(group) > 1:
                yield group
            group, filled = [], 0
        group.append(part)
        filled += size
    if len(group) > 1:
        yield group


def _merge(store: Store, name: str, parts: Sequence[RunPath]) -> RunPath:
    """One file in place of several, written row group by row group so that memory stays bounded."""
    names = [part.name for part in parts]
    with parquet(parts[0]) as opened:
        first = opened.schema_arrow
    metadata = {MERGED_FROM: json.dumps(names).encode(), FINGERPRINT: (first.metadata or {}).get(FINGERPRINT, b"")}
    schema = first.with_metadata(metadata)
    temporary = store.temporary()
    with pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
        for part in parts:
            with parquet(part) as source:
                for batch in source.iter_batches(batch_size=1024):
                    writer.write_batch(batch.replace_schema_metadata(metadata))
    place = store.part(name, f"{MERGED}-{batch_digest(names)}")
    store.publish_file(temporary, place)
    return place
