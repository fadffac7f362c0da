"""Low-rank adapters (Hu et al., "LoRA", arXiv 2106.09685) of which every sample of a batch has its own.

Nothing is fused into the weights, so one call of the UNet serves as many identities as its batch has samples.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn

PARTS = ("to_q", "to_k", "to_v", "to_out_0")
"""The projections of an attention module, as kohya's LoRA files write them."""

_NAME = re.compile(r"lora_unet_(?P<place>\w+?)_transformer_blocks_(?P<depth>\d+)_(?P<attention>attn[12])")
_SGM = re.compile(r"(?P<half>input|output)_blocks_(?P<number>\d+)_1")
_DIFFUSERS = re.compile(r"(?P<half>down|up)_blocks_(?P<block>\d+)_attentions_(?P<attention>\d+)")


class LoraError(ValueError):
    """Adapters that do not fit the network or the batch they are meant for."""


class LoraPair(NamedTuple):
    """One adapter: x ↦ up (down x), to be added to a linear layer. down is (rank, in), up (out, rank)."""

    down: torch.Tensor
    up: torch.Tensor


Adapter = Mapping[str, LoraPair]
"""One sample's pairs, by the names that the network's paths are known under."""


def attention_path(name: str) -> str:
    """Path of an attention module in diffusers' SDXL UNet, from its name in a LoRA file.

    Two numberings are in use: the original one of SDXL (`lora_unet_input_blocks_4_1_transformer_blocks_0_attn1`),
    which counts resnets and resamplers in one row, three to a resolution, and diffusers' own
    (`lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1`).

    Raises:
        LoraError: for a name of neither kind.
    """
    match = _NAME.fullmatch(name)
    place = _place(match["place"]) if match else None
    if match is None or place is None:
        raise LoraError(f"{name!r} names no attention module of an SDXL UNet, in neither numbering")
    return f"{place}.transformer_blocks.{match['depth']}.{match['attention']}"


def _place(text: str) -> str | None:
    if text in ("middle_block_1", "mid_block_attentions_0"):
        return "mid_block.attentions.0"
    if match := _DIFFUSERS.fullmatch(text):
        return f"{match['half']}_blocks.{match['block']}.attentions.{match['attention']}"
    if match := _SGM.fullmatch(text):
        number = int(match["number"])
        if match["half"] == "output":
            return f"up_blocks.{number // 3}.attentions.{number % 3}"
        if number:  # input block 0 is the first convolution
            return f"down_blocks.{(number - 1) // 3}.attentions.{(number - 1) % 3}"
    return None


def projection_paths(names: Iterable[str]) -> dict[str, str]:
    """`{name}_{part}`, as in kohya's files, to the path of that linear layer in diffusers' UNet.

    Raises:
        LoraError: for a name that `attention_path` does not know.
    """
    return {f"{name}_{part}": f"{attention_path(name)}.{_dotted(part)}" for name in names for part in PARTS}


def _dotted(part: str) -> str:
    return "to_out.0" if part == "to_out_0" else part


