"""Graphs for CUDA: checked, then run on the CPU.

`tests.doubles.cuda_on_cpu` says what is changed for that; all else is the graph that a GPU runs.
To trace a graph takes seconds, so a dtype is left out where other graphs have all of its nodes.
"""

import copy
import functools
from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from beam_gemma.model.signature import Signature
from export.modules.token_choice import choose, most_likely
from tests.doubles import sampling_cases
from tests.doubles.cuda_kernels import unplaced
from tests.doubles.cuda_models import (
    DTYPES,
    TWO_SIDED,
    Model,
    Stepper,
    assert_embeddings,
    assert_logits,
    assert_scores,
    checked,
    cuda_model,
)
from tests.doubles.cuda_on_cpu import KEPT, RETYPED, cuda_on_cpu
from tests.doubles.ragged import Feeder, Feeds
from tests.doubles.reference import logits_of

LENGTHS = [70, 33, 5]
"""Two beyond the window of 24, one with its edge inside a chunk."""
DECODERS = [
    ("gemma", "bfloat16"),
    ("gemma", "float16"),
    ("gemma_mha", "bfloat16"),
    ("vaultgemma", "float16"),
    ("gemma2", "bfloat16"),
    ("gemma2", "float16"),
    ("gemma3_text", "bfloat16"),
]
"""Graphs that generate. `gemma_mha` and `vaultgemma` have the nodes of `gemma`; Gemma 3 in float16
is that of `test_quantized_graphs.py`, but for the products."""
SCORERS = [("gemma", "bfloat16"), ("gemma2", "float16"), ("gemma3_text", "bfloat16")]
"""Graphs that score: with capped logits and plain ones. Their layers are those that generate."""
EMBEDDERS = [(TWO_SIDED, "bfloat16"), ("gemma2", "float16"), ("gemma3_text", "float16")]
"""Graphs that embed: two-sided with a mean and dense layers, causal with a softcap and a mean,
causal with the last token."""
Load = Callable[[str, str, str], tuple[Model, Signature, onnxruntime.InferenceSession]]
"""A model's graph for a task and a dtype, checked and then changed for the CPU."""


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    folder = tmp_path_factory.mktemp("cuda")

    @functools.cache
    def loaded(
        name: str, task: str, dtype: str
    ) -> tuple[Model, Signature, onnxruntime.InferenceSession]:
        model = cuda_model(name, folder)
        graph, signature = model.graph(task, dtype)
        assert unplaced(checked(graph)) == [], "nodes without a kernel for CUDA"
        return model, signature, model.session(graph)

    return loaded


def sequences(model: Model, lengths: list[int]) -> list[list[int]]:
    rng = np.random.default_rng(7)
    return [rng.integers(3, model.config.vocab_size, n).tolist() for n in lengths]


@pytest.mark.parametrize(("name", "dtype"), DECODERS)
def test_a_decoder_gives_the_reference_s_logits(load: Load, name: str, dtype: str) -> None:
    model, signature, session = load(name, "generate", dtype)
    assert_logits(session, signature, model.reference, sequences(model, LENGTHS))


@pytest.mark.parametrize(("name", "dtype"), DECODERS)
def test_a_decoder_feeds_itself(load: Load, name: str, dtype: str) -> None:
    """Each step takes what the one before it chose, in a step as wide as always."""
    model, signature, session = load(name, "generate", dtype)
    prompts = sequences(model, LENGTHS)
    feeder = Feeder(signature, len(prompts), max(LENGTHS) + 8)
    stepper = Stepper(session, signature, feeder.state())
    slots = np.array([2, 0, 1], np.int32)
    feeds = feeder.feeds(list(enumerate(prompts)), all_rows=False)
    outputs = stepper.run(feeds | {"logit_slots": slots})
    chosen = [outputs["chosen_ids"]]
    for _ in range(5):
        feeds = feeder.feeds([(i, [0]) for i in range(3)], all_rows=False)
        feeds |= {"logit_slots": slots, "token_slots": slots}
        outputs = stepper.run(padded(feeds, signature))
        chosen.append(outputs["chosen_ids"][:3])
        np.testing.assert_array_equal(stepper.state["next_ids"][slots], chosen[-1])
        np.testing.assert_array_equal(outputs["chosen_logits"], outputs["top_logits"])
    for row, prompt in enumerate(prompts):
        ids = prompt + [int(step[row]) for step in chosen]
        logits = logits_of(model.reference, ids)[len(prompt) - 1 : -1]
        taken = np.take_along_axis(logits, np.array(ids[len(prompt) :])[:, None], 1)[:, 0]
        # float32: equal to the last digits is equal.
        np.testing.assert_allclose(taken, logits.max(axis=1), rtol=0, atol=2e-5)


