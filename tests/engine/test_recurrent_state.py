"""RecurrentGemma in the engine: a row's bits in any company, with and without shared snapshots.

The graph is that of a real, tiny model. A row that runs alone, in one chunk and with nothing shared
is what all others must equal, in its tokens and in the bits of its log-probability.
"""

import random
import shutil
from contextlib import closing

import numpy as np
import onnx_ir as ir
import pytest

from beam_gemma.engine.engine import Engine
from beam_gemma.engine.kv_cache import KVCache
from beam_gemma.engine.sampling import SamplingParams
from beam_gemma.engine.sequence import Completion, Request
from beam_gemma.engine.stats import EngineStats
from beam_gemma.model.artifact import Artifact
from beam_gemma.model.graph_tensors import Head
from beam_gemma.runtime.capacity import Capacity, plan_capacity
from beam_gemma.runtime.cpu_session import Session
from beam_gemma.runtime.limits import EngineConfig
from beam_gemma.runtime.step_interface import Feeds, Finished
from tests.doubles.recurrent_models import WINDOW, tiny_recurrent
from tests.doubles.reference import VOCAB

BAD = VOCAB - 1
"""A token that no row has unless it is to fail."""
NUM_SNAPSHOTS = 4
MANY_BLOCKS = 400


@pytest.fixture(scope="module")
def artifact() -> Artifact:
    return Artifact.open(tiny_recurrent() / "artifact")


