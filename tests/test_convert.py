"""Copies of models in a shorter precision: the loaders get from them what they get from the originals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from wan_minis import FOLDERS

from ipvg_ray import cli, files
from ipvg_ray.models.convert import ConvertError, convert
from ipvg_ray.models.mini import qwen3, wan_vace
from ipvg_ray.models.wan.load import load, load_text_encoder
from ipvg_ray.models.wan.tasks import TASKS


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    wan_vace.make(root)
    qwen3.make(root, 0)
    return root


def quiet(line: str) -> None:
    pass


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    """Whether two networks have the same tensors, bit by bit and of the same types."""
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(
        tensor.dtype == second[name].dtype and torch.equal(tensor, second[name]) for name, tensor in first.items()
    )


@pytest.mark.parametrize("task", ["vace-i2v", "ti2v-5B", "i2v-A14B"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_copy_loads_as_its_original(task: str, dtype: torch.dtype, root: Path, tmp_path: Path) -> None:
    source, target = root / FOLDERS[task], tmp_path / "copy"
    convert(source, target, dtype, quiet)

    def loaded(folder: Path) -> list[Any]:
        parts = load(folder, TASKS[task], dtype=dtype, device="cpu", shift=5.0)
        return [*parts.transformers, parts.vae, load_text_encoder(folder, dtype=dtype, device="cpu").model]

    assert all(same(one, other) for one, other in zip(loaded(source), loaded(target), strict=True))
    assert {p.relative_to(source) for p in files.files_below(source)} == {
        p.relative_to(target) for p in files.files_below(target)
    }
    types = stored(target / "transformer")
    assert types["blocks.0.attn1.to_q.weight"] == dtype
    assert types["condition_embedder.time_embedder.linear_1.weight"] == torch.float32, "the loader keeps it"
    assert set(stored(target / "vae").values()) == {torch.float32}
    whole, copy = (sum(f.stat().st_size for f in (p / "transformer").glob("*.safetensors")) for p in (source, target))
    assert copy < 0.9 * whole


def stored(folder: Path) -> dict[str, torch.dtype]:
    found: dict[str, torch.dtype] = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            found |= {name: opened.get_tensor(name).dtype for name in opened.keys()}  # noqa: SIM118
    return found


def test_models_in_several_files_keep_their_lists(root: Path, tmp_path: Path) -> None:
    from diffusers import WanVACETransformer3DModel

    source = tmp_path / "source"
    whole = WanVACETransformer3DModel.from_pretrained(root / wan_vace.NAME / "transformer")
    whole.save_pretrained(source, max_shard_size="200KB")
    assert len(list(source.glob("*.safetensors"))) > 2
    convert(source, tmp_path / "copy", torch.bfloat16, quiet)
    (index,) = (tmp_path / "copy").glob("*.index.json")
    listed, before = json.loads(index.read_text()), json.loads((source / index.name).read_text())
    assert listed["weight_map"] == before["weight_map"]
    assert listed["metadata"]["total_size"] < 0.9 * before["metadata"]["total_size"]
    one, other = (
        WanVACETransformer3DModel.from_pretrained(folder, torch_dtype=torch.bfloat16)
        for folder in (source, tmp_path / "copy")
    )
    assert same(one, other)


def test_a_chat_model_is_copied_and_its_configuration_says_so(root: Path, tmp_path: Path) -> None:
    (source,) = {p.parent for p in root.rglob("generation_config.json")}
    convert(source, tmp_path / "copy", torch.bfloat16, quiet)
    config = json.loads((tmp_path / "copy/config.json").read_text())
    assert {config[key] for key in ("dtype", "torch_dtype") if key in config} == {"bfloat16"}
    assert set(stored(tmp_path / "copy").values()) == {torch.bfloat16}


def test_what_cannot_be_copied_is_named_and_leaves_nothing(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "original").mkdir()
    with pytest.raises(ConvertError, match="neither in diffusers' layout nor a transformers model"):
        convert(tmp_path / "original", tmp_path / "copy", torch.bfloat16, quiet)
    (tmp_path / "there").mkdir()
    with pytest.raises(ConvertError, match="is there already"):
        convert(root / wan_vace.NAME, tmp_path / "there", torch.bfloat16, quiet)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text('{"_class_name": "WanTransformer3DModel"}')
    with pytest.raises(ConvertError, match="no safetensors weights"):
        convert(broken, tmp_path / "copy", torch.bfloat16, quiet)
    (broken / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(Exception, match="header"):
        convert(broken, tmp_path / "copy", torch.bfloat16, quiet)
    (broken / "config.json").write_text('{"architectures": ["Qwen3ForCausalLM"], "quantization_config": {"bits": 4}}')
    with pytest.raises(ConvertError, match="is quantised"):
        convert(broken, tmp_path / "copy", torch.bfloat16, quiet)
    assert {p.name for p in tmp_path.iterdir()} == {"original", "there", "broken"}
    assert cli.main(["models", "convert", "a", str(tmp_path / "b"), "--dtype", "int8"]) == 1
    assert "it may be bfloat16 or float16" in capsys.readouterr().err


def test_the_command_copies_by_name(root: Path) -> None:
    arguments = ["models", "convert", wan_vace.NAME, "copies/vace-bf16", "--set", f"models.root={root}"]
    assert cli.main(arguments) == 0
    assert (root / "copies/vace-bf16/model_index.json").is_file()