def padded(feeds: Feeds, signature: Signature) -> Feeds:
    """Pad a decode step by two rows: sequences of one token that is written nowhere."""
    padding = feeds["past_seqlens"].size - 1
    feeds = dict(feeds)
    for name in ("input_ids", "past_seqlens", "position_ids"):
        feeds[name] = np.pad(feeds[name], (0, 2))
    feeds["cu_seqlens"] = np.append(feeds["cu_seqlens"], feeds["cu_seqlens"][-1] + [1, 2])
    feeds["cu_seqlens"] = feeds["cu_seqlens"].astype(np.int32)
    feeds["token_slots"] = np.pad(feeds["token_slots"], (0, 2), constant_values=-1)
    feeds["logit_slots"] = np.pad(feeds["logit_slots"], (0, 2), constant_values=padding + 1)
    for name in ("logit_rows", "temperatures", "uniforms", "top_ks", "top_ps"):
        feeds[name] = np.pad(feeds[name], (0, 2))
    for state in signature.paged_states:
        table, slots = f"block_table.{state.group}", f"slot_mapping.{state.group}"
        feeds[table] = np.pad(feeds[table], ((0, 2), (0, 0)))
        feeds[slots] = np.pad(feeds[slots], (0, 2), constant_values=-1)
    return feeds


@pytest.mark.parametrize(("name", "dtype"), [("gemma3_text", "bfloat16"), ("gemma2", "float16")])
def test_a_row_that_is_not_finite_says_so_and_spoils_no_other(
    load: Load, name: str, dtype: str
) -> None:
    model, signature, session = load(name, "generate", dtype)
    prompts = sequences(model, LENGTHS)
    feeder = Feeder(signature, 3, max(LENGTHS) + 1)
    stepper = Stepper(session, signature, feeder.state())
    clean = stepper.run(feeder.feeds(list(enumerate(prompts)), all_rows=False))
    assert np.isfinite(clean["top_logits"]).all()
    stepper.state["value_cache.1"][feeder.tables[1, 0]] = np.nan
    outputs = stepper.run(feeder.feeds([(i, [9]) for i in range(3)], all_rows=False))
    assert np.isnan(outputs["top_logits"]).tolist() == [False, True, False]
    assert np.isnan(outputs["chosen_logits"]).tolist() == [False, True, False]
    # No kernel has sorted NaN: to the head that row was zeros.
    assert outputs["topk_ids"][1].tolist() == list(range(signature.candidates))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("gemma2", "bfloat16"), ("gemma2", "float16"), ("gemma3_text", "bfloat16")],
)
def test_a_graph_draws_as_the_host_does(load: Load, name: str, dtype: str) -> None:
    """With two levels of candidates and with one, capped logits and plain ones."""
    model, signature, session = load(name, "generate", dtype)
    [prompt] = sequences(model, [60])
    feeder = Feeder(signature, 1, 60)
    stepper = Stepper(session, signature, feeder.state())
    feeds = feeder.feeds([(0, prompt)])
    cases = sampling_cases.draws(60, seed=1)
    outputs = stepper.run(feeds | sampling_cases.arrays(cases))
    logits = outputs["logits"]
    order = np.lexsort((np.broadcast_to(np.arange(logits.shape[1]), logits.shape), -logits))
    np.testing.assert_array_equal(outputs["topk_ids"], order[:, : signature.candidates])
    expected = [sampling_cases.chosen(case, row) for case, row in zip(cases, logits, strict=True)]
    assert outputs["chosen_ids"].tolist() == expected


@pytest.mark.parametrize("vocab", [300, 8192])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_equal_logits_go_by_the_lowest_id(vocab: int, dtype: torch.dtype) -> None:
    """In 16 bits, few of the highest logits are alone."""
    generator = torch.Generator().manual_seed(5)
    logits = (8 * torch.randn(40, vocab, generator=generator)).to(dtype)
    logits[0] = 0.0
    logits[1] = -logits[1].abs()
    values, ids = most_likely(logits, torch.Tensor.float, 64)
    cases = sampling_cases.draws(40, seed=2)
    arrays = {k: torch.from_numpy(v) for k, v in sampling_cases.arrays(cases).items()}
    places = choose(values, arrays)
    wide = logits.float().numpy()
    for i, case in enumerate(cases):
        expected = np.lexsort((np.arange(vocab), -wide[i]))[:64]
        # All logits of the first row are equal: which columns are looked at says nothing.
        assert i == 0 or ids[i].tolist() == expected.tolist()
        assert ids[i, places[i]] == sampling_cases.chosen(case, wide[i]) or i == 0


