"""A session without a model, whose next token is a fixed function of what its caches hold.

`FakeSession` keeps paged caches of token ids. It writes them where `slot_mapping` says and reads
them back through block tables, context starts and past lengths, so wrong bookkeeping or packing
changes what comes out. A group with a window shows the function only the tokens in the window. What
former owners left in a block never shows, except for a NaN: it spreads to every row whose table
holds its block, in use or not, as 0 * NaN does in a product. A recurrent state is a number that all
tokens so far have changed, or None once one of them was a NaN. Whatever the session is not allowed
to be given is kept in `faults`, since an engine answers for exceptions of its session.

A token of a picture is cached as the first number of its embedding, and `FakeEncoder` makes
embeddings whose first numbers no token ids are.

`expected` computes the same completion from the request alone.
"""

import hashlib
import itertools
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from beam_gemma.engine.sampling import sample
from beam_gemma.engine.sequence import Completion, Picture, Request
from beam_gemma.model.graph_tensors import Device, Head, PagedState, RecurrentState, State, Table
from beam_gemma.model.signature import CONTEXT_ALIGNMENT, Signature
from beam_gemma.runtime.step_interface import Finished, ScoreOutput, StepOutput

VOCAB_SIZE = 97
RAREST = VOCAB_SIZE - 1
"""The last token of a vocabulary is never chosen."""
NEVER_WRITTEN = -1.0
NUM_IMAGE_TOKENS = 20
"""More than a block."""
IMAGE_SIZE = 4
RECURRENT = "recurrent"
STATES = (
    PagedState(group="full", layers=(1,), num_key_value_heads=1, head_dim=8),
    PagedState(group="sliding", layers=(0,), num_key_value_heads=1, head_dim=8, sliding_window=40),
    RecurrentState(name=RECURRENT, layers=(2,), shape=(8,)),
)


def fake_signature(
    *,
    device: Device = "cpu",
    states: tuple[State, ...] = STATES,
    optional_inputs: tuple[str, ...] = ("span_ends",),
    max_model_len: int = 1000,
    vocab_size: int = VOCAB_SIZE,
    head: Head = "generate",
    shares_caches: bool = False,
    gathered_heads: int = 0,
    tables: tuple[Table, ...] = (),
) -> Signature:
    """Return the signature of a small decoder: full, sliding and recurrent layers by default."""
    return Signature(
        head=head,
        device=device,
        dtype="float32",
        vocab_size=vocab_size,
        hidden_size=8,
        max_model_len=max_model_len,
        states=states,
        optional_inputs=optional_inputs,
        shares_caches=shares_caches,
        gathered_heads=gathered_heads,
        tables=tables,
    )


