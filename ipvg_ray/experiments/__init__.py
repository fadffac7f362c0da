"""Named sets of configurations that end in one table each: the papers' tables and users' own. Knows no models.

The numbers are those that the papers and the challenge's site print: IPVG-STD (arXiv 2507.04705), TPIGE (2509.01362).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ipvg_ray import schema
from ipvg_ray.errors import UserError

_PAPER = (
    "arc_sim",
    "overall_consistency",
    "aesthetic_quality",
    "imaging_quality",
    "motion_smoothness",
    "dynamic_degree",
)
_CHALLENGE = ("cur_sim", "arc_sim", "face_distance", "clip_score")
_TPIGE = (*_CHALLENGE, "gme_score", "motion_smoothness", "imaging_quality", "overall")
_SMALL = "Wan2.1-VACE-1.3B-diffusers"


class ExperimentError(UserError, ValueError):
    """A name that is no experiment, or a file that describes none."""


@dataclass(frozen=True)
class Variant:
    """One row of the table.

    Attributes:
        name: the row's heading, unlike the others'.
        values: what it changes in the configuration, as nested mappings.
        paper: metric to what the paper prints.
    """

    name: str
    values: Mapping[str, Any]
    paper: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Experiment:
    """A table to make. The first variant is what the others are compared with; `shared` changes all of them."""

    title: str
    metrics: tuple[str, ...]
    variants: tuple[Variant, ...]
    shared: Mapping[str, Any] = field(default_factory=dict)

    def refuse_overrides(self, overrides: Iterable[str]) -> None:
        """Refuse `section.field=value` texts that would set, for all rows, what is to tell them apart.

        Raises:
            ExperimentError: names the row and the key.
        """
        for text in overrides:
            key = text.partition("=")[0].strip()
            for variant in self.variants:
                for own in _keys(variant.values):
                    if f"{own}.".startswith(f"{key}.") or f"{key}.".startswith(f"{own}."):
                        raise ExperimentError(
                            f"--set {text}: the row {variant.name!r} sets {own} itself, and all rows would become "
                            "alike; write an experiment file of your own"
                        )


def _keys(tree: Mapping[str, Any], above: str = "") -> Iterator[str]:
    """`section.field` of every value of nested mappings."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _keys(value, f"{above}{key}.")
        else:
            yield f"{above}{key}"


def _printed(*numbers: float) -> dict[str, float]:
    return dict(zip(_PAPER, numbers, strict=True))


EXPERIMENTS: dict[str, Experiment] = {
    "table1": Experiment(
        "Reference-to-video against first frame and image-to-video (IPVG-STD, table 1)",
        _PAPER,
        (
            Variant("R2V", {"video": {"task": "vace-r2v"}}, _printed(0.238, 0.202, 0.583, 0.692, 0.984, 0.552)),
            Variant("T2I→I2V", {"video": {"task": "vace-i2v"}}, _printed(0.262, 0.215, 0.588, 0.701, 0.979, 0.848)),
        ),
    ),
    "table2": Experiment(
        "Raw against refined prompts, by backbone (IPVG-STD, table 2, 25 identities)",
        _PAPER,
        (
            Variant("VACE-14B raw", {"prompts": {"method": "raw"}}, _printed(0.208, 0.198, 0.579, 0.680, 0.976, 0.776)),
            Variant("VACE-14B refined", {}, _printed(0.246, 0.210, 0.586, 0.689, 0.976, 0.812)),
            Variant(
                "Wan-1.3B raw",
                {"prompts": {"method": "raw"}, "video": {"model": _SMALL}},
                _printed(0.166, 0.190, 0.520, 0.665, 0.964, 0.824),
            ),
            Variant(
                "Wan-1.3B refined",
                {"video": {"model": _SMALL}},
                _printed(0.198, 0.204, 0.535, 0.679, 0.968, 0.840),
            ),
        ),
        {"dataset": {"limit": 25}},
    ),
    "tpige": Experiment(
        "Guidance of TPIGE against plain guidance, from the reference drawn in the prompt's clothes (the paper's "
        "numbers are those of its whole entry to the challenge, not of the guidance alone)",
        _TPIGE,
        (
            Variant("plain guidance", {"video": {"guide": "cfg"}}),
            Variant(
                "TPIGE, released code",
                {"video": {"guide": "tpige", "tpige": {"mode": "release"}}},
                {"cur_sim": 0.492, "arc_sim": 0.473, "face_distance": 170.0, "clip_score": 27.8},
            ),
            Variant("TPIGE, formula of the figure", {"video": {"guide": "tpige", "tpige": {"mode": "paper"}}}),
        ),
        {
            "prompts": {"method": "tpige"},
            "first_frame": {"reference": {"enhance": "hyperlora"}},
            "video": {"task": "vace-r2v", "reference": "reference_picture"},
        },
    ),
}


def find(name: str) -> Experiment:
    """The experiment of that name, or the one that a YAML file of that path describes.

    Raises:
        ExperimentError: where there is neither; the message names what there is.
    """
    if name in EXPERIMENTS:
        return EXPERIMENTS[name]
    file = Path(name)
    if not file.is_file():
        raise ExperimentError(f"no experiment {name!r} and no such file; there are {', '.join(EXPERIMENTS)}")
    try:
        return _read(yaml.safe_load(file.read_text(encoding="utf-8")), file)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ExperimentError(f"cannot read the experiment {file}: {error}") from error


def _read(tree: Any, file: Path) -> Experiment:
    """`{title, metrics: [...], shared: {...}, variants: [{name, set: {...}, paper: {...}}]}`."""
    if not isinstance(tree, dict) or not isinstance(tree.get("variants"), list) or not tree["variants"]:
        raise ExperimentError(f"{file} has no list `variants`, each with a name and what it sets")
    variants = []
    for number, entry in enumerate(tree["variants"], 1):
        if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
            raise ExperimentError(f"{file}: variant {number} has no name")
        if strange := set(entry) - {"name", "set", "paper"}:
            raise ExperimentError(f"{file}: variant {entry['name']!r} has {sorted(strange)}; known: name, set, paper")
        variants.append(Variant(entry["name"], entry.get("set") or {}, entry.get("paper") or {}))
    names = [variant.name for variant in variants]
    if len(set(names)) < len(names):
        raise ExperimentError(f"{file}: two variants have one name; name each its own")
    metrics = tuple(tree.get("metrics") or _PAPER)
    known = schema.table("evaluate").columns
    for metric in set(metrics) - set(known):
        raise ExperimentError(f"{file}: no score is called {metric!r}; there are {', '.join(known)}")
    return Experiment(str(tree.get("title") or file.stem), metrics, tuple(variants), tree.get("shared") or {})
