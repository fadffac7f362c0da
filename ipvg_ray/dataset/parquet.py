"""Parquet: one file or a folder of them, pictures as paths, bytes, or `{bytes, path}` as `datasets` writes them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ipvg_ray.dataset.places import Place, open_place
from ipvg_ray.dataset.problems import DatasetError, Problem
from ipvg_ray.dataset.records import missing_columns
from ipvg_ray.dataset.rows import RAW, Columns, Reading, UnreadableError, reference

_ROWS = 8192
_ROWS_WITH_PICTURES = 64
_BUFFER = 1 << 20  # without a buffer Arrow reads a whole column chunk, all of its pictures, at once


def read(place: Place, reading: Reading) -> Iterator[pa.RecordBatch]:
    """Batches of `rows.RAW`, column by column without a Python object per row; pictures are hashed one by one.

    Raises:
        DatasetError: where a file cannot be read, or lacks the column identity_id, image or prompt.
    """
    for file in files_of(place):
        try:
            yield from _read_file(file, reading)
        except (OSError, pa.ArrowException) as error:
            raise DatasetError(f"cannot read {file.uri}: {error}") from error


def files_of(place: Place) -> list[Place]:
    """The Parquet files of a folder, by name; the file itself where it is one."""
    if not place.is_folder():
        return [place]
    files, _ = place.names()
    return [place.child(name) for name in files if name.endswith(".parquet") and not name.startswith("_")]


def _read_file(file: Place, reading: Reading) -> Iterator[pa.RecordBatch]:
    columns = Columns.of(reading.config)
    base = open_place(reading.config.images) if reading.config.images else file.parent
    with file.filesystem.open_input_file(file.path) as source:
        parquet = pq.ParquetFile(source, pre_buffer=False, buffer_size=_BUFFER)
        found = parquet.schema_arrow
        missing = [n for n in (columns.identity_id, columns.image, columns.prompt) if n not in found.names]
        if missing:
            raise DatasetError(missing_columns(file.uri, missing, found.names))
        optional = [columns.prompt_id] if columns.prompt_id in found.names else []
        wanted = [columns.identity_id, columns.image, columns.prompt, *optional]
        kind = found.field(columns.image).type
        size = _ROWS if _is_text(kind.value_type if _is_list(kind) else kind) else _ROWS_WITH_PICTURES
        row = 1
        for batch in parquet.iter_batches(size, columns=wanted):
            yield _convert(batch, columns, file, base, row, reading)
            row += len(batch)


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _convert(
    batch: pa.RecordBatch, columns: Columns, file: Place, base: Place, first: int, reading: Reading
) -> pa.RecordBatch:
    """A batch of `RAW` from a batch of the file whose first row has the number `first`."""
    ids = _as_text(batch[columns.identity_id], columns.identity_id, file)
    numbers = pa.array(np.arange(first, first + len(batch))).cast(pa.string())
    where = pc.binary_join_element_wise(f"{file.uri}:row ", numbers, "")
    images, data, more, more_data, reasons = _all_pictures(batch[columns.image], columns.image, base, file)
    for row in np.flatnonzero(pc.equal(pc.fill_null(pc.utf8_length(ids), 0), 0)):
        reasons[int(row)] = f"the row has no value for {columns.identity_id!r}; give it one"
    names = batch[columns.prompt_id] if columns.prompt_id in batch.schema.names else None
    parents, prompts, prompt_ids, empty = _flat(batch[columns.prompt], names, columns, file, reasons)
    for row, reason in sorted(reasons.items()):
        who = ids[row].as_py() or ""
        reading.problems.add(Problem("unreadable_row", reason, where[row].as_py(), who))
    keep = pa.array(~np.isin(parents, list(reasons)))
    rows = pa.array(parents).filter(keep)
    prompts, prompt_ids, empty = (a.filter(keep) for a in (prompts, prompt_ids, empty))
    bad = pc.and_(pc.is_null(prompts), pc.invert(empty))
    none = pa.scalar(None, pa.string())
    kind = pc.if_else(bad, "unreadable_row", none)
    message = pc.if_else(bad, "the row has no prompt; give it a text or a list of texts", none)
    parts = [ids.take(rows), images.take(rows), data.take(rows), prompts, prompt_ids, where.take(rows), kind, message]
    return pa.RecordBatch.from_arrays([*parts, more.take(rows), more_data.take(rows)], schema=RAW)


def _as_text(values: pa.Array, column: str, file: Place) -> pa.Array:
    """Text or whole numbers as string. Raises DatasetError for other types."""
    kind = values.type.value_type if pa.types.is_dictionary(values.type) else values.type
    if not (_is_text(kind) or pa.types.is_integer(kind) or pa.types.is_null(kind)):
        raise DatasetError(f"{file.uri}: column {column!r} is {values.type}, not text")
    return values.cast(kind).cast(pa.string())


def _all_pictures(
    values: pa.Array, column: str, base: Place, file: Place
) -> tuple[pa.Array, pa.Array, pa.Array, pa.Array, dict[int, str]]:
    """RAW's columns image, image_bytes, more and more_bytes, and row number to reason where a picture is not named."""
    nothing = (pa.nulls(len(values), RAW.field(name).type) for name in ("more", "more_bytes"))
    if not _is_list(values.type):
        images, data, reasons = _pictures(values, column, base, file)
        return images, data, *nothing, reasons
    images, data, flat_reasons = _pictures(pc.list_flatten(values), column, base, file)
    lengths = pc.fill_null(pc.list_value_length(values), 0).to_numpy()
    ends = np.cumsum(lengths)
    firsts = pa.array(ends - lengths, mask=lengths == 0)
    owner = pc.list_parent_indices(values).to_numpy()
    reasons = {int(owner[place]): reason for place, reason in sorted(flat_reasons.items(), reverse=True)}
    reasons |= {int(row): f"the row has no picture in {column!r}; give it one" for row in np.flatnonzero(lengths == 0)}
    rest = np.ones(len(images), bool)
    rest[(ends - lengths)[lengths > 0]] = False
    offsets = pa.array(np.concatenate([[0], np.cumsum(np.maximum(lengths - 1, 0))]).astype(np.int32))
    more = [pa.ListArray.from_arrays(offsets, a.filter(pa.array(rest))) for a in (images, data)]
    several = pa.array(lengths > 1)
    more = [pc.if_else(several, a, pa.scalar(None, a.type)) for a in more]
    return images.take(firsts), data.take(firsts), *more, reasons


