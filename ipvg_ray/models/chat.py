"""The chat engine that runs on transformers' `generate`, with sampling that is seeded row by row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from ipvg_ray.models.chat_engine import Answer, BatchEngine, ChatFolderError, Question, Sampling
from ipvg_ray.models.chat_tokens import ChatTokenizer
from ipvg_ray.models.quiet import no_bars


class ChatModel(BatchEngine):
    """A causal language model with a chat template (Qwen3) from a folder in the Hugging Face format.

    Patterns of questions are ignored. The random numbers of an answer never depend on the other conversations of a
    call. Its logits do by rounding, since matrix products of other sizes add in another order: where two tokens tie
    within rounding, an answer may differ between batch sizes. Of 480 answers of the miniature (48 tokens, temperatures
    0.1 and 1) none differed between batches of 1 and of 8 in float32, 207 in bfloat16.

    Args:
        folder: configuration, safetensors weights, tokenizer and chat template.
        dtype: `float32`, `bfloat16` or `float16`.
        device: `cpu` or `cuda`.
        max_batch_tokens: a call's conversations are run in groups whose padded tokens, answers included, stay below
            this where that is possible, so that one long prompt does not make a whole batch run out of memory.

    Raises:
        ChatFolderError: where the folder is not such a model.
    """

    loader = "AutoModelForCausalLM"
    """The class of transformers that reads the folder."""

    def __init__(
        self, folder: str | Path, *, dtype: str = "float32", device: str = "cpu", max_batch_tokens: int = 65_536
    ) -> None:
        import transformers

        super().__init__()
        folder = Path(folder)
        if not (folder / "config.json").is_file():  # else transformers would take the name for one on the Hub
            raise ChatFolderError(f"{folder} holds no config.json; give the folder of a Qwen3 model")
        self.tokens = ChatTokenizer(folder)
        loader: Any = getattr(transformers, self.loader)
        with no_bars():
            model, loaded = loader.from_pretrained(
                folder, dtype=getattr(torch, dtype), local_files_only=True, output_loading_info=True
            )
        if missing := sorted(loaded["missing_keys"]):  # transformers would fill them with random numbers
            raise ChatFolderError(f"{folder} lacks {len(missing)} weights, such as {missing[0]}; download it again")
        self.model: Any = model.to(device).eval()
        self.context = int(self.model.config.get_text_config().max_position_embeddings)
        self.max_batch_tokens = max_batch_tokens
        self._ends = self.tokens.end_ids()
        self._pad = self._ends[0]
        # A new one: the folder's own carries the publisher's temperature, top_k and top_p, which `generate` would apply
        # to whatever a call leaves unset.
        self.model.generation_config = transformers.GenerationConfig(eos_token_id=self._ends, pad_token_id=self._pad)

    def check(self, question: Question, sampling: Sampling) -> int:
        """See `BatchEngine.check`."""
        return len(self._encode(question, sampling))

    def generate(self, questions: Sequence[Question], sampling: Sampling) -> list[Answer]:
        """See `BatchEngine.generate`."""
        prompts = [self._encode(question, sampling) for question in questions]
        answers: dict[int, Answer] = {}
        for group in _groups([len(p) + sampling.max_new_tokens for p in prompts], self.max_batch_tokens):
            seeds = [questions[i].seed for i in group]
            sampler = SeededSampler(seeds, sampling.temperature, sampling.top_p, vocabulary=len(self.tokens))
            run = self._run([prompts[i] for i in group], sampler, sampling.max_new_tokens)
            answers.update(zip(group, run, strict=True))
        return [answers[i] for i in range(len(prompts))]

    def _encode(self, question: Question, sampling: Sampling) -> list[int]:
        return self.tokens.encode_within(question, sampling, self.context)

    def _run(
        self, prompts: list[list[int]], sampler: SeededSampler, max_new_tokens: int, **seen: torch.Tensor
    ) -> Iterator[Answer]:
        """Answers to prompts of token ids; `seen` is what the model is given of a picture."""
        width = max(map(len, prompts))
        # Padding on the left: new tokens follow each prompt's last one directly.
        ids = torch.tensor([[self._pad] * (width - len(p)) + p for p in prompts], device=self.model.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=self.model.device)
        with torch.inference_mode():
            output = self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                do_sample=False,
                max_new_tokens=max_new_tokens,
                logits_processor=[sampler],
                **seen,
            )
        for prompt, new in zip(prompts, output[:, width:].tolist(), strict=True):
            end = next((i for i, token in enumerate(new) if token in self._ends), None)
            text = self.tokens.decode(new[:end])
            yield Answer(text, end is not None, len(prompt), len(new) if end is None else end + 1)


class SeededSampler:
    """Temperature and top-p sampling with a random stream per row, as a logits processor for greedy search.

    `generate`'s own sampling draws from the global generator for the whole batch, so that a row's text would depend on
    its place in the batch, on the batch's size and on what ran before. Here each row has its own generator, and the
    Gumbel-max trick makes the choice: with independent Gumbel noise added to the log-probabilities, the argmax is an
    exact sample of the distribution (Maddison et al., arXiv 1411.0030, section 2), and greedy search takes the argmax.
    Since the noise belongs to the token, rounding of the logits changes the choice only where the best two sums tie;
    inverting the cumulative probability would instead let it move every boundary.

    Args:
        seeds: one per row.
        temperature: 0 takes the likeliest token.
        top_p: nucleus sampling (Holtzman et al., arXiv 1904.09751): see `nucleus`.
        vocabulary: ids from here on have no text and are never chosen.
    """

    def __init__(self, seeds: Sequence[int], temperature: float, top_p: float, vocabulary: int) -> None:
        if temperature < 0 or not 0 < top_p <= 1:
            raise ValueError(f"temperature {temperature} must be at least 0 and top_p {top_p} in (0, 1]")
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.temperature = temperature
        self.top_p = top_p
        self.vocabulary = vocabulary

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores (rows, embedding rows) whose argmax is each row's sampled token."""
        scores = scores.float().clone()
        if scores[:, : self.vocabulary].isnan().any():
            raise ValueError("the language model gave NaN; use prompts.dtype bfloat16 or float32, or check its files")
        scores[:, self.vocabulary :] = -torch.inf
        if self.temperature == 0:
            return scores
        # The largest becomes 0 first, so that no temperature, however small, overflows.
        scores = nucleus((scores - scores.amax(-1, keepdim=True)) / self.temperature, self.top_p)
        kept = scores.isfinite()
        # At Qwen3's vocabulary noise costs a millisecond of CPU per row, and most steps leave but one token to choose.
        for row in (kept.sum(-1) > 1).nonzero().flatten().tolist():
            uniform = torch.rand(self.vocabulary, generator=self.generators[row], dtype=torch.float64)
            tokens = kept[row].nonzero().flatten()
            noise = -torch.log(-torch.log(uniform[tokens.cpu()]))
            scores[row, tokens] += noise.to(scores)
        return scores


def nucleus(scores: torch.Tensor, top_p: float) -> torch.Tensor:
    """Scores (rows, tokens) with -inf for all but the likeliest tokens that together hold at least `top_p`."""
    if top_p == 1:  # the sum below may reach 1 by rounding before the last token
        return scores
    ordered, order = scores.sort(dim=-1, descending=True)
    probabilities = ordered.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities  # mass of the likelier tokens; 0 for the first, which stays
    dropped = before >= top_p
    return scores.masked_fill(dropped.scatter(-1, order, dropped), -torch.inf)


def _groups(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Indices in groups of similar length whose padded size stays within `budget`; a longer one stands alone."""
    group: list[int] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        if group and (len(group) + 1) * lengths[index] > budget:
            yield group
            group = []
        group.append(index)
    if group:
        yield group
