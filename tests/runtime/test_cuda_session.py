"""The session for GPUs, on plain memory: graphs for CUDA whose attention is the CPU's."""

from contextlib import closing
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import onnxruntime
import pytest
import torch

from beam_gemma.engine.embedding_engine import feeds
from beam_gemma.engine.engine import Engine
from beam_gemma.engine.sampling import SamplingParams
from beam_gemma.engine.sequence import Request
from beam_gemma.errors import DeviceError, OptionsError
from beam_gemma.model.artifact import Artifact
from beam_gemma.model.signature import Signature
from beam_gemma.runtime.capacity import Capacity, block_bytes
from beam_gemma.runtime.cpu_session import Session
from beam_gemma.runtime.cuda_session import CudaSession
from beam_gemma.runtime.device_memory import HostMemory
from beam_gemma.runtime.limits import EngineConfig
from beam_gemma.runtime.step_shapes import StepSizes
from tests.doubles.cuda_models import TWO_SIDED, cuda_model, exported
from tests.doubles.cuda_on_cpu import cuda_file_on_cpu
from tests.doubles.late_memory import MEMORY, LateMark, LateMemory
from tests.doubles.ragged import Feeder
from tests.doubles.reference import VOCAB

SLOTS = 4
TOKENS = 160
DECODE = np.array([1, 256, 0], np.int32)
RNG = np.random.default_rng(3)
PROMPTS = [RNG.integers(3, VOCAB, n).tolist() for n in (9, 70, 40)]


class Model(NamedTuple):
    cpu: Artifact
    signatures: dict[str, Signature]
    paths: dict[str, str]

    def session(self, head="generate", *, memory=None, **changes):
        options = {
            "sizes": StepSizes(decode=(SLOTS,), prefill=(TOKENS,)),
            "max_num_seqs": SLOTS,
            "memory_utilization": 0.9,
        }
        memory = memory or LateMemory()
        path, signature = self.paths[head], self.signatures[head]
        return CudaSession(path, signature, memory, **(options | changes))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    # Weights that bfloat16 holds, so that both graphs have the same.
    folder, name = tmp_path_factory.mktemp("cuda"), "gemma3_text"
    cpu = exported(name, "cpu", "fp32", ("generate",))
    cuda = exported(name, "cuda", "bf16", ("generate", "classify"))
    heads = ("generate", "score")
    return Model(
        cpu,
        {h: replace(cuda.signature(h, "cuda"), dtype="float32") for h in heads},
        {h: str(cuda_file_on_cpu(cuda.graph_path(h, "cuda"), folder / f"{h}.onnx")) for h in heads},
    )


class Plain:
    """The same graph without padding, places or bindings."""

    def __init__(self, model, feeder, head="generate"):
        self.session = onnxruntime.InferenceSession(model.paths[head])
        self.tensors = model.signatures[head].state_tensors()
        self.state = feeder.state()

    def run(self, feeds):
        names = [output.name for output in self.session.get_outputs()]
        values = self.session.run(names, {**feeds, **self.state})
        outputs = dict(zip(names, values, strict=True))
        self.state = {t.input_name: outputs.pop(t.output_name) for t in self.tensors}
        return outputs


