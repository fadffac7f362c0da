"""The figures that Prometheus is given, and that the dashboard asks for none that are not there."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from engine_driver import request

from ipvg_ray.pipeline.ledger import Event
from ipvg_ray.pipeline.metrics import Meters
from ipvg_ray.pipeline.plan import make_steps
from ipvg_ray.pipeline.progress import Progress
from ipvg_ray.pipeline.survey import Counts

ROOT = Path(__file__).parent.parent


def asked_for() -> set[str]:
    """Our figures in the dashboard's queries."""
    panels = json.loads((ROOT / "deploy/grafana.json").read_text())["panels"]
    return {name for p in panels for name in re.findall(r"ray_ipvg_\w+", p["targets"][0]["expr"])}


class Kept:
    """A counter, gauge or histogram that keeps what it is told."""

    told: dict[str, list[tuple[float, str]]]

    def __init__(self, name: str, *rest: Any) -> None:
        self.name = name

    def inc(self, value: float, tags: dict[str, str]) -> None:
        self.told.setdefault(self.name, []).append((value, tags["stage"]))

    set = observe = inc


def test_figures_follow_what_workers_tell(tmp_path: Path) -> None:
    class Mine(Kept):
        told: dict[str, list[tuple[float, str]]] = {}  # noqa: RUF012 - one per test

    steps = make_steps(request(tmp_path, workers=2).stages)
    meters = Meters(steps, "run", SimpleNamespace(Counter=Mine, Gauge=Mine, Histogram=Mine))
    seen = Progress({s.name: Counts(10, 0, 0, 0, 10) for s in steps}, {s.name: s.stage.grain for s in steps}, 1.0)
    events = [
        Event("first", "b", began=4, node_age=33.0),
        Event("first", "b", done=3, failed=1, seconds=2.5, ended=True),
    ]
    seen.add(events)
    meters.add(events, seen)
    told = Mine.told
    assert told["ipvg_rows"] == [(3, "first")]
    assert told["ipvg_failures"] == [(1, "first")]
    assert told["ipvg_batch_seconds"] == [(2.5, "first")]
    assert told["ipvg_rows_waiting"] == [(6, "first"), (9, "second"), (9, "third")]
    assert told["ipvg_first_row_seconds"][0] == (33.0, "first")
    assert all(0 <= share <= 1 for share, _ in told["ipvg_busy_share"])
    assert told["ipvg_busy_share"][0][0] > 0
    meters.add([], seen)
    assert len(told["ipvg_rows_waiting"]) == 3, "gauges are told every five seconds"


PROGRAM = """
import os, sys, time, urllib.request, tempfile
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from job_on_a_cluster import free_port
import ray
from engine_driver import request
from ipvg_ray.pipeline.ledger import Event
from ipvg_ray.pipeline.metrics import Meters
from ipvg_ray.pipeline.plan import make_steps
from ipvg_ray.pipeline.progress import Progress
from ipvg_ray.pipeline.survey import Counts
port = free_port()
ray.init("local", num_cpus=1, _metrics_export_port=port, include_dashboard=False, log_to_driver=False)
steps = make_steps(request(Path("x")).stages)
seen = Progress({s.name: Counts(9, 0, 0, 0, 9) for s in steps}, {s.name: s.stage.grain for s in steps}, 1.0)
meters = Meters(steps, "run")
text, deadline = "", time.monotonic() + 90
while ("ray_ipvg_rows_total" not in text or "ray_ipvg_busy_share" not in text) and time.monotonic() < deadline:
    meters.add([Event("first", "b", done=1, failed=1, seconds=1.0, ended=True)], seen)
    time.sleep(2)
    try:
        text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5).read().decode()
    except OSError:
        pass
print("\\n".join(line for line in text.splitlines() if "ipvg" in line))
ray.shutdown()
"""


@pytest.mark.slow
def test_ray_serves_every_figure_that_the_dashboard_asks_for() -> None:
    here = str(Path(__file__).parent)
    done = subprocess.run([sys.executable, "-c", PROGRAM, here], capture_output=True, text=True, timeout=200)
    served = set(re.findall(r"^(ray_ipvg_\w+)\{", done.stdout, re.M))
    assert asked_for() <= served, done.stdout[-2000:] + done.stderr[-2000:]
    assert 'stage="first"' in done.stdout
    assert 'run="run"' in done.stdout
