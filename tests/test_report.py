"""The report page: what it says of a run in any state, what it refuses to say as HTML, and how large it may become."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ipvg_ray import cli, config, tables
from ipvg_ray.media import images, videos
from ipvg_ray.report import facts, lookup
from ipvg_ray.report.page import write_report
from ipvg_ray.report.progress import BEGUN, FAILED, FINISHED, WAITING, choose, read_progress
from ipvg_ray.report.scored import read_scored

STAGES = ("faces", "matting", "prompts", "first_frame", "video", "evaluate")
HOSTILE = '<script>alert("x")</script> & <img src=x onerror=alert(1)> "quoted" \'single\''


# -- a run directory like the engine's -----------------------------------------------------------------------------


class FakeRun:
    """Writes the tables of a run, a part file per row; `sample` and `people` go as far as they are asked to."""

    def __init__(self, folder: Path) -> None:
        self.dir = folder
        self.parts = 0
        folder.mkdir(parents=True, exist_ok=True)

    def write(self, name: str, rows: list[dict[str, Any]], row_group_size: int | None = None) -> Path:
        schema = tables.stored_schema(name)
        full = [{column: row.get(column) for column in schema.names} for row in rows]
        (self.dir / name).mkdir(exist_ok=True)
        path = self.dir / name / f"part-{self.parts:06d}.parquet"
        self.parts += 1
        pq.write_table(pa.Table.from_pylist(full, schema=schema), path, row_group_size=row_group_size or 1 << 20)
        return path

    def run_json(self, run: dict[str, Any] | None = None, **sections: Any) -> None:
        if run is None:
            run = {
                "version": 1,
                "created": "2025-11-21T03:08:00+00:00",
                "config": config.load("cpu-mini", values=sections).model_dump(mode="json"),
                "stages": {name: {"fingerprint": "0" * 16, "inputs": {}} for name in STAGES},
                "sessions": [session("complete")],
                "dataset": {"path": "faces", "format": "vip200k", "identities": 1, "samples": 1, "problems": 0},
            }
        (self.dir / "run.json").write_text(json.dumps(run))

    def identity(self, identity_id: str, picture: dict[str, Any] | None = None, **columns: Any) -> None:
        picture = picture or images.encode(colour_picture(identity_id))
        digest = hashlib.sha256(picture["bytes"]).hexdigest() if picture["bytes"] else "0" * 64
        row = {
            "identity_id": identity_id,
            "image": picture,
            "image_sha256": digest,
            "image_width": 64,
            "image_height": 48,
        }
        self.write("identities", [{**row, **columns}])

    def sample(self, identity_id: str, prompt_id: str, prompt: str = "walks on a beach", upto: str = "evaluate") -> str:
        """One sample with the sample stages up to `upto`; `samples` for none of them."""
        sample_id = f"{identity_id}/{prompt_id}"
        key = {"identity_id": identity_id, "sample_id": sample_id, "seed": 7, "seconds": 1.5}
        self.write("samples", [{**key, "prompt_id": prompt_id, "prompt": prompt}])
        row = self.rows_of(key, prompt)
        for stage in STAGES[2 : STAGES.index(upto) + 1 if upto in STAGES else 2]:
            self.write(stage, [{**key, **row[stage]()}])
        return sample_id

    def people(self, *identity_ids: str, **columns: Any) -> None:
        """Faces and mattes; `columns` are of the faces."""
        for identity_id in identity_ids:
            key = {"identity_id": identity_id, "seed": 7, "seconds": 0.5}
            face = {"face_count": 2, "face_box": [16, 12, 48, 36], "face_score": 0.875, "target": "A woman"}
            face |= {"landmarks_5": [0] * 10, "landmarks_106": [0] * 212}
            face |= dict.fromkeys(("embedding", "id_embedding"), [0] * 512)
            face |= {"embeddings": [[0] * 512], "id_embeddings": [[0] * 512]}
            face |= {"reference_numbers": [0], "odd_references": [], "reference_notes": [], "flaws": []}
            face |= dict.fromkeys(("face_size", "yaw", "pitch", "roll", "sharpness"), 0)
            face |= dict.fromkeys(("embedding_norm", "id_embedding_norm"), 20)
            self.write("faces", [{**key, **face, **columns}])
            matte = images.encode(np.full((48, 64), 200, np.uint8))
            cut = {"matte": matte, "id_picture": matte, "matting_method": "hrnet", "person_share": 0.25}
            self.write("matting", [{**key, **cut}])

    def rows_of(self, key: dict[str, Any], prompt: str) -> dict[str, Any]:
        number = int(re.sub(r"\D", "", key["sample_id"]) or 0)
        return {
            "prompts": lambda: {
                "video_prompt": f"A woman {prompt}",
                "image_prompt": f"fcsks, {prompt}, close-up",
                "prompt_status": "retried",
                "prompt_note": "the first answer was empty",
            },
            "first_frame": lambda: {
                "first_frame": images.encode(colour_picture(key["sample_id"]), "jpeg"),
                "first_frame_width": 64,
                "first_frame_height": 48,
                "first_frame_attempt": 2,
                "first_frame_reason": "similar",
                "first_frame_similarity": 0.6,
                "first_frame_similarities": [None, 0.6],
                "first_frame_seed": 7,
                "first_frame_detail": "done",
                "first_frame_faces": 1,
            },
            "video": lambda: self.video(key["sample_id"]),
            "evaluate": lambda: {"arc_sim": (number % 100) / 100, "arc_frames": 5, "frames_ok": True, "motion": 0.25},
        }

    def video(self, sample_id: str) -> dict[str, Any]:
        uri = f"videos/{sample_id}.mp4"
        data = tiny_mp4()
        (self.dir / uri).parent.mkdir(parents=True, exist_ok=True)
        (self.dir / uri).write_bytes(data)
        shape = {"video_width": 32, "video_height": 32, "video_frames": 5, "video_fps": 4.0, "video_seconds": 1.25}
        stills = {"video_poster": images.encode(colour_picture(uri)), "video_strip": images.encode(colour_picture("s"))}
        return {"video_uri": uri, "video_bytes": len(data), "video_sha256": "0" * 64, **shape, **stills}

    def failure(self, stage: str, identity_id: str, sample_id: str | None, **columns: Any) -> None:
        row = {"kind": "error", "message": "went wrong", "attempt": 1, "failed_at": datetime(2025, 11, 21, tzinfo=UTC)}
        self.write("failures", [{"stage": stage, "identity_id": identity_id, "sample_id": sample_id, **row, **columns}])

    def page(self) -> str:
        return write_report(self.dir).read_text(encoding="utf-8")


def session(outcome: str | None, **stages: Any) -> dict[str, Any]:
    timing = {"rows": 3, "failed": 1, "busy_seconds": 8.0, "workers": 2}
    ended = None if outcome is None else "2025-11-21T03:10:05+00:00"
    seconds = None if outcome is None else 125.0
    return {
        "started": "2025-11-21T03:08:00+00:00",
        "ended": ended,
        "seconds": seconds,
        "outcome": outcome,
        "host": "node-7",
        "stages": stages or {"video": timing},
    }


def colour_picture(text: str) -> np.ndarray:
    colour = np.frombuffer(hashlib.sha256(text.encode()).digest()[:3], np.uint8)
    return np.broadcast_to(colour, (48, 64, 3)).copy()


_mp4: list[bytes] = []


def tiny_mp4() -> bytes:
    if not _mp4:
        ramp = np.arange(5 * 32 * 32 * 3, dtype=np.uint32).reshape(5, 32, 32, 3) % 251
        _mp4.append(videos.encode_mp4(ramp.astype(np.uint8), fps=4, crf=30))
    return _mp4[0]


@pytest.fixture
def run(tmp_path: Path) -> FakeRun:
    """Two identities with two finished samples each."""
    fake = FakeRun(tmp_path / "my run")
    for identity in ("id0", "id1"):
        fake.identity(identity)
        for prompt in ("p0", "p1"):
            fake.sample(identity, prompt)
    fake.people("id0", "id1")
    fake.run_json()
    return fake


# -- reading the page ----------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Elements of a page as (tag, attributes), and the text of each that has an id or class asked for."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []
        self._raw = ""
        self.feed(html)
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        self._raw = tag if tag in ("script", "style") else ""

    def handle_endtag(self, tag: str) -> None:
        self._raw = ""

    def handle_data(self, data: str) -> None:
        if not self._raw:
            self.texts.append(data)

    def all(self, tag: str, **attributes: str) -> list[dict[str, str]]:
        wanted = {name.rstrip("_"): value for name, value in attributes.items()}
        return [a for t, a in self.elements if t == tag and all(a.get(k) == v for k, v in wanted.items())]


def counts(page: Page) -> dict[str, int]:
    found = re.findall(r"(Identities|Samples|Finished|Failed|Waiting) (\d+)", page.text)
    return {name.lower(): int(number) for name, number in found[:5]}


def data_uri(uri: str) -> bytes:
    return base64.b64decode(uri.partition("base64,")[2], validate=True)


# -- content -------------------------------------------------------------------------------------------------------


def test_finished_run_shows_every_sample_with_pictures_prompts_video_and_scores(run: FakeRun) -> None:
    page = Page(run.page())
    assert counts(page) == {"identities": 2, "samples": 4, "finished": 4, "failed": 0, "waiting": 0}
    assert [a["aria-label"] for a in page.all("article")] == ["id0/p0", "id0/p1", "id1/p0", "id1/p1"]
    assert [a["aria-label"] for a in page.all("section", class_="identity")] == ["Identity id0", "Identity id1"]
    assert "A woman walks on a beach" in page.text
    assert "fcsks, walks on a beach, close-up" in page.text
    assert "retried" in page.text
    assert "the first answer was empty" in page.text
    assert "32 \N{MULTIPLICATION SIGN} 32 · 5 frames · 4 fps · 1.2 s" in page.text
    assert "2 faces found" in page.text
    assert "matte covers 25%" in page.text
    assert "my run" in page.text
    assert "Failures" not in page.text


def test_pictures_are_those_of_the_tables_and_videos_play_byte_for_byte(run: FakeRun) -> None:
    page = Page(run.page())
    by_alt = {a["alt"]: a["src"] for a in page.all("img") if a.get("alt")}
    reference = images.decode(data_uri(by_alt["Reference picture of id1"]))
    assert np.abs(reference.astype(int) - colour_picture("id1")).max() <= 4
    frame = images.decode(data_uri(by_alt["First frame of id0/p1"]))
    assert np.abs(frame.astype(int) - colour_picture("id0/p1")).max() <= 6
    assert images.decode(data_uri(by_alt["Matte of id0"])).mean() == 200
    films = page.all("video")
    assert len(films) == 4
    for film in films:
        assert data_uri(film["src"]) == tiny_mp4()
        assert {"muted", "loop", "playsinline", "controls"} <= film.keys()
    poster = images.decode(data_uri(films[0]["poster"]))
    assert np.abs(poster.astype(int) - colour_picture("videos/id0/p0.mp4")).max() <= 6
    strip = images.decode(data_uri(by_alt["Frames of the video of id0/p0, from first to last"]))
    assert np.abs(strip.astype(int) - colour_picture("s")).max() <= 6
    assert all(a.get("alt") for a in page.all("img") if a.get("src"))


def test_scores_have_mean_and_median_and_rows_carry_them_for_sorting(run: FakeRun) -> None:
    page = Page(run.page())
    values = [float(a["data-score-arc_sim"]) for a in page.all("article")]
    assert values == pytest.approx([0.0, 0.01, 0.1, 0.11])
    assert "0.055 mean 0.055 median 0.000 to 0.110" in page.text
    assert "100 % hold" in page.text
    assert {"arc_sim high", "arc_sim low", "motion high"} <= {a.get("value") for a in page.all("option")}


def test_settings_timings_and_sessions_are_shown(run: FakeRun) -> None:
    text = Page(run.page()).text
    assert "max_new_tokens 48" in text
    assert "pool.batch_size 8" in text
    assert "node-7" in text
    assert "2 min 05 s" in text
    assert "video 3 +1 failed 8.0 s, 2 workers" in text
    assert "video per sample 4 / 4 0 0 2.0 s 8.0 s 2 –" in text  # 8 s of work over 3 + 1 rows tried
    assert "mini-wan-vace" in text
    assert "format vip200k" in text


def test_models_are_those_that_a_stage_used() -> None:
    config = {
        "prompts": {"method": "raw", "model": "large"},
        "video": {"model": "wan", "dtype": "bfloat16"},
        "evaluate": {"pack": "buffalo_l", "raft": "raft.pth", "amt": "amt-s.pth"},
    }
    inputs = {
        "prompts": {"settings": {"method": "raw"}, "models": {}},
        "video": {"settings": {"folder": "/given", "layout": "2026"}, "models": {}},
        "evaluate": {"settings": {"frames": 16}, "models": {"pack": "0", "raft": "1"}},
    }
    stages = {name: {"inputs": value} for name, value in inputs.items()}
    found = facts.models({"config": config, "stages": stages}, list(stages))
    assert found == {"prompts": ["raw"], "evaluate": ["buffalo_l", "raft.pth"]}


def test_what_was_lost_with_nodes_and_how_long_a_first_row_took_is_shown(run: FakeRun) -> None:
    timing = {"rows": 3, "failed": 0, "busy_seconds": 8.0, "workers": 2, "first_row_seconds": 95.0}
    lost = {"batches": 3, "notices": 1, "executions": "nonsense"}
    run.run_json({"sessions": [session("complete", video=timing) | {"lost": lost}, session("complete")]})
    text = Page(run.page()).text
    assert "video per sample 4 / 4 0 0 2.3 s 16.0 s 2 1 min 35 s" in text
    assert "1 node was taken away after a notice" in text
    assert "3 batches were begun again elsewhere" in text
    assert "from its checkpoints" not in text


def test_notice_of_miniature_models_stands_only_on_their_profile(run: FakeRun) -> None:
    assert "Miniature random models draw noise" in Page(run.page()).text
    run.run_json({"config": {"profile": "gpu"}})
    text = Page(run.page()).text
    assert "Miniature" not in text
    assert "profile gpu" in text


def test_face_box_is_given_as_shares_of_the_picture(run: FakeRun) -> None:
    box = next(a for a in Page(run.page()).all("rect") if a.get("x") == "0.25")
    assert [float(box[name]) for name in ("x", "y", "width", "height")] == [0.25, 0.25, 0.5, 0.5]


# -- failures and runs that are not finished -----------------------------------------------------------------------


def test_failures_are_listed_with_reasons_and_stop_their_samples(run: FakeRun) -> None:
    run.identity("cat")
    run.sample("cat", "p0", upto="samples")
    run.sample("cat", "p1", upto="samples")
    run.failure("faces", "cat", None, kind="no_face", message="no face found; use a clearer picture")
    run.sample("id0", "p9", upto="first_frame")
    run.failure("video", "id0", "id0/p9", kind="error", message="out of memory", traceback="Traceback: line 1\nBoom")
    page = Page(run.page())
    assert counts(page) == {"identities": 3, "samples": 7, "finished": 4, "failed": 3, "waiting": 0}
    assert "Finished with failures" in page.text
    assert "faces no_face 1 row cat 2025-11-21 00:00 UTC no face found; use a clearer picture" in page.text
    assert "video error 1 row id0/p9" in page.text
    assert page.text.count("Traceback: line 1 Boom") == 2  # in the list and in the sample's row
    assert page.text.count("Failed at faces") == 2
    status = {a["aria-label"]: a["data-status"] for a in page.all("article")}
    assert status["cat/p0"] == status["cat/p1"] == status["id0/p9"] == "failed"
    link = {a["id"]: a["aria-label"] for a in page.all("article")}
    targets = [link[a["href"][1:]] for a in page.all("a") if re.fullmatch(r"#s\d+", a.get("href", ""))]
    assert targets == ["cat/p0", "id0/p9"]
    assert "faces per identity 2 / 3 1 0" in page.text
    assert "evaluate per sample 4 / 7 0 0" in page.text  # three are not reached, none waits


def test_a_failure_that_was_mended_by_a_retry_is_no_failure(run: FakeRun) -> None:
    run.failure("video", "id0", "id0/p0")
    page = Page(run.page())
    assert counts(page)["failed"] == 0
    assert "went wrong" not in page.text
    assert "1 failed once and succeeded when tried again" in page.text


def test_only_the_latest_attempt_counts(run: FakeRun) -> None:
    run.sample("id1", "p9", upto="prompts")
    run.failure("first_frame", "id1", "id1/p9", attempt=2, message="second reason")
    run.failure("first_frame", "id1", "id1/p9", attempt=1, message="first reason")
    text = Page(run.page()).text
    assert "second reason" in text
    assert "first reason" not in text
    assert "attempt 2" in text


def test_dataset_failures_are_listed_with_their_place_and_fail_no_sample(run: FakeRun) -> None:
    run.failure("dataset", "id0", None, kind="empty_prompt", message="the prompt is empty", where="prompts.csv, row 4")
    run.failure("dataset", "id0", None, kind="empty_prompt", message="the prompt is empty", where="prompts.csv, row 9")
    page = Page(run.page())
    assert counts(page)["failed"] == 0
    assert "identity set empty_prompt 2 refused while it was read" in page.text
    assert "prompts.csv, row 4" in page.text
    assert "prompts.csv, row 9" in page.text


def test_run_in_progress_says_what_waits(run: FakeRun) -> None:
    run.identity("new")
    run.sample("new", "p0", upto="samples")
    run.sample("id1", "p7", upto="prompts")
    config_tree = config.load("cpu-mini").model_dump(mode="json")
    run.run_json({"config": config_tree, "sessions": [session(None)]})  # no "stages": the pipeline's own are meant
    page = Page(run.page())
    assert counts(page) == {"identities": 3, "samples": 6, "finished": 4, "failed": 0, "waiting": 2}
    assert "In progress" in page.text
    assert "first_frame per sample 4 / 6 0 2" in page.text
    assert {a["aria-label"] for a in page.all("article", **{"data-status": "waiting"})} == {"new/p0", "id1/p7"}


def test_stages_that_are_not_part_of_the_run_are_not_waited_for(tmp_path: Path) -> None:
    run = FakeRun(tmp_path / "run")
    run.identity("id0")
    run.people("id0")
    run.sample("id0", "p0", upto="prompts")
    run.run_json({"stages": {name: {} for name in STAGES[:3]}})
    page = Page(run.page())
    assert counts(page) == {"identities": 1, "samples": 1, "finished": 1, "failed": 0, "waiting": 0}
    assert "not part of this run" in page.text


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"config": None, "sessions": None, "stages": None, "dataset": None},
        {"config": {"report": {}}, "sessions": [{}, {"stages": {"faces": {}}}], "dataset": {"problems": 3}},
        {
            "created": "some day",
            "sessions": [{"seconds": "NaN", "stages": {"video": {"rows": None}}}],
            "config": {"seed": 1},
        },
    ],
)
def test_empty_run_and_missing_keys_do_not_break_the_page(tmp_path: Path, content: dict[str, Any]) -> None:
    run = FakeRun(tmp_path / "run")
    run.run_json(content)
    page = Page(run.page())
    assert counts(page) == {"identities": 0, "samples": 0, "finished": 0, "failed": 0, "waiting": 0}
    assert "This run has no samples yet" in page.text


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"run\.json"):
        write_report(tmp_path)


def test_missing_media_are_named_and_do_not_break_the_page(run: FakeRun) -> None:
    gone = {"bytes": None, "path": str(run.dir / "gone.png")}
    run.identity("id5", gone)
    run.identity("id6", {"bytes": b"\x89PNG broken", "path": None})
    changed = images.encode(colour_picture("x"))
    run.identity("id7", changed, image_sha256="f" * 64)
    for identity in ("id5", "id6", "id7"):
        run.sample(identity, "p0")
    (run.dir / "videos/id5/p0.mp4").unlink()
    (run.dir / "videos/id6/p0.mp4").write_bytes(b"")
    page = Page(run.page())
    assert "gone.png" in page.text
    assert "cannot decode the picture" in page.text
    assert "is not the file it was" in page.text
    assert "cannot read videos/id5/p0.mp4" in page.text
    assert "the video file is empty" in page.text


# -- safety --------------------------------------------------------------------------------------------------------


def test_hostile_texts_are_text_everywhere(tmp_path: Path) -> None:
    run = FakeRun(tmp_path / "a <b>run</b>")
    evil = f"x{HOSTILE}".replace("/", "")
    run.identity(evil)
    run.people(evil)
    key = {"identity_id": evil, "sample_id": f"{evil}/{HOSTILE}", "seed": 1, "seconds": 1.0}
    run.write("samples", [{**key, "prompt_id": HOSTILE, "prompt": HOSTILE + "\u202e{{ 7 * 7 }}"}])
    status = {"prompt_status": HOSTILE, "prompt_note": HOSTILE}
    run.write("prompts", [{**key, "video_prompt": HOSTILE, "image_prompt": HOSTILE, **status}])
    texts = {"kind": HOSTILE, "message": HOSTILE, "traceback": HOSTILE, "where": HOSTILE}
    run.failure("video", evil, key["sample_id"], **texts)
    run.failure("dataset", HOSTILE, HOSTILE, **texts)
    hostile_session = {**session(HOSTILE, **{HOSTILE: {"rows": 1}}), "host": HOSTILE, "started": HOSTILE}
    tree = {"profile": HOSTILE, HOSTILE: {HOSTILE: HOSTILE}, "video": {"model": HOSTILE}}
    extra = {"created": HOSTILE, "dataset": {HOSTILE: HOSTILE, "problems": HOSTILE, "format": HOSTILE}}
    run.run_json({"config": tree, "sessions": [hostile_session], **extra})
    page = Page(run.page())
    assert len(page.all("script")) == 1
    assert not [a for _, a in page.elements if any(name.startswith("on") for name in a)]
    assert not page.all("b", id="run")
    assert page.text.count('<script>alert("x")</script>') >= 15
    assert "{{ 7 * 7 }}" in page.text


def test_page_reaches_out_to_nothing(run: FakeRun) -> None:
    run.run_json(report={"embed_mb": 0})
    linked = run.page()
    run.run_json()
    for html in (run.page(), linked):
        page = Page(html)
        assert not re.search(r"https?://", html)
        assert "@import" not in html
        assert not re.search(r"url\((?!data:)", html)
        for _, attributes in page.elements:
            for name in ("src", "href", "poster", "srcset", "action", "xlink:href"):
                value = attributes.get(name, "data:")
                assert value.startswith(("data:", "#", "./videos/")), (name, value)
        assert not page.all("link", rel="stylesheet")


def test_policy_allows_exactly_the_pages_own_script_and_style(run: FakeRun) -> None:
    html = run.page()
    (policy,) = [a["content"] for a in Page(html).all("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy
    for tag in ("script", "style"):
        (body,) = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy


@pytest.mark.parametrize("uri", ["../other/secret.mp4", "/etc/passwd", "https://example.org/x.mp4", "a/../../x.mp4"])
def test_video_paths_outside_the_run_are_neither_read_nor_linked(run: FakeRun, uri: str) -> None:
    (run.dir.parent / "x.mp4").write_bytes(b"secret")
    key = {"identity_id": "id0", "sample_id": "id0/p5", "seed": 1, "seconds": 1.0}
    run.write("samples", [{**key, "prompt_id": "p5", "prompt": "runs"}])
    run.write("video", [{**run.video("id0/p5"), **key, "video_uri": uri}])
    page = Page(run.page())
    assert "does not lie in the run" in page.text
    assert len(page.all("video")) == 4
    assert not [a for a in page.all("a") if "secret" in a["href"] or "x.mp4" in a["href"] or "passwd" in a["href"]]


def test_link_of_a_video_with_odd_characters_leads_to_its_file(run: FakeRun) -> None:
    run.sample("id0", "p #1? 50%")
    hrefs = {a["href"] for a in Page(run.page()).all("a")}
    assert "./videos/id0/p%20%231%3F%2050%25.mp4" in hrefs


def test_credentials_in_uris_stay_off_the_page(run: FakeRun) -> None:
    uri = "s3://KEY:SECRET@bucket/set"
    run.run_json({"config": {"dataset": {"path": uri}}, "dataset": {"path": uri}})
    run.failure("dataset", "id9", None, message=f"cannot read {uri}", where=uri, traceback=f"OSError: {uri}")
    html = run.page()
    assert html.startswith("<!doctype html>")
    assert "SECRET" not in html
    assert "KEY" not in html
    assert html.count("bucket/set") == 6  # twice of the set, in the settings, and the failure's three


# -- bounds --------------------------------------------------------------------------------------------------------


def test_at_most_report_rows_samples_are_shown_and_the_page_says_so(run: FakeRun) -> None:
    for number in range(6):
        run.sample("id0", f"q{number}", upto="prompts")
    run.failure("first_frame", "id0", "id0/q5")
    run.run_json(report={"rows": 3})
    page = Page(run.page())
    assert sorted(a["aria-label"] for a in page.all("article")) == ["id0/p0", "id0/q5", "id1/p0"]
    assert "7 samples are not shown" in page.text
    assert counts(page)["samples"] == 10


def test_choice_prefers_failed_then_finished_and_spreads_evenly() -> None:
    status = np.full(1000, WAITING)
    status[200:400] = FINISHED
    status[400:410] = BEGUN
    status[[5, 700]] = FAILED
    chosen = choose(status, 22)
    assert {5, 700} <= set(chosen.tolist())
    assert np.diff(chosen).min() > 0
    finished = [i for i in chosen.tolist() if 200 <= i < 400]
    assert finished == list(range(200, 400, 10))
    assert len(choose(status, 2000)) == 1000
    assert len(choose(np.zeros(0, int), 5)) == 0


def test_failures_never_crowd_out_every_video() -> None:
    status = np.array([FAILED] * 90 + [FINISHED] * 10)
    chosen = choose(status, 20)
    assert np.count_nonzero(status[chosen] == FAILED) == 10
    assert len(chosen) == 20
    assert len(choose(np.array([FAILED] * 90 + [FINISHED] * 2), 20)) == 20
    assert len(choose(np.array([FAILED] * 90), 20)) == 20


def test_failure_list_is_bounded_and_says_so(run: FakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ipvg_ray.report.views.LISTED", 5)
    monkeypatch.setattr("ipvg_ray.report.views.TRACEBACKS", 2)
    for number in range(9):
        run.failure("faces", f"far{number}", None, kind="no_face", traceback="Boom")
    text = Page(run.page()).text
    assert "faces no_face 9 rows" in text
    assert re.findall(r"far\d", text) == ["far0", "far1", "far2", "far3", "far4"]
    assert text.count("Boom") == 2
    assert "4 more of this kind are not listed here" in text


def test_media_beyond_the_budget_are_linked_not_packed(run: FakeRun) -> None:
    run.run_json(report={"embed_mb": 0})
    html = run.page()
    page = Page(html)
    assert {a["src"] for a in page.all("video")} == {f"./videos/id{i}/p{j}.mp4" for i in (0, 1) for j in (0, 1)}
    assert "base64" not in html
    assert "left out: the page has reached report.embed_mb" in page.text


def test_packed_media_stay_within_the_budget(run: FakeRun) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (400, 400, 3), np.uint8)
    for number in range(8):
        run.identity(f"big{number}", images.encode(noise, "jpeg"))
        run.sample(f"big{number}", "p0")
        (run.dir / f"videos/big{number}/p0.mp4").write_bytes(b"\0" * 120_000)
    run.run_json(report={"embed_mb": 1})
    page = Page(run.page())
    packed = [a["src"] for a in page.all("video") + page.all("img") if a.get("src", "").startswith("data:")]
    assert 600_000 < sum(len(src) for src in packed) <= 1_000_000 + 30 * len(packed)
    assert len(page.all("video")) == 12
    assert any(a["src"].startswith("./videos/") for a in page.all("video"))


def test_pictures_are_shrunk(run: FakeRun) -> None:
    run.identity("wide", images.encode(np.zeros((500, 2000, 3), np.uint8)))
    run.sample("wide", "p0")
    (picture,) = [a for a in Page(run.page()).all("img") if a.get("alt") == "Reference picture of wide"]
    assert images.decode(data_uri(picture["src"])).shape == (100, 400, 3)
    assert (picture["width"], picture["height"]) == ("400", "100")


def test_wide_columns_are_read_only_where_a_shown_row_is(
    run: FakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six row groups of pictures, one sample shown: only its row group may be decoded."""
    many = FakeRun(tmp_path / "many")
    picture = images.encode(np.zeros((32, 32, 3), np.uint8))
    digest = hashlib.sha256(picture["bytes"]).hexdigest()
    given = {"image": picture, "image_sha256": digest, "image_width": 32, "image_height": 32}
    rows = [{"identity_id": f"id{n}", **given} for n in range(60)]
    many.write("identities", rows, row_group_size=10)
    text = {"prompt_id": "p", "prompt": "walks"}
    many.write("samples", [{"identity_id": f"id{n}", "sample_id": f"id{n}/p", **text} for n in range(60)])
    many.run_json(report={"rows": 1})
    read: list[tuple[str, int]] = []
    original = lookup._read_group

    def spy(file: pq.ParquetFile, group: int, places: np.ndarray, columns: list[str]) -> list[dict[str, Any]]:
        if "image" in columns:
            read.append(("image", group))
        return original(file, group, places, columns)

    monkeypatch.setattr(lookup, "_read_group", spy)
    many.page()
    assert read == [("image", 0)]


