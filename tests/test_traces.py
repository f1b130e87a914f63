"""What tests share in place of tracing a graph again is what tracing it would give."""

from dataclasses import replace
from functools import partial

import pytest

from beam_gemma.model.config import GemmaConfig
from export.graph.tasks import graph_module, graph_signature
from export.graph.to_onnx import trace
from tests.doubles.reference import tiny_model
from tests.doubles.traces import kept_trace, with_weights_as_inputs


@pytest.fixture(scope="module")
def build():
    config = GemmaConfig.from_hf(tiny_model("gemma").config.to_dict())
    config = replace(config, num_hidden_layers=1, layer_types=config.layer_types[:1])
    signature = graph_signature("generate", config, None, "cpu", "float32")
    return partial(graph_module, config, None, signature), signature


def test_a_kept_graph_is_the_traced_one_in_each_bit(build):
    once, again = kept_trace(*build), kept_trace(*build)
    assert once is not again
    expected = with_weights_as_inputs(trace(*build)).SerializeToString(deterministic=True)
    for graph in (once, again):
        assert with_weights_as_inputs(graph).SerializeToString(deterministic=True) == expected
        assert list(graph.graph.initializers) == list(once.graph.initializers)


def test_settings_tell_kept_graphs_apart(build):
    whole, signature = build
    config, *others = whole.args
    scaled = replace(config, query_pre_attn_scalar=2 * config.query_pre_attn_scalar)
    graphs = [kept_trace(partial(graph_module, c, *others), signature) for c in (config, scaled)]
    first, second = (with_weights_as_inputs(graph).SerializeToString() for graph in graphs)
    assert first != second
