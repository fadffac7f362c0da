"""The real models: what each is for, where it comes from, how large it is, and who may use it.

One table for the whole program: `ipvg-ray models pull` and `check`, the plan's hints and `docs/models.md` read it.
A model's `name` is its place below `models.root`, the same word that the configuration uses.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ipvg_ray.errors import UserError


class UnknownModelError(UserError, ValueError):
    """A name that is not in the table; the message gives the nearest one that is."""


@dataclass(frozen=True)
class Licence:
    """Terms of a set of weights.

    Attributes:
        spdx: SPDX identifier, or `LicenseRef-…` where there is none.
        who: who may use the weights, in plain words.
        commercial: False where the terms, or those of the training data, leave out commercial use; such a model is
            pulled only with `--accept-licence`.
        url: where the terms are.
    """

    spdx: str
    who: str
    commercial: bool
    url: str


@dataclass(frozen=True)
class HubSource:
    """Files of one Hugging Face Hub repository.

    Attributes:
        repo: repository id.
        allow: glob patterns of the files wanted; as on the Hub, `*` also matches `/`.
        subpath: the file or folder of the repository that becomes the model; empty for all of it.
        revision: branch, tag or commit. A pull resolves it once and takes every file from that commit.
    """

    repo: str
    allow: tuple[str, ...]
    subpath: str = ""
    revision: str = "main"

    @property
    def url(self) -> str:
        """The repository's page."""
        return f"https://huggingface.co/{self.repo}"


@dataclass(frozen=True)
class UrlSource:
    """One file behind a plain URL.

    Attributes:
        url: the file.
        size: bytes, or None where not known.
        sha256: of the file as served, or None where nobody published one: then the pull's receipt records it.
        unpack: `zip` where the model is the archive's content.
        strip: folder that all the archive's members lie in and that is taken off when unpacking.
    """

    url: str
    size: int | None = None
    sha256: str | None = None
    unpack: Literal["zip"] | None = None
    strip: str = ""


@dataclass(frozen=True)
class Model:
    """One row of the table.

    Attributes:
        name: place below `models.root`.
        used_by: fields of the configuration whose default it is; empty for an alternative.
        purpose: what it does here.
        source: where it comes from.
        approx_bytes: size of the download, for the plan when the source cannot be asked.
        licence: the weights' terms.
        needs: glob patterns below the model's folder that must each match a file; empty for a single file.
        verified: which of these facts were seen at their source.
        unverified: which were not; empty where nothing is left open.
    """

    name: str
    used_by: tuple[str, ...]
    purpose: str
    source: HubSource | UrlSource
    approx_bytes: int
    licence: Licence
    needs: tuple[str, ...]
    verified: str
    unverified: str = ""


APACHE = Licence("Apache-2.0", "everyone, commercially too", True, "https://www.apache.org/licenses/LICENSE-2.0")
OPENRAIL = Licence(
    "LicenseRef-CreativeML-OpenRAIL++-M",
    "everyone, commercially too, within the licence's list of forbidden uses, which must be passed on",
    True,
    "https://huggingface.co/stabilityai/stable-diffusion-xl-base-1.0/blob/main/LICENSE.md",
)
HYPERLORA = Licence(
    "CC-BY-NC-4.0",
    "non-commercial use, with attribution",
    False,
    "https://creativecommons.org/licenses/by-nc/4.0/",
)
INSIGHTFACE = Licence(
    "LicenseRef-InsightFace-NonCommercial",
    "non-commercial research only; InsightFace sells other terms. Its Python code is MIT",
    False,
    "https://github.com/deepinsight/insightface#license",
)
CLIP = Licence(
    "MIT",
    "everyone by the licence; the model card puts every deployed use, commercial or not, out of its scope",
    True,
    "https://github.com/openai/CLIP/blob/main/LICENSE",
)
LIP = Licence(
    "LicenseRef-MIT-code-LIP-data",
    "research: code and weights were published under MIT, the LIP pictures they were trained on for research only",
    False,
    "https://github.com/HRNet/HRNet-Semantic-Segmentation/blob/HRNet-OCR/LICENSE",
)

_INSIGHTFACE_RELEASE = "https://github.com/deepinsight/insightface/releases/download/v0.7"
_HRNET_RELEASE = "https://github.com/hsfzxjy/models.storage/releases/download/HRNet-OCR"
_WAN_PARTS = ("model_index.json", "scheduler/*", "text_encoder/*", "tokenizer/*", "transformer/*", "vae/*", "LICENSE*")
_WAN_NEEDS = (
    "model_index.json",
    "scheduler/scheduler_config.json",
    "text_encoder/*.safetensors",
    "tokenizer/tokenizer_config.json",
    "transformer/*.safetensors",
    "vae/*.safetensors",
)
_SDXL_CONFIGS = (
    "model_index.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder_2/config.json",
    "unet/config.json",
    "vae/config.json",
)
_HYPERLORA_FILES = (
    "hyper_lora_modules.json",
    "hyper_lora_modules.safetensors",
    "id_projector.safetensors",
    "resampler.safetensors",
)