class FakeSession:
    """Stands in for `session.Session`."""

    max_steps_in_flight = 1

    def __init__(
        self,
        signature: Signature | None = None,
        *,
        num_blocks: int | Mapping[str, int] = 512,
        num_state_slots: int = 64,
        poison: tuple[str, int] | None = None,
        next_token: Callable[[tuple[int, ...]], int] | None = None,
    ) -> None:
        """Start with zeroed caches.

        Args:
            signature: What the caches are.
            num_blocks: Pool of every group, or of each.
            num_state_slots: Rows of the recurrent state.
            poison: A group or a recurrent state, and a token that it stores as NaN.
            next_token: Most likely token after so many; None for the built-in function.
        """
        self.signature = signature or fake_signature()
        groups = [state.group for state in self.signature.paged_states]
        self.num_blocks = (
            dict.fromkeys(groups, num_blocks) if isinstance(num_blocks, int) else dict(num_blocks)
        )
        self.num_state_slots = num_state_slots
        self.steps: list[list[tuple[int, int]]] = []
        """(tokens before, new tokens) of each sequence of each step."""
        self.faults: list[AssertionError] = []
        """What was wrong with the steps that came; must stay empty."""
        self.fails: Callable[[int, list[int]], bool] = lambda _, __: False
        """Whether a step raises, by its number (from 1) and its new tokens."""
        self.go = threading.Event()
        """Steps wait for it, so that a test can submit before the first."""
        self.go.set()
        self._poison = poison
        self._next_token = next_token
        size = self.signature.block_size
        self._cache = {g: np.full(n * size, NEVER_WRITTEN) for g, n in self.num_blocks.items()}
        self._recurrent: list[int | None] = [None] * num_state_slots
        self.copied: list[tuple[int, int]] = []
        """Slots whose state was copied, each with the slot it was copied to."""
        self._next_ids = np.full(num_state_slots + 1, -1)

    def start(
        self,
        feeds: Mapping[str, np.ndarray],
        *,
        with_logits: bool = False,
        with_candidates: bool = True,
    ) -> Finished:
        """Run a step at once."""
        output = self.run(feeds, with_logits=with_logits)
        if isinstance(output, StepOutput) and not with_candidates:
            assert self.signature.chooses, "the host cannot choose among no candidates"
            output = replace(output, topk_logits=None, topk_ids=None)
        return Finished(output)

    def run(
        self, feeds: Mapping[str, np.ndarray], *, with_logits: bool = False
    ) -> StepOutput | ScoreOutput:
        """Write the new tokens, read each row's context, and return logits made of it."""
        assert self.go.wait(timeout=200)
        try:
            return self._run(feeds, with_logits=with_logits)
        except AssertionError as fault:
            self.faults.append(fault)
            raise

    def zero_blocks(self, group: str, blocks: Sequence[int]) -> None:
        """Forget what blocks hold."""
        assert all(blocks), "block 0 belongs to nobody"
        self._cache[group].reshape(-1, self.signature.block_size)[list(blocks)] = NEVER_WRITTEN

    def copy_slot(self, source: int, target: int) -> None:
        """Copy a recurrent state."""
        assert self.signature.has_recurrent_state
        assert 0 <= source < self.num_state_slots > target >= 0 != source - target
        self.copied.append((source, target))
        self._recurrent[target] = self._recurrent[source]

    def _run(
        self, feeds: Mapping[str, np.ndarray], *, with_logits: bool
    ) -> StepOutput | ScoreOutput:
        self._check_names(feeds)
        if self.signature.chooses:
            feeds = {**feeds, "input_ids": self._known(feeds)}
        if "embeds_rows" in feeds:
            feeds = {**feeds, "input_ids": with_pictures(feeds)}
        num_new_tokens = np.diff(feeds["cu_seqlens"])
        self.steps.append(
            list(zip(feeds["past_seqlens"].tolist(), num_new_tokens.tolist(), strict=True))
        )
        for state in self.signature.paged_states:
            self._write(state, feeds)
        if self.fails(len(self.steps), feeds["input_ids"].tolist()):
            self._spoil(feeds)
            raise RuntimeError("the device is gone")
        self._advance(feeds)
        ends = (feeds["cu_seqlens"][1:] - 1).tolist()
        known = {end: self._logits(feeds, b, end) for b, end in enumerate(ends)}
        rows = []
        for row in feeds["logit_rows"].tolist():
            owner = int(np.searchsorted(ends, row))
            rows.append(known[row] if row in known else self._logits(feeds, owner, row))
        logits = np.array(rows, np.float32).reshape(len(rows), self.signature.vocab_size)
        if self.signature.head == "score":
            return score_output(logits, feeds)
        output = step_output(logits, self.signature.candidates, with_logits=with_logits)
        output = replace(output, top_probability=output.top_probability[feeds["probability_rows"]])
        return self._choose(output, logits, feeds) if self.signature.chooses else output

    def _known(self, feeds: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return the step's tokens, those that earlier steps chose included."""
        slots = feeds["token_slots"]
        chosen = self._next_ids[slots]
        assert (chosen[slots >= 0] >= 0).all(), "a token is used that nobody chose"
        assert not feeds["input_ids"][slots >= 0].any()
        return np.where(slots >= 0, chosen, feeds["input_ids"])

    def _choose(
        self, output: StepOutput, logits: np.ndarray, feeds: Mapping[str, np.ndarray]
    ) -> StepOutput:
        """Choose next tokens as a graph does, and keep them."""
        names = ("temperatures", "uniforms", "top_ks", "top_ps")
        params = zip(*(feeds[name].tolist() for name in names), strict=True)
        ids = np.array(list(itertools.starmap(draw, zip(logits, params, strict=True))), np.int64)
        assert len(set(feeds["logit_slots"].tolist())) == len(ids)
        self._next_ids[feeds["logit_slots"]] = ids
        return replace(
            output,
            logits=None if output.logits is None else logits[feeds["full_rows"]],
            chosen_ids=ids,
            chosen_logits=logits[np.arange(len(ids)), ids],
            top_logits=logits.max(axis=1, initial=-np.inf),
        )

    def _spoil(self, feeds: Mapping[str, np.ndarray]) -> None:
        """Leave behind the worst that a step can which ended halfway."""
        for state in self.signature.paged_states:
            slots, _ = self._written(state, feeds)
            self._cache[state.group][slots] = np.nan
        if self.signature.has_recurrent_state:
            for slot in feeds["state_slots"].tolist():
                self._recurrent[slot] = None

    def _check_names(self, feeds: Mapping[str, np.ndarray]) -> None:
        tensors = self.signature.step_inputs()
        assert sorted(feeds) == sorted(t.name for t in tensors)
        for tensor in tensors:
            assert feeds[tensor.name].dtype == tensor.dtype, tensor.name
            assert feeds[tensor.name].ndim == len(tensor.shape), tensor.name

    def _write(self, state: PagedState, feeds: Mapping[str, np.ndarray]) -> None:
        slots, ids = self._written(state, feeds)
        size = self.signature.block_size
        table = feeds[f"block_table.{state.group}"]
        assert len(set(slots.tolist())) == len(slots) == len(ids)
        assert slots.min(initial=size) >= size, "block 0 stays zero"
        assert np.isin(slots // size, table).all()
        if self.signature.device == "cpu":
            assert table.shape[1] * size % CONTEXT_ALIGNMENT == 0
            assert not (self._starts(state, feeds) % CONTEXT_ALIGNMENT).any()
        if self._poison is not None and self._poison[0] == state.group:
            ids[ids == self._poison[1]] = np.nan
        self._cache[state.group][slots] = ids

    def _written(
        self, state: PagedState, feeds: Mapping[str, np.ndarray]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the slots of a group that a step writes, and what it writes to them."""
        slots, ids = [], []
        if state.holds != "source":
            slots.append(feeds[f"slot_mapping.{state.group}"])
            ids.append(feeds["input_ids"].astype(np.float64))
        if state.holds != "target":
            sources = feeds[f"source_slots.{state.group}"]
            states = feeds["source_states"][:, 0].astype(np.float64)
            assert len(sources) == len(states)
            if sources[0] < 0:
                assert (sources, states) == ([-1], [0]), "one row stands for no source"
            else:
                slots.append(sources)
                ids.append(states)
        return np.concatenate(slots or [[]]).astype(np.int64), np.concatenate(ids or [[]])

    def _logits(self, feeds: Mapping[str, np.ndarray], row: int, place: int) -> np.ndarray:
        """Return the logits after a new token of a row; a NaN in reach also spoils its keys."""
        begin, end = feeds["cu_seqlens"][row : row + 2].tolist()
        past = int(feeds["past_seqlens"][row])
        if "span_ends" in feeds:
            assert (feeds["span_ends"][begin:end] < past + end - begin).all(), "a span was split"
        histories = []
        poisoned = False
        for state in self.signature.paged_states:
            blocks = feeds[f"block_table.{state.group}"][row]
            context = self._cache[state.group].reshape(-1, self.signature.block_size)[blocks]
            context = context.reshape(-1)
            if self.signature.device == "cuda":  # where kernels mask before they multiply
                context = context[: past + end - begin]
            poisoned |= bool(np.isnan(context).any())
            if state.holds != "target":
                histories.append(self._behind_source(state, feeds, row, place, context))
                continue
            start = int(self._starts(state, feeds)[row])
            last = past + place - begin
            first = 0 if state.sliding_window is None else max(0, last - state.sliding_window + 1)
            assert first >= start or self.signature.device == "cuda"
            histories.append(context[first - start : last + 1 - start])
            assert not (histories[-1] == NEVER_WRITTEN).any(), "a token is read that nobody wrote"
        if poisoned:
            for group, cache in self._cache.items():
                if f"slot_mapping.{group}" in feeds:
                    cache[feeds[f"slot_mapping.{group}"][begin:end]] = np.nan
            return np.full(self.signature.vocab_size, np.nan)
        summary = self._summaries[place]
        if summary is None:
            return np.full(self.signature.vocab_size, np.nan)
        return logits_of(histories, summary, self.signature.vocab_size, self._next_token)

    def _behind_source(
        self,
        state: PagedState,
        feeds: Mapping[str, np.ndarray],
        row: int,
        place: int,
        context: np.ndarray,
    ) -> np.ndarray:
        """Return what a token reaches in a group that holds sources: these, then its own tokens."""
        begin, end = feeds["cu_seqlens"][row : row + 2].tolist()
        past, num_source = (int(feeds[n][row]) for n in ("past_seqlens", "source_seqlens"))
        last, window = past + place - begin, state.sliding_window or self.signature.max_model_len
        assert end - begin == 1 or past + end - begin <= window, "a chunk overwrites its own tokens"
        cells = list(range(num_source))
        if state.holds == "both":
            cells += [num_source + p % window for p in range(max(0, last - window + 1), last + 1)]
        assert not (context[cells] == NEVER_WRITTEN).any(), "a token is read that nobody wrote"
        return context[cells]

    def _advance(self, feeds: Mapping[str, np.ndarray]) -> None:
        """Compute the recurrent state after each token of the step, and keep each row's last."""
        self._summaries: list[int | None] = [0] * len(feeds["input_ids"])
        if not self.signature.has_recurrent_state:
            return
        slots, past = feeds["state_slots"].tolist(), feeds["past_seqlens"].tolist()
        assert len(set(slots)) == len(slots)
        bad = self._poison[1] if self._poison is not None and self._poison[0] == RECURRENT else None
        for row, (begin, end) in enumerate(itertools.pairwise(feeds["cu_seqlens"].tolist())):
            summary = self._recurrent[slots[row]] if past[row] else 0
            for place in range(begin, end):
                token = int(feeds["input_ids"][place])
                is_nan = summary is None or token == bad
                summary = None if is_nan else recur(summary, [token])
                self._summaries[place] = summary
            self._recurrent[slots[row]] = summary

    def _starts(self, state: PagedState, feeds: Mapping[str, np.ndarray]) -> np.ndarray:
        zeros = np.zeros_like(feeds["past_seqlens"])
        return feeds.get(f"context_starts.{state.group}", zeros)


def expected(
    signature: Signature,
    request: Request,
    *,
    eos_token_ids: tuple[int, ...] = (),
    next_token: Callable[[tuple[int, ...]], int] | None = None,
) -> Completion:
    """Return what a request completes to, from the definition alone: no cache, no batch."""
    params = request.params
    ends = {*params.stop_token_ids, *(() if params.ignore_eos else eos_token_ids)}
    ids, source = list(request.prompt_token_ids), list(request.source_token_ids)
    for picture in request.media:
        place = slice(picture.start, picture.start + NUM_IMAGE_TOKENS)
        (source or ids)[place] = soft_ids(picture.values)
    source = read_source(source)
    completion: list[int] = []
    finish_reason, logprob = "length", 0.0
    while len(completion) < params.max_tokens:
        histories = histories_of(signature, ids, source)
        summary = recur(0, ids) if signature.has_recurrent_state else 0
        logits = logits_of(histories, summary, signature.vocab_size, next_token)
        every = np.arange(signature.vocab_size)
        token = sample(params, logits, every, key=request.sampling_key, position=len(ids))
        logprob += float(logits[token] - logsumexp(logits[None])[0])
        if token in ends:
            finish_reason = "stop"
            break
        ids.append(token)
        completion.append(token)
        if request.should_stop is not None and request.should_stop(token):
            finish_reason = "stop"
            break
    return Completion(
        token_ids=tuple(completion),
        finish_reason=finish_reason,
        logprob=logprob if request.logprob else None,
    )


def histories_of(signature: Signature, token_ids: list[int], source: list[int]) -> list[np.ndarray]:
    """Return what the last token reaches in each group, by the definition of its state."""
    histories = []
    for state in signature.paged_states:
        own = token_ids if state.sliding_window is None else token_ids[-state.sliding_window :]
        held = {"target": own, "source": source, "both": source + own}[state.holds]
        histories.append(np.array(held, np.float64))
    return histories


def logits_of(
    histories: Sequence[np.ndarray],
    summary: int,
    vocab_size: int,
    next_token: Callable[[tuple[int, ...]], int] | None,
) -> np.ndarray:
    """Return logits that any change of any token changes; coarse, so that some are equal."""
    text = ";".join(",".join(str(int(i)) for i in history) for history in histories)
    digest = hashlib.blake2b(f"{text}|{summary}".encode(), digest_size=8).digest()
    rng = np.random.default_rng(int.from_bytes(digest, "little"))
    logits = rng.integers(0, 12, vocab_size).astype(np.float32) / 2
    logits[-1] = -np.inf
    if next_token is not None:
        logits[next_token(tuple(int(i) for i in histories[0]))] = 50
    return logits


def recur(summary: int, ids: Sequence[int]) -> int:
    """Return a recurrent state after more tokens."""
    for i in ids:
        summary = (summary * 6364136223846793005 + i + 1) % 2**64
    return summary


def with_pictures(feeds: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return the step's tokens, with those of pictures in place of their ids."""
    rows, embeds = feeds["embeds_rows"], feeds["inputs_embeds"]
    assert 1 <= len(embeds) <= max(1, (rows >= 0).sum())
    assert (embeds.max(axis=1) == embeds[:, 0]).all(), "numbers other than the first are zero"
    return np.where(rows >= 0, embeds[rows, 0].astype(np.int64), feeds["input_ids"])


def soft_ids(pixels: np.ndarray) -> list[int]:
    """Return what stands for the tokens of a picture in the caches of a `FakeSession`."""
    digest = hashlib.blake2b(pixels.tobytes(), digest_size=2).digest()
    first = 1000 + 100 * int.from_bytes(digest, "little")
    return list(range(first, first + NUM_IMAGE_TOKENS))


def read_source(token_ids: Sequence[int]) -> list[int]:
    """Return what stands for the tokens of a source, each of which depends on all of them."""
    digest = hashlib.blake2b(repr(list(token_ids)).encode(), digest_size=1).digest()
    first = 8_000_000 + 10_000 * digest[0]
    return [first + i for i in range(len(token_ids))]


class FakeEncoder:
    """Stands in for the session that makes embeddings of pictures."""

    signature = Signature(
        head="vision",
        device="cpu",
        dtype="float32",
        vocab_size=VOCAB_SIZE,
        hidden_size=8,
        max_model_len=1000,
        states=(),
        image_size=IMAGE_SIZE,
        num_image_tokens=NUM_IMAGE_TOKENS,
    )

    def __init__(self) -> None:
        self.batches: list[int] = []
        """Number of pictures of each call."""
        self.fails: Callable[[np.ndarray], bool] = lambda _: False
        """Whether a call with such a picture raises."""

    def encode(self, pixels: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Return embeddings made of the pixels."""
        self.batches.append(len(pixels))
        if any(map(self.fails, pixels)):
            raise RuntimeError("the tower is gone")
        embeddings = np.zeros((len(pixels), NUM_IMAGE_TOKENS, 8), np.float32)
        for one, picture in zip(embeddings, pixels, strict=True):
            one[:, 0] = soft_ids(picture)
        return list(embeddings)


def fake_picture(number: int, start: int) -> Picture:
    """Return one of 200 pictures, from a position of a prompt on."""
    pixels = np.full((3, IMAGE_SIZE, IMAGE_SIZE), number, np.uint8)
    return Picture(start, hashlib.blake2b(pixels.tobytes()).digest(), pixels, NUM_IMAGE_TOKENS)


def logsumexp(logits: np.ndarray) -> np.ndarray:
    return np.log(np.exp(logits.astype(np.float64)).sum(axis=1))


def step_output(logits: np.ndarray, candidates: int, *, with_logits: bool) -> StepOutput:
    """Return what the `generate` head makes of logits."""
    order = np.argsort(-logits, axis=1, kind="stable")[:, :candidates]
    top = np.take_along_axis(logits, order, axis=1)
    probability = np.exp(top[:, 0] - logsumexp(logits)).astype(np.float32)
    return StepOutput(top, order, probability, logits if with_logits else None)


def draw(logits: np.ndarray, params: tuple[float, float, int, float]) -> int:
    """Return the token that a graph chooses."""
    temperature, uniform, top_k, top_p = params
    if temperature == 0 or np.isnan(logits).any():
        return int(logits.argmax())
    order = np.argsort(-logits, kind="stable")[:top_k]
    mass = np.exp((logits[order] - logits.max()).astype(np.float64) / temperature).cumsum()
    nucleus = mass[: 1 + mass.searchsorted(top_p * mass[-1])]
    return int(order[nucleus.searchsorted(uniform * nucleus[-1], side="right")])


def score_output(logits: np.ndarray, feeds: Mapping[str, np.ndarray]) -> ScoreOutput:
    """Return what the `score` head makes of logits."""
    wanted = logits[feeds["probability_rows"]]
    top = wanted.max(axis=1, initial=-np.inf)
    probability = np.exp(top - logsumexp(wanted)).astype(np.float32)
    return ScoreOutput(logits[feeds["target_rows"], feeds["target_ids"]], top, probability)
