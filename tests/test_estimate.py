"""What a run will take, and the run on a virtual clock."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
from engine_driver import request
from engine_inprocess import drive

from ipvg_ray import cli, config
from ipvg_ray.pipeline.estimate import EstimateError, Load, Prices, Rate, balance, costs, measured, rates, read_prices
from ipvg_ray.pipeline.nodes import ClusterFileError, Kind, one_machine, places, read_cluster
from ipvg_ray.pipeline.plan import rows_ahead
from ipvg_ray.pipeline.simulate import Conditions, Timeline, simulate
from ipvg_ray.pipeline.stage import Resources
from ipvg_ray.report import usage

ROOT = Path(__file__).parent.parent
RATIO = {"faces": 1, "matting": 1, "prompts": 4, "first_frame": 10, "video": 320, "evaluate": 6}


def load(name: str, rows: int, seconds: float, **asks: float) -> Load:
    return Load(name, rows, Rate(seconds, "given"), Resources(**{"cpus": 0, **asks}))  # type: ignore[arg-type]


def pipeline(rows: int, scale: float = 1.0) -> list[Load]:
    return [load(name, rows, s * scale, gpus=1 if name == "video" else 0.0) for name, s in RATIO.items()]


def on(gpus: float, loads: list[Load]) -> dict[str, Kind]:
    return dict.fromkeys((one.name for one in loads), one_machine(gpus)[0])


def test_balanced_pools_end_at_about_the_same_time() -> None:
    loads = [load("a", 1200, 10, gpus=1), load("b", 1200, 30, gpus=1), load("c", 2400, 5, gpus=0.5)]
    layout = balance(loads, on(9, loads))
    assert layout.workers == {"a": 2, "b": 6, "c": 2}
    assert layout.seconds == 6000
    one_more = balance(loads, on(10, loads))
    assert one_more.workers["b"] == 6, "a tenth card helps the bottleneck only if the others keep pace"
    with pytest.raises(EstimateError, match="one worker of each stage"):
        balance(loads, on(2, loads))


def test_pools_keep_to_their_bounds_where_asked() -> None:
    loads = [load("a", 100, 10, gpus=1, max_workers=3)]
    assert balance(loads, on(8, loads)).workers == {"a": 8}
    assert balance(loads, on(8, loads), bounded=True).workers == {"a": 3}


def test_more_workers_than_rows_help_nothing() -> None:
    loads = [load("a", 3, 10, gpus=1)]
    layout = balance(loads, on(8, loads))
    assert (layout.workers, layout.seconds) == ({"a": 3}, 10)


def test_groups_of_cards_do_not_span_nodes() -> None:
    kind = Kind(("video",), 64, 8, most=3)
    loads = [load("video", 90, 10, gpus=5)]
    layout = balance(loads, {"video": kind})
    assert (layout.workers, layout.nodes) == ({"video": 3}, {"video": 3}), "one group of five in each node of eight"


def test_cost_is_that_of_the_nodes_for_the_time() -> None:
    loads = [load("a", 3600, 10, gpus=1)]
    kind = Kind(("spot", "dear"), 8, 1, most=10, spot=True)
    layout = balance(loads, {"a": kind})
    prices = Prices({"head": 1.0, "spot": 2.0, "dear": 5.0})
    assert costs(layout, {"a": kind}, prices, "head", 3600) == (1 + 10 * 2, 1 + 10 * 5)
    with pytest.raises(EstimateError, match="no price for node type dear; add it under nodes"):
        costs(layout, {"a": kind}, Prices({"spot": 2.0}), "head", 3600)


def test_rates_come_from_the_checkpoints_of_an_earlier_run(tmp_path: Path) -> None:
    asked = request(tmp_path / "run")
    drive(asked)
    first = asked.stages[0]
    found = rates([first], [tmp_path / "nothing", tmp_path / "run"])["first"]
    assert found.source.startswith("5 rows of ")
    assert found.spread is not None
    assert found.spread[0] <= found.seconds <= found.spread[-1]
    assert measured(tmp_path / "run", first.table()) is not None
    with pytest.raises(EstimateError, match="nothing is known of first's seconds"):
        rates([first], [])
    assert rates([first], [tmp_path / "run"], {"first": 7.0})["first"].seconds == 7.0


def test_published_figures_are_marked_and_shared_by_a_group() -> None:
    from ipvg_ray.stages import make_stages

    stages = make_stages(config.load("gpu", overrides=["video.pool.gpus=8"]))
    found = rates(stages, [])
    assert found["video"].seconds == 80, "a worker has two rows in work, which end 40 s apart"
    assert found["video"].source == "published, divided by 8 cards"
    prompts = stages[2].resources()
    assert Load("prompts", 100, found["prompts"], prompts).work == pytest.approx(400), "of the worker as a whole"


@pytest.mark.parametrize("name", ["cluster.yaml", "deploy/cluster-gcp.yaml", "deploy/kuberay/raycluster.yaml"])
def test_cluster_files_are_read_and_stages_placed(name: str) -> None:
    kinds, head = read_cluster(ROOT / name)
    assert head == "head"
    assert [(kind.types[0], kind.gpus) for kind in kinds] == [("cpu", 0), ("one-gpu-spot", 1), ("eight-gpu-spot", 8)]
    assert kinds[1].types == ("one-gpu-spot", "one-gpu-on-demand")
    assert kinds[1].spot
    asks = {"any": Resources(), "card": Resources(gpus=0.1), "group": Resources(gpus=8, accelerator_type="H100")}
    found = places(asks, kinds)
    assert [found[stage].types[0] for stage in asks] == ["cpu", "one-gpu-spot", "eight-gpu-spot"]
    with pytest.raises(ClusterFileError, match="big asks for 1 CPU, 16 GPU"):
        places({"big": Resources(gpus=16)}, kinds)


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text("nodes: [1]")
    with pytest.raises(ClusterFileError, match="no available_node_types"):
        read_cluster(file)
    with pytest.raises(EstimateError, match="is no price file"):
        read_prices(file)
    file.write_text("available_node_types: {w: {node_config: {}, resources: {}}}\nhead_node_type: h")
    with pytest.raises(ClusterFileError, match="node type w must say its CPU"):
        read_cluster(file)
    assert read_prices(ROOT / "deploy/prices.yaml").nodes.keys() == {"head"} | {
        name for kind in read_cluster(ROOT / "cluster.yaml")[0] for name in kind.types
    }


# -- the virtual clock -------------------------------------------------------------------------------------------

AT_ONCE = Conditions(node_s=0, load_s=0)


def test_one_stage_takes_rows_times_seconds_over_workers() -> None:
    loads = [load("a", 100, 3.0, gpus=1, min_workers=4)]
    played = simulate(loads, on(4, loads), {"a": 4}, AT_ONCE)
    assert played.seconds == pytest.approx(75)
    assert played.idle_share("a") == pytest.approx(0)
    assert played.stages["a"].gpus.sums.sum() == pytest.approx(300), "GPU seconds"


def test_stages_overlap_and_identities_fan_out() -> None:
    loads = [load("a", 10, 1.0), load("b", 50, 1.0), load("c", 50, 0.5)]
    played = simulate(loads, on(1, loads), {"a": 1, "b": 1, "c": 1}, AT_ONCE)
    assert played.seconds == pytest.approx(1 + 50 + 0.5)


def test_batches_fill_up_and_the_last_one_need_not() -> None:
    loads = [load("a", 10, 1.0), load("b", 10, 1.0, batch_size=4)]
    played = simulate(loads, on(1, loads), {"a": 1, "b": 1}, AT_ONCE)
    assert played.seconds == pytest.approx(4 + 4 + 4 + 2)


def test_nodes_and_models_take_their_time_and_leave_when_done() -> None:
    loads = [load("a", 10, 1.0), load("b", 10, 100.0, gpus=1)]
    kinds = {"a": Kind(("cpu",), 4, 0), "b": Kind(("gpu",), 4, 1)}
    played = simulate(loads, kinds, {"a": 1, "b": 1}, Conditions(node_s=60, load_s=30))
    assert played.seconds == pytest.approx(90 + 1 + 1000)
    assert played.node_hours["gpu"] == pytest.approx(1091 / 3600)
    assert played.node_hours["cpu"] < 1091 / 3600, "its stage was done long before"


def test_nodes_whose_workers_still_load_stay() -> None:
    """The first stage ends at 900 s, while the second loads models; its fourth worker was asked for at 540 s."""
    loads = [load("a", 16, 30.0), load("b", 16, 1000.0, gpus=1, max_workers=4)]
    kinds = {"a": Kind(("cpu",), 4, 0), "b": Kind(("gpu",), 4, 1, most=4)}
    played = simulate(loads, kinds, {"a": 1, "b": 4})
    assert played.seconds == pytest.approx(540 + 300 + 120 + 4000), "four rows for each of four workers"
    assert played.stages["b"].redone == 0


def test_lost_nodes_cost_what_was_in_work_and_nothing_else() -> None:
    loads = [load("a", 500, 60.0, gpus=1)]
    kind = Kind(("spot",), 8, 1, most=4, spot=True)
    calm = simulate(loads, {"a": kind}, {"a": 4}, Conditions(node_s=30, load_s=10))
    fierce = simulate(loads, {"a": kind}, {"a": 4}, Conditions(node_s=30, load_s=10, spot_hours=0.2))
    assert fierce.lost_nodes > 5
    assert 0 < fierce.stages["a"].redone <= fierce.lost_nodes
    assert fierce.stages["a"].busy < 500 * 60 + fierce.lost_nodes * 60
    assert calm.seconds < fierce.seconds < 1.5 * calm.seconds


def test_eight_video_groups_hardly_idle_in_the_published_ratio() -> None:
    loads = pipeline(400)
    sizes = dict.fromkeys(RATIO, 1) | {"video": 8}
    streamed = simulate(loads, on(8, loads), sizes, AT_ONCE)
    assert streamed.idle_share("video") <= 0.05
    after_another = sum(simulate([one], on(8, [one]), sizes, AT_ONCE).seconds for one in loads)
    assert 1 - 400 * 320 / (8 * after_another) > 0.3, "stage after stage, the groups wait for the other five"


def test_a_stage_of_large_batches_does_not_starve_the_next() -> None:
    """What waits must last while the stage in front makes its next batches."""
    asks = Resources(batch_size=32, concurrency=16)
    assert rows_ahead(Resources(), asks) == 2 * 32 * 16
    loads = [load("prompts", 4096, 64, batch_size=32, concurrency=16), load("frames", 4096, 5, gpus=1, max_workers=1)]
    played = simulate(loads, on(1, loads), {"prompts": 1, "frames": 1}, AT_ONCE)
    assert played.idle_share("frames") < 0.12, "the first 512 rows come after 2,048 s of 22,000"


def test_timelines_keep_their_sum_when_they_widen() -> None:
    line, luck, total = Timeline(), np.random.default_rng(1), 0.0
    for _ in range(300):
        start, length = luck.uniform(0, 5000), luck.uniform(0, 900)
        line.add(start, start + length, 2.0)
        total += 2 * length
    assert line.sums.sum() == pytest.approx(total)
    assert line.width == 16


def test_a_picture_of_gpu_use() -> None:
    levels = np.linspace(0, 8, 100)
    assert usage.spark(levels, 8.0, 9).replace(" ", "")[-1] == "█"
    assert usage.spark(np.zeros(5), 0.0, 3) == "   "
    svg = ElementTree.fromstring(usage.draw({"video & more": levels}, np.full(100, 8.0), 1e6, "a <run>"))
    assert sum(1 for shape in svg if shape.tag.endswith("polygon")) == 1
    assert "a <run>, GPUs over days" in "".join(svg.itertext())


def test_the_estimate_names_hours_bottleneck_cost_and_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    from ipvg_ray.cli_estimate import Around, show
    from ipvg_ray.stages import make_stages

    stages = make_stages(config.load("gpu", file=ROOT / "deploy/pools.yaml", overrides=["video.pool.max_workers=4"]))
    rows = {stage.name: 1000 for stage in stages}
    show(stages, rows, 1000, Around([], ROOT / "cluster.yaml", ROOT / "deploy/prices.yaml"))
    told = capsys.readouterr().out
    assert "pools as configured: 22 h" in told
    assert "balanced pools: 3 h" in told
    assert "bottleneck video; $ " in told
    assert "from published seconds, not measured ones: faces, matting" in told
    assert "--set video.pool.max_workers=32" in told
    show(stages, dict.fromkeys(rows, 0), 0, Around([]))
    assert "nothing is left to do" in capsys.readouterr().out


def test_simulate_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["simulate", "--samples", "500", "-c", str(ROOT / "deploy/pools.yaml")]
    common += ["--cluster", str(ROOT / "cluster.yaml"), "--prices", str(ROOT / "deploy/prices.yaml")]
    assert cli.main([*common, "--json", "--spot-hours", "20"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["bottleneck"] == "video"
    assert told["stages"]["video"]["workers"] == 32
    assert told["stages"]["video"]["busy_hours"] >= 44.4
    assert told["cost"] > 100
    assert cli.main([*common, "--svg", str(tmp_path / "use.svg")]) == 0
    assert "bottleneck video: idle" in capsys.readouterr().out
    ElementTree.parse(tmp_path / "use.svg")
