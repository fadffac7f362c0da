"""Tries noted in files: what a process that takes a dead one's place learns of it, and what the driver hears."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ipvg_ray.pipeline import desk
from ipvg_ray.pipeline.ledger import Event, TryLedger, Who
from ipvg_ray.pipeline.worker import context_lost


class FakeDesk:
    """The desk's ledger, called as an actor is: `desk.method.remote(...)`; `ray.get` gives back what it is given."""

    def __init__(self) -> None:
        self.gone: set[str] = set()
        self.ledger = TryLedger(self.gone.__contains__)

    def __getattr__(self, name: str) -> Any:
        method = self.ledger.node_lost if name == "is_lost" else getattr(self.ledger, name)
        return type("Method", (), {"remote": staticmethod(method)})


@pytest.fixture
def office(monkeypatch: pytest.MonkeyPatch) -> FakeDesk:
    monkeypatch.setattr(desk.ray, "get", lambda answer, timeout=None: answer)
    return FakeDesk()


def start(office: FakeDesk, folder: Path, process: str, node: str = "near", worker: str = "w") -> tuple[Any, Who, int]:
    """A process that has loaded: its ledger, who it is, and the restarts it was told."""
    ledger, who = desk._Noted(office, folder), Who(worker, process, node, "host", "/nowhere")
    _, restarts = ledger.begin_setup("s", who)
    ledger.end_setup("s", who)
    return ledger, who, restarts


def test_who_takes_a_dead_ones_place_knows_its_tries(office: FakeDesk, tmp_path: Path) -> None:
    one, first, _ = start(office, tmp_path, "1")
    assert one.begin(Event("s", "done", began=2), first) == []
    one.end(Event("s", "done", ended=True, closed=True, done=2))
    assert one.begin(Event("s", "kills", began=2, alone=False), first) == []
    two, second, _ = start(office, tmp_path, "2")
    assert [(w.process, w.alone) for w in two.begin(Event("s", "kills", began=2), second)] == [("1", False)]
    assert two.begin(Event("s", "done", began=2), second) == []
    two.end(Event("s", "kills", ended=True))  # taken apart: its rows are other batches
    three, third, _ = start(office, tmp_path, "3")
    assert three.begin(Event("s", "kills", began=2), third) == []
    assert [w.process for w in three.begin(Event("s", "done", began=2), third)] == ["2"]


def test_a_node_that_is_known_to_be_lost_only_later_is_nobodys_fault(office: FakeDesk, tmp_path: Path) -> None:
    one, first, _ = start(office, tmp_path, "1", node="far")
    one.begin(Event("s", "b", began=1), first)
    two, second, _ = start(office, tmp_path, "2")
    office.gone.add("far")
    assert two.begin(Event("s", "b", began=1), second) == []
    assert office.ledger.lost_tries == 1
    three, third, _ = start(office, tmp_path, "3")
    assert [w.process for w in three.begin(Event("s", "b", began=1), third)] == ["2"]
    assert office.ledger.lost_tries == 1, "told once"


def test_only_the_last_process_shows_that_the_stage_works(office: FakeDesk, tmp_path: Path) -> None:
    one, first, _ = start(office, tmp_path, "1")
    one.begin(Event("s", "b", began=1), first)
    one.end(Event("s", "b", ended=True, closed=True, done=1))
    assert [start(office, tmp_path, str(process))[2] for process in range(2, 7)] == [1, 2, 3, 4, 5]


def test_an_answer_of_the_desk_that_comes_late_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter(["first answer", "second answer"])
    far = SimpleNamespace(take=SimpleNamespace(remote=lambda: next(answers)))
    heard, late = desk._Heard(far), [True, False, False]

    def get(answer: str, timeout: float) -> list[str]:
        if late.pop(0):
            raise desk.ray.exceptions.GetTimeoutError
        return [answer]

    monkeypatch.setattr(desk.ray, "get", get)
    assert [heard.take() for _ in range(3)] == [[], ["first answer"], ["second answer"]]


def test_the_driver_follows_whole_lines(tmp_path: Path) -> None:
    followed = desk._Followed(tmp_path / "tries")
    assert followed.take() == [], "no folder yet, or one that another start has closed"
    (tmp_path / "tries").mkdir()
    line = json.dumps(vars(Event("s", "b", began=3))) + "\n"
    file = tmp_path / "tries" / "w-1.jsonl"
    file.write_text(line + line[:9])
    assert followed.take() == [Event("s", "b", began=3)]
    assert desk._read(file) == [Event("s", "b", began=3)], "its process died while it wrote"
    assert followed.take() == []
    file.write_text(line + line)
    assert followed.take() == [Event("s", "b", began=3)]


@pytest.mark.parametrize(
    ("words", "lost"),
    [
        ("CUDA error: device-side assert triggered", True),
        ("CUDA failure 700: an illegal memory access was encountered", True),
        ("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED", True),
        ("CUDA error: out of memory", False),
        ("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate", False),
        ("shapes do not fit", False),
    ],
)
def test_what_says_that_a_cuda_context_is_lost(words: str, lost: bool) -> None:
    assert context_lost(RuntimeError(words)) is lost