def _pictures(values: pa.Array, column: str, base: Place, file: Place) -> tuple[pa.Array, pa.Array, dict[int, str]]:
    """RAW's columns image and image_bytes, and row number to reason where there is no picture to look for."""
    kind = values.type
    data = pa.nulls(len(values), pa.binary())
    paths = pa.nulls(len(values), pa.string())
    if pa.types.is_struct(kind):
        fields = {field.name: number for number, field in enumerate(kind)}
        if not {"bytes", "path"} & set(fields):
            raise DatasetError(f"{file.uri}: column {column!r} is {kind}; a picture has the fields bytes and path")
        if "bytes" in fields:
            data = pc.struct_field(values, fields["bytes"]).cast(pa.binary())
        if "path" in fields:
            paths = pc.struct_field(values, fields["path"]).cast(pa.string())
    elif pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        data = values.cast(pa.binary())
    else:
        paths = _as_text(values, column, file)
    reasons: dict[int, str] = {}
    digests = [f"sha256:{hashlib.sha256(d.as_buffer()).hexdigest()}" if d.is_valid else None for d in data]
    uris = _uris(paths, base, [digest is not None for digest in digests], column, reasons)
    return pc.coalesce(pa.array(digests, pa.string()), uris), data, reasons


def _uris(paths: pa.Array, base: Place, covered: list[bool], column: str, reasons: dict[int, str]) -> pa.Array:
    """Absolute path or URI of each path; rows that are not `covered` by bytes and name none get a reason."""
    encoded = paths.dictionary_encode()
    known: list[str | None] = []
    faults: list[str] = []
    for text in encoded.dictionary.to_pylist():
        try:
            known.append(reference(base, text) if text else None)
            faults.append("" if text else "the picture's path is empty; give it one")
        except UnreadableError as error:
            known.append(None)
            faults.append(str(error))
    for row, code in enumerate(encoded.indices.to_pylist()):
        if not covered[row] and (code is None or faults[code]):
            reasons[row] = faults[code] if code is not None else f"the row has no value for {column!r}; give it one"
    return pa.array(known, pa.string()).take(encoded.indices)


def _flat(
    values: pa.Array, names: pa.Array | None, columns: Columns, file: Place, reasons: dict[int, str]
) -> tuple[np.ndarray, pa.Array, pa.Array, pa.Array]:
    """Prompts one by one: row they come from (int64), text, name, and whether they stand for an empty list."""
    if not _is_list(values.type):
        texts = _as_text(values, columns.prompt, file)
        ids = pa.nulls(len(values), pa.string()) if names is None else _as_text(names, columns.prompt_id, file)
        return np.arange(len(values)), texts, _blank_to_null(ids), pa.array(np.zeros(len(values), bool))
    lengths = pc.list_value_length(values)
    if names is not None:
        if not _is_list(names.type):
            raise DatasetError(
                f"{file.uri}: {columns.prompt!r} holds lists, so {columns.prompt_id!r} must hold lists too"
            )
        differ = pc.not_equal(pc.fill_null(pc.list_value_length(names), -1), pc.fill_null(lengths, -1))
        for row in np.flatnonzero(differ):
            reasons[int(row)] = "the lists of prompts and prompt_ids differ in length"
        fits = pc.invert(differ)
        values, names, lengths = (pc.if_else(fits, a, pa.scalar(None, a.type)) for a in (values, names, lengths))
    bare = np.flatnonzero(pc.equal(pc.fill_null(lengths, 0), 0))  # rows without an element still stand for an identity
    parents = np.concatenate([pc.list_parent_indices(values).to_numpy(), bare])
    order = pa.array(np.argsort(parents, kind="stable"))
    blank = pa.nulls(len(bare), pa.string())
    texts = _as_text(pc.list_flatten(values), columns.prompt, file)
    ids = (
        pa.nulls(len(texts), pa.string())
        if names is None
        else _as_text(pc.list_flatten(names), columns.prompt_id, file)
    )
    empty = pc.is_in(pa.array(parents), value_set=pa.array(np.flatnonzero(pc.fill_null(pc.equal(lengths, 0), False))))
    texts, ids = pa.concat_arrays([texts, blank]), _blank_to_null(pa.concat_arrays([ids, blank]))
    return parents[order.to_numpy()], texts.take(order), ids.take(order), empty.take(order)


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind))


def _blank_to_null(texts: pa.Array) -> pa.Array:
    """An empty prompt_id is none."""
    return pc.if_else(pc.equal(texts, ""), pa.scalar(None, pa.string()), texts)
