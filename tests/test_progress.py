"""The live counts: what is done, running, waiting, lost behind a failure, and how it is shown."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

from ipvg_ray.pipeline.ledger import Event
from ipvg_ray.pipeline.progress import Display, Progress, duration
from ipvg_ray.pipeline.survey import Counts


def fresh() -> Progress:
    counts = {"faces": Counts(4, 1, 0, 0, 3), "video": Counts(8, 2, 0, 0, 6)}
    return Progress(counts, {"faces": "identity", "video": "sample"}, prompts=2.0)


def test_counts_follow_the_events() -> None:
    progress = fresh()
    progress.add([Event("faces", "a", began=2), Event("video", "b", began=1), Event("video", "b", began=1)])
    assert (progress.stages["faces"].running, progress.stages["video"].running) == (2, 1), "begun again after a death"
    progress.add([Event("faces", "a", done=1, failed=1, seconds=0.5, ended=True)])
    faces, video = progress.stages["faces"], progress.stages["video"]
    assert (faces.finished, faces.running, faces.waiting, faces.all_failed) == (2, 0, 1, 1)
    assert (video.running, video.waiting) == (1, 6 - 1 - 2), "a failed identity takes its two samples along"
    assert faces.busy == 0.5


def test_what_a_start_has_done_is_kept_when_it_begins_again() -> None:
    progress = fresh()
    progress.add([Event("faces", "a", done=1, failed=1, seconds=0.5, ended=True)])
    progress.restart({"faces": Counts(4, 2, 1, 0, 1), "video": Counts(8, 2, 0, 2, 4)})
    progress.add([Event("faces", "b", done=1, seconds=0.5, ended=True)])
    assert progress.done_here("faces") == (2, 1)
    assert progress.stages["faces"].busy == 1.0, "of the same rows"


def test_a_nodes_first_row_is_that_of_its_first_process() -> None:
    progress = fresh()
    progress.add([Event("video", "a", began=1, node="n", node_age=90.0)])
    progress.add([Event("video", "b", began=1, node="n", node_age=7200.0)])  # a worker that came, or came again, later
    progress.restart({"faces": Counts(4, 1, 0, 0, 3), "video": Counts(8, 2, 0, 0, 6)})
    progress.add([Event("video", "a", began=1, node="n", node_age=9000.0)])
    assert progress.stages["video"].first_row == 90.0
    progress.add([Event("video", "c", began=1, node="m", node_age=95.0)])
    assert progress.stages["video"].first_row == 95.0


def test_log_lines_where_there_is_no_terminal() -> None:
    stream = io.StringIO()
    with Display(fresh(), stream) as display:
        display.tick()
    assert "faces 1/4 · video 2/8" in stream.getvalue()
    assert "\x1b" not in stream.getvalue()


def test_the_terminal_is_ours_while_others_print(tmp_path: Path) -> None:
    code = (
        "import os, sys, pathlib\n"
        "from ipvg_ray.pipeline.progress import own_terminal\n"
        "with own_terminal(pathlib.Path(sys.argv[1])) as terminal:\n"
        "    print('noise'); os.write(2, b'deep noise\\n'); print('ours', file=terminal, flush=True)\n"
        "print('after')\n"
    )
    log = tmp_path / "log"
    done = subprocess.run([sys.executable, "-c", code, str(log)], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("after\n", "ours\n")
    assert set(log.read_text().splitlines()) == {"noise", "deep noise"}


def test_durations() -> None:
    assert [duration(s) for s in (41.6, 200, 7500)] == ["42 s", "3 min 20 s", "2 h 05 min"]
