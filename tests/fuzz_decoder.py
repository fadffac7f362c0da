"""Fuzz the picture decoder for a while: `python tests/fuzz_decoder.py --seconds 900`.

hypothesis damages the pictures of `picture_corpus`: flips and overwrites bytes, cuts, repeats and splices pieces, sets
numbers of 16 and 32 bits to extreme values, and mends a PNG's checksums so that damage reaches behind them. Whatever
comes of it must be uint8 (H, W, 3) of no more pixels than allowed, or an ImageError of a known kind, soon and without
much memory. The bytes in work lie in the file named with --keep, should the process itself die.
"""

from __future__ import annotations

import argparse
import resource
import struct
import tempfile
import time
import zlib
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from picture_corpus import cases

from ipvg_ray.media import images

MAX_PIXELS = 4_000_000
SECONDS = 5.0
GROWTH = 700 << 10
"""Most that one picture may add to the process's peak memory, kB: 4 megapixels as float64, several times over."""
SEEDS = [case.data for case in cases() if 0 < len(case.data) < 60_000]
EXTREMES = (0, 1, 2, 3, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A picture of the corpus after one to eight damages, most of them near its beginning, where its headers are."""
    data = bytearray(draw(st.sampled_from(SEEDS)))
    for _ in range(draw(st.integers(1, 8))):
        reach = min(len(data), 200) if draw(st.booleans()) else len(data)
        at = draw(st.integers(0, max(0, reach - 1)))
        kind = draw(st.sampled_from(("flip", "byte", "number", "cut", "repeat", "splice", "insert")))
        if not data:
            break
        if kind == "flip":
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "byte":
            data[at] = draw(st.integers(0, 255))
        elif kind == "number":
            code = draw(st.sampled_from(("<H", ">H", "<I", ">I")))
            value = draw(st.sampled_from(EXTREMES)) & (0xFFFF if code[1] == "H" else 0xFFFFFFFF)
            data[at : at + struct.calcsize(code)] = struct.pack(code, value)
        elif kind == "cut":
            del data[at : at + draw(st.integers(1, 64))]
        elif kind == "repeat":
            piece = data[at : at + draw(st.integers(1, 64))]
            data[at:at] = piece * draw(st.integers(1, 20))
        elif kind == "splice":
            other = draw(st.sampled_from(SEEDS))
            data[at:] = other[at:]
        else:
            data[at:at] = draw(st.binary(min_size=1, max_size=32))
    whole = bytes(data)
    return with_checksums(whole) if draw(st.booleans()) else whole


def with_checksums(data: bytes) -> bytes:
    """A PNG with its chunks' checksums made right as far as its chunks can be followed; anything else as it is."""
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        return data
    fixed, at = bytearray(data), 8
    while at + 12 <= len(fixed):
        length = struct.unpack_from(">I", fixed, at)[0]
        end = at + 8 + length
        if end + 4 > len(fixed):
            break
        struct.pack_into(">I", fixed, end, zlib.crc32(fixed[at + 4 : end]))
        at = end + 4
    return bytes(fixed)


def check(data: bytes) -> str:
    """Decode, and return what became of it. Raises AssertionError where that is no outcome a picture may have."""
    message = ""
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    try:
        found = images.decode(data, MAX_PIXELS)
    except images.ImageError as error:
        outcome, message = error.kind, str(error)
    else:
        outcome = "decoded"
        assert found.dtype == np.uint8
        assert found.ndim == 3
        assert found.shape[2] == 3
        assert 0 < found.shape[0] * found.shape[1] <= MAX_PIXELS
    assert outcome in {"decoded", "broken_image", "image_too_large"}, outcome
    assert "0x" not in message, message
    assert len(message) < 500, message
    assert time.perf_counter() - started < SECONDS, f"took {time.perf_counter() - started:.1f} s"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < GROWTH, "took too much memory"
    return outcome


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=900)
    parser.add_argument("--keep", type=Path, default=Path(tempfile.gettempdir()) / "decoder-fuzz.bin")
    arguments = parser.parse_args()
    counts: dict[str, int] = {}
    started = time.monotonic()

    @settings(max_examples=500, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(damaged())
    def round_of_damage(data: bytes) -> None:
        arguments.keep.write_bytes(data)
        outcome = check(data)
        counts[outcome] = counts.get(outcome, 0) + 1

    while time.monotonic() - started < arguments.seconds:
        try:
            round_of_damage()
        except AssertionError as error:
            failed = arguments.keep.with_name(f"decoder-fuzz-{int(time.time())}.bin")
            failed.write_bytes(arguments.keep.read_bytes())
            print(f"{error}: kept as {failed}", flush=True)
        spent = time.monotonic() - started
        print(f"{sum(counts.values())} pictures in {spent:.0f} s: {counts}", flush=True)


if __name__ == "__main__":
    main()
