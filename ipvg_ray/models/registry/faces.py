"""Face and matting models."""

from __future__ import annotations

from ipvg_ray.models.registry.rows import APACHE, INSIGHTFACE, LIP, Model, UrlSource

_INSIGHTFACE_RELEASE = "https://github.com/deepinsight/insightface/releases/download/v0.7"
_PADDLE_MATTING = "https://paddleseg.bj.bcebos.com/matting/models"
_MMSEG_HRNET = "https://download.openmmlab.com/mmsegmentation/v0.5/hrnet"
_HRNET_RELEASE = "https://github.com/hsfzxjy/models.storage/releases/download/HRNet-OCR"

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
        purpose="HRNetV2-W48 human parsing (20 LIP classes); 1 - P(background), refined, is the matte",
        source=UrlSource(f"{_HRNET_RELEASE}/hrnet_lip_5583_torch04.pth"),
        approx_bytes=265_000_000,
        licence=LIP,
        needs=(),
        verified="URL as the authors' own table of results links it",
        unverified="size (calculated from 65.9 M float32 parameters), checksum (none is published), the LIP data's "
        "own words",
    ),
    Model(
        name="hrnet_ocr_lip_5648_torch04.pth",
        used_by=(),
        purpose="HRNetV2-W48 human parsing with the OCR head, 56.48 mIoU where the plain one has 55.83",
        source=UrlSource(f"{_HRNET_RELEASE}/hrnet_ocr_lip_5648_torch04.pth"),
        approx_bytes=283_000_000,
        licence=LIP,
        needs=(),
        verified="URL as the authors' own table of results links it",
        unverified="size (calculated from 70.4 M float32 parameters), checksum (none is published), the LIP data's "
        "own words",
    ),
    Model(
        name="fcn_hr48_512x512_40k_voc12aug_20200613_222111-1b0f18bc.pth",
        used_by=(),
        purpose="HRNetV2-W48 with MMSegmentation's FCN head (21 VOC classes, person is one of them)",
        source=UrlSource(
            f"{_MMSEG_HRNET}/fcn_hr48_512x512_40k_voc12aug/fcn_hr48_512x512_40k_voc12aug_20200613_222111-1b0f18bc.pth"
        ),
        approx_bytes=264_000_000,
        licence=APACHE,
        needs=(),
        verified="file name and folder as MMSegmentation's table of results links it; licence of its code",
        unverified="the host in the URL (the table seen names a mirror), size (calculated from 65.9 M float32 "
        "parameters), checksum (the name ends in its first 8 digits), the terms of VOC's pictures",
    ),
    Model(
        name="ppmatting-hrnet_w18-human_512.pdparams",
        used_by=(),
        purpose="PP-Matting on HRNet-W18: alpha of people, hair included, without a refinement step",
        source=UrlSource(f"{_PADDLE_MATTING}/ppmatting-hrnet_w18-human_512.pdparams"),
        approx_bytes=98_000_000,
        licence=APACHE,
        needs=(),
        verified="URL as PaddleSeg's table of results links it; architecture and names compared with PaddleSeg's code "
        "run under Paddle 3.3 on random weights; licence of its code",
        unverified="size (calculated from 24.5 M float32 parameters), checksum (none is published), the terms of the "
        "pictures that it was trained on",
    ),
    Model(
        name="modnet-hrnet_w18.pdparams",
        used_by=(),
        purpose="MODNet on HRNet-W18: as PP-Matting, faster and a little less exact",
        source=UrlSource(f"{_PADDLE_MATTING}/modnet-hrnet_w18.pdparams"),
        approx_bytes=41_000_000,
        licence=APACHE,
        needs=(),
        verified="URL as PaddleSeg's table of results links it; architecture and names compared with PaddleSeg's code "
        "run under Paddle 3.3 on random weights; licence of its code",
        unverified="size (calculated from 10.2 M float32 parameters), checksum (none is published), the terms of the "
        "pictures that it was trained on",
    ),
)
