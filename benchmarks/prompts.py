"""Prompts per second of the prompts stage, and of the ways to do the same calls without it, on the same machine.

(a) transformers, one `generate` at a time; (b) transformers in batches; (c) plain `vllm.LLM.generate` over all first
calls at once, then over all second calls; (d) our stage, end to end on Ray Data, checkpoints included.

Each prompt is two calls (polisher, parser) of the same instructions, seeds and token limits; the model's random answers
never pass the checks, so `retries` is 0 and the second call reads the user's text with the target in front, always.
Engine starts are left out and stated apart. (c) and (d) run in turn `--repeat` times; medians, and the ratio (d) / (c).

usage: python benchmarks/prompts.py [PROMPTS.json] [--model mini|100m] [--count 500] [--tokens 64] [--repeat 3]
       [--slow 20] [--slow-batched 64] [--constrain]
PROMPTS.json: {id: {"1": text, ...}}, as TPIGE publishes its prompts.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

TESTS = str(Path(__file__).parent.parent / "tests")
sys.path.insert(0, TESTS)
os.environ["PYTHONPATH"] = TESTS  # the workers need tests/prompt_runs.py too
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

from prompt_runs import freeze_prompts, request

from ipvg_ray import tables
from ipvg_ray.models import prompt_rules as rules
from ipvg_ray.models.chat_engine import Question, Sampling
from ipvg_ray.models.mini import qwen3
from ipvg_ray.models.prompt_templates import conversation, load_templates
from ipvg_ray.pipeline import execute
from ipvg_ray.pipeline import run as engine
from ipvg_ray.pipeline.stage import derived_seed
from ipvg_ray.pipeline.store import row_seeds

TARGET = "A man"
CONTEXT = 2048


def make_100m(root: Path) -> None:
    """A random Qwen3 of about 100 million parameters with the miniature's tokenizer, in the miniature's place."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    qwen3.make(root)
    folder = root / qwen3.NAME
    small = json.loads((folder / "config.json").read_text())
    small.update(hidden_size=768, intermediate_size=2304, num_hidden_layers=14, num_attention_heads=12)
    small.update(num_key_value_heads=4, head_dim=64, layer_types=["full_attention"] * 14, initializer_range=0.05)
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(**small))
    generation = (folder / "generation_config.json").read_text()
    model.to(torch.bfloat16).save_pretrained(folder)
    (folder / "generation_config.json").write_text(generation)
    print(f"model of {sum(p.numel() for p in model.parameters()) / 1e6:.0f} million parameters")


def calls(prompts: list[str]) -> tuple[list[Question], list[Question]]:
    """The first and the second calls as the stage makes them where no answer is valid."""
    templates = load_templates(["polisher", "parser"], None)
    first, second = [], []
    for i, prompt in enumerate(prompts):
        (seed,) = row_seeds(1, [f"id{i // 5:05d}/prompt{i % 5}"], "prompts")
        refined = rules.fallback_polished(prompt, TARGET)
        first.append(Question(conversation(templates["polisher"], prompt, TARGET), derived_seed(seed, "polisher", 0)))
        second.append(Question(conversation(templates["parser"], refined, TARGET), derived_seed(seed, "parser", 0)))
    return first, second


def with_transformers(folder: Path, dtype: str, prompts: list[str], sampling: Sampling, batch: int) -> float:
    """Prompts per second of (a), where `batch` is 1, and (b)."""
    from ipvg_ray.models.chat import ChatModel

    model = ChatModel(folder, dtype=dtype)
    first, second = calls(prompts)
    model.generate(first[:1], sampling)
    started = time.perf_counter()
    for questions in (first, second):
        for i in range(0, len(questions), batch):
            model.generate(questions[i : i + batch], sampling)
    return len(prompts) / (time.perf_counter() - started)