@pytest.fixture(scope="module")
def spoiled_graph(artifact: Artifact, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a graph that takes an infinite number for the embedding of BAD, and NaN follows.

    The head keeps its own matrix, so no other row notices.
    """
    folder = tmp_path_factory.mktemp("spoiled") / "artifact"
    shutil.copytree(artifact.path, folder)
    path = folder / artifact.graph_path("generate", "cpu").name
    model = ir.load(path)
    weights = model.graph.initializers["embed_tokens.weight"]
    assert weights.const_value is not None
    table = weights.const_value.numpy().copy()
    table[BAD, 0] = np.inf
    spoiled = ir.val("spoiled", const_value=ir.tensor(table, name="spoiled"))
    model.graph.register_initializer(spoiled)
    lookups = [(n, i) for n, i in weights.uses() if n.op_type == "Gather"]
    assert len(lookups) == 1
    for node, i in lookups:
        node.replace_input_with(i, spoiled)
    ir.save(model, path)
    return str(path)


def prompts(num_rows: int, *, bad: tuple[int, ...] = ()) -> list[tuple[int, ...]]:
    """Return prompts behind an instruction of four windows, half with a common question too."""
    rng = np.random.default_rng(3)
    instruction, question = (rng.integers(3, BAD, n).tolist() for n in (4 * WINDOW, 40))
    rows = []
    for i in range(num_rows):
        own = rng.integers(3, BAD, rng.integers(1, 60)).tolist()
        if i in bad:
            own[len(own) // 2] = BAD
        beginning = [instruction, instruction + question, []][i % 5 // 2]
        rows.append(tuple(beginning + own))
    return rows


def requests(rows: list[tuple[int, ...]]) -> list[Request]:
    """Return requests of uneven length, half of them sampled."""
    return [
        Request(
            request_id=str(i),
            prompt_token_ids=row,
            params=SamplingParams(
                max_tokens=3 + i % 4 * 5,
                temperature=0.9 * (i % 2),
                top_k=9,
                seed=3,
                ignore_eos=True,
            ),
            sampling_key=str(i),
            logprob=True,
        )
        for i, row in enumerate(rows)
    ]


class FailingSession(Session):
    """A session one of whose steps fails after it has run."""

    failing_step = 0
    num_steps = 0

    def start(
        self, feeds: Feeds, *, with_logits: bool = False, with_candidates: bool = True
    ) -> Finished:
        self.num_steps += 1
        done = super().start(feeds, with_logits=with_logits, with_candidates=with_candidates)
        if self.num_steps == self.failing_step:
            raise RuntimeError("the device is gone")
        return done


def open_session(
    artifact: Artifact,
    config: EngineConfig,
    *,
    head: Head = "generate",
    num_blocks: int = MANY_BLOCKS,
    num_threads: int = 2,
    graph_path: str | None = None,
) -> FailingSession:
    signature = artifact.signature(head, "cpu")
    session = FailingSession(
        graph_path or str(artifact.graph_path(head, "cpu")),
        signature,
        Capacity(
            num_blocks={s.group: num_blocks for s in signature.paged_states},
            num_state_slots=config.max_num_seqs + NUM_SNAPSHOTS,
        ),
        num_threads=num_threads,
    )
    for name in (name for state in signature.recurrent_states for name in state.names):
        session._state[name][...] = np.nan  # as if other rows had left it in all slots
    return session


def run(
    session: Session, config: EngineConfig, batch: list[Request]
) -> tuple[list[Completion], EngineStats]:
    with closing(Engine(session, config)) as engine:
        return engine.generate(batch), engine.stats


def alone(artifact: Artifact, batch: list[Request], head: Head = "generate") -> list[Completion]:
    """Complete each request by itself, in one chunk, with nothing shared."""
    config = EngineConfig(max_num_seqs=1, max_num_batched_tokens=400, enable_prefix_caching=False)
    session = open_session(artifact, config, head=head, num_threads=1)
    with closing(Engine(session, config)) as engine:
        completions = [engine.generate([request])[0] for request in batch]
    assert engine.stats.num_cached_tokens == 0
    assert engine.stats.num_prefill_steps == len(batch)
    return completions


@pytest.fixture(scope="module")
def base(artifact: Artifact) -> list[Completion]:
    completions = alone(artifact, requests(prompts(20)))
    assert len({c.logprob for c in completions}) == 20
    assert not any(BAD in c.token_ids for c in completions)
    return completions


@pytest.mark.parametrize(
    ("max_num_seqs", "budget", "num_threads", "num_blocks", "shuffled"),
    [
        (8, 400, 2, MANY_BLOCKS, False),
        (8, 64, 1, MANY_BLOCKS, True),
        (5, 16, 5, MANY_BLOCKS, False),
        (3, 37, 2, MANY_BLOCKS, True),
        # Enough for two or three rows at once.
        (8, 100, 2, 16, False),
        (8, 64, 1, 14, True),
    ],
)
def test_rows_are_the_same_in_any_company(
    artifact: Artifact,
    base: list[Completion],
    *,
    max_num_seqs: int,
    budget: int,
    num_threads: int,
    num_blocks: int,
    shuffled: bool,
) -> None:
    batch = requests(prompts(20))
    order = list(range(20))
    if shuffled:
        random.Random(2).shuffle(order)
    config = EngineConfig(max_num_seqs=max_num_seqs, max_num_batched_tokens=budget)
    session = open_session(artifact, config, num_blocks=num_blocks, num_threads=num_threads)
    completions, stats = run(session, config, [batch[i] for i in order])
    assert completions == [base[i] for i in order]
    assert stats.num_cached_tokens > 0
    assert (stats.num_preemptions > 0) == (num_blocks < MANY_BLOCKS)


def test_rows_that_preempt_one_another_are_the_same(artifact: Artifact) -> None:
    """Eight rows begin with three blocks each, two of them shared, and grow to six, of 18."""
    rng = np.random.default_rng(6)
    common = rng.integers(3, BAD, 34).tolist()
    batch = [
        Request(
            request_id=str(i),
            prompt_token_ids=tuple(common + rng.integers(3, BAD, 1 + i).tolist()),
            params=SamplingParams(max_tokens=50, ignore_eos=True),
            logprob=True,
        )
        for i in range(8)
    ]
    config = EngineConfig(max_num_seqs=8, max_num_batched_tokens=48)
    completions, stats = run(open_session(artifact, config, num_blocks=19), config, batch)
    assert completions == alone(artifact, batch)
    assert stats.num_preemptions > 2
    # Preempted rows start from the snapshot, too.
    assert stats.num_cached_tokens > 7 * 32


def test_a_common_prefix_is_computed_once(artifact: Artifact, base: list[Completion]) -> None:
    """The instruction has five full blocks, with the question eight; rows share all of them."""
    config = EngineConfig(max_num_seqs=20, max_num_batched_tokens=400)
    completions, stats = run(open_session(artifact, config), config, requests(prompts(20)))
    assert completions == base
    num_tokens = sum(map(len, prompts(20)))
    assert stats.num_prompt_tokens == num_tokens - stats.num_cached_tokens
    # One of the rows with the question makes both snapshots; the other 15 start from them.
    assert stats.num_cached_tokens == 8 * 5 * 16 + 7 * 8 * 16


def test_rows_after_rows_that_are_not_finite_are_the_same(
    artifact: Artifact, base: list[Completion], spoiled_graph: str
) -> None:
    """Others run beside bad rows, which share their prefixes, and after them in their slots."""
    bad = (0, 2, 6, 9, 13)
    batch = requests(prompts(20, bad=bad))
    for max_num_seqs in (2, 8):
        config = EngineConfig(max_num_seqs=max_num_seqs, max_num_batched_tokens=100)
        session = open_session(artifact, config, graph_path=spoiled_graph, num_blocks=40)
        completions, stats = run(session, config, batch)
        for i, completion in enumerate(completions):
            if i in bad:
                assert completion.error is not None
                assert "NaN" in completion.error
            else:
                assert completion == base[i]
        assert stats.num_cached_tokens > 0
        assert stats.num_failed == len(bad)


def test_every_row_comes_back_if_steps_fail(artifact: Artifact, base: list[Completion]) -> None:
    """What a failed step has left in slots and blocks reaches nobody, and no snapshot."""
    config = EngineConfig(max_num_seqs=6, max_num_batched_tokens=100)
    for number in range(1, 8, 2):
        session = open_session(artifact, config)
        session.failing_step = number
        completions, stats = run(session, config, requests(prompts(20)))
        assert completions == base
        assert session.num_steps > number
        assert stats.num_preemptions > 0


def labels(row: tuple[int, ...], count: int) -> list[Request]:
    """Return requests that score `count` continuations of three tokens after a prompt."""
    rng = np.random.default_rng(len(row))
    batch = []
    for i in range(count):
        label = rng.integers(3, BAD, 3).tolist()
        targets = tuple((len(row) - 1 + place, token) for place, token in enumerate(label))
        batch.append(
            Request(
                request_id=str(i),
                prompt_token_ids=(*row, *label[:-1]),
                params=SamplingParams(max_tokens=1),
                targets=targets,
            )
        )
    return batch


def test_scores_are_the_same_with_and_without_snapshots(artifact: Artifact) -> None:
    """Five labels share their prompt; three of another one share only the instruction."""
    batch = [r for i, row in enumerate(prompts(6)) for r in labels(row, 3 + 2 * (i % 2))]
    expected = alone(artifact, batch, "score")
    cached = {}
    for enabled in (True, False):
        config = EngineConfig(
            max_num_seqs=4, max_num_batched_tokens=100, enable_prefix_caching=enabled
        )
        session = open_session(artifact, config, head="score")
        completions, stats = run(session, config, batch)
        assert [c.scores for c in completions] == [c.scores for c in expected]
        assert not any(c.error for c in completions)
        cached[enabled] = stats.num_cached_tokens
    assert cached[True] > 0 == cached[False]


def test_a_long_prompt_takes_no_more_memory_than_a_short_one(artifact: Artifact) -> None:
    """Blocks of the window and a chunk, for a prompt of a hundred windows."""
    ids = np.random.default_rng(4).integers(3, BAD, 100 * WINDOW).tolist()
    request = requests([tuple(ids)])
    config = EngineConfig(max_num_seqs=2, max_num_batched_tokens=128)
    # A chunk, the window before it and the alignment of tables.
    needed = (128 + WINDOW + 1 + 64) // 16 + 1
    completions, stats = run(open_session(artifact, config, num_blocks=needed + 1), config, request)
    whole = EngineConfig(max_num_seqs=1, max_num_batched_tokens=2048)
    assert completions == run(open_session(artifact, whole), whole, request)[0]
    # Chunks do not shrink either, as they do where all tokens before are attended to.
    assert stats.num_prefill_steps == -(-len(ids) // 128)


def test_the_longest_sequence_makes_no_large_tables(artifact: Artifact) -> None:
    signature = artifact.signature("generate", "cpu")
    assert signature.max_model_len == 131_072
    (group,) = (state.group for state in signature.paged_states)
    cache = KVCache(signature, num_blocks={group: 9}, max_num_seqs=64, max_num_batched_tokens=1024)
    assert cache.block_table(group).nbytes < 64 * 1024


def test_recurrent_state_is_taken_from_the_memory_of_the_cache(artifact: Artifact) -> None:
    signature = artifact.signature("generate", "cpu")
    (paged,) = signature.paged_states
    sizes = {"max_num_seqs": 4, "max_num_batched_tokens": 64}
    plan = plan_capacity(signature, num_bytes=1 << 20, **sizes)
    assert plan.num_state_slots == 4 + 16
    # Four layers of three tokens' and one token's 128 channels, in 32 bits.
    state = 20 * 4 * 4 * 128 * 4
    # Keys and values of 16 tokens, one head of 24, two layers.
    block = 2 * 2 * 16 * 24 * 4
    assert plan.num_blocks[paged.group] == min(4 * 14 + 1, ((1 << 20) - state) // block)
    tight = plan_capacity(signature, num_bytes=state + 10 * block, **sizes)
    assert tight.num_blocks[paged.group] == 10
