"""How several cards share one video."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from ipvg_ray.config.base import Section


class GroupConfig(Section):
    """The group of ranks, one a card, that works on one video; alone by default, which gives most videos an hour.

    `cfg` ranks share the branches of guidance, `ring` and `ulysses` ranks the tokens of each forward; their product is
    `gpus`. On a pool without GPUs the ranks are processes on the CPU. `weights` fsdp cuts the weights over ring and
    Ulysses ranks, offload fetches them block by block from host memory (also for a card alone). When no rank has moved
    for `stall_s` seconds, or one has died, the group is made anew, up to `rebuilds` times for one row; with `reserve`
    from processes that stand by with their libraries imported, half a gigabyte of host memory each.
    """

    gpus: int = Field(1, ge=1)
    cfg: int = Field(1, ge=1)
    ring: int = Field(1, ge=1)
    ulysses: int = Field(1, ge=1)
    across_nodes: bool = False
    weights: Literal["whole", "fsdp", "offload"] = "whole"
    stall_s: float = Field(600.0, ge=0)
    rebuilds: int = Field(2, ge=0)
    reserve: bool = True

    @model_validator(mode="after")
    def _product(self) -> GroupConfig:
        product = self.cfg * self.ring * self.ulysses
        if product != self.gpus:
            raise ValueError(
                f"cfg {self.cfg} × ring {self.ring} × ulysses {self.ulysses} = {product}, and gpus is {self.gpus}; "
                f"{self._such_as()}"
            )
        if self.weights == "fsdp" and self.ring * self.ulysses == 1:
            raise ValueError(
                "weights fsdp needs ring or ulysses ranks; ranks of different branches cannot share weights"
            )
        if self.across_nodes and self.gpus == 1:
            raise ValueError("across_nodes is for groups of several gpus")
        return self

    def _such_as(self) -> str:
        splits = [(1, 1), (2, 1), (self.cfg, self.ring)]
        options = [
            f"{{cfg: {cfg}, ring: {ring}, ulysses: {self.gpus // (cfg * ring)}}}"
            for cfg, ring in dict.fromkeys(splits)
            if self.gpus % (cfg * ring) == 0
        ]
        return "such as " + ", or ".join(options)
