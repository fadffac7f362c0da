"""Models come to a node once, before its first worker loads them; and how long after its start a node does its work."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from ipvg_ray import mirror
from ipvg_ray.pipeline.stage import Stage
from ipvg_ray.storage import run_path


def take_models(stages: Sequence[Stage]) -> list[str]:
    """Have the models of these stages on this machine, from `models.mirror` if one is set; returns what was fetched.

    Of those that a stage can do without, the ones that the mirror has: before `models`, which may tell by the disk.

    Raises:
        FetchError: where the mirror lacks one, or this machine's disk has no room.
    """
    taken = []
    for stage in stages:
        models = getattr(stage.config, "models", None)
        if models is None or models.mirror is None:
            continue
        place = run_path(models.mirror)
        optional = [name for name in _names(stage.wanted_models(), models.root) if mirror.holds(name, place)]
        taken += [name for name in optional if mirror.take(name, models.root, place)]
        taken += [name for name in _names(stage.models(), models.root) if mirror.take(name, models.root, place)]
    return taken


def _names(models: Mapping[str, Path], root: Path) -> list[str]:
    """Names of the models below `root`; others were named by a path of their own."""
    return list(dict.fromkeys(p.relative_to(root).as_posix() for p in models.values() if p.is_relative_to(root)))


def node_age() -> float:
    """Seconds since this node's Ray began: the age of this worker's parent process; 0 where nobody tells."""
    try:
        started = float(Path(f"/proc/{os.getppid()}/stat").read_text().rpartition(")")[2].split()[19])
        up = float(Path("/proc/uptime").read_text().split()[0])
        return max(0.0, up - started / os.sysconf("SC_CLK_TCK"))
    except (OSError, ValueError, IndexError):
        return 0.0