@pytest.mark.parametrize("uniform", [0.0, 0.5, 0.75])
def test_a_share_is_reached_by_equals_and_passed_by_more(uniform: float) -> None:
    """Four equal logits: half of the mass is two of them, and a draw of a half is the second."""
    case = sampling_cases.Draw(temperature=1.0, top_k=4, top_p=0.5, uniform=uniform)
    arrays = {k: torch.from_numpy(v) for k, v in sampling_cases.arrays([case]).items()}
    place = choose(torch.zeros(1, 4), arrays)
    assert place.item() == sampling_cases.chosen(case, np.zeros(4, np.float32)) == (uniform > 0)


@pytest.mark.parametrize(("name", "dtype"), SCORERS)
def test_scores_are_the_reference_s(load: Load, name: str, dtype: str) -> None:
    model, signature, session = load(name, "classify", dtype)
    assert_scores(session, signature, model.reference, sequences(model, LENGTHS))


@pytest.mark.parametrize(("name", "dtype"), EMBEDDERS)
def test_embeddings_are_the_reference_s(load: Load, name: str, dtype: str) -> None:
    """Two-sided and causal, with windows shorter than the texts, a softcap, dense layers."""
    model, signature, session = load(name, "embed", dtype)
    assert model.embedding is not None
    assert_embeddings(
        session,
        signature,
        model.reference,
        sequences(model, [*LENGTHS, 1]),
        pooling=model.embedding.pooling,
        dense=[model.weights[f"dense.{i}.weight"] for i in range(len(model.embedding.dense_sizes))],
    )


@pytest.mark.parametrize(
    ("name", "other", "dtype"),
    [("gemma", "gemma_mha", "bfloat16"), ("gemma", "vaultgemma", "float16")],
)
def test_heads_and_scale_change_attributes_and_no_node(
    load: Load, name: str, other: str, dtype: str
) -> None:
    """What is proven of `gemma` in one dtype is so of models that differ in nothing else."""
    graphs = [load(n, "generate", dtype)[0].graph("generate", dtype)[0] for n in (name, other)]
    ours, theirs = map(structure, graphs)
    assert ours == theirs


def structure(graph: ir.Model) -> list[tuple[object, ...]]:
    """Return each node's op and inputs: a node by its number, a constant by its type, or a name."""
    numbers = {node: number for number, node in enumerate(graph.graph)}

    def source(value: ir.Value | None) -> object:
        if value is None or value.const_value is not None:
            return value and value.dtype
        return numbers.get(value.producer(), value.name)

    return [(node.domain, node.op_type, *map(source, node.inputs)) for node in graph.graph]


@pytest.mark.parametrize("dtype", DTYPES)
def test_only_what_is_listed_is_changed(load: Load, dtype: str) -> None:
    model = load("gemma2", "generate", dtype)[0]
    graph, _ = model.graph("generate", dtype)
    before = copy.deepcopy(ir.to_proto(graph)).graph
    after = ir.to_proto(cuda_on_cpu(graph)).graph
    assert [i.name for i in before.input] == [i.name for i in after.input]
    changed = {old: new.value for old, new in ((k.value, v) for k, v in RETYPED.items())}
    for old, new in zip(before.node, after.node, strict=True):
        assert list(old.output) == list(new.output)
        if old.op_type == "RaggedAttention":
            assert list(old.input)[: len(new.input)] == list(new.input)
            continue
        for attribute in old.attribute:
            if attribute.name == "to":
                attribute.i = changed.get(attribute.i, attribute.i)
        assert old.SerializeToString() == new.SerializeToString()
        assert old.op_type in KEPT[old.domain]


def test_what_is_not_listed_is_refused(load: Load) -> None:
    model = load("gemma", "generate", "bfloat16")[0]
    graph, _ = model.graph("generate", "bfloat16")
    next(node for node in graph.graph if node.op_type == "Gelu").op_type = "Erf"
    with pytest.raises(AssertionError, match="unlisted:  Erf"):
        cuda_on_cpu(graph)
