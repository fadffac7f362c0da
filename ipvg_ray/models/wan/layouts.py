"""How long a video takes, and what it holds, on one card or on several: arithmetic for the plan, no model loaded.

The work of a forward is counted exactly (it equals torch's own counter on these architectures). Speeds are rounded
from times published for Wan's own code; they rank layouts well and foretell times roughly.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

GIB = 2**30
_TEXT_TOKENS, _TEXT_WIDTH, _TIME_WIDTH = 512, 4096, 256
_ACTIVATIONS = 76
"""Bytes of activations a token and channel of width: A14B's published peaks at 480p and 720p, less its weights."""
_DECODE = 8.5e6
"""Operations a pixel and frame of the VAE's decoder: 0.275 PF for 81 frames of 832x480."""
_DECODE_RATE = 60e12
_VAE_GIB = 3.0
_REST_GIB = 2.0
"""What the driver, NCCL and the allocator's gaps hold."""
_RANK_COST, _RING_COST = 0.034, 0.02
"""Share of a forward that each further rank adds: Wan2.1's and 2.2's published times on 2, 4 and 8 cards give 0.034 for
Ulysses. None are published for rings, which send more: what they add is a guess."""
_BRANCHES_COST = 0.01


@dataclass(frozen=True)
class Card:
    """A card: memory in GiB, and the bf16 rate that Wan's official code reaches on it, operations a second."""

    name: str
    memory: float
    rate: float


CARDS = {
    card.name: card
    for card in (
        Card("H100", 80, 450e12),
        Card("H200", 140, 450e12),
        Card("H20", 95, 130e12),
        Card("A100", 80, 180e12),
        Card("B200", 180, 820e12),
        Card("4090", 24, 98e12),
    )
}
"""From the times that Wan's authors publish for one card (H200: an H100 with more memory; B200: SGLang's)."""


