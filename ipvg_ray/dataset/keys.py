"""Who is who among the rows of an identity set: a few numbers per row, computed on whole columns."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ipvg_ray.dataset.spill import Spill


@dataclass(frozen=True)
class Keys:
    """Rows (n) grouped by identity (m), identities numbered in the order in which they first appear.

    Attributes:
        owner: int32 (n,), the identity's number.
        first: int64 (m,), its first row; the picture it names is the identity's.
        place: int32 (n,), the row's place among its identity's rows, from 0.
        same_picture: bool (n,), whether the row names the picture of its identity's first row.
        order: int64 (n,), rows identity by identity, each in input order.
    """

    owner: np.ndarray
    first: np.ndarray
    place: np.ndarray
    same_picture: np.ndarray
    order: np.ndarray

    @classmethod
    def of(cls, spill: Spill) -> Keys:
        """Group the rows of a spill."""
        owner = codes_of(spill.column("identity_id"))
        picture = codes_of(pc.fill_null(spill.column("image"), ""))
        order = np.argsort(owner, kind="stable")
        counts = np.bincount(owner)
        begins = np.cumsum(counts) - counts
        first = order[begins] if len(order) else order
        place = np.empty(len(owner), np.int32)
        place[order] = np.arange(len(owner)) - np.repeat(begins, counts)
        return cls(owner, first, place, picture == picture[first][owner], order)


def codes_of(values: pa.ChunkedArray) -> np.ndarray:
    """A number per value, int32 (n,), counted up in the order of first appearance."""
    encoded = values.dictionary_encode().unify_dictionaries()
    return np.concatenate([np.zeros(0, np.int32), *(c.indices.to_numpy(zero_copy_only=False) for c in encoded.chunks)])


def repeated(values: pa.ChunkedArray, among: np.ndarray) -> np.ndarray:
    """Bool (n,): values that an earlier row of those `among` (bool, (n,)) has already; False elsewhere."""
    codes = codes_of(values)
    rows = np.flatnonzero(among)
    again = np.zeros(len(codes), bool)
    again[rows] = True
    again[rows[np.unique(codes[rows], return_index=True)[1]]] = False
    return again
