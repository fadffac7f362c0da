"""Loading: diffusers' folders, the authors' own, what must stay exact, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from wan_minis import FOLDERS

from ipvg_ray.models.mini import wan_vace
from ipvg_ray.models.wan.errors import WanError
from ipvg_ray.models.wan.load import load, load_text_encoder
from ipvg_ray.models.wan.tasks import TASKS


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    wan_vace.make(root)
    return root


def parts(folder: Path, task: str = "vace-i2v", dtype: torch.dtype = torch.float32) -> Any:
    return load(folder, TASKS[task], dtype=dtype, device="cpu", shift=16.0)


def test_the_checkpoints_own_shift_is_replaced(root: Path) -> None:
    folder = root / wan_vace.NAME
    assert json.loads((folder / "scheduler" / "scheduler_config.json").read_text())["flow_shift"] == 3.0
    scheduler = parts(folder).scheduler()
    scheduler.set_timesteps(4)
    sigma = np.linspace(1, 1e-3, 5)[:-1]
    assert scheduler.timesteps.tolist() == pytest.approx(1000 * 16 * sigma / (1 + 15 * sigma), abs=1)


def exact_where_it_must_be(transformer: Any) -> None:
    assert transformer.blocks[0].ffn.net[0].proj.weight.dtype == torch.bfloat16
    assert transformer.condition_embedder.text_embedder.linear_1.weight.dtype == torch.bfloat16
    assert transformer.condition_embedder.time_embedder.linear_1.weight.dtype == torch.float32
    assert transformer.scale_shift_table.dtype == torch.float32
    assert transformer.blocks[0].norm2.weight.dtype == torch.float32


@pytest.mark.parametrize("task", FOLDERS)
def test_bfloat16_spares_what_must_stay_exact(task: str, root: Path) -> None:
    loaded = parts(root / FOLDERS[task], task, torch.bfloat16)
    assert len(loaded.transformers) == TASKS[task].experts
    for transformer in loaded.transformers:
        exact_where_it_must_be(transformer)
    assert {p.dtype for p in loaded.vae.parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in loaded.vae.parameters())


def test_folders_without_the_model_are_refused(tmp_path: Path, root: Path) -> None:
    with pytest.raises(WanError, match="no WanVACEPipeline; task vace-i2v"):
        parts(tmp_path)
    with pytest.raises(WanError, match="no WanVACEPipeline but a WanImageToVideoPipeline"):
        parts(root / wan_vace.TI2V_NAME)
    with pytest.raises(WanError, match="48 input channels and task i2v-A14B needs 36"):
        parts(root / wan_vace.TI2V_NAME, "i2v-A14B")
    with pytest.raises(WanError, match="no text_encoder"):
        load_text_encoder(tmp_path, dtype=torch.float32, device="cpu")


def test_a_schedule_without_shift_is_refused(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / wan_vace.NAME, tmp_path / "copy")
    config = tmp_path / "copy" / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"use_flow_sigmas": False}))
    with pytest.raises(WanError, match="shift"):
        parts(tmp_path / "copy")


def test_no_bars_are_drawn(root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    parts(root / wan_vace.NAME)
    load_text_encoder(root / wan_vace.NAME, dtype=torch.float32, device="cpu")
    printed = capfd.readouterr()
    assert "it/s" not in printed.err + printed.out
    assert "%|" not in printed.err + printed.out


# -- the authors' own layout -----------------------------------------------------------------------------------------

# From diffusers' names to the authors', written down apart from the loader, which goes the other way.
TRANSFORMER = (
    ("condition_embedder.time_embedder.linear_1", "time_embedding.0"),
    ("condition_embedder.time_embedder.linear_2", "time_embedding.2"),
    ("condition_embedder.text_embedder.linear_1", "text_embedding.0"),
    ("condition_embedder.text_embedder.linear_2", "text_embedding.2"),
    ("condition_embedder.time_proj", "time_projection.1"),
    (".attn1.", ".self_attn."),
    (".attn2.", ".cross_attn."),
    (".to_out.0.", ".o."),
    (".to_q.", ".q."),
    (".to_k.", ".k."),
    (".to_v.", ".v."),
    (".norm2.", ".norm3."),
    ("ffn.net.0.proj", "ffn.0"),
    ("ffn.net.2", "ffn.2"),
)
UMT5 = (
    ("encoder.block.", "blocks."),
    ("layer.0.SelfAttention.relative_attention_bias", "pos_embedding.embedding"),
    ("layer.0.SelfAttention", "attn"),
    ("layer.0.layer_norm", "norm1"),
    ("layer.1.layer_norm", "norm2"),
    ("layer.1.DenseReluDense.wi_0", "ffn.gate.0"),
    ("layer.1.DenseReluDense.wi_1", "ffn.fc1"),
    ("layer.1.DenseReluDense.wo", "ffn.fc2"),
    ("encoder.final_layer_norm", "norm"),
    ("shared", "token_embedding"),
)
CONVOLUTIONS = (
    ("norm1.", "residual.0."),
    ("conv1.", "residual.2."),
    ("norm2.", "residual.3."),
    ("conv2.", "residual.6."),
    ("conv_shortcut.", "shortcut."),
)


def renamed(key: str, table: tuple[tuple[str, str], ...]) -> str:
    for ours, theirs in table:
        key = key.replace(ours, theirs)
    return key


def authors_transformer(key: str) -> str:
    key = renamed(key, TRANSFORMER)
    if key.startswith("vace_blocks."):
        key = key.replace(".proj_in.", ".before_proj.").replace(".proj_out.", ".after_proj.")
    if key == "scale_shift_table":
        return "head.modulation"
    return key.replace("scale_shift_table", "modulation").replace("proj_out.", "head.head.")


def authors_vae(key: str, nested: bool) -> str:
    """Wan2.1 lists the blocks of all stages in a row, four a stage of the decoder; Wan2.2 stage by stage."""
    side, _, rest = key.partition(".")
    if side == "quant_conv":
        return f"conv1.{rest}"
    if side == "post_quant_conv":
        return f"conv2.{rest}"
    for ours, theirs in (("conv_in.", "conv1."), ("norm_out.", "head.0."), ("conv_out.", "head.2.")):
        if rest.startswith(ours):
            return f"{side}.{theirs}{rest.removeprefix(ours)}"
    words = rest.split(".")
    if words[0] == "mid_block":
        if words[1] == "attentions":
            return f"{side}.middle.1.{'.'.join(words[3:])}"
        return f"{side}.middle.{2 * int(words[2])}.{renamed('.'.join(words[3:]), CONVOLUTIONS)}"
    way = words[0].removesuffix("_blocks")
    if nested:
        sampler = words[2] in ("downsampler", "upsampler")
        place = {"down": 2, "up": 3}[way] if sampler else int(words[3])
        leaf = ".".join(words[3:]) if sampler else renamed(".".join(words[4:]), CONVOLUTIONS)
        return f"{side}.{way}samples.{words[1]}.{way}samples.{place}.{leaf}"
    if way == "down":
        return f"{side}.downsamples.{words[1]}.{renamed('.'.join(words[2:]), CONVOLUTIONS)}"
    place = 4 * int(words[1]) + (3 if words[2] == "upsamplers" else int(words[3]))
    return f"{side}.upsamples.{place}.{renamed('.'.join(words[4:]), CONVOLUTIONS)}"


def write_transformer(transformer: Any, folder: Path, **more: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    c = transformer.config
    config = {
        "dim": c.num_attention_heads * c.attention_head_dim,
        "eps": c.eps,
        "ffn_dim": c.ffn_dim,
        "freq_dim": c.freq_dim,
        "in_dim": c.in_channels,
        "num_heads": c.num_attention_heads,
        "num_layers": c.num_layers,
        "out_dim": c.out_channels,
        "text_len": 512,
        **more,
    }
    (folder / "config.json").write_text(json.dumps(config))
    state = {authors_transformer(key): value.contiguous() for key, value in transformer.state_dict().items()}
    halves = sorted(state)[: len(state) // 2], sorted(state)[len(state) // 2 :]
    names = [f"diffusion_pytorch_model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    for name, keys in zip(names, halves, strict=True):
        save_file({key: state[key] for key in keys}, folder / name)
    index = {"weight_map": {key: name for name, keys in zip(names, halves, strict=True) for key in keys}}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))


def real_vae(kind: str) -> Any:
    """Wan's VAEs with all of their published blocks, but a few channels wide."""
    from diffusers import AutoencoderKLWan

    if kind == "2.1":
        return AutoencoderKLWan(base_dim=4, z_dim=16)
    return AutoencoderKLWan(
        base_dim=4, decoder_base_dim=8, z_dim=48, is_residual=True, in_channels=12, out_channels=12, patch_size=2,
        scale_factor_spatial=16, scale_factor_temporal=4, latents_mean=[0.0] * 48, latents_std=[1.0] * 48,
    )  # fmt: skip


