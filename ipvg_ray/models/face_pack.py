"""insightface's model packs: where their files are, and on what onnxruntime runs them.

A pack is a folder of ONNX files (`buffalo_l`, `antelopev2`); see https://github.com/deepinsight/insightface. The
providers' options are those of onnxruntime's documentation of its CUDA and TensorRT execution providers.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

logger = logging.getLogger(__name__)

Provider = Literal["auto", "tensorrt", "cuda", "cpu"]
TENSORRT, CUDA, CPU = "TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"

CUDA_OPTIONS = {
    "cudnn_conv_algo_search": "HEURISTIC",  # an exhaustive search would run for every new size of a batch
    "arena_extend_strategy": "kSameAsRequested",  # several workers share a card: none takes more than it uses
}


def open_pack(pack: Path, modules: set[str], *, device: str, provider: Provider, threads: int) -> Any:
    """insightface's `FaceAnalysis` with those of a pack's models that `modules` names.

    Args:
        pack: the pack's folder.
        modules: insightface's names of the models; `detection` must be among them.
        device: what the worker was given, `cpu` or `cuda`.
        provider: see `providers`.
        threads: threads per model.

    Raises:
        FileNotFoundError: where the folder is missing, or holds no models or no detector.
        ValueError: where `provider` cannot run here.
    """
    import onnxruntime
    from insightface.app import FaceAnalysis

    pack = _checked(pack)
    # insightface calls a function of scikit-image that is to go, which would say so for every face. The filter stays
    # set, because one that comes and goes is not safe beside other threads.
    warnings.filterwarnings("ignore", message=".*estimate.* is deprecated", category=FutureWarning)
    onnxruntime.set_default_logger_severity(3)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = threads
    options.log_severity_level = 3
    chosen = providers(provider, device, onnxruntime.get_available_providers())
    wanted = _name(chosen[0])
    if wanted != CPU and hasattr(onnxruntime, "preload_dlls"):
        onnxruntime.preload_dlls()  # insightface does so only where it chooses the providers itself
    try:
        app = FaceAnalysis(
            name=str(pack),  # a folder is taken as it is; a bare name would be downloaded where it is missing
            allowed_modules=sorted(modules),
            providers=chosen,
            sess_options=options,
            static_shape_sessions=False,  # one session serves every size, instead of one more for each
        )
    except AssertionError as error:
        raise FileNotFoundError(f"{pack} holds no face detector; unpack the whole pack there") from error
    running = app.det_model.session.get_providers()
    if wanted not in running:
        logger.warning("onnxruntime could not start %s (its libraries are missing); faces run on %s", wanted, running)
    return app


def providers(asked: Provider, device: str, available: Sequence[str]) -> list[str | tuple[str, dict[str, str]]]:
    """onnxruntime's providers, best first, each with its options where it has any.

    Args:
        asked: `auto` for CUDA where the worker was given a GPU, else the CPU; `cpu` even then; `cuda` and `tensorrt`
            where nothing else will do. TensorRT builds an engine per model at its first start, which takes minutes,
            and keeps it in the user's cache folder.
        device: what the worker was given, `cpu` or `cuda`.
        available: the names onnxruntime was built with.

    Raises:
        ValueError: where `cuda` or `tensorrt` is asked for and cannot be had.
    """
    cuda, tensorrt = (CUDA, CUDA_OPTIONS), (TENSORRT, _tensorrt_options())
    given = device.startswith("cuda")
    if asked in ("cuda", "tensorrt"):
        needed = CUDA if asked == "cuda" else TENSORRT
        if not given:
            raise ValueError(f"onnx_provider is {asked} and the worker was given no GPU; give its pool a share of one")
        if needed not in available:
            raise ValueError(f"onnx_provider is {asked} and this onnxruntime lacks {needed}; install onnxruntime-gpu")
        return [tensorrt, cuda, CPU] if asked == "tensorrt" else [cuda, CPU]
    if asked == "auto" and given:
        if CUDA in available:
            return [cuda, CPU]
        logger.warning("this onnxruntime has no CUDA; faces run on the CPU (install onnxruntime-gpu)")
    return [CPU]


def _name(provider: str | tuple[str, dict[str, str]]) -> str:
    return provider if isinstance(provider, str) else provider[0]


def _tensorrt_options() -> dict[str, str]:
    # Not inside the pack: what lies there is part of a run's fingerprint.
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ipvg_ray" / "tensorrt"
    return {
        "trt_engine_cache_enable": "True",
        "trt_engine_cache_path": str(cache),
        "trt_timing_cache_enable": "True",
        "trt_timing_cache_path": str(cache),
    }


def _checked(pack: Path) -> Path:
    pack = Path(pack).expanduser().resolve()
    if not pack.is_dir():
        raise FileNotFoundError(
            f"no insightface pack at {pack}; unpack {pack.name}.zip there, or set models.root to where the packs are"
        )
    if not any(pack.glob("*.onnx")):
        nested = pack / pack.name  # antelopev2.zip holds a folder of its own name
        hint = f"; move them up from {nested}" if nested.is_dir() else ""
        raise FileNotFoundError(f"{pack} holds no .onnx files{hint}")
    return pack
