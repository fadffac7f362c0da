"""`ipvg-ray evaluate` and `compare` as users call them, on small videos and miniature models, through the engine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ipvg_ray import tables
from ipvg_ray.media import images, videos
from ipvg_ray.metrics import catalogue
from ipvg_ray.pipeline.fingerprint import digest_of

pytestmark = pytest.mark.slow


def call(*arguments: str, code: int = 0) -> str:
    command = [sys.executable, "-m", "ipvg_ray", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600)
    assert done.returncode == code, done.stdout
    return done.stdout


def astronaut() -> np.ndarray:
    from skimage import data

    return np.ascontiguousarray(data.astronaut()[:256, 96:352])


def video(shift: int) -> bytes:
    """The astronaut, moving to the right."""
    picture = astronaut()[::2, ::2]
    return videos.encode_mp4(np.stack([np.roll(picture, shift * number, 1) for number in range(9)]), 8, 18)


def put(path: Path, data: bytes | str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())


def as_an_older_version_left_it(run: Path, version: int | None = None) -> None:
    """Without what this version adds to run.json; `version` is that of the stage that scored."""
    kept = json.loads((run / "run.json").read_text())
    for name in ("videos", "layout"):
        kept["dataset"].pop(name, None)
    kept["config"]["dataset"].pop("max_references", None)
    if version is not None:
        scored = kept["stages"]["evaluate"]
        scored["inputs"]["version"] = version
        scored["fingerprint"] = digest_of(scored["inputs"])
    (run / "run.json").write_text(json.dumps(kept))


def layouts(root: Path) -> dict[str, list[str]]:
    """The same two good videos, a broken one and a missing one, in every layout; the arguments that name them."""
    face = images.encode(astronaut())["bytes"]
    prompts = {"id001": {"1": "a woman in orange", "2": "she smiles"}, "id002": {"1": "a woman", "2": "she waves"}}
    good, cut = video(2), video(1)[:-300]
    (root / "refs").mkdir(parents=True)
    for identity_id, texts in prompts.items():
        put(root / f"refs/{identity_id}.png", face)
        put(root / f"set/{identity_id}/image.png", face)
        for number, text in texts.items():
            put(root / f"set/{identity_id}/prompt{number}.txt", text)
            put(root / f"texts/{identity_id}_prompt{number}.txt", text)
    entries = [{"img": f"images/{i}.png", "prompt": text} for i, texts in prompts.items() for text in texts.values()]
    put(root / "eval.json", json.dumps(entries))
    names = {"challenge": "{i}/prompt{k}.mp4", "tpige": "{i}_{k}.mp4", "2026": "{n}.mp4"}
    for layout, name in names.items():
        for number, (i, k) in enumerate((("id001", 1), ("id001", 2), ("id002", 1)), 1):
            put(root / layout / name.format(i=i, k=k, n=number), cut if number == 2 else good)
    refs, texts, numbered = (str(root / part) for part in ("refs", "texts", "eval.json"))
    return {
        "challenge": ["--refs", str(root / "set")],
        "tpige": ["--refs", refs, "--prompts", texts],
        "2026": ["--refs", refs, "--prompts", numbered],
    }


def test_every_layout_and_a_comparison(tmp_path: Path, mini_models: Path) -> None:
    common = ["--profile", "cpu-mini", "--set", f"models.root={mini_models}"]
    found = {}
    for layout, arguments in layouts(tmp_path).items():
        run = tmp_path / f"run-{layout}"
        output = call("evaluate", "--videos", str(tmp_path / layout), *arguments, "--out", str(run), *common, code=3)
        assert "missing_video: 1" in output
        assert "broken_video: 1" in output
        rows = sorted(tables.read_table(run, "evaluate").to_pylist(), key=lambda row: row["identity_id"])
        found[layout] = [[row[name] for name in ("arc_sim", *catalogue.NAMES)] for row in rows]
        assert len(rows) == 2
        assert (run / "scores.md").read_text().count("2 of 4") == 1
        assert (run / "report.html").is_file()
    stages = json.loads(call("status", str(run), "--json"))["stages"]
    assert list(stages) == ["video", "evaluate"]
    for scores in found["challenge"]:
        assert scores[0] > 0.5  # the face of the video is the reference's
        assert sum(score is None for score in scores) == 1  # human_identity wants 21 frames
    for layout in ("tpige", "2026"):
        assert np.allclose(np.array(found[layout], float), np.array(found["challenge"], float), equal_nan=True)

    as_an_older_version_left_it(run)
    assert list(json.loads(call("status", str(run), "--json"))["stages"]) == ["video", "evaluate"]
    assert "report" in call("report", str(run))
    again = ["evaluate", "--videos", str(tmp_path / "2026"), *arguments, "--out", str(run), *common]
    for command in (["run", "--out", str(run)], again):
        assert "2 of 4 rows finished" in call(*command, code=3)
    as_an_older_version_left_it(run, version=1)
    refused = call(*again, code=1)
    assert "evaluate.version: 1 → 3 (this version of ipvg-ray" in refused
    assert f"options of `ipvg-ray run --out {run}`" in refused
    (run / "scores.md").unlink()
    assert "2 of 4 rows finished" in call("run", "--out", str(run), "--redo-from", "evaluate", code=3)
    call(*again, code=3)
    assert (run / "scores.md").is_file()

    first, second = (str(tmp_path / f"run-{layout}") for layout in ("challenge", "challenge"))
    assert "arc_sim" in call("compare", first, second, "--fail-if", "arc_sim<-0.01")
    assert "holds" in call("compare", first, second, "--fail-if", "arc_sim>-0.01", code=1)


def test_an_experiment_shares_what_its_rows_have_in_common(tmp_path: Path, mini_models: Path) -> None:
    put(tmp_path / "set/id001/image.png", images.encode(astronaut())["bytes"])
    put(tmp_path / "set/id001/prompt1.txt", "a woman in an orange suit smiles")
    put(
        tmp_path / "e.yaml",
        "title: Frames\nmetrics: [arc_sim, clip_score]\nvariants:\n- {name: few, set: {evaluate: {frames: 4}}}\n"
        "- {name: many, set: {evaluate: {frames: 9}}, paper: {arc_sim: 0.262}}\n",
    )
    arguments = ["experiment", str(tmp_path / "e.yaml"), str(tmp_path / "set"), "--out", str(tmp_path / "out")]
    arguments += ["--profile", "cpu-mini", "--set", f"models.root={mini_models}", "--set", "video.frames=5"]
    output = call(*arguments)
    assert "takes over from" in output
    second = tables.read_run(tmp_path / "out/many")
    assert {stage for session in second["sessions"] for stage, done in session["stages"].items() if done["rows"]} == {
        "evaluate"
    }
    first_video, second_video = ((tmp_path / "out" / name / "videos").rglob("*.mp4") for name in ("few", "many"))
    assert [path.read_bytes() for path in first_video] == [path.read_bytes() for path in second_video]
    text = (tmp_path / "out/table.md").read_text()
    assert "| *paper: many* |  | 0.262 |" in text
    assert {path.name for path in (tmp_path / "out").glob("table*")} == {
        "table.md",
        "table.csv",
        "table.tex",
        "table.html",
        "table_samples.csv",
        "table_comparisons.csv",
    }
