"""Pictures of many identities in one batch: SDXL, and for each sample the LoRA that HyperLoRA makes of its identity."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ipvg_ray.models.clip_vision import ClipVision
from ipvg_ray.models.hyperlora import ALPHA_PER_RANK, HyperLora
from ipvg_ray.models.lora import Adapter, LoraPair, PerSampleLora, merged
from ipvg_ray.models.sdxl import DrawSettings, Request, Sdxl
from ipvg_ray.models.sdxl_load import SdxlError


@dataclass(frozen=True, eq=False)
class Identity:
    """What HyperLoRA reads of a person.

    Attributes:
        key: by which the LoRA made of it is found again.
        pictures: the face on grey, uint8 RGB (H, W, 3), of one or more reference pictures.
        embeddings: ArcFace embeddings of the same pictures, (n, 512), each of length 1.
        base_pictures: the same pictures with the face blurred out; read only for a Base LoRA.
    """

    key: str
    pictures: tuple[np.ndarray, ...]
    embeddings: np.ndarray
    base_pictures: tuple[np.ndarray, ...] = ()


@dataclass(frozen=True, eq=False)
class Painting:
    """One picture to draw: `sdxl.Request` with an identity in place of its adapter."""

    identity: Identity
    prompt: str
    seed: int
    picture: np.ndarray | None = None
    mask: np.ndarray | None = None
    control: np.ndarray | None = None


class Painter:
    """Draws batches of mixed identities. To be used from one thread.

    Args:
        sdxl: the model; its attention projections are wrapped here to carry adapters.
        hyperlora: made for that model's UNet.
        clip: the vision model whose features `hyperlora` reads.
        weight: of the ID LoRA.
        base_weight: of the Base LoRA; above 0 only with a checkpoint that makes one.
        kept: identities whose LoRA is kept on the device, 23 MB each in the released size in half precision.

    Raises:
        ValueError: where the models do not fit each other.
    """

    def __init__(
        self,
        sdxl: Sdxl,
        hyperlora: HyperLora,
        clip: ClipVision,
        weight: float,
        base_weight: float = 0.0,
        kept: int = 32,
    ) -> None:
        if hyperlora.clip_width not in (None, clip.width):
            raise ValueError(
                f"first_frame.clip_vision gives {clip.width} channels and first_frame.hyperlora reads "
                f"{hyperlora.clip_width}; use the CLIP model that the HyperLoRA was trained with"
            )
        if base_weight and not hyperlora.has_base:
            raise ValueError(
                "first_frame.base_weight is above 0 and first_frame.hyperlora makes no Base LoRA; set it to 0"
            )
        self.sdxl = sdxl
        self.hyperlora = hyperlora
        self.clip = clip
        self.weight, self.base_weight = weight, base_weight
        self.kept = kept
        self.adapters: OrderedDict[str, Adapter] = OrderedDict()
        # With a Base LoRA the two weights are in the merged adapter already.
        sdxl.adapt(PerSampleLora(sdxl.unet, hyperlora.paths), ALPHA_PER_RANK * (1.0 if base_weight else weight))

    def paint(self, paintings: Sequence[Painting], settings: DrawSettings) -> list[np.ndarray | SdxlError]:
        """One UNet call per step for all of them; as `Sdxl.draw`."""
        requests = [
            Request(each.prompt, each.seed, self._adapter(each.identity), each.picture, each.mask, each.control)
            for each in paintings
        ]
        return self.sdxl.draw(requests, settings)

    def _adapter(self, identity: Identity) -> Adapter:
        """The identity's LoRA, made once for its prompts and attempts."""
        kept = self.adapters
        if identity.key not in kept:
            kept[identity.key] = self.make_adapter(identity)
            if len(kept) > self.kept:
                kept.popitem(last=False)
        kept.move_to_end(identity.key)
        return kept[identity.key]

    def make_adapter(self, identity: Identity) -> Adapter:
        """The identity's LoRA, merged with its Base LoRA where that has a weight."""
        lora = self._placed(identity_lora(self.hyperlora, self.clip, identity))
        if not self.base_weight:
            return lora
        base = self._placed(base_lora(self.hyperlora, self.clip, identity))
        return merged([(lora, self.weight), (base, self.base_weight)])

    def _placed(self, lora: Adapter) -> Adapter:
        """On the device and in the precision of the UNet; HyperLoRA itself may lie in host memory."""
        where = {"device": self.sdxl.device, "dtype": self.sdxl.unet.dtype}
        return {name: LoraPair(pair.down.to(**where), pair.up.to(**where)) for name, pair in lora.items()}


def identity_lora(hyperlora: HyperLora, clip: ClipVision, identity: Identity) -> dict[str, LoraPair]:
    """The ID LoRA of a person from all reference pictures; CLIP looks at them only where the checkpoint reads it."""
    embeddings = torch.from_numpy(np.asarray(identity.embeddings, np.float32))
    features = None
    if hyperlora.clip_width is not None:
        features = torch.cat([clip.penultimate(picture) for picture in identity.pictures])
    return hyperlora.lora(hyperlora.tokens(embeddings, features))


def base_lora(hyperlora: HyperLora, clip: ClipVision, identity: Identity) -> dict[str, LoraPair]:
    """The Base LoRA of a person, from all base pictures.

    Raises:
        HyperLoraError: where the checkpoint makes none.
    """
    features = torch.cat([clip.penultimate(picture) for picture in identity.base_pictures])
    return hyperlora.base_lora(hyperlora.base_tokens(features))