# -- parts ---------------------------------------------------------------------------------------------------------


def test_lookup_finds_rows_across_files_and_row_groups_once(tmp_path: Path) -> None:
    run = FakeRun(tmp_path)

    def rows(first: int, last: int, word: str = "text") -> list[dict[str, Any]]:
        key = {"identity_id": "id", "prompt_id": "p"}
        return [{**key, "sample_id": f"s{n}", "prompt": f"{word} {n}"} for n in range(first, last)]

    run.write("samples", rows(0, 200), row_group_size=70)
    run.write("samples", rows(200, 230))
    run.write("samples", rows(5, 6, "repeated"))
    table = lookup.Lookup.open(tmp_path, "samples", ["sample_id"])
    found = table.rows("sample_id", ["s229", "s5", "absent", "s139", "s140", "s69"], ["prompt", "no_such_column"])
    assert found == {f"s{n}": {"prompt": f"text {n}"} for n in (229, 5, 139, 140, 69)}
    assert [row["prompt"] for row in table.take([210, 3, 3], ["prompt"])] == ["text 210", "text 3", "text 3"]
    assert lookup.Lookup.open(tmp_path, "video", ["sample_id"]).rows("sample_id", ["s1"], ["video_uri"]) == {}


def test_progress_counts_blocked_rows_behind_a_failure(run: FakeRun) -> None:
    run.identity("cat")
    run.sample("cat", "p0", upto="samples")
    run.failure("faces", "cat", None)
    run.identity("alone")  # no sample of it is left
    stages = {s.name: s for s in read_progress(run.dir, tables.read_run(run.dir)).stages}
    figures = {name: (s.total, s.done, s.failed, s.blocked, s.waiting) for name, s in stages.items()}
    assert figures["faces"] == (4, 2, 1, 0, 1)
    assert figures["matting"] == (4, 2, 0, 1, 1)
    assert figures["prompts"] == figures["evaluate"] == (5, 4, 0, 1, 0)