def assert_same(output, wanted, rows=None):
    np.testing.assert_array_equal(output.chosen_ids, wanted["chosen_ids"])
    for name in ("chosen_logits", "top_logits", "top_probability", "topk_logits"):
        # float32, with other shapes of matrix products.
        np.testing.assert_allclose(getattr(output, name), wanted[name], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(output.topk_ids, wanted["topk_ids"])
    for row in range(len(output.chosen_ids)) if rows is None else rows:
        np.testing.assert_allclose(output.logits[row], wanted["logits"][row], rtol=1e-4, atol=1e-5)


def feeder_of(model, head="generate"):
    return Feeder(model.signatures[head], len(PROMPTS), 200)


def sampled(feeds):
    """Draw each row by parameters of its own."""
    count = len(feeds["logit_rows"])
    values = np.random.default_rng(count).random(count)
    return feeds | {
        "temperatures": np.array([(0, 0.7, 1.3)[i % 3] for i in range(count)], np.float32),
        "uniforms": values.astype(np.float32),
        "top_ks": np.array([(5, 20, 64)[i % 3] for i in range(count)], np.int32),
        "top_ps": np.array([(1, 0.8, 0.95)[i % 3] for i in range(count)], np.float32),
    }


def test_padded_steps_give_what_steps_without_padding_do(model):
    session, feeder = model.session(), feeder_of(model)
    plain = Plain(model, feeder)
    prompts = sampled(feeder.feeds(list(enumerate(PROMPTS)), all_rows=False))
    wanted = plain.run(prompts)
    assert_same(session.start(prompts, with_logits=True).result(), wanted)
    chosen = wanted["chosen_ids"].tolist()
    for order in ([0, 1, 2], [2, 0], [1], [1, 2, 0]):
        feeds = feeder.feeds([(i, [chosen[i]]) for i in order], all_rows=False)
        feeds = sampled(feeds) | {"attention_metadata": DECODE}
        wanted = plain.run(feeds)
        assert_same(session.start(feeds, with_logits=True).result(), wanted)
        for i, token_id in zip(order, wanted["chosen_ids"].tolist(), strict=True):
            chosen[i] = token_id
    stats = session.stats()
    assert (stats.steps, stats.replays) == (5, 4)
    assert stats.graphs == 1
    assert stats.busy_secs > 0
    assert 0 < stats.used_mib <= stats.total_mib == MEMORY >> 20


def test_only_what_is_asked_for_is_fetched(model):
    session, feeder = model.session(), feeder_of(model)
    feeds = feeder.feeds(list(enumerate(PROMPTS)), all_rows=False)
    feeds["probability_rows"] = np.array([2], np.int64)
    every = session.run(feeds)
    few = session.start(feeds, with_candidates=False).result()
    assert few.topk_ids is few.topk_logits is few.logits is every.logits is None
    assert every.topk_ids.shape == (3, 64)
    np.testing.assert_array_equal(few.chosen_ids, every.chosen_ids)
    assert few.top_probability.shape == (1,)
    assert set(few.chosen_ids.tolist()) <= set(range(VOCAB))


def test_a_step_follows_another_before_anybody_has_seen_what_that_chose(model):
    """Twice: each step's inputs and outputs have pinned memory that the next leaves alone."""
    session, feeder = model.session(), feeder_of(model)
    slots = np.array([3, 0, 2], np.int32)
    feeds = feeder.feeds(list(enumerate(PROMPTS)), all_rows=False)
    pending = [session.start(feeds | {"logit_slots": slots})]
    for _ in range(4):
        feeds = feeder.feeds([(i, [0]) for i in range(3)], all_rows=False)
        feeds |= {"attention_metadata": DECODE, "token_slots": slots, "logit_slots": slots}
        pending.append(session.start(feeds, with_candidates=False))
    ahead = [step.result().chosen_ids.tolist() for step in pending]
    session, feeder = model.session(), feeder_of(model)
    output = session.run(feeder.feeds(list(enumerate(PROMPTS)), all_rows=False))
    for chosen in ahead:
        assert output.chosen_ids.tolist() == chosen
        feeds = feeder.feeds(list(enumerate([i] for i in chosen)), all_rows=False)
        output = session.run(feeds | {"attention_metadata": DECODE})


def test_scores_are_those_without_padding(model):
    session, feeder = model.session("score"), feeder_of(model, "score")
    feeds = feeder.feeds(list(enumerate(PROMPTS)), all_rows=False)
    feeds |= {
        "target_rows": np.array([0, 0, 2], np.int64),
        "target_ids": np.array([5, 9, 7], np.int64),
        "probability_rows": np.array([0, 2], np.int64),
    }
    plain = Plain(model, feeder, "score")
    wanted, output = plain.run(feeds), session.run(feeds)
    for name in ("target_logits", "top_logits", "top_probability"):
        # float32, with other shapes of matrix products.
        np.testing.assert_allclose(getattr(output, name), wanted[name], rtol=1e-4, atol=1e-5)


def test_an_engine_completes_as_on_the_cpu(model):
    params = [
        SamplingParams(max_tokens=12, ignore_eos=True),
        SamplingParams(max_tokens=7, temperature=0.8, top_k=20, seed=3),
        SamplingParams(max_tokens=9, temperature=1.0, top_k=0, top_p=0.9),
    ]
    lengths = (9, 170, 40, 3, 66, 1, 12)
    requests = [
        Request(
            request_id=str(i),
            prompt_token_ids=tuple(RNG.integers(3, VOCAB, n).tolist()),
            params=params[i % 3],
            sampling_key=str(i),
            logprob=i % 2 == 0,
        )
        for i, n in enumerate(lengths)
    ]
    signature = model.cpu.signature("generate", "cpu")
    capacity = Capacity(
        num_blocks={s.group: 400 for s in signature.paged_states}, num_state_slots=SLOTS
    )
    path = str(model.cpu.graph_path("generate", "cpu"))
    completions = []
    for session in (Session(path, signature, capacity, num_threads=1), model.session()):
        config = EngineConfig(max_num_seqs=SLOTS, max_num_batched_tokens=TOKENS)
        with closing(Engine(session, config)) as engine:
            completions.append(engine.generate(requests))
    for one, other in zip(*completions, strict=True):
        assert replace(one, logprob=None) == replace(other, logprob=None)
        if one.logprob is not None:
            # The graph for CUDA has constants of bfloat16 where the CPU's has float32.
            assert other.logprob == pytest.approx(one.logprob, abs=2e-2)


def test_zeroed_blocks_are_zero_in_all_layers_and_no_others_are(model):
    session, feeder = model.session(), feeder_of(model)
    session.run(feeder.feeds(list(enumerate(PROMPTS)), all_rows=False))
    kept, *zeroed = sorted(feeder.tables[:, 0].tolist())
    assert zeroed == [7, 10]
    for state in model.signatures["generate"].paged_states:
        caches = [p for p in session._state if p.tensor.input_name.startswith(("key", "value"))]
        caches = [p for p in caches if int(p.tensor.input_name.split(".")[1]) in state.layers]
        before = [read(session, placed) for placed in caches]
        session.zero_blocks(state.group, [*reversed(zeroed), 9, 8])
        for placed, old in zip(caches, before, strict=True):
            now = read(session, placed)
            assert all(old[block].any() for block in (kept, *zeroed))
            assert not now[7:11].any()
            np.testing.assert_array_equal(now[:7], old[:7])
            np.testing.assert_array_equal(now[11:], old[11:])


def read(session, placed):
    array = np.empty(placed.shape, np.float32)
    HostMemory.copy_out(session._memory, array, placed.address)
    return array


def test_caches_take_what_the_largest_step_leaves(model):
    """But for less than a block of each group."""
    signature = model.signatures["generate"]
    block = max(block_bytes(signature, state) for state in signature.paged_states)
    for total, share in ((5 << 20, 0.9), (6 << 20, 0.9), (8 << 20, 0.9), (8 << 20, 0.7)):
        session = model.session(memory=LateMemory(total), memory_utilization=share)
        kept = session._memory.room().free - (1 - share) * total
        # Inputs, outputs, logits, caches of two groups, and next_ids; nothing of the trial is left.
        assert len(session._memory._held) == 6
        assert 0 <= kept < block, (total, share)


def test_no_room_for_caches_is_an_error_before_any_row(model):
    with pytest.raises(OptionsError, match="expected memory for at least 2 blocks"):
        model.session(memory=LateMemory(2 << 20), memory_utilization=0.01)


def test_a_size_without_room_is_given_up(model, caplog, monkeypatch):
    """The executor halves what failed; no step of the size is tried again."""
    block = model.signatures["generate"].block_size
    session = model.session(sizes=StepSizes(decode=(SLOTS,), prefill=(3 * block,)))
    feeds = feeder_of(model).feeds([(1, PROMPTS[1][:block])], all_rows=False)
    tried, run = [], session._graph.run

    def fails(_, graph_id):
        tried.append(graph_id)
        raise RuntimeError("Failed to allocate memory for requested buffer of size 42")

    monkeypatch.setattr(session._graph, "run", fails)
    for _ in range(3):
        with pytest.raises(RuntimeError, match="Failed to allocate"):
            session.start(feeds)
    sizes = [size for size in (3 * block // 2, block) if f"at most {size}\n" in caplog.text]
    assert sizes == [3 * block // 2, block], "no prompt is cut finer than a block"
    monkeypatch.setattr(session._graph, "run", run)
    assert session.run(feeds).chosen_ids.shape == (1,)
    feeds["input_ids"] = np.zeros(block + 1, np.int64)
    with pytest.raises(DeviceError, match=f"expected at most {block} tokens, got {block + 1}"):
        session.start(feeds)
    assert len(tried) == 3


def test_what_fails_on_the_device_is_raised_by_the_step_that_is_waited_for(model, monkeypatch):
    session, feeder = model.session(), feeder_of(model)
    pending = session.start(feeder.feeds([(0, PROMPTS[0])], all_rows=False))

    def fails(_):
        raise DeviceError("CUDA: cudaErrorIllegalAddress")

    monkeypatch.setattr(LateMark, "wait", fails)
    for _ in range(2):
        with pytest.raises(DeviceError, match="IllegalAddress"):
            pending.result()


def test_texts_are_embedded_as_on_the_cpu(two_sided):
    _, artifact = two_sided
    signature = artifact.signature("embed", "cpu")
    path = str(artifact.graph_path("embed", "cpu"))
    session = CudaSession(
        path,
        signature,
        LateMemory(),
        sizes=StepSizes(decode=(), prefill=(128, 256)),
        max_num_seqs=1,
        memory_utilization=0.9,
    )
    plain = Session(path, signature, Capacity(num_blocks={}, num_state_slots=1), num_threads=1)
    for lengths in ([7, 30, 1], [128], [200], [3] * 12):
        ids = RNG.integers(3, signature.vocab_size, sum(lengths))
        feeds = {"input_ids": ids, "cu_seqlens": np.cumsum([0, *lengths]).astype(np.int32)}
        one, other = session.embed(feeds), plain.embed(feeds)
        # float32, with other shapes of matrix products.
        np.testing.assert_allclose(one.embedding, other.embedding, rtol=1e-4, atol=1e-5)
        assert one.embedding.shape == other.embedding.shape


def test_the_graph_for_cuda_embeds_as_its_reference(tmp_path):
    model = cuda_model(TWO_SIDED, tmp_path)
    graph, signature = model.graph("embed", "bfloat16")
    path = tmp_path / "graph.onnx"
    path.write_bytes(model.on_cpu(graph))
    session = CudaSession(
        str(path),
        replace(signature, dtype="float32"),
        LateMemory(),
        sizes=StepSizes(decode=(), prefill=(128, 256)),
        max_num_seqs=1,
        memory_utilization=0.9,
    )
    for lengths in ([7, 30, 1], [128], [200], [3] * 12):
        texts = [RNG.integers(3, signature.vocab_size, n).tolist() for n in lengths]
        output = session.embed(feeds(texts))
        first = model.reference(torch.tensor([texts[-1]])).last_hidden_state[0, 0]
        # float32 on both sides.
        np.testing.assert_allclose(output.first_state[-1], first.detach(), rtol=0, atol=2e-5)
        np.testing.assert_allclose(np.linalg.norm(output.embedding, axis=1), 1, atol=1e-6)
        assert len(output.embedding) == len(texts)
