"""`<run>/report.html`: one page that shows a run, in a single file that needs no network.

The page is bounded whatever the run's size: `report.rows` samples, `report.embed_mb` of media. It can be made of a run
in any state, and while it runs.
"""

from __future__ import annotations

import base64
import hashlib
import os
import uuid
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import resources
from typing import Any
from urllib.parse import urlsplit

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from ipvg_ray import tables
from ipvg_ray.config import ReportConfig
from ipvg_ray.report import facts, scores
from ipvg_ray.report.embed import Budget
from ipvg_ray.report.progress import FAILED, FINISHED, Progress, choose, read_progress
from ipvg_ray.report.scored import skipped_reasons
from ipvg_ray.report.views import IdentityView, failure_groups, sample_views
from ipvg_ray.storage import RunPath, S3Path, run_path

MINI_PROFILE = "cpu-mini"


def write_report(run_dir: RunPath, links_s: int = 0) -> RunPath:
    """Write `<run>/report.html`, replacing an earlier one in one step.

    Args:
        run_dir: a run directory, of a run that is finished, stopped or still going.
        links_s: seconds for which links to videos of a run in S3 are signed, so that they open without credentials; 0
            to leave them relative to the run.

    Returns:
        The page's path.

    Raises:
        FileNotFoundError: where the folder holds no run.json.
    """
    run_dir = run_path(run_dir)
    place = run_dir / "report.html"
    _replace(place, render(run_dir, links_s).encode("utf-8", "replace"))
    return place


def _replace(place: RunPath, page: bytes) -> None:
    if isinstance(place, S3Path):
        place.write_bytes(page)
        return
    temporary = place.with_name(f".report-{uuid.uuid4().hex}.html")
    try:
        temporary.write_bytes(page)
        os.replace(temporary, place)
    finally:
        temporary.unlink(missing_ok=True)


def render(run_dir: RunPath, links_s: int = 0) -> str:
    """The page's HTML; see `write_report`. Raises FileNotFoundError where the folder is not a run directory."""
    run = facts.mapping(tables.read_run(run_dir))
    config = facts.mapping(run.get("config"))
    progress = read_progress(run_dir, run)
    rows, embed_mb = _bounds(config)
    chosen = choose(progress.status, rows)
    groups = sample_views(run_dir, progress, chosen, Budget(embed_mb * 1_000_000, links_s))
    rows_of_scores = _score_rows(progress)
    css, js = _asset("page.css"), _asset("page.js")
    page = (
        _environment()
        .from_string(_asset("page.html"))
        .render(
            **_head(run_dir, run, config, progress),
            groups=groups,
            shown=len(chosen),
            failures=failure_groups(progress, _anchors(groups)),
            scores=scores.summarise(rows_of_scores),
            skipped=skipped_reasons(rows_of_scores),
            css=Markup(css),
            js=Markup(js),
            css_hash=_csp_hash(css),
            js_hash=_csp_hash(js),
            media_host=_media_host(run_dir, links_s),
        )
    )
    return page.lstrip()


def _media_host(run_dir: RunPath, links_s: int) -> str:
    """The store that signed links lead to, which the page may then play videos from; else nothing."""
    if not links_s or not isinstance(run_dir, S3Path):
        return ""
    parts = urlsplit((run_dir / "report.html").link(links_s))
    return f"{parts.scheme}://{parts.netloc}"


def _bounds(config: Mapping[str, Any]) -> tuple[int, int]:
    given, default = facts.mapping(config.get("report")), ReportConfig.model_validate({})
    rows, embed_mb = facts.number(given.get("rows")), facts.number(given.get("embed_mb"))
    return int(default.rows if rows is None else rows), int(default.embed_mb if embed_mb is None else embed_mb)


def _head(run_dir: RunPath, run: Mapping[str, Any], config: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
    """Everything above the samples."""
    sessions = facts.sessions(run)
    names = list(progress.lookups)
    finished, failed = progress.count(FINISHED), progress.count(FAILED)
    total = len(progress.status)
    return {
        "name": run_dir.resolve().name,
        "state": _state(total, finished, failed, sessions),
        "created": facts.moment(run.get("created")),
        "made": facts.moment(datetime.now(UTC)),
        "host": sessions[-1].host if sessions else "",
        "profile": str(config.get("profile") or "not named"),
        "mini": config.get("profile") == MINI_PROFILE,
        "counts": {
            "identities": progress.identities,
            "samples": total,
            "finished": finished,
            "failed": failed,
            "waiting": total - finished - failed,
        },
        "mended": progress.mended,
        "stages": progress.stages,
        "timings": facts.totals(sessions),
        "sessions": sessions,
        "models": facts.models(run, names),
        "dataset": facts.mapping(run.get("dataset")),
        "settings": facts.settings(config),
    }


def _state(total: int, finished: int, failed: int, sessions: list[facts.Session]) -> tuple[str, str]:
    """The run's state as a CSS class and words."""
    if total and finished == total:
        return "finished", "Finished"
    if total and finished + failed == total:
        return "failed", "Finished with failures"
    outcome = sessions[-1].outcome if sessions else "not started"
    known = {"interrupted": "Interrupted", "failed": "Stopped by an error", "not ended": "In progress"}
    return "waiting", known.get(outcome, "Not started" if outcome == "not started" else "Unfinished")


def _score_rows(progress: Progress) -> Any:
    rows = progress.lookups["evaluate"].narrow if "evaluate" in progress.lookups else None
    if rows is None or not len(rows):
        return tables.stored_schema("evaluate").empty_table()
    return tables.first_of_each(rows, "sample_id")


def _anchors(groups: list[IdentityView]) -> dict[tuple[str, str | None], str]:
    """(identity, sample) of a failure to the anchor of the row it leads to; without a sample, the identity's first."""
    anchors: dict[tuple[str, str | None], str] = {}
    for group in groups:
        for sample in group.samples:
            anchors[group.identity_id, sample.sample_id] = sample.anchor
            anchors.setdefault((group.identity_id, None), sample.anchor)
    return anchors


def _asset(name: str) -> str:
    return (resources.files("ipvg_ray.report") / name).read_text(encoding="utf-8")


def _csp_hash(text: str) -> str:
    """The source expression by which the page's policy allows exactly this script or style, and none from a prompt."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _environment() -> Environment:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(count=facts.count, duration=facts.duration, size=facts.size, clean=facts.clean)
    return environment