def with_plain_vllm(folder: Path, dtype: str, prompts: list[str], sampling: Sampling) -> tuple[float, float, int]:
    """Prompts per second of (c), seconds to start, and new tokens."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # all in one process: its fastest on few cores
    from vllm import LLM, SamplingParams

    from ipvg_ray.models.chat_tokens import ChatTokenizer

    started = time.perf_counter()
    llm = LLM(
        str(folder),
        dtype=dtype,  # type: ignore[arg-type]
        max_model_len=CONTEXT,
        max_num_batched_tokens=4096,
        enable_chunked_prefill=False,
        kv_cache_memory_bytes=1 << 30,
        enforce_eager=True,
        generation_config="vllm",
        disable_log_stats=True,
    )
    tokens = ChatTokenizer(folder)
    ready = time.perf_counter()
    written = 0
    for questions in calls(prompts):
        given: list[Any] = [{"prompt_token_ids": tokens.encode(question.messages)} for question in questions]
        drawn = [
            SamplingParams(
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                max_tokens=sampling.max_new_tokens,
                seed=question.seed,
                stop_token_ids=tokens.end_ids(),
            )
            for question in questions
        ]
        outputs = llm.generate(given, drawn, use_tqdm=False)
        written += sum(len(output.outputs[0].token_ids) for output in outputs)
    return len(prompts) / (time.perf_counter() - ready), ready - started, written


def with_the_stage(
    root: Path, dtype: str, prompts: list[str], sampling: Sampling, constrain: bool
) -> tuple[float, float]:
    """Prompts per second of (d), from the first batch begun to the last one's part file, and seconds before that."""
    settings = {
        "engine": "vllm",
        "vllm": {"context": CONTEXT, "kv_cache_gb": 1, "eager": True},
        "dtype": dtype,
        "max_new_tokens": sampling.max_new_tokens,
        "retries": 0,
        "constrain": constrain,
        "pool": {"batch_size": 16, "concurrency": 40, "cpus": 0.1, "threads": os.cpu_count() or 1},  # as (c) takes
    }
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        started = time.time()
        result = engine.run(request(run, root, settings), freeze_prompts(prompts))
        assert result.outcome == "complete"
        assert len(tables.read_table(run, "prompts", ["prompt_status"])) == len(prompts)
        notes = [json.loads(line) for file in run.rglob("journal/prompts-*.jsonl") for line in file.open()]
        begun = min(note["t"] for note in notes if note["event"] == "begin")
        ended = max(note["t"] for note in notes if note["event"] == "end")
        execute.shutdown()
    return len(prompts) / (ended - begun), begun - started


def apart(function: Any, *arguments: Any) -> Any:
    """Call a function in a process of its own, so that neither engine leaves anything behind for the other."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_put, args=(queue, function, arguments))
    process.start()
    result = queue.get()
    process.join()
    if isinstance(result, BaseException):
        raise result
    return result


def _put(queue: Any, function: Any, arguments: tuple[Any, ...]) -> None:
    try:
        queue.put(function(*arguments))
    except BaseException:
        queue.put(RuntimeError(traceback.format_exc()))
    queue.close()
    queue.join_thread()
    os._exit(0)  # an engine of vLLM's that was not shut down would keep the process waiting for it


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shared = Path(os.environ.get("IPVG_RAY_SHARED", "../shared"))
    parser.add_argument("prompts", type=Path, nargs="?", default=shared / "data" / "face_enhanced_prompts.json")
    parser.add_argument("--model", choices=["mini", "100m"], default="mini")
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--slow", type=int, default=20, help="prompts for (a)")
    parser.add_argument("--slow-batched", type=int, default=64, help="prompts for (b)")
    parser.add_argument("--constrain", action="store_true", help="(d) once more with structured output")
    options = parser.parse_args()
    texts = [text for each in json.loads(options.prompts.read_text()).values() for text in each.values()]
    texts = texts[: options.count]
    dtype = "float32" if options.model == "mini" else "bfloat16"
    sampling = Sampling(0.1, 0.9, options.tokens)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (qwen3.make if options.model == "mini" else make_100m)(root)
        place = root / qwen3.NAME
        print(f"{len(texts)} prompts of two calls, {options.tokens} new tokens at most, {dtype}", flush=True)
        plain, ours = [], []
        for i in range(options.repeat):
            rate, start, written = apart(with_plain_vllm, place, dtype, texts, sampling)
            plain.append(rate)
            print(f"(c) run {i + 1}: {rate:7.2f} prompts/s; start {start:.0f} s; {written} new tokens", flush=True)
            rate, start = apart(with_the_stage, root, dtype, texts, sampling, False)
            ours.append(rate)
            print(f"(d) run {i + 1}: {rate:7.2f} prompts/s; start {start:.0f} s", flush=True)
        c, d = statistics.median(plain), statistics.median(ours)
        print(f"(d) / (c)  {d / c:.2f}   medians {d:.2f} and {c:.2f} prompts/s", flush=True)
        if options.constrain:
            rate, _ = apart(with_the_stage, root, dtype, texts, sampling, True)
            print(f"(d) with structured output: {rate:7.2f} prompts/s", flush=True)
        if options.slow_batched:
            b = apart(with_transformers, place, dtype, texts[: options.slow_batched], sampling, 32)
            print(f"(b) {b:7.3f} prompts/s over {options.slow_batched}; (d) / (b) {d / b:.1f}", flush=True)
        if options.slow:
            a = apart(with_transformers, place, dtype, texts[: options.slow], sampling, 1)
            print(f"(a) {a:7.3f} prompts/s over {options.slow}; (d) / (a) {d / a:.1f}", flush=True)


if __name__ == "__main__":
    main()
