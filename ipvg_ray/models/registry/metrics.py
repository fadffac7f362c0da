"""Models of the metrics."""

from __future__ import annotations

from ipvg_ray.models.registry.rows import APACHE, CLIP, HubSource, Licence, Model, UrlSource

AMT = Licence(
    "CC-BY-NC-4.0",
    "non-commercial use, with attribution",
    False,
    "https://github.com/MCG-NKU/AMT/blob/main/LICENSE",
)
GLINT = Licence(
    "LicenseRef-Glint360K-data",
    "research: trained on Glint360K, whose pictures are for non-commercial research",
    False,
    "https://github.com/deepinsight/insightface#license",
)
WIDER = Licence(
    "LicenseRef-MIT-code-WIDER-FACE-data",
    "research: code and weights were published under MIT, the WIDER FACE pictures for research only",
    False,
    "https://github.com/ternaus/retinaface/blob/master/LICENSE",
)
WEBFACE = Licence(
    "LicenseRef-none-CASIA-WebFace-data",
    "research: published without a licence, and trained on CASIA-WebFace, which is for non-commercial research",
    False,
    "https://github.com/ronghuaiyang/arcface-pytorch",
)
PYIQA = Licence(
    "PolyForm-Noncommercial-1.0.0",
    "non-commercial use: the terms of the repository that publishes the converted weights; Google's own are Apache-2.0",
    False,
    "https://github.com/chaofengc/IQA-PyTorch/blob/main/LICENSE_PolyForm-Noncommercial",
)
TORCHVISION = Licence(
    "BSD-3-Clause", "everyone, commercially too", True, "https://github.com/pytorch/vision/blob/main/LICENSE"
)
MIT_LAION = Licence(
    "MIT", "everyone, commercially too", True, "https://github.com/LAION-AI/aesthetic-predictor/blob/main/LICENSE"
)
INTERNVIDEO = Licence(
    "Apache-2.0",
    "everyone, commercially too; the terms of the code's repository",
    True,
    "https://github.com/OpenGVLab/InternVideo/blob/main/LICENSE",
)
_CLIP_FILES = ("config.json", "preprocessor_config.json", "*token*.json", "vocab.json", "merges.txt")
_CLIP_NEEDS = ("config.json", "preprocessor_config.json", "vocab.json", "merges.txt")


def _clip(name: str, fields: tuple[str, ...], purpose: str) -> Model:
    return Model(
        name=name,
        used_by=fields,
        purpose=purpose,
        source=HubSource(f"openai/{name}", (*_CLIP_FILES, "pytorch_model.bin")),
        approx_bytes=605_000_000,
        licence=CLIP,
        needs=(*_CLIP_NEEDS, "pytorch_model.bin"),
        verified="repository as the evaluation codes of ConsisID and TPIGE name it",
        unverified="size, and that the weights lie there as pytorch_model.bin",
    )


