"""A video survives its worker: the loop's state every few steps, and going on from it.

The loop draws no random numbers after the noise it starts from, and that comes from the row's seed. So latents, the
number of steps done and the scheduler's variables are the whole state, and what goes on from it ends in the same bytes.
Caches are emptied whenever a state is kept, whether or not anyone goes on from it: with a cache too, a video that was
interrupted is the one that was not.
"""

from __future__ import annotations

import hashlib
import io
import logging
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from ipvg_ray.models.wan.guidance import Step
from ipvg_ray.models.wan.loop import LoopState
from ipvg_ray.models.wan.video import Sample

logger = logging.getLogger(__name__)

_FORMAT = 1


class Place(Protocol):
    """Where states are kept; a stage's scratch has this shape."""

    def read(self, name: str) -> bytes | None: ...

    def write(self, name: str, data: bytes) -> None: ...


class Keeper:
    """Keeps the state of one batch. Give `on_step` to the loop and `start()` as where to start from.

    Args:
        place: where.
        name: of the batch; states of other inputs must have another; see `name_of`.
        every: steps between two states.
        device: where tensors of a state that is read go.
        reset: empties the caches.
    """

    def __init__(
        self, place: Place, name: str, every: int, device: torch.device, reset: Callable[[], None] = lambda: None
    ) -> None:
        self.place = place
        self.name = name
        self.every = every
        self.device = device
        self.reset = reset

    def start(self) -> LoopState | None:
        """The state kept last; None where there is none or it cannot be read, and then the batch begins anew."""
        data = self.place.read(self.name)
        if data is None:
            return None
        try:
            return unpack(data, self.device)
        except Exception as error:  # torch raises many kinds for bytes that it did not write
            logger.warning("the state of a video cannot be read (%s); it is begun anew", error)
            return None

    def on_step(self, step: Step, state: LoopState) -> None:
        """Keep the state if its turn has come; not after the last step, when only the decoding is left.

        A video can do without its states, so one that cannot be written is only told.

        Raises:
            FileNotFoundError: where the place itself is gone; then what comes of the video cannot be kept either.
        """
        if state.done % self.every == 0 and state.done < step.count:
            try:
                self.place.write(self.name, pack(state))
            except FileNotFoundError:
                raise
            except OSError as error:
                logger.warning("the state of a video cannot be kept (%s); it goes on without", error)
            self.reset()


def pack(state: LoopState) -> bytes:
    """A state as bytes."""
    buffer = io.BytesIO()
    content: dict[str, Any] = {"format": _FORMAT, "done": state.done, "latents": state.latents}
    torch.save(content | {"scheduler": dict(state.scheduler)}, buffer)
    return buffer.getvalue()


def unpack(data: bytes, device: torch.device) -> LoopState:
    """What `pack` was given; tensors that were on a GPU come back on `device`.

    Raises:
        Exception: where the bytes are no state.
    """
    content = torch.load(
        io.BytesIO(data), weights_only=True, map_location=lambda storage, tag: _moved(storage, tag, device)
    )
    if content["format"] != _FORMAT:
        raise ValueError(f"it has format {content['format']}, not {_FORMAT}")
    return LoopState(content["done"], content["latents"], content["scheduler"])


def _moved(storage: Any, tag: str, device: torch.device) -> Any:
    return storage if tag == "cpu" else storage.to(device=device)


def name_of(samples: Sequence[Sample], negative: torch.Tensor | None) -> str:
    """A name that only equal inputs share: a hash over texts, pictures and seeds.

    Not over what networks make of them: on another card that may differ in the last bit.
    """
    digest = hashlib.blake2b(digest_size=16)
    for sample in samples:
        digest.update(f"seed {sample.seed}".encode())
        for kind, picture in vars(sample.pictures).items():
            if picture is not None:
                digest.update(f"{kind} {picture.shape}".encode() + picture.tobytes())
        _add(digest, sample.text)
    if negative is not None:
        _add(digest, negative)
    return digest.hexdigest()


def _add(digest: Any, states: torch.Tensor) -> None:
    digest.update(f"{states.dtype} {tuple(states.shape)}".encode())
    digest.update(states.contiguous().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
