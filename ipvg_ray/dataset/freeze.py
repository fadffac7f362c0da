"""Freeze an identity set: two checked tables that a run stands on, whatever becomes of the input.

How a million samples fit: readers hand on batches, which go to a file on disk; of every row only a few numbers stay in
memory, and identities and samples are checked, ordered and written from the file slice by slice.
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ipvg_ray import tables
from ipvg_ray.config import DatasetConfig
from ipvg_ray.dataset.checks import Fault, faults, first_identities, problem_of, with_good_ids
from ipvg_ray.dataset.formats import open_set
from ipvg_ray.dataset.keys import Keys, repeated
from ipvg_ray.dataset.parts import Parts
from ipvg_ray.dataset.pictures import Candidate, Picture, verify_all
from ipvg_ray.dataset.problems import DatasetError, Problem, Problems
from ipvg_ray.dataset.rows import Reading
from ipvg_ray.dataset.spill import Spill
from ipvg_ray.media.images import ImageError

_SLICE = 8192
_TABLES = ("identities", "samples", "failures")


@dataclass(frozen=True)
class Summary:
    """What came out of an identity set.

    Attributes:
        identities, samples: rows written.
        problems: rows of the failures table.
        kinds: how many problems of each kind.
        first: the first problems, for printing.
    """

    identities: int
    samples: int
    problems: int
    kinds: dict[str, int]
    first: tuple[Problem, ...]


def freeze(config: DatasetConfig, out: Path, *, threads: int = 8) -> Summary:
    """Read the identity set that `config` names and write `<out>/identities`, `<out>/samples` and `<out>/failures`.

    Samples of one identity stand together, in input order, and identities in the same order; every identity has a
    sample. A prompt without an id is named by its place among its identity's rows: prompt1, prompt2, …

    Args:
        out: a folder without these tables; made where it is missing. Nothing is left in it if an error is raised.
        threads: pictures verified, and files read, at the same time.

    Raises:
        DatasetError: where nothing can be read or nothing is left; with `config.strict` where anything is wrong.
    """
    place, read = open_set(config)
    with _staged(out) as staging:
        with Problems(staging / "failures") as problems:
            batches = with_good_ids(read(place, Reading(config, problems, threads)), problems)
            if config.limit is not None:
                batches = first_identities(batches, config.limit)
            freezer = _Freezer(config, Spill.write(staging / "spill.arrow", batches), problems, threads)
            _refuse_if_strict(config, problems)
            fit, identities = freezer.write_identities(staging / "identities")
            samples = freezer.write_samples(staging / "samples", fit)
            _refuse_if_strict(config, problems)
        if not identities:
            raise DatasetError(f"{place.uri} holds no usable identity with a prompt\n{problems.listing()}".rstrip())
    return Summary(identities, samples, problems.total, dict(problems.kinds), tuple(problems.first))


def _refuse_if_strict(config: DatasetConfig, problems: Problems) -> None:
    if config.strict and problems.total:
        raise DatasetError(
            f"{problems.total} problems in the identity set, and dataset.strict is set:\n{problems.listing()}"
        )


@contextmanager
def _staged(out: Path) -> Iterator[Path]:
    """A folder inside `out` whose tables are moved into `out` at the end, and removed where something goes wrong."""
    present = [name for name in _TABLES if (out / name).exists()]
    if present:
        raise DatasetError(f"{out} already holds {', '.join(present)}; choose another folder")
    fresh = not out.exists()
    staging = out / f".freeze-{uuid.uuid4().hex[:8]}"
    staging.mkdir(parents=True)
    try:
        yield staging
        for name in _TABLES:
            if (staging / name).exists():
                (staging / name).rename(out / name)
    except BaseException:
        shutil.rmtree(out if fresh else staging, ignore_errors=True)
        raise
    shutil.rmtree(staging)


class _Freezer:
    """The rows of a spill, grouped and checked, and what is written of them."""

    def __init__(self, config: DatasetConfig, spill: Spill, problems: Problems, threads: int) -> None:
        self.config, self.spill, self.problems, self.threads = config, spill, problems, threads
        self.keys = Keys.of(spill)
        self.fault = self._faults()

    def _faults(self) -> np.ndarray:
        """The `Fault` of each row, int8 (n,)."""
        found = [faults(batch, self.config) for batch in self.spill.batches]
        fault = np.concatenate([np.zeros(0, np.int8), *found])
        ids = _prompt_ids(self.spill.column("prompt_id"), self.keys.place)
        samples = pc.binary_join_element_wise(self.spill.column("identity_id"), ids, "/")
        usable = (fault == Fault.OK) & self.keys.same_picture
        fault[repeated(samples, usable)] = Fault.DUPLICATE
        fault[~self.keys.same_picture] = Fault.OTHER_PICTURE
        return fault

    def write_identities(self, folder: Path) -> tuple[np.ndarray, int]:
        """Verify pictures and write the identities that have a good one and a good prompt.

        Returns:
            Whether each identity is fit, bool (m,), and how many rows were written. Prompts of the others are lost
            with them: their one failure is the identity's.
        """
        keys, total = self.keys, len(self.keys.first)
        asked = np.bincount(keys.owner[self.fault != Fault.NO_PROMPT], minlength=total) > 0
        good = np.bincount(keys.owner[self.fault == Fault.OK], minlength=total) > 0
        fit = np.zeros(total, bool)
        with Parts(folder, tables.stored_schema("identities"), group_rows=1024, group_bytes=8 << 20) as parts:
            for start in range(0, total, _SLICE):
                numbers = np.arange(start, min(start + _SLICE, total))
                for number, row in self._promising(numbers, asked):
                    fit[number] = True
                    if good[number]:
                        parts.add_row(row)
        return fit, parts.rows

    def _promising(self, numbers: np.ndarray, asked: np.ndarray) -> Iterator[tuple[int, dict[str, Any]]]:
        """Number and table row of those identities that have a prompt and a good picture; the others are reported."""
        columns = ["identity_id", "image", "more", "where", "kind", "message"]
        facts = self.spill.take(self.keys.first[numbers], columns).to_pylist()
        looked_at = []
        for number, row in zip(numbers.tolist(), facts, strict=True):
            if row["image"] is None:
                reason = row["message"] if row["kind"] == "missing_image" else "no picture; put one beside the prompts"
                self._refuse(row, "missing_image", reason)
            elif not asked[number]:
                self._refuse(row, "no_prompts", "the identity has a picture but no prompt; write one, or remove it")
            else:
                looked_at.append((number, row))
        candidates = (one for number, row in looked_at for one in self._candidates(number, row))
        outcomes = verify_all(candidates, self.config, self.threads)
        for number, row in looked_at:
            first, *others = islice(outcomes, len(self._named(row)))
            if isinstance(first, Picture):
                yield number, _identity_row(row["identity_id"], first, self._usable(row, others))
            else:
                self._refuse(row, first.kind, str(first))

    def _named(self, row: dict[str, Any]) -> list[str]:
        """The pictures of an identity that are used, its first row's, as `rows.RAW` names them."""
        return [row["image"], *(row["more"] or ())][: self.config.max_references]

    def _candidates(self, number: int, row: dict[str, Any]) -> Iterator[Candidate]:
        names = self._named(row)
        if len(names) <= len(row["more"] or ()) and len(names) > 1:
            most = self.config.max_references
            self._refuse(
                row,
                "too_many_images",
                f"the pictures after the first {most} are left out; remove them, or raise dataset.max_references",
            )
        for place, name in enumerate(names):
            if name.startswith("sha256:"):
                yield Candidate(None, partial(self.spill.picture, int(self.keys.first[number]), place))
            else:
                yield Candidate(name)

    def _usable(self, row: dict[str, Any], others: Iterable[Picture | ImageError]) -> list[Picture]:
        """The further pictures that are fit for use; the others are reported and left out."""
        usable = []
        for outcome in others:
            if isinstance(outcome, Picture):
                usable.append(outcome)
            else:
                self._refuse(row, outcome.kind, f"a further picture is left out: {outcome}")
        return usable

    def _refuse(self, row: dict[str, Any], kind: str, message: str) -> None:
        self.problems.add(Problem(kind, message, row["where"], row["identity_id"]))

    def write_samples(self, folder: Path, fit: np.ndarray) -> int:
        """Write the good prompts of fit identities and report the others of theirs; returns how many were written."""
        order = self.keys.order[fit[self.keys.owner[self.keys.order]]]
        with Parts(folder, tables.stored_schema("samples"), group_rows=4096, group_bytes=8 << 20) as parts:
            for start in range(0, len(order), _SLICE):
                rows = order[start : start + _SLICE]
                self._report(rows[self.fault[rows] > Fault.NO_PROMPT])
                parts.add_table(self._samples(rows[self.fault[rows] == Fault.OK]))
        return parts.rows

    def _samples(self, rows: np.ndarray) -> pa.Table:
        raw = self.spill.take(rows, ["identity_id", "prompt_id", "prompt"])
        ids = _prompt_ids(raw["prompt_id"], self.keys.place[rows])
        samples = pc.binary_join_element_wise(raw["identity_id"], ids, "/")
        columns = {"sample_id": samples, "identity_id": raw["identity_id"], "prompt_id": ids, "prompt": raw["prompt"]}
        schema = tables.stored_schema("samples")
        return pa.Table.from_arrays([columns[name] for name in schema.names], schema=schema)

    def _report(self, rows: np.ndarray) -> None:
        columns = ["identity_id", "prompt_id", "prompt", "where", "kind", "message"]
        for start in range(0, len(rows), 256):  # refused prompts may be huge
            some = rows[start : start + 256]
            raw = self.spill.take(some, columns)
            ids = _prompt_ids(raw["prompt_id"], self.keys.place[some]).to_pylist()
            for row, prompt_id, fault in zip(raw.to_pylist(), ids, self.fault[some], strict=True):
                self.problems.add(problem_of(Fault(fault), {**row, "prompt_id": prompt_id}, self.config))


def _prompt_ids(given: pa.ChunkedArray, place: np.ndarray) -> pa.ChunkedArray:
    """The given ids, and prompt1, prompt2, … by place where there is none."""
    numbers = pa.chunked_array([pa.array(place + 1)]).cast(pa.string())
    return pc.coalesce(given, pc.binary_join_element_wise("prompt", numbers, ""))


def _identity_row(identity_id: str, picture: Picture, more: Sequence[Picture]) -> dict[str, Any]:
    return {
        "identity_id": identity_id,
        "image": {"bytes": picture.data, "path": picture.uri},
        "image_sha256": picture.sha256,
        "image_width": picture.width,
        "image_height": picture.height,
        "more_images": [{"bytes": one.data, "path": one.uri} for one in more] or None,
        "more_images_sha256": [one.sha256 for one in more] or None,
    }
