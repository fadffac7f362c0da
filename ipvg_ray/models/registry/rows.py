"""What a row of the table of models holds, and the licences that several rows share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


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
        sha256: of the file as served, or its first digits where only a file's name gives them, or None where nobody
            published one. The pull's receipt records it.
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
