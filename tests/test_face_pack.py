"""On what onnxruntime runs the packs."""

from __future__ import annotations

from pathlib import Path

import pytest

from ipvg_ray.models.face_pack import CPU, CUDA, TENSORRT, providers
from ipvg_ray.models.faces import FaceAnalyser

GPU_BUILD = [TENSORRT, CUDA, CPU]


def names(asked: str, device: str, available: list[str]) -> list[str]:
    found = providers(asked, device, available)  # type: ignore[arg-type]
    return [p if isinstance(p, str) else p[0] for p in found]


def test_the_worker_gets_what_it_was_given() -> None:
    assert names("auto", "cpu", GPU_BUILD) == [CPU]
    assert names("auto", "cuda", GPU_BUILD) == [CUDA, CPU]
    assert names("cpu", "cuda", GPU_BUILD) == [CPU]
    assert names("cuda", "cuda", GPU_BUILD) == [CUDA, CPU]
    assert names("tensorrt", "cuda", GPU_BUILD) == [TENSORRT, CUDA, CPU]


def test_without_cuda_auto_warns_and_the_others_refuse(caplog: pytest.LogCaptureFixture) -> None:
    assert names("auto", "cuda", [CPU]) == [CPU]
    assert "install onnxruntime-gpu" in caplog.text
    with pytest.raises(ValueError, match="install onnxruntime-gpu"):
        names("cuda", "cuda", [CPU])
    with pytest.raises(ValueError, match=f"lacks {TENSORRT}"):
        names("tensorrt", "cuda", [CUDA, CPU])
    with pytest.raises(ValueError, match="was given no GPU"):
        names("tensorrt", "cpu", GPU_BUILD)


def test_engines_are_kept_outside_the_pack(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    name, options = providers("tensorrt", "cuda", GPU_BUILD)[0]
    assert name == TENSORRT
    assert Path(options["trt_engine_cache_path"]).is_relative_to(tmp_path)


def test_a_networks_threads_are_those_asked_for(packs: Path) -> None:
    analyser = FaceAnalyser(packs / "insightface/models/mini_buffalo_l", det_sizes=(256,), threads=2)
    for model in analyser._models.values():
        assert model.session.get_session_options().intra_op_num_threads == 2