class LoraLinear(nn.Linear):
    """A linear layer that adds up_b (down_b x_b) to the output of sample b, while pairs are set.

    It shares the parameters of the layer it stands for, under the same names, so state dicts stay as they were.
    """

    @classmethod
    def around(cls, linear: nn.Linear) -> LoraLinear:
        """The same layer, able to carry pairs."""
        wrapped = cls(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        wrapped.weight, wrapped.bias = linear.weight, linear.bias
        return wrapped.train(linear.training)

    def __init__(self, in_features: int, out_features: int, bias: bool = True, device: str | None = None) -> None:
        super().__init__(in_features, out_features, bias=bias, device=device)
        self.pairs: LoraPair | None = None

    def set(self, down: torch.Tensor, up: torch.Tensor) -> None:
        """Carry pairs for the samples of the next calls.

        Args:
            down: (B, rank, in).
            up: (B, out, rank), any scale multiplied in.

        Raises:
            LoraError: where the shapes are not this layer's.
        """
        if down.shape[-1] != self.in_features or up.shape[-2] != self.out_features or len(down) != len(up):
            raise LoraError(
                f"pairs {tuple(down.shape)} and {tuple(up.shape)} do not fit a linear layer "
                f"{self.in_features} → {self.out_features}"
            )
        # Not the weight's device: with offloading that is elsewhere between two calls.
        self.pairs = LoraPair(down.to(self.weight.dtype), up.to(self.weight.dtype))

    def clear(self) -> None:
        """Carry none: the plain layer again."""
        self.pairs = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(k·B, tokens, in) to (k·B, tokens, out). Row k·B + b is sample b: guidance stacks whole batches."""
        result = super().forward(x)
        if self.pairs is None:
            return result
        down, up = self.pairs
        if len(x) % len(down):
            raise LoraError(f"a batch of {len(x)} cannot be shared out among the pairs of {len(down)} samples")
        if len(x) != len(down):
            down, up = (each.repeat(len(x) // len(down), 1, 1) for each in (down, up))
        # One kernel multiplies and adds: the sum must not cost another pass over the layer's output.
        return torch.baddbmm(result, torch.bmm(x, down.mT), up.mT)


def merged(loras: Sequence[tuple[Adapter, float]]) -> dict[str, LoraPair]:
    """One adapter that does what several do at once: their ranks side by side, each `up` times its weight.

    Raises:
        LoraError: where they do not adapt the same layers.
    """
    names = loras[0][0].keys()
    if any(adapter.keys() != names for adapter, _ in loras):
        raise LoraError("LoRAs can be merged only where they adapt the same layers")
    return {
        name: LoraPair(
            torch.cat([adapter[name].down for adapter, _ in loras]),
            torch.cat([adapter[name].up * weight for adapter, weight in loras], dim=1),
        )
        for name in names
    }


class PerSampleLora:
    """The adapted layers of one network, set and cleared together."""

    def __init__(self, network: nn.Module, paths: Mapping[str, str]) -> None:
        """Replace linear layers of `network` by `LoraLinear`.

        Args:
            network: changed in place; computes as before until pairs are set.
            paths: an adapter's names, to the layers' paths in `network`.

        Raises:
            LoraError: where the network has no linear layer at a path; it is then left as it was.
        """
        found = {name: _linear(network, name, path) for name, path in paths.items()}
        self._layers = {
            name: layer if isinstance(layer, LoraLinear) else LoraLinear.around(layer) for name, layer in found.items()
        }
        for name, path in paths.items():
            parent, _, attribute = path.rpartition(".")
            setattr(network.get_submodule(parent), attribute, self._layers[name])

    def set(self, batch: Sequence[Adapter], scale: float, copies: int = 1) -> None:
        """Give sample b of the next calls the pairs of `batch[b]`, times `scale`.

        Args:
            batch: one adapter per sample, all of one rank.
            scale: what they are applied with.
            copies: how often the next calls stack the batch (2 for guidance); another number costs a copy per layer.

        Raises:
            LoraError: where an adapter lacks a layer's pair or has a wrong shape; then no layer carries any.
        """
        self.clear()
        try:
            for name, layer in self._layers.items():
                pairs = [adapter[name] for adapter in batch] * copies
                layer.set(torch.stack([p.down for p in pairs]), torch.stack([p.up for p in pairs]) * scale)
        except KeyError as error:
            self.clear()
            raise LoraError(f"an adapter has no pair for {error}; it was made for another network") from None
        except LoraError:
            self.clear()
            raise

    def clear(self) -> None:
        """Back to the plain network."""
        for layer in self._layers.values():
            layer.clear()

    @contextmanager
    def applied(self, batch: Sequence[Adapter], scale: float, copies: int = 1) -> Iterator[None]:
        """`set`, and `clear` at the end whatever happens."""
        self.set(batch, scale, copies)
        try:
            yield
        finally:
            self.clear()


def _linear(network: nn.Module, name: str, path: str) -> nn.Linear:
    try:
        layer = network.get_submodule(path)
    except AttributeError:
        layer = None
    if not isinstance(layer, nn.Linear):
        raise LoraError(f"the adapter names {name}, but this UNet has no linear layer {path}")
    return layer
