"""Configuration: defaults, profiles, overrides, and refusals that name the mend."""

from __future__ import annotations

from pathlib import Path

import pytest

from ipvg_ray import config


@pytest.mark.parametrize("profile", config.profiles())
def test_every_profile_is_valid(profile: str) -> None:
    assert config.load(profile).profile == profile


def test_the_defaults_are_the_published_settings() -> None:
    settings = config.load("gpu")
    video, frame, prompts = settings.video, settings.first_frame, settings.prompts
    assert (video.steps, video.shift, video.guidance, video.frames, video.fps) == (50, 16.0, 5.0, 81, 16)
    assert (video.width, video.height) == (frame.width, frame.height) == (832, 480)
    assert (frame.steps, frame.guidance, frame.weight, frame.quality) == (20, 5.0, 0.85, 95)
    assert (prompts.temperature, prompts.top_p, prompts.max_new_tokens) == (0.1, 0.9, 1000)
    assert settings.faces.det_sizes == (640, 512, 384, 256)


def test_later_sources_win(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("video: {steps: 7, fps: 8}\nseed: 3\n")
    settings = config.load("cpu-mini", file=file, overrides=["video.steps=9"], values={"seed": 4})
    assert (settings.video.steps, settings.video.fps, settings.seed) == (9, 8, 4)
    assert settings.video.width == 176, "the profile's other values stay"
    again = config.updated(settings.model_dump(mode="json"), ["video.steps=10"], {})
    assert again == settings.model_copy(update={"video": settings.video.model_copy(update={"steps": 10})})


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("video.stps=4", r"unknown key 'video.stps'; did you mean 'steps'\?"),
        ("vdeo.steps=4", r"unknown key 'vdeo'; did you mean 'video'\?"),
        ("faces.pool.gpu=1", r"unknown key 'faces.pool.gpu'; did you mean 'gpus'\?"),
        ("video.frames=80", r"frames is 80; Wan needs 4·n \+ 1, such as 81"),
        ("video.width=100", r"width is 100; it must be a multiple of 16, such as 96"),
        ("first_frame.height=99", r"multiple of 8, such as 96"),
        ("faces.pool.gpus=1.5", r"gpus is 1.5: use a share below 1, or a whole number"),
        ("faces.pool.max_workers=0", r"faces.pool.max_workers"),
        ("video.pool.min_workers=5", r"max_workers is 2, below min_workers 5"),
        ("faces.det_sizes=[100]", r"each must be a positive multiple of 32"),
        ("matting.method=magic", r"matting.method: .*'hrnet'"),
        ("dataset.columns={identiti_id: x}", r"columns renames 'identiti_id'.*did you mean 'identity_id'"),
        ("seed=-1", r"seed: .*greater than or equal to 0 \(given: -1\)"),
        ("video", r"write section.field=value"),
        ("video.steps=[", r"the value is not YAML"),
    ],
)
def test_refusals_name_the_field_and_the_mend(override: str, message: str) -> None:
    with pytest.raises(config.ConfigError, match=message):
        config.load("cpu-mini", overrides=[override])


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        ("vace-i2v", ("Wan2.1-VACE-14B-diffusers", 832, 480, 81, 16, 50, 16.0, 5.0, None, None)),
        ("vace-r2v", ("Wan2.1-VACE-14B-diffusers", 832, 480, 81, 16, 50, 16.0, 5.0, None, None)),
        ("ti2v-5B", ("Wan2.2-TI2V-5B-Diffusers", 1280, 704, 121, 24, 50, 5.0, 5.0, None, None)),
        ("i2v-A14B", ("Wan2.2-I2V-A14B-Diffusers", 832, 480, 81, 16, 40, 5.0, 3.5, 3.5, 0.9)),
    ],
)
def test_each_video_task_brings_its_official_settings(task: str, expected: tuple[object, ...]) -> None:
    video = config.load("gpu", overrides=[f"video.task={task}"]).video
    assert expected == (
        video.model, video.width, video.height, video.frames, video.fps, video.steps, video.shift, video.guidance,
        video.guidance_low, video.boundary,
    )  # fmt: skip
    assert config.load("gpu", overrides=[f"video.task={task}", "video.steps=7"]).video.steps == 7
    words = video.negative_prompt.split("，")
    assert (len(words), words[0], words[11], words[-1]) == (28, "色调艳丽", "最差质量", "倒着走"), (
        "as the authors' code"
    )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["video.task=t2v"], r"video.task: .*'vace-i2v'"),
        (["video.task=ti2v-5B", "video.height=720"], r"height is 720; it must be a multiple of 32, such as 704"),
        (["video.task=i2v-A14B", "video.guide=tpige"], r"guide tpige weakens VACE's hints"),
        (["video.task=i2v-A14B", "video.boundary=null"], r"needs boundary"),
        (["video.compile=true", "video.cache.kind=taylorseer"], r"compile and cache exclude each other"),
        (["video.together=3"], r"together is 3, .* set pool\.batch_size to a multiple of 3"),
        (
            ["video.together=2", "video.pool.batch_size=2", "video.cache.kind=first_block"],
            r"set together to 1, or cache\.kind to taylorseer",
        ),
    ],
)
def test_video_settings_that_exclude_each_other(overrides: list[str], message: str) -> None:
    with pytest.raises(config.ConfigError, match=message):
        config.load("gpu", overrides=overrides)


def test_a_reference_that_nothing_draws_is_refused() -> None:
    chosen = ["video.task=vace-r2v", "video.reference=reference_picture"]
    with pytest.raises(config.ConfigError, match=r"set first_frame\.reference\.enhance to hyperlora"):
        config.load("gpu", overrides=chosen)
    config.load("gpu", overrides=[*chosen, "first_frame.reference.enhance=hyperlora"])


def test_unknown_profile_and_file(tmp_path: Path) -> None:
    with pytest.raises(config.ConfigError, match="did you mean 'cpu-mini'"):
        config.load("cpu-min")
    with pytest.raises(config.ConfigError, match="cannot read the configuration file"):
        config.load("gpu", file=tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("- a\n")
    with pytest.raises(config.ConfigError, match="must hold sections and fields"):
        config.load("gpu", file=tmp_path / "list.yaml")


def test_models_are_found_by_path_or_below_the_root(tmp_path: Path) -> None:
    settings = config.load("cpu-mini", overrides=[f"models.root={tmp_path}"])
    assert settings.models.path("mini-qwen3") == tmp_path / "mini-qwen3"
    assert settings.models.path("/models/x") == Path("/models/x")


def test_labels_of_nodes_are_checked_for_their_syntax() -> None:
    asked = config.load("cpu-mini", overrides=["video.pool.label_selector={ipvg-ray/pool: eight-gpu}"])
    assert asked.video.pool.label_selector == {"ipvg-ray/pool": "eight-gpu"}
    with pytest.raises(config.ConfigError, match="label_selector names the label 'my label'"):
        config.load("cpu-mini", overrides=["video.pool.label_selector={my label: x}"])
