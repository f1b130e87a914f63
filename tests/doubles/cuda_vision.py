"""Tiny decoders that see: graphs for CUDA that the CPU provider runs, beside their references."""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch

from beam_gemma.engine.sampling import SamplingParams
from beam_gemma.engine.sequence import Picture, Request
from beam_gemma.engine.sequence import Sequence as Running
from beam_gemma.engine.span_packing import span_inputs
from beam_gemma.model.config import GemmaConfig
from beam_gemma.model.graph_tensors import Head
from beam_gemma.model.signature import Signature
from beam_gemma.model.vision_config import VisionConfig
from export.graph.signatures import decoder_signature
from export.graph.weights import inverse_frequencies
from export.modules.decoder import GemmaDecoder
from tests.doubles.cuda_models import Model
from tests.doubles.ragged import Chunk, Feeder, Feeds
from tests.doubles.traces import kept_trace
from tests.doubles.vision_models import image_features, tiny_vision_model, vision_model_config

TEXT_PREFIX = "model.language_model."
BLOCK = 64
"""Tokens of a cache block: fewer than heads of this width have on a GPU, so that a prompt has some
whole ones."""


@dataclasses.dataclass(frozen=True)
class Prompt:
    """Token ids, with pictures in places of theirs, and the tokens seen from both sides."""

    token_ids: list[int]
    starts: list[int]
    pixels: list[np.ndarray]
    spans: tuple[tuple[int, int], ...]
    num_image_tokens: int

    def request(self, name: str = "r", **options: Any) -> Request:
        """Return a request for a completion."""
        pictures = zip(self.starts, self.pixels, strict=True)
        return Request(
            request_id=name,
            prompt_token_ids=tuple(self.token_ids),
            spans=self.spans,
            media=tuple(
                Picture(start, p.tobytes()[:64], p, self.num_image_tokens) for start, p in pictures
            ),
            **{"params": SamplingParams(max_tokens=8, ignore_eos=True), **options},
        )


@dataclasses.dataclass(frozen=True)
class SeeingModel(Model):
    """A reference that sees, and what its decoder's graphs are made of."""

    vision: VisionConfig

    def signature(self, dtype: str, head: Head = "generate") -> Signature:
        """Return the contract of the decoder for CUDA, with small blocks."""
        signature = decoder_signature(
            self.config, device="cuda", dtype=dtype, head=head, vision=self.vision
        )
        return dataclasses.replace(signature, block_size=BLOCK)

    def graph(self, task: str, dtype: str) -> tuple[ir.Model, Signature]:
        """Return a decoder's graph without its weights, and its signature."""
        head: Head = "score" if task == "classify" else "generate"
        signature = self.signature(dtype, head)

        build = partial(GemmaDecoder, self.config, signature, self.vision)
        return kept_trace(build, signature), signature

    def for_card(self, dtype: str, file: Path) -> Signature:
        """Write the decoder's graph as a card runs it; return its signature."""
        signature = decoder_signature(
            self.config, device="cuda", dtype=dtype, head="generate", vision=self.vision
        )
        build = partial(GemmaDecoder, self.config, signature, self.vision)
        graph = kept_trace(build, signature)
        for name, value in graph.graph.initializers.items():
            if value.const_value is None and value.dtype is not None:
                values = self.weights[name].astype(value.dtype.numpy())
                value.const_value = ir.tensor(values, name=name)
        ir.save(graph, file)
        return signature

    def features(self, pixels: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Return the embeddings of pictures, float32."""
        return list(image_features(self.reference, torch.from_numpy(np.stack(pixels))).numpy())

    def logits(self, prompt: Prompt) -> np.ndarray:
        """Return the reference's logits at each position of a prompt and what follows it."""
        reference: Any = self.reference
        ids = torch.tensor([prompt.token_ids])
        seen = torch.zeros_like(ids)
        if self.vision.bidirectional == "picture":
            for start in prompt.starts:
                ids[0, start : start + self.vision.num_image_tokens] = self.vision.image_token_id
            seen[ids == self.vision.image_token_id] = 1
        else:
            ids[0, : len(prompt.starts) * self.vision.num_image_tokens] = self.vision.image_token_id
            seen[0, prompt.spans[0][1] :] = 1
        inputs: dict[str, torch.Tensor] = {"input_ids": ids, "token_type_ids": seen}
        if prompt.pixels:
            values = torch.from_numpy(np.stack(prompt.pixels)).float()
            inputs["pixel_values"] = (values / 255 - 0.5) / 0.5
        with torch.no_grad():
            return reference(
                **inputs, attention_mask=torch.ones_like(ids), use_cache=False
            ).logits[0].numpy()  # fmt: skip


@functools.cache
def seeing_model(name: str, dtype: str) -> SeeingModel:
    """Return one of `tests.doubles.vision_models.MODELS`, with weights that bfloat16 holds."""
    model = tiny_vision_model(name)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(torch.bfloat16))
    raw = vision_model_config(name).to_dict()
    text = raw["text_config"] | {"use_bidirectional_attention": False}
    text.pop("num_image_tokens", None)
    config = GemmaConfig.from_hf(text)
    if dtype == "bfloat16":
        # The factor of embeddings has the model's dtype, in the graph as in the reference.
        embed: Any = model.get_submodule("model.language_model.embed_tokens")
        embed.embed_scale.fill_(float(ml_dtypes.bfloat16(config.hidden_size**0.5)))
    weights = {
        key.removeprefix(TEXT_PREFIX): value.detach().numpy()
        + np.float32(key.endswith("norm.weight"))
        for key, value in model.named_parameters()
        if key.startswith(TEXT_PREFIX)
    }
    for group in config.groups:
        weights[f"rotary.{group}.inv_freq"] = inverse_frequencies(config, group)
    vision = VisionConfig.from_hf(raw)
    return SeeingModel(name, model, config, None, weights, vision)


