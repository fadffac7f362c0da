"""How often the same question with the same seed gets another answer from vLLM, by what is asked beside it.

Prints, for float32 and bfloat16, how many of the answers differ from those of one call with all questions at once: the
same again, in reversed order, and each question alone. 0 is what per-request seeds aim at; what is left is rounding.

usage: python benchmarks/prompt_seeds.py [PROMPTS.json] [--count 100] [--tokens 64]
PROMPTS.json: {id: {"1": text, ...}}, as TPIGE publishes its prompts.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

from ipvg_ray.models.chat_engine import Answer, Dialogue, Question, Sampling
from ipvg_ray.models.chat_vllm import VllmChat
from ipvg_ray.models.mini import qwen3
from ipvg_ray.models.prompt_templates import conversation, load_templates


def ask(question: Question) -> Dialogue[Answer]:
    return (yield question)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shared = Path(os.environ.get("IPVG_RAY_SHARED", "../shared"))
    parser.add_argument("prompts", type=Path, nargs="?", default=shared / "data" / "face_enhanced_prompts.json")
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=64)
    options = parser.parse_args()
    texts = [text for each in json.loads(options.prompts.read_text()).values() for text in each.values()]
    template = load_templates(["polisher"], None)["polisher"]
    questions = [Question(conversation(template, text, "A man"), i) for i, text in enumerate(texts[: options.count])]
    with tempfile.TemporaryDirectory() as folder:
        qwen3.make(Path(folder))
        for dtype in ("float32", "bfloat16"):
            for temperature in (0.1, 1.0):
                _compare(Path(folder) / qwen3.NAME, dtype, questions, Sampling(temperature, 0.9, options.tokens))


def _compare(folder: Path, dtype: str, questions: list[Question], sampling: Sampling) -> None:
    engine = VllmChat(folder, dtype=dtype, context=2048, kv_cache_gb=1, eager=True)

    def texts(asked: list[Question]) -> list[str]:
        ends = engine.converse([ask(question) for question in asked], sampling)
        return [end.text for end in ends if isinstance(end, Answer)]

    whole = texts(questions)
    orders = {
        "again": texts(questions),
        "reversed": texts(questions[::-1])[::-1],
        "each alone": [text for question in questions for text in texts([question])],
    }
    engine.close()
    counts = ", ".join(
        f"{name} {sum(a != b for a, b in zip(whole, other, strict=True))}" for name, other in orders.items()
    )
    print(f"{dtype}, temperature {sampling.temperature}: of {len(questions)} answers differ: {counts}", flush=True)


if __name__ == "__main__":
    main()