MODELS: tuple[Model, ...] = (
    Model(
        name="insightface/models/buffalo_l",
        used_by=("faces.pack", "evaluate.pack"),
        purpose="finds and describes the face (box, gender, 106 landmarks) and scores likeness (ArcFace w600k_r50)",
        source=UrlSource(
            f"{_INSIGHTFACE_RELEASE}/buffalo_l.zip",
            size=288_621_354,
            sha256="80ffe37d8a5940d59a7384c201a2a38d4741f2f3c51eef46ebb28218a7b0ca2f",
            unpack="zip",
        ),
        approx_bytes=288_621_354,
        licence=INSIGHTFACE,
        needs=("det_10g.onnx", "w600k_r50.onnx", "2d106det.onnx", "genderage.onnx"),
        verified="URL, size and checksum agree in several independent projects that pin this archive",
    ),
    Model(
        name="insightface/models/antelopev2",
        used_by=("faces.id_pack",),
        purpose="the ArcFace embedding (glintr100) that HyperLoRA was trained on, with its own detector",
        source=UrlSource(
            f"{_INSIGHTFACE_RELEASE}/antelopev2.zip",
            size=360_662_982,
            sha256="8e182f14fc6e80b3bfa375b33eb6cff7ee05d8ef7633e738d1c89021dcf0c5c5",
            unpack="zip",
            strip="antelopev2",
        ),
        approx_bytes=360_662_982,
        licence=INSIGHTFACE,
        needs=("scrfd_10g_bnkps.onnx", "glintr100.onnx", "2d106det.onnx"),
        verified="URL, size, checksum and the archive's inner folder of its own name agree in several independent "
        "projects that pin it",
    ),
    Model(
        name="hrnet_lip_5583_torch04.pth",
        used_by=("matting.model",),
        purpose="HRNetV2-W48 human parsing (20 LIP classes); the matte is 1 - P(background)",
        source=UrlSource(f"{_HRNET_RELEASE}/hrnet_lip_5583_torch04.pth"),
        approx_bytes=265_000_000,
        licence=LIP,
        needs=(),
        verified="URL as the authors' own table of results links it",
        unverified="size (calculated from 65.9 M float32 parameters), checksum (none is published), the LIP data's "
        "own words",
    ),
    Model(
        name="Qwen3-8B",
        used_by=("prompts.model",),
        purpose="rewrites the prompt for video and derives the one for the first frame",
        source=HubSource("Qwen/Qwen3-8B", ("*.json", "*.txt", "*.safetensors", "LICENSE*")),
        approx_bytes=16_400_000_000,
        licence=APACHE,
        needs=("config.json", "tokenizer_config.json", "*.safetensors"),
        verified="repository, file names and size as its page lists them; licence",
    ),
    Model(
        name="Qwen3-8B-FP8",
        used_by=(),
        purpose="Qwen3-8B quantised to 8 bits, for `--set prompts.model=Qwen3-8B-FP8` with engine vllm",
        source=HubSource("Qwen/Qwen3-8B-FP8", ("*.json", "*.txt", "*.safetensors", "LICENSE*")),
        approx_bytes=9_450_000_000,
        licence=APACHE,
        needs=("config.json", "tokenizer_config.json", "*.safetensors"),
        verified="that the makers name the quantised models of this family so (Qwen3-30B-A3B-FP8)",
        unverified="the repository itself, its files, size (calculated: 8-bit layers, 16-bit embeddings)",
    ),
    Model(
        name="Qwen3-8B-AWQ",
        used_by=(),
        purpose="Qwen3-8B quantised to 4 bits, for `--set prompts.model=Qwen3-8B-AWQ` with engine vllm",
        source=HubSource("Qwen/Qwen3-8B-AWQ", ("*.json", "*.txt", "*.safetensors", "LICENSE*")),
        approx_bytes=6_100_000_000,
        licence=APACHE,
        needs=("config.json", "tokenizer_config.json", "*.safetensors"),
        verified="that the makers name the quantised models of this family so (Qwen3-32B-AWQ)",
        unverified="the repository itself, its files, size (calculated: 4-bit layers, 16-bit embeddings)",
    ),
    Model(
        name="Qwen3-VL-8B-Instruct",
        used_by=("prompts.vision_model",),
        purpose="method tpige alone: sees the reference picture and describes its face within the prompt",
        source=HubSource("Qwen/Qwen3-VL-8B-Instruct", ("*.json", "*.txt", "*.safetensors", "LICENSE*")),
        approx_bytes=17_500_000_000,
        licence=APACHE,
        needs=("config.json", "preprocessor_config.json", "tokenizer_config.json", "*.safetensors"),
        verified="repository, licence and number of parameters (8.8 billion) as copies of its page list them",
        unverified="size (calculated from the parameters at 16 bits), file names",
    ),
    Model(
        name="RealVisXL_V4.0.safetensors",
        used_by=("first_frame.checkpoint",),
        purpose="the SDXL checkpoint that draws the first frame: one file, VAE included",
        source=HubSource(
            "SG161222/RealVisXL_V4.0", ("RealVisXL_V4.0.safetensors",), subpath="RealVisXL_V4.0.safetensors"
        ),
        approx_bytes=6_940_000_000,
        licence=OPENRAIL,
        needs=(),
        verified="repository, file name, size and licence tag as its page lists them",
    ),
    Model(
        name="stable-diffusion-xl-base-1.0",
        used_by=("first_frame.checkpoint_config",),
        purpose="SDXL's configurations and its two tokenizers, without which a single file cannot be loaded offline",
        source=HubSource(
            "stabilityai/stable-diffusion-xl-base-1.0",
            (*_SDXL_CONFIGS, "tokenizer/*", "tokenizer_2/*", "LICENSE.md"),
        ),
        approx_bytes=3_200_000,
        licence=OPENRAIL,
        needs=(*_SDXL_CONFIGS, "tokenizer/vocab.json", "tokenizer_2/vocab.json"),
        verified="repository, folders, tokenizer files and licence tag as its page lists them",
    ),
    Model(
        name="sdxl_hyper_id_lora_v1_fidelity",
        used_by=("first_frame.hyperlora",),
        purpose="HyperLoRA: makes the LoRA weights of one identity from its face",
        source=HubSource(
            "bytedance-research/HyperLoRA",
            ("sdxl_hyper_id_lora_v1_fidelity/*",),
            subpath="sdxl_hyper_id_lora_v1_fidelity",
        ),
        approx_bytes=3_140_000_000,
        licence=HYPERLORA,
        needs=_HYPERLORA_FILES,
        verified="repository and file names as several projects download them; folders, total size of both variants "
        "(6.28 GB) and licence tag as a mirror's page lists them",
        unverified="the original repository's own page",
    ),
    Model(
        name="clip-vit-large-patch14",
        used_by=("first_frame.clip_vision",),
        purpose="CLIP ViT-L/14: face features for HyperLoRA; only the vision half of the file is loaded",
        source=HubSource(
            "openai/clip-vit-large-patch14", ("config.json", "preprocessor_config.json", "model.safetensors")
        ),
        approx_bytes=1_710_000_000,
        licence=CLIP,
        needs=("config.json", "preprocessor_config.json", "model.safetensors"),
        verified="repository and file names as several projects download them; size as a copy's page lists it",
        unverified="a licence on the weights' own page: the card names none, the code's repository says MIT",
    ),
    Model(
        name="Wan2.1-VACE-14B-diffusers",
        used_by=("video.model",),
        purpose="first frame, mask and prompt to video",
        source=HubSource("Wan-AI/Wan2.1-VACE-14B-diffusers", _WAN_PARTS),
        approx_bytes=81_200_000_000,
        licence=APACHE,
        needs=_WAN_NEEDS,
        verified="repository as the diffusers documentation names it; size as a mirror's page lists it (the "
        "transformer is stored in float32)",
        unverified="the original repository's own page",
    ),
    Model(
        name="Wan2.1-VACE-1.3B-diffusers",
        used_by=(),
        purpose="the small VACE, for `--set video.model=Wan2.1-VACE-1.3B-diffusers` and the paper's ablation",
        source=HubSource("Wan-AI/Wan2.1-VACE-1.3B-diffusers", _WAN_PARTS),
        approx_bytes=19_040_000_000,
        licence=APACHE,
        needs=_WAN_NEEDS,
        verified="repository as the diffusers documentation names it; file names and size as a project that pins them "
        "lists them",
        unverified="the original repository's own page",
    ),
)