def prompts(model: SeeingModel, *, seed: int = 0) -> list[Prompt]:
    """Return prompts with one picture, with two, and with none."""
    rng = np.random.default_rng(seed)
    size, count = model.vision.image_size, model.vision.num_image_tokens

    def ids(length: int) -> list[int]:
        return list(rng.integers(10, 300, length).tolist())

    made = []
    for before, after, num_pictures in ((5, 9, 1), (3, 21, 2), (0, 33, 0)):
        pixels = [rng.integers(0, 256, (3, size, size), np.uint8) for _ in range(num_pictures)]
        between = [3, 0] if model.vision.bidirectional == "picture" else [0, 0]
        before = before if model.vision.bidirectional == "picture" else 0
        token_ids, starts = ids(before), []
        for gap, _ in zip(between, pixels, strict=False):
            starts.append(len(token_ids))
            token_ids += [0] * count + ids(gap)
        spans = tuple((start, start + count) for start in starts)
        token_ids += ids(after)
        if model.vision.bidirectional == "prefix":
            spans = ((0, len(token_ids) - 4),)
        made.append(Prompt(token_ids, starts, pixels, spans, model.vision.num_image_tokens))
    return made


class SeeingFeeder(Feeder):
    """Builds the inputs of steps over prompts with pictures."""

    def __init__(self, model: SeeingModel, signature: Signature, rows: Sequence[Prompt]) -> None:
        super().__init__(signature, len(rows), max(len(row.token_ids) for row in rows))
        self._count = model.vision.num_image_tokens
        self._rows = rows
        self._features = [model.features(row.pixels) if row.pixels else [] for row in rows]

    def feeds(self, chunks: list[Chunk], *, all_rows: bool = True) -> Feeds:
        """Return the inputs of a step and move each sequence on."""
        running = []
        for i, tokens in chunks:
            sequence = Running(self._rows[i].request(), frozenset())
            sequence.restart(self.past[i])
            running.append((sequence, len(tokens)))
        feeds = super().feeds(chunks, all_rows=all_rows)
        feeds |= self._embeddings(chunks, [s.num_computed_tokens for s, _ in running])
        return feeds | span_inputs(tuple(running), self.signature, feeds)

    def _embeddings(self, chunks: list[Chunk], pasts: list[int]) -> Feeds:
        parts: list[np.ndarray] = [np.zeros((1, self.signature.hidden_size), np.float32)]
        rows = []
        for (i, tokens), past in zip(chunks, pasts, strict=True):
            of_token = dict.fromkeys(range(past, past + len(tokens)), -1)
            for start, values in zip(self._rows[i].starts, self._features[i], strict=True):
                for offset in range(self._count):
                    if start + offset in of_token:
                        of_token[start + offset] = len(parts)
                        parts.append(values[offset : offset + 1])
            rows += of_token.values()
        return {
            "inputs_embeds": np.concatenate(parts),
            "embeds_rows": np.array(rows, np.int64),
        }


def cuts(prompt: Prompt, length: int) -> list[int]:
    """Return where chunks of about `length` tokens end, none of them inside a span."""
    ends = range(length, len(prompt.token_ids), length)
    inside = {i for start, end in prompt.spans for i in range(start + 1, end)}
    return [end for end in ends if end not in inside] + [len(prompt.token_ids)]


def seeing_schedules(rows: Sequence[Prompt]) -> dict[str, list[list[tuple[int, int]]]]:
    """Return ways to run prompts, as steps of (prompt, number of tokens)."""
    lengths = [len(row.token_ids) for row in rows]
    whole = list(enumerate(lengths))
    chunked = []
    for i, row in enumerate(rows):
        pairs = itertools.pairwise([0, *cuts(row, 7)])
        chunked += [[(i, end - begin)] for begin, end in pairs]
    prefill = [(i, n - 4) for i, n in whole]
    return {
        "alone": [[item] for item in whole],
        "packed with others": [whole],
        "chunked": chunked,
        "decode over cache": [prefill, *([[(i, 1) for i, _ in whole]] * 4)],
        "decode beside prefill": [[(1, lengths[1] - 4)], [(0, lengths[0])],
                                  *([[(1, 1)]] * 4), [whole[2]]],
    }  # fmt: skip