MODELS: tuple[Model, ...] = (
    Model(
        name="glint360k_curricular_face_r101_backbone.bin",
        used_by=("evaluate.curricular_face",),
        purpose="CurricularFace IR-101: cur_sim",
        source=HubSource(
            "BestWishYsh/ConsisID-preview",
            ("face_encoder/glint360k_curricular_face_r101_backbone.bin",),
            subpath="face_encoder/glint360k_curricular_face_r101_backbone.bin",
        ),
        approx_bytes=261_000_000,
        licence=GLINT,
        needs=(),
        verified="repository and path as ConsisID's and TPIGE's evaluation codes name them; the network's parameters "
        "take 261 MB",
        unverified="the file itself, its checksum, terms of its own",
    ),
    Model(
        name="inception_v3_google-0cc3c7bd.pth",
        used_by=("evaluate.inception",),
        purpose="Inception-v3 (ImageNet): face_distance",
        source=UrlSource("https://download.pytorch.org/models/inception_v3_google-0cc3c7bd.pth", sha256="0cc3c7bd"),
        approx_bytes=108_900_000,
        licence=TORCHVISION,
        needs=(),
        verified="URL as torchvision's code names it; names and shapes equal to torchvision's network",
        unverified="size (calculated from 27.2 M float32 parameters), checksum beyond the eight digits of the name",
    ),
    Model(
        name="retinaface_resnet50_2020-07-20-f168fae3c.zip",
        used_by=("evaluate.retina_face",),
        purpose="RetinaFace on ResNet-50: human_identity's face detector",
        source=UrlSource(
            "https://github.com/ternaus/retinaface/releases/download/0.01/retinaface_resnet50_2020-07-20-f168fae3c.zip"
        ),
        approx_bytes=109_400_000,
        licence=WIDER,
        needs=(),
        verified="URL as VBench-2.0's code names it; names and shapes equal to retinaface_pytorch's network",
        unverified="size (calculated from 27.4 M float32 parameters), checksum",
    ),
    Model(
        name="resnet18_110.pth",
        used_by=("evaluate.resnet_face",),
        purpose="ResNetFace-18: human_identity's face embedding",
        source=UrlSource(
            "https://drive.usercontent.google.com/download?id=1m387vGTQ4GW4I4PQfBsCC-Y9aEp6zjvy&export=download&confirm=t"
        ),
        approx_bytes=102_600_000,
        licence=WEBFACE,
        needs=(),
        verified="Google Drive's id as VBench-2.0's script names it; names and shapes equal to its network",
        unverified="that this form of the URL is served, size (calculated from 25.6 M float32 parameters), checksum",
    ),
    Model(
        name="ViClip-InternVid-10M-FLT.pth",
        used_by=("evaluate.vi_clip",),
        purpose="ViCLIP-L/14: overall_consistency",
        source=HubSource(
            "OpenGVLab/VBench_Used_Models",
            ("ViClip-InternVid-10M-FLT.pth",),
            subpath="ViClip-InternVid-10M-FLT.pth",
        ),
        approx_bytes=1_710_000_000,
        licence=INTERNVIDEO,
        needs=(),
        verified="file name as VBench's code names it; names and shapes equal to VBench's network (427.6 M parameters)",
        unverified="the repository's own page, checksum, terms of the weights beside the code's",
    ),
    _clip("clip-vit-base-patch32", ("evaluate.clip_b32",), "CLIP ViT-B/32: clip_score; its tokenizer also for ViCLIP"),
    _clip("clip-vit-base-patch16", ("evaluate.clip_b16",), "CLIP ViT-B/16: clip_score_tpige"),
    Model(
        name="sa_0_4_vit_l_14_linear.pth",
        used_by=("evaluate.aesthetic_head",),
        purpose="LAION's linear head on CLIP ViT-L/14: aesthetic_quality",
        source=UrlSource(
            "https://raw.githubusercontent.com/LAION-AI/aesthetic-predictor/main/sa_0_4_vit_l_14_linear.pth"
        ),
        approx_bytes=3_800,
        licence=MIT_LAION,
        needs=(),
        verified="URL as VBench's code names it",
        unverified="size (calculated from 769 float32 parameters), checksum",
    ),
    Model(
        name="musiq_spaq_ckpt-358bb6af.pth",
        used_by=("evaluate.musiq",),
        purpose="MUSIQ trained on SPAQ: imaging_quality",
        source=UrlSource(
            "https://github.com/chaofengc/IQA-PyTorch/releases/download/v0.1-weights/musiq_spaq_ckpt-358bb6af.pth"
        ),
        approx_bytes=108_600_000,
        licence=PYIQA,
        needs=(),
        verified="URL as VBench's and pyiqa's codes name it; names and shapes equal to pyiqa's network",
        unverified="size (calculated from 27.1 M float32 parameters), checksum beyond the eight digits of the name",
    ),
    Model(
        name="amt-s.pth",
        used_by=("evaluate.amt",),
        purpose="AMT-S frame interpolation: motion_smoothness",
        source=HubSource("lalala125/AMT", ("amt-s.pth",), subpath="amt-s.pth"),
        approx_bytes=12_000_000,
        licence=AMT,
        needs=(),
        verified="repository and file as VBench's code names them; names and shapes equal to VBench's network",
        unverified="size (calculated from 2.99 M float32 parameters), checksum",
    ),
    Model(
        name="raft_large_C_T_V1-22a6c225.pth",
        used_by=("evaluate.raft",),
        purpose="RAFT (raft-things.pth under torchvision's names): dynamic_degree",
        source=UrlSource("https://download.pytorch.org/models/raft_large_C_T_V1-22a6c225.pth", sha256="22a6c225"),
        approx_bytes=21_100_000,
        licence=TORCHVISION,
        needs=(),
        verified="URL as torchvision's code names it; names and shapes equal to torchvision's network",
        unverified="size (calculated from 5.26 M float32 parameters), checksum beyond the eight digits of the name",
    ),
    Model(
        name="gme-Qwen2-VL-2B-Instruct",
        used_by=("evaluate.gme",),
        purpose="GME-Qwen2-VL: gme_score",
        source=HubSource("Alibaba-NLP/gme-Qwen2-VL-2B-Instruct", ("*.json", "*.txt", "*.safetensors")),
        approx_bytes=8_840_000_000,
        licence=APACHE,
        needs=("config.json", "preprocessor_config.json", "tokenizer_config.json", "*.safetensors"),
        verified="repository, licence, size and number of parameters (2.2 billion) as projects that list it give them",
        unverified="that its weights carry Qwen2-VL's names",
    ),
)