def test_page_is_replaced_in_one_step_and_leaves_nothing_behind(run: FakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_report(run.dir)
    path.write_bytes(b"an earlier page")
    monkeypatch.setattr("ipvg_ray.report.page.os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_report(run.dir)
    assert path.read_bytes() == b"an earlier page"
    assert [p.name for p in run.dir.iterdir() if "report" in p.name] == ["report.html"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.421, "0.42 s"),
        (59.96, "1 min 00 s"),
        (3599.7, "1 h 00 min"),
        (245, "4 min 05 s"),
        (273600, "3 d 4 h"),
        (None, "\N{EN DASH}"),
    ],
)
def test_durations_read_well(seconds: float | None, text: str) -> None:
    assert facts.duration(seconds) == text


@pytest.mark.parametrize(
    ("size", "text"), [(512, "512 B"), (999.7, "1.0 kB"), (34_400, "34 kB"), (1_234_000, "1.2 MB")]
)
def test_sizes_read_well(size: float, text: str) -> None:
    assert facts.size(size) == text


def test_what_is_not_scored_is_listed_with_its_reason(run: FakeRun) -> None:
    assert "Not scored" not in Page(run.page()).text
    reason = "cur_sim: mini.bin is not there"
    for number in (2, 3):
        sample_id = run.sample("id0", f"p{number}", upto="video")
        row = {
            "arc_sim": 0.5,
            "arc_frames": 5,
            "frames_ok": True,
            "motion": 0.1,
            "skipped": f"{reason}; gme_score: <b>",
        }
        run.write("evaluate", [{"identity_id": "id0", "sample_id": sample_id, "seed": 1, "seconds": 1.0, **row}])
    page = Page(run.page())
    assert f"Not scored {reason} 2 videos gme_score: <b> 2 videos" in page.text


