"""How long a transformer takes to load in bfloat16: from float32 files as published, against a copy that
`ipvg-ray models convert` made of it, with the files out of the page cache and in it.

usage: python benchmarks/load.py [--layers 12] [--repeat 5] [--folder FOLDER]
Makes a random VACE transformer (about 1 GB with 12 layers) below FOLDER, and removes it.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
from diffusers import WanVACETransformer3DModel

from ipvg_ray.models.convert import convert
from ipvg_ray.models.quiet import no_bars

WIDTH, HEADS = 1024, 16
_PAGE = os.sysconf("SC_PAGE_SIZE")


def make(folder: Path, layers: int) -> None:
    WanVACETransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=WIDTH // HEADS,
        text_dim=WIDTH,
        ffn_dim=4 * WIDTH,
        num_layers=layers,
        vace_layers=[0, layers // 2],
    ).save_pretrained(folder)


def forget(folder: Path) -> None:
    """Have the system drop the folder's files from its page cache."""
    for file in folder.iterdir():
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def load(folder: Path) -> float:
    """Seconds until every page of the weights has been in memory once, as for the copy to a card."""
    started = time.perf_counter()
    with no_bars():
        model = WanVACETransformer3DModel.from_pretrained(folder, torch_dtype=torch.bfloat16)
    for tensor in model.state_dict().values():
        tensor.flatten().view(torch.uint8)[::_PAGE].sum()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        original, copy = Path(temporary) / "original", Path(temporary) / "copy"
        make(original, options.layers)
        convert(original, copy, torch.bfloat16)
        print(f"medians of {options.repeat}")
        for name, cold in (("files not cached", True), ("files cached", False)):
            times: dict[Path, list[float]] = {original: [], copy: []}
            for _ in range(options.repeat):
                for folder, taken in times.items():
                    if cold:
                        forget(folder)
                    taken.append(load(folder))
            whole, half = (statistics.median(taken) for taken in times.values())
            print(f"{name:18} original {whole:6.2f} s, copy {half:6.2f} s, ratio {half / whole:.2f}", flush=True)


if __name__ == "__main__":
    main()
