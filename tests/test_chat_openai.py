"""The endpoint engine against a real HTTP server in this process, which answers as a test tells it to."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from ipvg_ray import config
from ipvg_ray.models.chat_engine import Answer, Dialogue, EndpointError, Question, Sampling
from ipvg_ray.models.chat_openai import OpenAIChat
from ipvg_ray.pipeline.stage import Row, RowError, StageContext
from ipvg_ray.stages.prompts import PromptsStage

SAMPLING = Sampling(0.1, 0.9, 50)
Reply = Callable[[dict[str, Any], int], tuple[int, Any]]
"""(the request's body, how often this very question came before) to status and body."""


class Server:
    """Keeps what it was asked; `most` is the highest number of questions that it held at a time."""

    def __init__(self, reply: Reply, models: tuple[int, Any]) -> None:
        self.reply, self.models = reply, models
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.now = self.most = 0
        self.lock = threading.Lock()

    def ask(self, body: dict[str, Any]) -> tuple[int, Any]:
        with self.lock:
            before = sum(known["messages"] == body["messages"] for known in self.bodies)
            self.bodies.append(body)
            self.now += 1
            self.most = max(self.most, self.now)
        try:
            return self.reply(body, before)
        finally:
            with self.lock:
                self.now -= 1


@contextmanager
def serving(reply: Reply, models: tuple[int, Any] = (404, {})) -> Iterator[tuple[str, Server]]:
    server = Server(reply, models)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            server.keys.append(self.headers["Authorization"])
            self._send(*server.models)

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self._send(*server.ask(body))

        def _send(self, status: int, body: Any) -> None:
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.send_header("retry-after-ms", "20")
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{http.server_port}/v1", server
    finally:
        http.shutdown()
        http.server_close()


def said(text: str, reason: str = "stop") -> tuple[int, Any]:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": reason}
    usage = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
    return 200, {
        "id": "x",
        "object": "chat.completion",
        "created": 0,
        "model": "m",
        "choices": [choice],
        "usage": usage,
    }


def _once(text: str = "hello", seed: int = 5, picture: bytes | None = None) -> Dialogue[Answer]:
    return (yield Question([{"role": "user", "content": text}], seed, picture))


def _engine(url: str, **changes: Any) -> OpenAIChat:
    return OpenAIChat("m", **({"url": url, "tries": 4, "concurrency": 8, "timeout_s": 5} | changes))


def test_what_is_sent_and_what_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "secret")
    with serving(lambda body, before: said("A man.", "length")) as (url, server):
        engine = _engine(url, api_key_env="MY_KEY", extra_body={"chat_template_kwargs": {"enable_thinking": False}})
        (answer,) = engine.converse([_once("a\ud800b", picture=b"\x89PNG....")], SAMPLING)
        engine.close()
    assert answer == Answer("A man.", finished=False, prompt_tokens=7, new_tokens=3)
    (body,) = server.bodies
    assert {k: body[k] for k in ("model", "temperature", "top_p", "seed", "max_tokens", "chat_template_kwargs")} == {
        "model": "m",
        "temperature": 0.1,
        "top_p": 0.9,
        "seed": 5,
        "max_tokens": 50,
        "chat_template_kwargs": {"enable_thinking": False},
    }
    picture, text = body["messages"][0]["content"]
    assert picture == {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORy4uLi4="}}
    assert text == {"type": "text", "text": "a?b"}
    assert server.keys == ["Bearer secret"]


def test_questions_under_way_are_bounded_and_overlap() -> None:
    def slow(body: dict[str, Any], before: int) -> tuple[int, Any]:
        time.sleep(0.05)
        return said("A man.")

    with serving(slow) as (url, server):
        engine = _engine(url, concurrency=5)
        ends = engine.converse([_once(f"text {i}") for i in range(25)], SAMPLING)
        engine.close()
    assert len([end for end in ends if isinstance(end, Answer)]) == 25
    assert 2 <= server.most <= 5


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_endpoint_is_asked_again(status: int) -> None:
    with serving(lambda body, before: (status, {}) if before < 2 else said("A man.")) as (url, server):
        engine = _engine(url)
        (end,) = engine.converse([_once()], SAMPLING)
        engine.close()
    assert isinstance(end, Answer)
    assert len(server.bodies) == 3


def test_one_that_stays_busy_fails_its_question_alone() -> None:
    def reply(body: dict[str, Any], before: int) -> tuple[int, Any]:
        return (429, {"error": {"message": "slow down"}}) if "bad" in str(body) else said("A man.")

    with serving(reply) as (url, server):
        engine = _engine(url, tries=3)
        bad, good = engine.converse([_once("bad"), _once("good")], SAMPLING)
        engine.close()
    assert isinstance(good, Answer)
    assert isinstance(bad, EndpointError)
    assert bad.passing
    assert "answered 429 to the last of 3 tries" in str(bad)
    assert sum("bad" in str(body) for body in server.bodies) == 3


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        ((400, {"error": {"message": "context too long"}}), "refused with 400: .*context too long"),
        ((401, {"error": {"message": "no"}}), "refused with 401.*OPENAI_API_KEY"),
        ((200, {"error": {"message": "out of credits"}}), "gave no answer.*out of credits"),
        ((200, b"<html>"), "."),
    ],
)
def test_refusals_are_not_asked_again(reply: tuple[int, Any], words: str) -> None:
    with serving(lambda body, before: reply) as (url, server):
        engine = _engine(url)
        (end,) = engine.converse([_once()], SAMPLING)
        engine.close()
    assert isinstance(end, EndpointError)
    assert not end.passing
    with pytest.raises(EndpointError, match=words):
        raise end
    assert len(server.bodies) == 1


