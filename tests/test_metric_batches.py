"""Batches that hold items of several videos."""

from __future__ import annotations

import numpy as np
import pytest

from ipvg_ray.metrics.metric import in_batches


class TestBatches:
    """Items of several videos share batches, and find back to their videos."""

    videos = ([1, 2, 3], [], [4], [5, 6])

    def run(self, size: int) -> tuple[list[list[int]], list[list[float]]]:
        seen = []

        def double(items: np.ndarray) -> list[float]:
            seen.append(items[:, 0].tolist())
            return (2 * items[:, 0]).tolist()

        items = [[np.full(3, value) for value in video] for video in self.videos]
        return seen, in_batches(items, size, double)

    @pytest.mark.parametrize("size", [1, 2, 4, 100])
    def test_every_item_finds_its_place(self, size):
        seen, found = self.run(size)
        assert found == [[2, 4, 6], [], [8], [10, 12]]
        assert [len(batch) for batch in seen] == [size] * (6 // size) + [6 % size] * bool(6 % size)

    def test_items_of_other_shapes_have_batches_of_their_own(self):
        seen = []
        frames = [np.zeros((2, height, 8, 3), np.uint8) for height in (4, 6, 4)]
        found = in_batches(frames, 3, lambda batch: seen.append(batch.shape) or [batch.shape[1]] * len(batch))
        assert seen == [(3, 4, 8, 3), (1, 4, 8, 3), (2, 6, 8, 3)]
        assert found == [[4, 4], [6, 6], [4, 4]]

    def test_a_result_too_few_is_an_error(self):
        with pytest.raises(ValueError, match="shorter"):
            in_batches([np.zeros((3, 2))], 2, lambda batch: [0])
