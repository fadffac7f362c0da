"""The metrics by name, which models each needs, and which of them can be computed here. Loads nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from ipvg_ray.metrics.overall import WEIGHTS

MODELS: dict[str, tuple[str, ...]] = {
    "cur_sim": ("curricular_face",),
    "face_distance": ("inception",),
    "human_identity": ("retina_face", "resnet_face"),
    "overall_consistency": ("vi_clip", "clip_b32"),
    "aesthetic_quality": ("clip_l14", "aesthetic_head"),
    "imaging_quality": ("musiq",),
    "motion_smoothness": ("amt",),
    "dynamic_degree": ("raft",),
    "clip_score": ("clip_b32",),
    "clip_score_tpige": ("clip_b16",),
    "gme_score": ("gme",),
}
"""Metric to the fields of the configuration's section `evaluate` that name its models. ViCLIP borrows CLIP's tokenizer.

Arc-Sim is not among them: its model is the face pack, which the stage cannot do without.
"""
NAMES = (*MODELS, "overall")


def fields_of(names: Iterable[str]) -> list[str]:
    """Fields that name the models of these metrics, each once."""
    return list(dict.fromkeys(field for name in names for field in MODELS.get(name, ())))


def usable(
    names: Iterable[str], paths: Mapping[str, Path], *, accept_licence: bool
) -> tuple[list[str], dict[str, str]]:
    """Which of the metrics can be computed.

    Args:
        names: metrics wanted, from `NAMES`.
        paths: field to where its model should be.
        accept_licence: whether models under non-commercial terms may be used.

    Returns:
        The names that can be, in order; and for each other one the reason, in words.
    """
    ready: list[str] = []
    skipped: dict[str, str] = {}
    wanted = list(dict.fromkeys(names))
    for name in wanted:
        reason = next(filter(None, (_flaw(paths[field], accept_licence) for field in MODELS.get(name, ()))), None)
        if reason is None:
            ready.append(name)
        else:
            skipped[name] = reason
    if "overall" in ready and (lacking := sorted(set(WEIGHTS) - {"arc_sim"} - set(ready))):
        ready.remove("overall")
        skipped["overall"] = f"it is a sum of which {', '.join(lacking)} are missing"
    return ready, skipped


def _flaw(path: Path, accept_licence: bool) -> str | None:
    """Why a model cannot be used, or None."""
    if not path.exists():
        return f"{path.name} is not there"
    return _refusal(path, accept_licence)


def accepted(path: Path, accept_licence: bool) -> bool:
    """Whether a model's terms allow its use, wherever it is."""
    return _refusal(path, accept_licence) is None


def _refusal(path: Path, accept_licence: bool) -> str | None:
    from ipvg_ray.models import registry

    known = registry.at(path)
    if known is not None and not known[0].licence.commercial and not accept_licence:
        return f"the licence of {path.name} ({known[0].licence.spdx}) is not accepted"
    return None


def told(skipped: Mapping[str, str]) -> str:
    """The reasons as one text, `metric: reason; …`."""
    return "; ".join(f"{name}: {reason}" for name, reason in skipped.items())
