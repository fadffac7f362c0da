"""The chat engine that asks an endpoint which speaks OpenAI's chat completions: a vLLM server, a gateway, OpenAI."""

from __future__ import annotations

import asyncio
import base64
import os
from collections.abc import Mapping
from typing import Any

from ipvg_ray.models.chat_engine import Answer, AsyncEngine, EndpointError, Question, Sampling

_SEEN = {b"\x89PNG": "image/png", b"\xff\xd8\xff": "image/jpeg"}


class OpenAIChat(AsyncEngine):
    """A chat model behind an endpoint, asked many questions at a time.

    Busy answers (408, 409, 429, 5xx), time-outs and lost connections are tried again by the client, each time after a
    longer pause or the one that the endpoint names (`Retry-After`). Patterns of questions are not sent: no field for
    them is common to the endpoints. Whether equal seeds give equal answers is the endpoint's affair.

    Args:
        model: its name at the endpoint.
        url: base address, such as `http://host:8000/v1`.
        api_key_env: environment variable that holds the key; endpoints without one need none.
        concurrency: requests under way at a time.
        tries: how often a request is sent where the endpoint is busy.
        timeout_s: seconds for one try.
        limit_parameter: how the endpoint calls the bound on new tokens.
        extra_body: more fields of each request, such as `{chat_template_kwargs: {enable_thinking: false}}`, which
            switches the thinking of Qwen3 off on a vLLM server.

    Raises:
        EndpointError: where the endpoint refuses the key, or cannot be reached at all.
    """

    def __init__(
        self,
        model: str,
        *,
        url: str,
        api_key_env: str = "OPENAI_API_KEY",
        concurrency: int = 32,
        tries: int = 6,
        timeout_s: float = 300.0,
        limit_parameter: str = "max_tokens",
        extra_body: Mapping[str, Any] | None = None,
    ) -> None:
        from openai import AsyncOpenAI

        self.model = model
        self.url = url
        self.tries = tries
        self._limit = limit_parameter
        self._extra = dict(extra_body or {})
        self._key = api_key_env
        self._room = asyncio.Semaphore(concurrency)
        self._client = AsyncOpenAI(
            base_url=url,
            api_key=os.environ.get(api_key_env) or "none",  # the client wants one even where the endpoint does not
            max_retries=tries - 1,
            timeout=timeout_s,
        )
        super().__init__("openai")
        try:
            self._run(self._probe())
        except BaseException:
            self.close()
            raise

    async def answer(self, question: Question, sampling: Sampling) -> Answer:
        """See `AsyncEngine.answer`."""
        async with self._room:
            reply = await self._asked(
                self._client.chat.completions.create(
                    model=self.model,
                    messages=_messages(question),
                    temperature=sampling.temperature,
                    top_p=sampling.top_p,
                    seed=question.seed,
                    extra_body={self._limit: sampling.max_new_tokens, **self._extra},
                )
            )
        if not getattr(reply, "choices", None):  # some gateways report their errors with status 200
            raise EndpointError(f"{self.url} gave no answer: {str(reply)[:300]}", passing=False)
        choice, usage = reply.choices[0], reply.usage
        return Answer(
            text=choice.message.content or "",
            finished=choice.finish_reason == "stop",
            prompt_tokens=usage.prompt_tokens if usage else 0,
            new_tokens=usage.completion_tokens if usage else 0,
        )

    async def _probe(self) -> None:
        """Ask for the list of models, to tell at the start what no row could mend."""
        from openai import APIStatusError

        try:
            listed = await self._asked(self._client.models.list())
        except EndpointError as error:
            status = error.__cause__.status_code if isinstance(error.__cause__, APIStatusError) else None
            if status in (None, 401, 403):
                raise
            return  # an endpoint without this list may answer questions all the same
        names = [model.id for model in getattr(listed, "data", None) or ()]
        if names and self.model not in names:
            shown = ", ".join(names[:10])
            raise EndpointError(f"{self.url} has no model {self.model!r}; it lists {shown}", passing=False)

    async def _asked(self, request: Any) -> Any:
        """Await a request of the client; its errors in the words of this package."""
        from openai import APIConnectionError, APIStatusError, OpenAIError

        try:
            return await request
        except APIConnectionError as error:  # time-outs too
            raise EndpointError(f"{self.url} was not reached in {self.tries} tries: {error}", passing=True) from error
        except APIStatusError as error:
            status, words = error.status_code, str(error.message)[:500]
            if status in (408, 409, 429) or status >= 500:
                message = f"{self.url} answered {status} to the last of {self.tries} tries: {words}"
                raise EndpointError(f"{message}; try again later with --retry-failures", passing=True) from error
            hint = f"; put a valid key into {self._key} on the workers" if status in (401, 403) else ""
            raise EndpointError(f"{self.url} refused with {status}: {words}{hint}", passing=False) from error
        except (OpenAIError, ValueError) as error:  # an answer that is not what the interface promises
            raise EndpointError(f"{self.url} answered with something else: {error}", passing=False) from error

    def close(self) -> None:
        """See `ChatEngine.close`."""
        self._run(self._client.close())
        super().close()


def _messages(question: Question) -> Any:
    """The messages as the interface wants them, a picture as a data URI before the last one's text."""
    messages: list[dict[str, Any]] = [dict(message) for message in question.messages]
    # Lone surrogates, which JSON in UTF-8 cannot carry, become question marks.
    for message in messages:
        message["content"] = message["content"].encode("utf-8", "replace").decode()
    if (data := question.picture) is not None:
        kind = next((kind for start, kind in _SEEN.items() if data.startswith(start)), "image/png")
        uri = f"data:{kind};base64,{base64.b64encode(data).decode()}"
        messages[-1]["content"] = [
            {"type": "image_url", "image_url": {"url": uri}},
            {"type": "text", "text": messages[-1]["content"]},
        ]
    return messages
