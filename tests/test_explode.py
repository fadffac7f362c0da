"""Identity rows that become one row per sample."""

from __future__ import annotations

import pyarrow as pa

from ipvg_ray.pipeline.plan import SAMPLES
from ipvg_ray.pipeline.worker import explode


def test_each_sample_has_its_identitys_columns_and_no_array_holds_two_identities_pictures() -> None:
    """Arrow refuses arrays of more than 2 GiB, and an identity of many pictures alone may bring hundreds of MiB."""
    samples = [[{"sample_id": f"{name}/{n}"} for n in range(count)] for name, count in (("a", 2), ("b", 0), ("c", 1))]
    names, pictures = pa.array(["a", "b", "c"]), pa.array([[b"1", b"2"], [], [b"3"]], pa.list_(pa.binary()))
    kind = pa.list_(pa.struct([("sample_id", pa.string())]))
    table = pa.table({"identity_id": names, "pictures": pictures, SAMPLES: pa.array(samples, kind)})
    into = pa.schema([("identity_id", pa.string()), ("sample_id", pa.string()), ("pictures", pictures.type)])
    found = explode(table, into)
    rows = [("a", "a/0", [b"1", b"2"]), ("a", "a/1", [b"1", b"2"]), ("c", "c/0", [b"3"])]
    assert [tuple(row.values()) for row in found.to_pylist()] == rows
    assert [len(set(chunk.to_pylist())) for chunk in found["identity_id"].chunks if len(chunk)] == [1, 1]
    assert explode(table.slice(0, 0), into).equals(into.empty_table())
    assert explode(table.slice(2), into).to_pylist() == found.to_pylist()[2:]