@dataclass(frozen=True)
class Shape:
    """What decides a Wan transformer's work.

    Attributes:
        heads, head_dim, ffn, layers: of the main blocks.
        vace_layers: number of VACE blocks.
        inputs, control, outputs: channels.
        experts: transformers that are held at once, of which one works.
        temporal, spatial: frames and pixels of a latent.
    """

    heads: int
    head_dim: int
    ffn: int
    layers: int
    vace_layers: int = 0
    inputs: int = 16
    control: int = 0
    outputs: int = 16
    experts: int = 1
    temporal: int = 4
    spatial: int = 8

    @property
    def width(self) -> int:
        return self.heads * self.head_dim

    def tokens(self, frames: int, height: int, width: int, references: int = 0) -> int:
        """Tokens of a video, one for 2×2 latents."""
        latents = (frames - 1) // self.temporal + 1 + references
        return latents * (height // self.spatial // 2) * (width // self.spatial // 2)

    def attention(self, tokens: int) -> float:
        """Operations of all self-attentions of one forward, 2 a multiply-add; without their linear layers."""
        return 4.0 * tokens**2 * self.width * (self.layers + self.vace_layers)

    def forward(self, tokens: int) -> float:
        """Operations of one forward, 2 a multiply-add."""
        d, blocks = self.width, self.layers + self.vace_layers
        linear = 2 * tokens * d * (6 * d + 2 * self.ffn) + 4 * _TEXT_TOKENS * d * d
        hints = 2 * tokens * d * d * (self.vace_layers + 1) if self.vace_layers else 0
        ends = 8 * tokens * d * (self.inputs + self.control + self.outputs)
        text = 2 * _TEXT_TOKENS * (_TEXT_WIDTH * d + d * d) + 2 * (_TIME_WIDTH * d + 7 * d * d)
        return float(blocks * (linear + 4 * tokens * _TEXT_TOKENS * d) + hints + ends + text) + self.attention(tokens)

    @property
    def parameters(self) -> int:
        """Of one transformer."""
        d = self.width
        block = 8 * (d * d + d) + 4 * d + 2 * d * self.ffn + d + self.ffn + 2 * d + 6 * d
        hints = self.vace_layers * (block + d * d + d) + (d * d + d if self.vace_layers else 0)
        ends = 7 * d * d + d * d + (_TEXT_WIDTH + _TIME_WIDTH + 4 * (self.inputs + self.control + self.outputs)) * d
        return self.layers * block + hints + ends


SHAPES = {
    "vace-14B": Shape(40, 128, 13824, 40, vace_layers=8, control=96),
    "vace-1.3B": Shape(12, 128, 8960, 30, vace_layers=15, control=96),
    "i2v-A14B": Shape(40, 128, 13824, 40, inputs=36, experts=2),
    "ti2v-5B": Shape(24, 128, 14336, 30, inputs=48, outputs=48, spatial=16),
}


def read_shape(folder: Path, fallback: str) -> Shape:
    """The shape of a checkpoint in diffusers' layout, else of the model that goes by `fallback`."""
    try:
        config = json.loads((folder / "transformer" / "config.json").read_text())
        vae = json.loads((folder / "vae" / "config.json").read_text())
    except OSError:
        return SHAPES[fallback]
    vace = len(config["vace_layers"]) if config["_class_name"] == "WanVACETransformer3DModel" else 0
    return Shape(
        heads=config["num_attention_heads"],
        head_dim=config["attention_head_dim"],
        ffn=config["ffn_dim"],
        layers=config["num_layers"],
        vace_layers=vace,
        inputs=config["in_channels"],
        control=config.get("vace_in_channels", 0) if vace else 0,
        outputs=config["out_channels"],
        experts=2 if (folder / "transformer_2" / "config.json").is_file() else 1,
        temporal=vae.get("scale_factor_temporal", 4),
        spatial=vae.get("scale_factor_spatial", 8),
    )


@dataclass(frozen=True)
class Job:
    """One video: the model, its size, its steps, and the branches of each."""

    shape: Shape
    frames: int
    height: int
    width: int
    steps: int
    branches: int = 2
    references: int = 0

    @property
    def tokens(self) -> int:
        return self.shape.tokens(self.frames, self.height, self.width, self.references)


@dataclass(frozen=True)
class Estimate:
    """A layout's cost for a job.

    Attributes:
        cfg, ring, ulysses: the layout.
        fsdp: whether its weights are cut over ring and Ulysses ranks.
        seconds: of one video.
        memory: GiB that the fullest card holds.
        videos_per_hour: of one node.
    """

    cfg: int
    ring: int
    ulysses: int
    fsdp: bool
    seconds: float
    memory: float
    videos_per_hour: float

    @property
    def gpus(self) -> int:
        """Cards that work on one video."""
        return self.cfg * self.ring * self.ulysses


def estimate(job: Job, card: Card, cards: int, cfg: int, ring: int, ulysses: int, fsdp: bool = False) -> Estimate:
    """What a layout takes; `cards` are those of a node."""
    shape, shards = job.shape, ring * ulysses
    attention = shape.attention(job.tokens)
    idle = -(-shape.heads // ulysses) * ulysses / shape.heads  # heads that do not divide leave ranks waiting
    work = attention * idle + shape.forward(job.tokens) - attention
    exchange = 1 + _RANK_COST * (shards - 1) + _RING_COST * (ring - 1) + _BRANCHES_COST * (cfg - 1)
    forwards = job.steps * -(-job.branches // cfg)
    decode = _DECODE * job.frames * job.height * job.width / _DECODE_RATE / (cfg * shards)
    seconds = forwards * work / shards * exchange / card.rate + decode
    weights = 2 * shape.parameters * shape.experts / (max(ring, ulysses) if fsdp else 1)
    memory = (weights + _ACTIVATIONS * shape.width * job.tokens / shards) / GIB + _VAE_GIB + _REST_GIB
    per_node = cards // (cfg * shards) or cards / (cfg * shards)  # a group of several nodes: its share of one
    return Estimate(cfg, ring, ulysses, fsdp, seconds, memory, per_node * 3600 / seconds)


def fitting(job: Job, card: Card, cards: int) -> list[Estimate]:
    """Every layout of up to `cards` cards that the card's memory holds; whole weights before cut ones."""
    found = []
    for cfg, ring, ulysses in _layouts(cards, job.branches):
        for fsdp in (False, True) if ring * ulysses > 1 else (False,):
            made = estimate(job, card, cards, cfg, ring, ulysses, fsdp)
            if made.memory <= card.memory:
                found.append(made)
                break
    return found


def _layouts(cards: int, branches: int) -> Iterator[tuple[int, int, int]]:
    for cfg in range(1, branches + 1):
        for ulysses in range(1, cards // cfg + 1):
            for ring in range(1, cards // (cfg * ulysses) + 1):
                yield cfg, ring, ulysses


def most_videos(layouts: list[Estimate]) -> Estimate:
    """The layout that makes most videos an hour; of equals that with the fewest cards."""
    return max(layouts, key=lambda e: (round(e.videos_per_hour, 6), -e.gpus))


def lowest_latency(layouts: list[Estimate]) -> Estimate:
    """The layout that has a video done first."""
    return min(layouts, key=lambda e: (round(e.seconds, 6), e.gpus))


def advice(job: Job, card: Card, cards: int, chosen: tuple[int, int, int] = (1, 1, 1)) -> list[str]:
    """What the plan says: the best layout for throughput, for latency, and the chosen one (cfg, ring, ulysses)."""
    layouts = fitting(job, card, cards)
    about = f"{card.name} ({card.memory:g} GiB), {cards} a node; rough times"
    lines = [f"layouts on {about}:"]
    if layouts:
        lines.append(f"  most videos an hour: {_words(most_videos(layouts))}")
        lines.append(f"  lowest latency: {_words(lowest_latency(layouts))}")
    else:
        lines.append(f"  none of up to {cards} cards holds this model and size; see group.weights: offload")
    if chosen != (1, 1, 1):
        lines.append(f"  chosen: {_words(estimate(job, card, cards, *chosen))}")
    ulysses, heads = chosen[2], job.shape.heads
    if heads % ulysses:
        share = -(-heads // ulysses)
        divide = ", ".join(str(n) for n in range(2, min(heads, cards) + 1) if heads % n == 0)
        lines.append(
            f"  {heads} heads do not divide by ulysses {ulysses}: ranks have up to {share}, {share * ulysses - heads} "
            f"places stay idle; {divide} divide"
        )
    return lines


def _words(layout: Estimate) -> str:
    parts = [f"{name} {n}" for name in ("cfg", "ring", "ulysses") if (n := getattr(layout, name)) > 1]
    parts += ["weights fsdp"] if layout.fsdp else []
    cards = "1 card a video" if layout.gpus == 1 else f"{layout.gpus} cards a video ({', '.join(parts)})"
    minutes = f"{layout.seconds / 60:.1f} min" if layout.seconds >= 60 else f"{layout.seconds:.1f} s"
    return (
        f"{cards}: {layout.videos_per_hour:.3g} videos an hour and node, {minutes} each, {layout.memory:.0f} GiB a card"
    )