def test_what_no_row_could_mend_is_told_at_the_start() -> None:
    with (
        serving(lambda body, before: said("x"), (401, {"error": {"message": "bad key"}})) as (url, _),
        pytest.raises(EndpointError, match=r"401.*bad key.*OPENAI_API_KEY"),
    ):
        _engine(url)
    listed = {"object": "list", "data": [{"id": "other", "object": "model", "created": 0, "owned_by": "x"}]}
    with (
        serving(lambda body, before: said("x"), (200, listed)) as (url, _),
        pytest.raises(EndpointError, match=r"has no model 'm'; it lists other"),
    ):
        _engine(url)
    with pytest.raises(EndpointError, match="was not reached in 1 tries"):
        _engine("http://127.0.0.1:9/v1", tries=1)


def test_the_stage_runs_on_an_endpoint() -> None:
    def reply(body: dict[str, Any], before: int) -> tuple[int, Any]:
        if "forbidden" in body["messages"][1]["content"]:
            return 400, {"error": {"message": "content policy"}}
        polish = "videos" in body["messages"][0]["content"]
        return said("A man cooks and smiles." if polish else "A man, white apron, kitchen")

    with serving(reply) as (url, _):
        prompts = {"engine": "openai", "model": "m", "endpoint": {"url": url, "tries": 1}}
        stage = PromptsStage(config.load("cpu-mini", values={"prompts": prompts}))
        stage.setup(StageContext(device="cpu", threads=1, media=None, run_dir=""))  # type: ignore[arg-type]
        fine, refused = stage.process([_row("he cooks"), _row("forbidden")])
        stage.teardown()
    assert isinstance(fine, dict)
    assert fine["video_prompt"] == "A man cooks and smiles."
    assert fine["image_prompt"].endswith("A man, white apron, kitchen, close-up")
    assert isinstance(refused, RowError)
    assert refused.kind == "endpoint_refused"
    assert "content policy" in refused.message


def _row(prompt: str) -> Row:
    return {"sample_id": "a/1", "identity_id": "a", "prompt": prompt, "target": "A man", "seed": 1}
