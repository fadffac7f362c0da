"""How a leader judges its ranks' answers, with refs and answers that are made up; test_groups.py has real ones."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("ray")

import ray

from ipvg_ray.pipeline import crew, groups, places
from ipvg_ray.pipeline.groups import GroupBrokenError, LedGroup, _Watch
from ipvg_ray.pipeline.places import Room
from ipvg_ray.pipeline.processes import Processes
from ipvg_ray.pipeline.spot import Notice
from ipvg_ray.pipeline.stage import Ranks, RowError
from ipvg_ray.pipeline.store import FencedError
from ipvg_ray.storage import StorageError


class Answers:
    """Stands for `ray`: a ref is answered with what it names, an exception is raised, and `None` never comes."""

    exceptions = ray.exceptions

    def __init__(self, answers: list[Any]) -> None:
        self.answers = answers

    def wait(self, refs: list[int], num_returns: int, timeout: float) -> tuple[list[int], list[int]]:
        done = [ref for ref in refs if self.answers[ref] is not None][:num_returns]
        return done, [ref for ref in refs if ref not in done]

    def get(self, ref: int) -> Any:
        answer = self.answers[ref]
        if isinstance(answer, Exception):
            raise ray.exceptions.RayTaskError("call", "its traceback", answer)
        return answer

    def put(self, value: Any) -> Any:
        return value


@pytest.fixture
def led(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A group of two ranks whose calls are answered as told, and how often it was made."""

    def make(answers: list[Any]) -> LedGroup:
        monkeypatch.setattr(groups, "ray", Answers(answers))
        monkeypatch.setattr(groups, "_GRACE_SECONDS", 0.1)
        group = LedGroup(Ranks(2, lambda context: None, rebuilds=2), "cpu", 1)

        def stand() -> None:
            if group.crew is None:
                group.builds += 1
                calls = [lambda method, args, number=number: number for number in range(len(answers))]
                notices = [lambda number=number: number for number in range(len(answers))]
                ranks = [
                    SimpleNamespace(call=SimpleNamespace(remote=call), notice=SimpleNamespace(remote=notice))
                    for call, notice in zip(calls, notices, strict=True)
                ]
                group.crew = SimpleNamespace(ranks=ranks, end=lambda: None)  # type: ignore[assignment]

        monkeypatch.setattr(group, "_stand", stand)
        return group

    return make


@pytest.mark.parametrize("error", [StorageError("the disk is full"), FencedError("closed")])
def test_a_place_that_cannot_be_written_ends_the_call_at_once(error: Exception, led: Any) -> None:
    group = led([error, None])
    with pytest.raises(type(error), match=str(error)):
        group.run("make")
    assert group.builds == 1, "a new group would do no better"
    assert not group.ranks, "the other rank waits for the one that raised"


def test_a_rank_that_raises_alone_costs_three_groups(led: Any) -> None:
    group = led([None, ValueError("out of memory")])
    with pytest.raises(RowError, match="lost 3 times, the last time so: rank 1 raised, and others did not"):
        group.run("make")
    assert group.builds == 3


def test_what_all_raise_leaves_the_group_whole(led: Any) -> None:
    group = led([ValueError("a"), ValueError("b")])
    with pytest.raises(ValueError, match="a"):
        group.run("make")
    assert group.ranks


def test_a_rank_that_answers_now_and_then_does_not_get_further(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(groups.time, "monotonic", lambda: now)
    watch = _Watch(stall_s=10.0)
    for now in range(10):
        watch.look([(3, "step 3"), (3, "step 3") if now % 2 else None])
    now = 12.0
    with pytest.raises(GroupBrokenError, match=r"any further for 10 s \(0: step 3, 1: no answer\)"):
        watch.look([(3, "step 3"), None])
    watch.look([(4, "step 4"), None])
    now = 21.0
    watch.look([(4, "step 4"), (3, "step 3")])


def test_a_group_waits_for_its_nodes_before_it_is_made_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lost node's bundles come back only with another node; tries before that would all be in vain."""
    ready = [False, False, True]
    place = SimpleNamespace(wait=lambda seconds: ready.pop(0))
    monkeypatch.setattr(places, "_nodes", lambda place: {0: "here", 1: "there"})
    group = LedGroup(Ranks(2, lambda context: None, True), "cpu", 1, Room(place))
    left: list[int] = []
    monkeypatch.setattr(group, "_build", lambda: left.append(len(ready)))
    group.start()
    assert (left, group.builds) == ([0], 1)


def test_a_group_waits_until_a_node_that_is_to_be_taken_away_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = ["doomed", "doomed", "other"]
    paused = []

    @contextlib.contextmanager
    def waiting() -> Iterator[None]:
        paused.append("begun")
        yield
        paused.append("ended")

    monkeypatch.setattr(places, "_nodes", lambda place: {0: "here", 1: nodes.pop(0)})
    monkeypatch.setattr(places, "_ASK_SECONDS", 0.01)
    place = SimpleNamespace(wait=lambda seconds: True)
    Room(place, lost=lambda node: node == "doomed", waiting=waiting).wait()
    assert nodes == []
    assert paused == ["begun", "ended"]
    monkeypatch.setattr(places, "_LEAVE_SECONDS", 0.05)
    nodes = ["doomed"] * 1000
    Room(place, lost=lambda node: node == "doomed").wait()
    assert nodes, "one that stays is used again"


def test_the_leader_hears_of_the_node_of_any_rank(led: Any) -> None:
    notice = Notice("aws", 1.0, "another node")
    group = led([None, notice, RuntimeError("it is gone")])
    assert group.notice() is None, "no ranks, no notice"
    group._stand()
    assert group.notice() == notice


def test_a_rank_has_the_models_on_its_node_before_it_loads_them(monkeypatch: pytest.MonkeyPatch) -> None:
    rank = object.__new__(crew.RankProcess.__ray_metadata__.modified_class)
    rank.rank, rank.before, did = 0, Processes(), []
    monkeypatch.setattr(crew, "take_models", did.append)
    stage: Any = SimpleNamespace()
    meeting = SimpleNamespace(join=lambda place, context: did.append(place))
    rank.take_on(Ranks(1, lambda context: did.append(context.rank), stage=stage, rendezvous=meeting), None)
    rank.setup("where they meet", "cpu", 1)
    assert did == [[stage], "where they meet", 0]
