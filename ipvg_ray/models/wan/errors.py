"""What can go wrong with Wan models."""

from __future__ import annotations


class WanError(ValueError):
    """A folder without the model, inputs that it cannot take, or a result that is no picture."""