def write_authors(source: Path, folder: Path, task: str) -> tuple[Any, Any]:
    """The authors' folder of a miniature; returns what was written, as diffusers' models."""
    loaded = parts(source, task)
    if len(loaded.transformers) == 2:
        for transformer, name in zip(loaded.transformers, ("high_noise_model", "low_noise_model"), strict=True):
            write_transformer(transformer, folder / name)
    else:
        write_transformer(loaded.transformers[0], folder, **({"vace_layers": [0, 2]} if "vace" in task else {}))
    kind = "2.2" if task == "ti2v-5B" else "2.1"
    vae = real_vae(kind)
    torch.save({authors_vae(k, kind == "2.2"): v for k, v in vae.state_dict().items()}, folder / f"Wan{kind}_VAE.pth")
    text = load_text_encoder(source, dtype=torch.float32, device="cpu")
    state = {renamed(key, UMT5): value for key, value in text.model.state_dict().items() if "embed_tokens" not in key}
    torch.save(state, folder / "models_t5_umt5-xxl-enc-bf16.pth")
    shutil.copytree(source / "tokenizer", folder / "google" / "umt5-xxl")
    return loaded, vae


@pytest.mark.parametrize("task", ["vace-i2v", "ti2v-5B", "i2v-A14B"])
def test_the_authors_folders_hold_the_same_models(task: str, root: Path, tmp_path: Path) -> None:
    expected, vae = write_authors(root / FOLDERS[task], tmp_path, task)
    found = parts(tmp_path, task)
    for ours, theirs in zip([*found.transformers, found.vae], [*expected.transformers, vae], strict=True):
        left, right = ours.state_dict(), theirs.state_dict()
        assert left.keys() == right.keys()
        assert all(torch.equal(left[key], right[key]) for key in left)
    for ours, theirs in zip(found.transformers, expected.transformers, strict=True):
        settings = [{k: v for k, v in c.items() if not k.startswith("_")} for c in (ours.config, theirs.config)]
        assert json.dumps(settings[0], sort_keys=True) == json.dumps(settings[1], sort_keys=True)
    prompts = ("a woman smiles", "A man.")
    encoders = [load_text_encoder(f, dtype=torch.float32, device="cpu") for f in (tmp_path, root / FOLDERS[task])]
    for prompt in prompts:
        assert torch.equal(*(encoder.states(prompt) for encoder in encoders))


