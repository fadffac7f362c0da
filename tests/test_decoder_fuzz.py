"""A short run of the decoder's fuzzer, and the pictures that a long one found."""

from __future__ import annotations

from fuzz_decoder import check, damaged
from hypothesis import HealthCheck, given, settings


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(damaged())
def test_damaged_pictures_are_right_or_refused_by_name(data: bytes) -> None:
    check(data)
