"""Miniature Wan models: the real architectures and folder layouts, random weights, a few MB; their videos are noise."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import torch

from ipvg_ray.models.quiet import no_bars

NAME = "mini-wan-vace"
TI2V_NAME = "mini-wan-ti2v"
A14B_NAME = "mini-wan-i2v-a14b"

_TEXT_WIDTH = 32
_HINT_GAIN = 8.0  # a random network barely hears its hints; louder, another first frame visibly is another video
_TEXT = (
    "a an the man woman person in on at with and of to is he she his her they their face eyes hair smile smiles looks "
    "walks stands sits talks turns camera close-up light soft background park street room wearing shirt dress black "
    "white red blue green overexposed static blurred quality low worst picture video"
)


def make(root: Path, seed: int = 0) -> None:
    """Write Wan2.1-VACE, Wan2.2 TI2V-5B and Wan2.2 I2V-A14B in the diffusers format; same seed, same bytes.

    Like the published conversions, the schedulers of VACE and A14B carry flow_shift 3.0, not the official 16 and 5.
    """
    from diffusers import WanImageToVideoPipeline, WanVACEPipeline

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = _tokenizer()
        text: dict[str, Any] = {"tokenizer": tokenizer, "text_encoder": _text_encoder(len(tokenizer))}
        vae = _vae()
        pipelines: dict[str, Any] = {
            NAME: WanVACEPipeline(**text, vae=vae, scheduler=_scheduler(3.0), transformer=_vace()),
            TI2V_NAME: WanImageToVideoPipeline(
                **text, vae=_vae22(), scheduler=_scheduler(5.0), transformer=_wan(48, 48), expand_timesteps=True
            ),
            A14B_NAME: WanImageToVideoPipeline(
                **text,
                vae=vae,
                scheduler=_scheduler(3.0),
                transformer=_wan(36, 16),
                transformer_2=_wan(36, 16),
                boundary_ratio=0.9,
            ),
        }
    with no_bars():
        for name, pipeline in pipelines.items():
            pipeline.save_pretrained(root / name)


def _tokenizer() -> Any:
    """T5's kind of unigram tokenizer: printable ASCII and a few words, written out rather than trained."""
    from transformers import T5Tokenizer

    characters = [(character, -6.0) for character in string.ascii_letters + string.digits + string.punctuation]
    words = [(f"▁{word}", -3.0) for word in _TEXT.split() if len(word) > 1]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    return T5Tokenizer(vocab=[*special, ("▁", -4.0), *characters, *words], extra_ids=0, model_max_length=512)


def _text_encoder(vocabulary: int) -> Any:
    from transformers import UMT5Config, UMT5EncoderModel

    config = UMT5Config(
        vocab_size=vocabulary,
        d_model=_TEXT_WIDTH,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        pad_token_id=0,
        eos_token_id=1,
    )
    return UMT5EncoderModel(config)


def _vae() -> Any:
    """Wan 2.1's causal video VAE: 16 latent channels, 8× smaller in space, 4× in time."""
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan(
        base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )


def _vae22() -> Any:
    """Wan 2.2's VAE of TI2V-5B: 48 latent channels, 16× smaller in space, 4× in time."""
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan(
        base_dim=4,
        decoder_base_dim=4,
        z_dim=48,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=16,
        scale_factor_temporal=4,
        latents_mean=[0.1 * (channel % 5 - 2) for channel in range(48)],
        latents_std=[0.5 + 0.1 * (channel % 7) for channel in range(48)],
    )


_SMALL: dict[str, Any] = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 4,
    "attention_head_dim": 24,
    "text_dim": _TEXT_WIDTH,
    "freq_dim": 64,
    "ffn_dim": 128,
    "num_layers": 4,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 1024,
}


def _vace() -> Any:
    """Four blocks, hints from VACE blocks 0 and 2; 96 control channels = inactive 16 + reactive 16 + mask 64."""
    from diffusers import WanVACETransformer3DModel

    transformer: Any = WanVACETransformer3DModel(
        **_SMALL, in_channels=16, out_channels=16, vace_layers=[0, 2], vace_in_channels=96
    )
    with torch.no_grad():
        transformer.vace_patch_embedding.weight *= _HINT_GAIN
    return transformer


def _wan(in_channels: int, out_channels: int) -> Any:
    """Four blocks without hints."""
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(**_SMALL, in_channels=in_channels, out_channels=out_channels)


def _scheduler(shift: float) -> Any:
    from diffusers import UniPCMultistepScheduler

    return UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=shift
    )
