"""The first-frame stage on the miniatures: what changes a picture, what must not, and how rows fail."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from first_frame_stage import NoMedia, picture, row, started
from sdxl_minis import embedding, face, make_minis, one_condition

from ipvg_ray import config
from ipvg_ray.media import images
from ipvg_ray.models.mini import hyperlora as mini_hyperlora
from ipvg_ray.pipeline.stage import RowError, StageContext
from ipvg_ray.stages.first_frame import FirstFrameStage


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    return make_minis(tmp_path_factory.mktemp("minis"))


@pytest.fixture
def stage(models, monkeypatch) -> FirstFrameStage:
    return started(models, monkeypatch)


# -- the row -----------------------------------------------------------------------------------------------------------


def test_the_row_holds_the_picture_as_configured(models, monkeypatch):
    (result,) = started(models, monkeypatch, format="jpeg").process([row()])
    assert tuple(result) == tuple(FirstFrameStage.table().columns)
    stored = pa.Table.from_pylist([result], schema=FirstFrameStage.table().schema)
    assert stored.to_pylist()[0]["first_frame_similarities"] == [None]
    assert (result["first_frame_width"], result["first_frame_height"]) == (88, 64)
    assert result["first_frame"]["bytes"][:3] == b"\xff\xd8\xff"
    assert picture(result).shape == (64, 88, 3)
    (lossless,) = started(models, monkeypatch).process([row()])
    assert lossless["first_frame"]["bytes"][:4] == b"\x89PNG"
    assert picture(lossless).std() > 5


def test_a_row_alone_gives_the_same_bytes_again(models, stage, monkeypatch):
    rows = [row(1, 1), row(1, 2), row(2, 1)]
    forwards = [stage.process([r])[0] for r in rows]
    backwards = [started(models, monkeypatch).process([r])[0] for r in rows[::-1]][::-1]
    assert forwards == backwards
    assert len({r["first_frame"]["bytes"] for r in forwards}) == len(rows)


def test_a_rows_picture_does_not_depend_on_its_batch(stage):
    """Matrix products over a larger batch may add in another order: nothing but that may differ."""
    rows = [row(1, 1), row(1, 2), row(2, 1), row(2, 2), row(3, 1)]
    alone = [picture(stage.process([r])[0]).astype(int) for r in rows]
    together = [picture(r) for r in stage.process(rows)]
    for a, b in zip(alone, together, strict=True):
        assert np.abs(a - b).max() <= 1
        assert np.abs(a - b).mean() < 0.01
    assert min(np.abs(alone[0] - other).mean() for other in alone[1:]) > 1


def test_threads_share_batches(models, monkeypatch):
    """Three batches of two in work, as with pool.concurrency 3: the UNet sees more than two samples at a time."""
    stage = started(models, monkeypatch, runtime={"batch": 4})
    sizes, paint, gate = [], stage._painter.paint, threading.Event()
    monkeypatch.setattr(stage._painter, "paint", lambda p, s: gate.wait(10) and (sizes.append(len(p)) or paint(p, s)))
    batches = [[row(1, 1), row(1, 2)], [row(2, 1), row(2, 2)], [row(3, 1), row(3, 2)]]
    with ThreadPoolExecutor(3) as pool:
        running = [pool.submit(stage.process, batch) for batch in batches]
        time.sleep(0.5)
        gate.set()
        results = [future.result() for future in running]
    assert sum(sizes) == 6
    assert max(sizes) == 4
    for batch, made in zip(batches, results, strict=True):
        for each, result in zip(batch, made, strict=True):
            (alone,) = stage.process([each])
            assert np.abs(picture(result).astype(int) - picture(alone)).max() <= 1


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 7},
        {"image_prompt": "fcsks fxhks fhyks, a man"},
        {"identity_id": "x", "id_embeddings": [embedding(9).tolist()]},
        {"identity_id": "x", "id_picture": images.encode(face(9))},
    ],
)
def test_seed_prompt_embedding_and_id_picture_change_the_picture(stage, change):
    before, after = (picture(stage.process([row(**changes)])[0]) for changes in ({}, change))
    assert np.abs(before.astype(int) - after).mean() > 1


# -- the identity ------------------------------------------------------------------------------------------------------


def test_the_weight_decides_how_much_of_the_identity_is_drawn(models, monkeypatch):
    """At 0 all identities look alike; at 0.85 each has its own picture, farther away than at 0.2."""
    drawn = {
        weight: [
            picture(started(models, monkeypatch, weight=weight).process([row(i, seed=5)])[0]).astype(int)
            for i in (1, 2)
        ]
        for weight in (0.0, 0.2, 0.85)
    }
    assert np.array_equal(*drawn[0.0])
    assert not np.array_equal(*drawn[0.85])
    for i in range(2):
        near, far = (np.abs(drawn[weight][i] - drawn[0.0][i]).mean() for weight in (0.2, 0.85))
        assert 0 < near < far


def test_the_effective_scale_is_half_the_weight(stage, monkeypatch):
    scales, lora = [], stage._painter.sdxl.lora
    apply = lora.applied
    monkeypatch.setattr(
        lora, "applied", lambda batch, scale, copies: scales.append(scale) or apply(batch, scale, copies)
    )
    stage.process([row()])
    assert scales == [0.85 * 0.5]


def test_an_identitys_lora_is_made_once_and_few_are_kept(models, monkeypatch):
    stage = started(models, monkeypatch, runtime={"kept_identities": 2})
    made, make = [], stage._painter.make_adapter
    monkeypatch.setattr(stage._painter, "make_adapter", lambda i: made.append(i.key) or make(i))
    for number, identity in enumerate([1, 1, 2, 1, 3, 1, 2, 2]):
        stage.process([row(identity, 1 + number % 2)])
    assert made == ["id001", "id002", "id003", "id002"]
    assert len(stage._painter.adapters) == 2


def test_a_kept_lora_draws_what_a_new_one_does(models, stage, monkeypatch):
    kept = [stage.process([row(1, prompt)])[0] for prompt in (1, 2)][1]
    assert kept == started(models, monkeypatch).process([row(1, 2)])[0]


@pytest.mark.parametrize("encoders", ["arcface", "clip"])
def test_a_checkpoint_of_one_encoder_is_asked_with_that_alone(models, monkeypatch, encoders):
    folder = models / f"{encoders}-alone"
    shutil.copytree(models / mini_hyperlora.NAME, folder, dirs_exist_ok=True)
    one_condition(folder)
    if encoders == "clip":
        (folder / "id_projector.safetensors").unlink()
    stage = started(models, monkeypatch, hyperlora=folder.name)
    looks = []
    monkeypatch.setattr(
        stage._painter.clip, "penultimate", lambda p: looks.append(1) or torch.ones(1, 17, 32) * p.mean()
    )
    changes = {"id_embeddings": [embedding(9).tolist()]}, {"id_picture": images.encode(face(9))}
    base, other_face, other_picture = (
        stage.process([row(identity_id=str(n), **change)])[0] for n, change in enumerate(({}, *changes))
    )
    assert bool(looks) == (encoders == "clip")
    assert np.array_equal(picture(base), picture(other_face)) == (encoders == "clip")
    assert np.array_equal(picture(base), picture(other_picture)) == (encoders == "arcface")


# -- failures ----------------------------------------------------------------------------------------------------------


def test_bad_rows_fail_alone(stage, tmp_path):
    broken = {"bytes": b"not a picture", "path": None}
    gone = {"bytes": None, "path": str(tmp_path / "gone.png")}
    results = stage.process([row(1, id_picture=broken), row(2, id_picture=gone), row(3, image_prompt=" "), row(1)])
    assert [r.kind for r in results if isinstance(r, RowError)] == ["broken_image", "missing_image", "empty_prompt"]
    assert picture(results[3]).shape == (64, 88, 3)


def test_nan_is_a_failed_row_and_leaves_no_adapter_behind(stage):
    sdxl = stage._painter.sdxl
    with torch.no_grad():
        sdxl.unet.conv_out.bias[0] = torch.nan
    (result,) = stage.process([row()])
    assert isinstance(result, RowError)
    assert result.kind == "bad_first_frame"
    assert "NaN" in result.message
    paths = stage._painter.hyperlora.paths.values()
    assert all(sdxl.unet.get_submodule(path).pairs is None for path in paths)


def test_what_the_model_raises_is_raised_for_the_engine_to_take_the_batch_apart(stage, monkeypatch):
    def fail(*_: object) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(stage._painter, "paint", fail)
    with pytest.raises(MemoryError, match="no room"):
        stage.process([row(1), row(2)])


# -- the contract ------------------------------------------------------------------------------------------------------


def test_the_contract(models):
    stage = FirstFrameStage(config.load("cpu-mini", values={"models": {"root": str(models)}}))
    of_identity = {"id_picture", "more_id_pictures", "id_embeddings", "embeddings", "reference_used"}
    assert (stage.grain, set(stage.needs)) == ("sample", {*of_identity, "image_prompt"})
    assert stage.models().keys() == {"checkpoint", "checkpoint_config", "hyperlora", "clip_vision", "pack"}
    assert all(path.exists() for field, path in stage.models().items() if field != "pack")
    assert not set(stage.models()) & set(stage.fingerprint_settings())


def test_only_what_changes_pictures_is_in_the_fingerprint():
    def inputs(**section: object) -> dict[str, object]:
        return FirstFrameStage(config.load("cpu-mini", values={"first_frame": section})).fingerprint_settings()

    same = inputs()
    assert inputs(runtime={"batch": 2, "compile": True, "offload": True, "kept_identities": 3}) == same
    assert inputs(reference={"width": 128}, control={"scale": 0.9}, safety={"threshold": 0.1}) == same
    for changed in (
        {"runtime": {"vae_tiling": True}},
        {"attempts": 5},
        {"detail": {"denoise": 0.4}},
        {"detail": {"enabled": False}},
        {"reference": {"enhance": "hyperlora"}},
        {"safety_model": "falcon"},
    ):
        assert inputs(**changed) != same


def test_importing_the_stage_loads_no_heavy_library():
    heavy = {"torch", "diffusers", "transformers", "ray"}
    code = f"import sys, ipvg_ray.stages.first_frame; print({heavy} & set(sys.modules))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "set()"


@pytest.mark.slow
def test_the_profile_size_is_drawn_with_the_real_pack(mini_models):
    stage = FirstFrameStage(config.load("cpu-mini", values={"models": {"root": str(mini_models)}}))
    stage.setup(StageContext("cpu", 1, NoMedia(), "run"))
    results = stage.process([row(2, 1), row(2, 2), row(3, 1)])
    assert {picture(result).shape for result in results} == {(96, 176, 3)}
    stage.teardown()
