"""Loading SDXL checkpoints and ControlNets, and what trades their memory for speed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ipvg_ray.models.quiet import only_errors


class SdxlError(ValueError):
    """A checkpoint that is no SDXL, a size it cannot draw, or a result that is no picture."""


@dataclass(frozen=True)
class Memory:
    """How SDXL is held on its device.

    Attributes:
        offload: keep SDXL's parts in host memory and move each to the GPU while it works.
        vae_slicing: decode the pictures of a batch one after another.
        vae_tiling: decode large pictures in overlapping tiles; changes pixels slightly.
        channels_last: the convolutions' weights in the layout that tensor cores read.
        compile: compile the UNet's transformer blocks at their first use.
        compile_backend: torch.compile's; tests take one that needs no compiler.
    """

    offload: bool = False
    vae_slicing: bool = False
    vae_tiling: bool = False
    channels_last: bool = False
    compile: bool = False
    compile_backend: str = "inductor"


def load(
    checkpoint: Path,
    config: Path,
    *,
    dtype: torch.dtype,
    device: str,
    vae: Path | None = None,
    vae_dtype: torch.dtype = torch.float32,
) -> Any:
    """Load a `StableDiffusionXLPipeline` without any network.

    Args:
        checkpoint: a single .safetensors file in SDXL's original layout with baked VAE, or a diffusers folder.
        config: diffusers folder with the configurations and tokenizers that a single file lacks; not read for folders.
        dtype: of UNet and text encoders.
        device: where all parts go, such as `cuda`.
        vae: diffusers folder of another VAE in place of the checkpoint's, such as sdxl-vae-fp16-fix.
        vae_dtype: of the VAE; SDXL's own overflows in float16.

    Raises:
        SdxlError: where something is missing from either.
    """
    with only_errors():
        # Importing them prints advice too.
        from diffusers import AutoencoderKL
        from diffusers.loaders.single_file_utils import SingleFileComponentError

        try:
            read = _read_folder if checkpoint.is_dir() else _read_file
            pipeline = read(checkpoint, config, dtype, vae_dtype)
            if vae is not None:
                pipeline.vae = AutoencoderKL.from_pretrained(vae, dtype=vae_dtype, local_files_only=True)
            pipeline = pipeline.to(device)
        except SdxlError:
            raise
        except NotImplementedError as error:  # what torch says of weights without values: the file holds none
            raise SdxlError(f"{checkpoint} lacks weights of the SDXL that {config} describes") from error
        except (OSError, ValueError, KeyError, RuntimeError, SingleFileComponentError) as error:
            raise SdxlError(f"cannot load an SDXL checkpoint from {checkpoint}: {error}") from error
    return pipeline


def load_controlnet(folder: Path, *, dtype: torch.dtype, device: str) -> Any:
    """Load any SDXL ControlNet from a local diffusers folder.

    Raises:
        SdxlError: where it holds none, or one for another network.
    """
    with only_errors():
        from diffusers import ControlNetModel

        try:
            model: Any = ControlNetModel.from_pretrained(folder, dtype=dtype, local_files_only=True)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise SdxlError(f"cannot load a ControlNet from {folder}: {error}") from error
    if model.config.addition_embed_type != "text_time":
        raise SdxlError(f"{folder} is a ControlNet of another network than SDXL")
    return model.eval().requires_grad_(False).to(device)


def tune(pipeline: Any, memory: Memory, device: str) -> None:
    """Apply memory and speed options; after the UNet's layers were wrapped for adapters, since offloading hooks them.

    Raises:
        SdxlError: for offloading without a GPU.
    """
    if memory.channels_last:
        for part in (pipeline.unet, pipeline.vae):
            part.to(memory_format=torch.channels_last)
    if memory.vae_slicing:
        pipeline.vae.enable_slicing()
    if memory.vae_tiling:
        pipeline.vae.enable_tiling()
    if memory.offload:
        if not device.startswith("cuda"):
            raise SdxlError("first_frame.runtime.offload moves parts to a GPU and back, and this worker has none")
        pipeline.enable_model_cpu_offload(device=device)
    if memory.compile:
        # Block by block: 70 blocks share one compilation, and sizes of batches and prompts differ from call to call.
        pipeline.unet.compile_repeated_blocks(dynamic=True, backend=memory.compile_backend)


def _read_folder(folder: Path, config: Path, dtype: torch.dtype, vae_dtype: torch.dtype) -> Any:
    from diffusers import StableDiffusionXLPipeline

    types = {"default": dtype, "vae": vae_dtype}
    return StableDiffusionXLPipeline.from_pretrained(folder, dtype=types, add_watermarker=False, local_files_only=True)


def _read_file(checkpoint: Path, config: Path, dtype: torch.dtype, vae_dtype: torch.dtype) -> Any:
    from diffusers import AutoencoderKL, StableDiffusionXLPipeline

    # Looked for here, because diffusers would take a missing path for the name of a repository and go to the network.
    if not checkpoint.is_file():
        raise SdxlError(f"{checkpoint} is missing; give an SDXL .safetensors file or a diffusers folder")
    if not (config / "model_index.json").is_file():
        raise SdxlError(f"{config} is no diffusers folder with SDXL's configurations and tokenizers")
    options: dict[str, Any] = {"config": str(config), "local_files_only": True}
    vae = AutoencoderKL.from_single_file(str(checkpoint), subfolder="vae", dtype=vae_dtype, **options)
    return StableDiffusionXLPipeline.from_single_file(
        str(checkpoint), vae=vae, dtype=dtype, add_watermarker=False, **options
    )