def test_the_authors_folder_in_bfloat16_spares_the_same_parts(root: Path, tmp_path: Path) -> None:
    write_authors(root / wan_vace.NAME, tmp_path, "vace-i2v")
    exact_where_it_must_be(parts(tmp_path, dtype=torch.bfloat16).transformers[0])
    assert len(parts(tmp_path).vae.config.latents_mean) == 16


def test_the_second_vae_has_its_own_statistics(root: Path, tmp_path: Path) -> None:
    write_authors(root / wan_vace.TI2V_NAME, tmp_path, "ti2v-5B")
    config = parts(tmp_path, "ti2v-5B").vae.config
    assert (config.latents_mean[0], config.latents_std[-1]) == (-0.2289, 0.7744)
    assert (len(config.latents_mean), len(config.latents_std)) == (48, 48)


def test_authors_folders_that_are_not_whole_are_refused(root: Path, tmp_path: Path) -> None:
    write_authors(root / wan_vace.NAME, tmp_path, "vace-i2v")
    with pytest.raises(WanError, match="is a VACE model; task ti2v-5B"):
        parts(tmp_path, "ti2v-5B")
    (tmp_path / "google").rename(tmp_path / "elsewhere")
    with pytest.raises(WanError, match="google/umt5-xxl"):
        load_text_encoder(tmp_path, dtype=torch.float32, device="cpu")
    (tmp_path / "Wan2.1_VAE.pth").unlink()
    with pytest.raises(WanError, match=r"neither Wan2.1_VAE.pth nor"):
        parts(tmp_path)
    (tmp_path / "diffusion_pytorch_model-00002-of-00002.safetensors").unlink()
    with pytest.raises(WanError, match=r"lacks diffusion_pytorch_model-00002-of-00002.safetensors"):
        parts(tmp_path)