def test_scores_are_read_with_what_is_missing(run: FakeRun) -> None:
    run.sample("id1", "p7", upto="first_frame")
    run.failure("video", "id1", "id1/p7", kind="missing_video")
    found = read_scored(run.dir, "mine")
    assert found.scores == {"arc_sim": pytest.approx({"id0/p0": 0, "id0/p1": 0.01, "id1/p0": 0.1, "id1/p1": 0.11})}
    assert found.failed == {"missing_video": ["id1/p7"]}
    assert found.counted("arc_sim") == pytest.approx(0.22 / 5)
    assert found.owners["id1/p7"] == "id1"


def test_a_failure_that_was_mended_is_not_among_the_scores(run: FakeRun) -> None:
    run.failure("video", "id0", "id0/p0", kind="bad_video")
    run.failure("faces", "id1", None, kind="no_face")
    assert read_scored(run.dir, "mine").failed == {}


def test_the_best_of_a_distance_is_the_lowest(run: FakeRun) -> None:
    row = {"arc_sim": 0.5, "arc_frames": 5, "frames_ok": True, "motion": 0.1, "face_distance": 200.0}
    sample_id = run.sample("id0", "p2", upto="video")
    run.write("evaluate", [{"identity_id": "id0", "sample_id": sample_id, "seed": 1, "seconds": 1.0, **row}])
    html = run.page()
    assert '<option value="face_distance low">FID (face), best first' in html
    assert '<option value="arc_sim high">Arc-Sim, best first' in html