def get(name: str) -> Model:
    """The model of that name.

    Raises:
        UnknownModelError: where the table has none, with the nearest name, or with what makes a miniature.
    """
    for model in MODELS:
        if model.name == name:
            return model
    if is_miniature(name):
        raise UnknownModelError(f"{name!r} is a miniature, which is made, not pulled: `ipvg-ray models make-mini`")
    near = difflib.get_close_matches(name, [model.name for model in MODELS], n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise UnknownModelError(f"no model {name!r} is known{hint} (a folder or file of your own needs no pulling)")


def at(path: Path) -> tuple[Model, Path] | None:
    """The model whose place `path` is, and the root that it lies below; None for a place the table does not know.

    Only the end of the path counts: `/data/models/Qwen3-8B` is `Qwen3-8B` below `/data/models`.
    """
    for model in MODELS:
        parts = Path(model.name).parts
        if path.parts[-len(parts) :] == parts:
            return model, path.parents[len(parts) - 1]
    return None


def is_miniature(name: str | Path) -> bool:
    """Whether a name or path is one of those that `ipvg-ray models make-mini` makes."""
    return Path(name).name.startswith(("mini-", "mini_"))


def non_commercial(models: Iterable[Model] = MODELS) -> list[Model]:
    """Those whose terms leave out commercial use."""
    return [model for model in models if not model.licence.commercial]
