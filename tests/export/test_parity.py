"""The ladder from the reference to the exported graph: our module, then ONNX Runtime.

Every way to run a sequence (alone, packed, in chunks, token by token) must give the reference's
distribution at every position.
"""

import numpy as np
import pytest
import torch

from beam_gemma.model.graph_tensors import Device
from beam_gemma.runtime.capacity import Capacity
from beam_gemma.runtime.cpu_session import Session
from export.checkpoints.tensors import is_norm
from export.graph.signatures import decoder_signature
from export.graph.tasks import graph_module
from export.graph.weights import inverse_frequencies
from tests.conftest import SEQUENCE_LENGTHS, TinyModel
from tests.doubles.ragged import Feeder, Feeds, run_module, run_schedule, schedules

SCHEDULES = schedules(SEQUENCE_LENGTHS)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    return torch.from_numpy(logits).double().log_softmax(-1).numpy()


def decoder(tiny: TinyModel, device: Device, dtype: torch.dtype) -> torch.nn.Module:
    """Return our module with the checkpoint's weights."""
    config = tiny.checkpoint.config
    signature = decoder_signature(config, device=device, dtype="float32")
    module = graph_module(config, None, signature)
    state = {}
    for name, stored in tiny.checkpoint.tensors.items():
        values = np.concatenate(list(stored.chunks())).astype(np.float64)
        offset = tiny.checkpoint.norm_offset if is_norm(name) else 0
        state[name] = torch.from_numpy(values + offset)
    for group in config.groups:
        state[f"rotary.{group}.inv_freq"] = torch.from_numpy(inverse_frequencies(config, group))
    module = module.to(dtype)
    module.load_state_dict(state, strict=True)
    return module.to(dtype).eval()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_module_in_float64_equals_the_reference(
    tiny: TinyModel, device: Device, schedule: str
) -> None:
    """Both cache layouts; float64 leaves no room for a wrong formula."""
    module = decoder(tiny, device, torch.float64)
    steps = SCHEDULES[schedule]
    signature = decoder_signature(tiny.checkpoint.config, device=device, dtype="float32")
    ours = run_module(module, signature, steps, tiny.sequences, np.float64)
    for got, expected in zip(ours, tiny.exact_logits, strict=True):
        # float64.
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_graph_is_as_exact_as_the_reference(tiny: TinyModel, schedule: str) -> None:
    signature = tiny.artifact.signature("generate", "cpu")
    feeder = Feeder(signature, len(tiny.sequences), max(SEQUENCE_LENGTHS))
    session = Session(
        str(tiny.artifact.graph_path("generate", "cpu")),
        signature,
        Capacity(
            num_blocks={s.group: feeder.num_blocks for s in signature.paged_states},
            num_state_slots=0,
        ),
        num_threads=2,
    )

    def run(feeds: Feeds) -> np.ndarray:
        logits = session.run(feeds, with_logits=True).logits
        assert logits is not None
        return logits

    ours = run_schedule(SCHEDULES[schedule], tiny.sequences, feeder, run)
    our_error = max(_errors(ours, tiny.exact_logits))
    their_error = max(_errors(tiny.logits, tiny.exact_logits))
    assert our_error <= 2 * their_error, f"{our_error:.2e} against {their_error:.2e}, float32"
    for got, expected in zip(ours, tiny.logits, strict=True):
        # float32 on both sides.
        np.testing.assert_allclose(log_softmax(got), log_softmax(expected), rtol=0, atol=1e-4)


def _errors(found: list[np.ndarray], exact: list[np.ndarray]) -> list[float]:
    return [float(np.abs(a - b).max()) for a, b in zip(found, exact, strict=True)]