def test_scores_of_a_run_that_has_none_yet(tmp_path: Path) -> None:
    run = FakeRun(tmp_path / "new")
    run.run_json()
    assert read_scored(run.dir, "new").scores == {}


def test_two_runs_are_compared_and_gates_decide(
    run: FakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = FakeRun(tmp_path / "other")
    other.run_json()
    for identity_id in ("id0", "id1"):
        other.identity(identity_id)
        for prompt_id in ("p0", "p1"):
            sample_id = other.sample(identity_id, prompt_id, upto="video")
            row = {"arc_sim": 0.0, "arc_frames": 5, "frames_ok": True, "motion": 0.1}
            other.write("evaluate", [{"identity_id": identity_id, "sample_id": sample_id, "seed": 1, **row}])
    pair = [str(run.dir), str(other.dir)]
    assert cli.main(["compare", *pair, "--fail-if", "arc_sim<-0.06", "--fail-if", "arc_sim>0"]) == 0
    assert "-0.055" in capsys.readouterr().out
    assert cli.main(["compare", *pair, "--fail-if", "arc_sim<-0.05"]) == 1
    assert "gate arc_sim<-0.05 holds" in capsys.readouterr().out
    assert cli.main(["compare", *pair, "--fail-if", "cur_sim<0"]) == 1
    assert "share no sample with a value of cur_sim" in capsys.readouterr().err
    assert cli.main(["compare", *pair, "--json", "--fail-if", "arc_sim<-0.05"]) == 1
    answer = json.loads(capsys.readouterr().out)
    assert answer["gates"] == {"arc_sim<-0.05": True}
    found = answer["scores"]
    assert (found["arc_sim"]["samples"], found["arc_sim"]["wins"]) == (4, 0.125)  # one is equal
