"""The plan's arithmetic of layouts, against torch's own count and against published figures."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import wan_ranks

from ipvg_ray.models.mini import wan_vace
from ipvg_ray.models.wan.layouts import (
    CARDS,
    SHAPES,
    Job,
    Shape,
    advice,
    estimate,
    fitting,
    lowest_latency,
    most_videos,
    read_shape,
)


def job(model: str, height: int = 480, width: int = 832, frames: int = 81, steps: int = 50, branches: int = 2) -> Job:
    return Job(SHAPES[model], frames, height, width, steps, branches)


@pytest.mark.parametrize("task", ["vace", "a14b", "ti2v"])
def test_work_and_weights_are_those_of_the_network(task: str) -> None:
    """On a network whose text and time widths are the published ones, on the meta device."""
    from diffusers import WanTransformer3DModel, WanVACETransformer3DModel
    from torch.utils.flop_counter import FlopCounterMode

    shape = {
        "vace": Shape(4, 24, 160, 3, vace_layers=2, control=96),
        "a14b": Shape(4, 24, 160, 3, inputs=36),
        "ti2v": Shape(4, 24, 160, 3, inputs=48, outputs=48, spatial=16),
    }[task]
    given = {
        "num_attention_heads": 4, "attention_head_dim": 24, "ffn_dim": 160, "num_layers": 3, "text_dim": 4096,
        "freq_dim": 256, "in_channels": shape.inputs, "out_channels": shape.outputs,
    }  # fmt: skip
    with torch.device("meta"):
        if task == "vace":
            model = WanVACETransformer3DModel(**given, vace_layers=[0, 1])
        else:
            model = WanTransformer3DModel(**given)
        arguments = wan_ranks.inputs({"a14b": "i2v"}.get(task, task), (3, 6, 10))
        arguments = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
        arguments["encoder_hidden_states"] = torch.empty(1, 512, 4096)
        arguments["timestep"] = torch.zeros(1)
        arguments.pop("encoder_hidden_states_image", None)
        if task == "vace":
            arguments["control_hidden_states"] = torch.empty(1, 96, 3, 6, 10)
        with FlopCounterMode(display=False) as counter:
            model(**arguments)
    assert shape.forward(3 * 3 * 5) == pytest.approx(counter.get_total_flops(), rel=0.01)
    assert shape.parameters == pytest.approx(sum(p.numel() for p in model.parameters()), rel=0.01)


def test_published_sizes_and_work() -> None:
    tokens = SHAPES["vace-14B"].tokens(81, 480, 832)
    assert tokens == 32760
    assert SHAPES["vace-14B"].forward(tokens) == pytest.approx(2.03e15, rel=0.01)
    assert SHAPES["i2v-A14B"].forward(75600) == pytest.approx(6.52e15, rel=0.01)
    assert SHAPES["vace-14B"].parameters == pytest.approx(17.34e9, rel=0.01)
    assert SHAPES["ti2v-5B"].parameters == pytest.approx(5.0e9, rel=0.01)


@pytest.mark.parametrize(
    ("cards", "seconds"), [((1, 1), 327.8), ((4, 4), 92.4), ((8, 8), 52.9)]
)  # Wan2.2 I2V-A14B, 480p, H100: one, four, eight cards
def test_times_are_near_the_published_ones(cards: tuple[int, int], seconds: float) -> None:
    made = estimate(job("i2v-A14B", steps=40), CARDS["H100"], 8, 1, 1, cards[1])
    assert made.seconds == pytest.approx(seconds, rel=0.2)


def test_one_card_a_video_gives_most_wherever_it_fits() -> None:
    for model in ("vace-14B", "vace-1.3B", "ti2v-5B"):
        best = most_videos(fitting(job(model), CARDS["H100"], 8))
        assert (best.gpus, best.fsdp) == (1, False), model
    small = most_videos(fitting(job("vace-14B"), CARDS["4090"], 8))
    assert small.gpus > 1
    assert small.fsdp, "35 GB of weights do not fit into 24"


def test_lowest_latency_uses_the_node_and_the_branches() -> None:
    fastest = lowest_latency(fitting(job("vace-14B"), CARDS["H100"], 8))
    assert (fastest.cfg, fastest.ring, fastest.ulysses) == (2, 1, 4)
    guided = lowest_latency(fitting(job("vace-14B", branches=3), CARDS["H100"], 6))
    assert (guided.cfg, guided.ulysses) == (3, 2)


def test_heads_that_do_not_divide_cost_and_are_explained() -> None:
    small = job("vace-1.3B")
    eight = estimate(small, CARDS["H100"], 8, 1, 1, 8)
    six = estimate(small, CARDS["H100"], 8, 1, 1, 6)
    assert eight.seconds > 0.95 * six.seconds
    text = "\n".join(advice(small, CARDS["H100"], 8, (1, 1, 8)))
    assert "12 heads do not divide by ulysses 8: ranks have up to 2, 4 places stay idle; 2, 3, 4, 6 divide" in text
    assert "most videos an hour: 1 card a video" in text
    assert "heads" not in "\n".join(advice(small, CARDS["H100"], 8, (2, 1, 4)))


def test_a_checkpoint_s_own_shape_is_read(tmp_path: Path) -> None:
    wan_vace.make(tmp_path)
    shape = read_shape(tmp_path / wan_vace.NAME, "vace-14B")
    assert (shape.heads, shape.head_dim, shape.layers, shape.vace_layers, shape.control) == (4, 24, 4, 2, 96)
    assert read_shape(tmp_path, "vace-1.3B") == SHAPES["vace-1.3B"]
