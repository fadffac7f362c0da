"""A miniature Wan2.1-VACE: the real architecture and folder layout, random weights, a few MB; its videos are noise."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import torch

from ipvg_ray.models.quiet import no_bars

NAME = "mini-wan-vace"

_TEXT_WIDTH = 32
_HINT_GAIN = 8.0  # a random network barely hears its hints; louder, another first frame visibly is another video
_TEXT = (
    "a an the man woman person in on at with and of to is he she his her they their face eyes hair smile smiles looks "
    "walks stands sits talks turns camera close-up light soft background park street room wearing shirt dress black "
    "white red blue green overexposed static blurred quality low worst picture video"
)


def make(root: Path, seed: int = 0) -> None:
    """Write `<root>/mini-wan-vace` in the diffusers format; the same seed gives the same bytes.

    Like the published conversions, its scheduler carries flow_shift 3.0, not VACE's own 16.
    """
    from diffusers import WanVACEPipeline

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = _tokenizer()
        pipeline: Any = WanVACEPipeline(
            tokenizer=tokenizer,
            text_encoder=_text_encoder(len(tokenizer)),
            vae=_vae(),
            scheduler=_scheduler(),
            transformer=_transformer(),
        )
    with no_bars():
        pipeline.save_pretrained(root / NAME)


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


def _transformer() -> Any:
    """Four blocks, hints from VACE blocks 0 and 2; 96 control channels = inactive 16 + reactive 16 + mask 64."""
    from diffusers import WanVACETransformer3DModel

    transformer: Any = WanVACETransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=4,
        attention_head_dim=24,
        in_channels=16,
        out_channels=16,
        text_dim=_TEXT_WIDTH,
        freq_dim=64,
        ffn_dim=128,
        num_layers=4,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=1024,
        vace_layers=[0, 2],
        vace_in_channels=96,
    )
    with torch.no_grad():
        transformer.vace_patch_embedding.weight *= _HINT_GAIN
    return transformer


def _scheduler() -> Any:
    from diffusers import UniPCMultistepScheduler

    return UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=3.0
    )
