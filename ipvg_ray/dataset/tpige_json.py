"""TPIGE's prompts file, `{id: {"1": text, …}}`; the pictures lie in a folder as `<id>/image.*` or `<id>.*`.

Source: github.com/Andyplus1/IPT2V.
"""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa

from ipvg_ray.dataset import keyed
from ipvg_ray.dataset.picture_folder import PictureFolder
from ipvg_ray.dataset.places import Place, open_place
from ipvg_ray.dataset.rows import Reading, pack


def read(place: Place, reading: Reading) -> Iterator[pa.RecordBatch]:
    """Batches of `rows.RAW`; key `1` is named `prompt1`. The pictures' folder is `dataset.images`, else the file's own.

    Raises:
        DatasetError: where the file or the folder cannot be read.
    """
    folder = open_place(reading.config.images) if reading.config.images else place.parent
    pictures = PictureFolder(folder, reading.problems)
    yield from pack(keyed.join(keyed.from_json(place, reading), pictures), reading.problems)
