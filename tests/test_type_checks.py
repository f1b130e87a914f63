"""The run-time type checks of a test run: what they refuse, with and without named dimensions."""

import numpy as np
import pytest
from beartype.roar import BeartypeCallHintViolation
from jaxtyping import TypeCheckError

from beam_gemma.engine.sampling import SamplingParams, sample
from beam_gemma.model.tokenizer import Tokenizer
from beam_gemma.runtime.capacity import Capacity
from beam_gemma.runtime.step_interface import StepOutput


def test_an_argument_of_another_type_is_refused() -> None:
    with pytest.raises(BeartypeCallHintViolation, match="model"):
        Tokenizer("not bytes")  # type: ignore[arg-type]


def test_a_field_of_another_type_is_refused() -> None:
    with pytest.raises(BeartypeCallHintViolation, match="num_blocks"):
        Capacity(num_blocks=3, num_state_slots=0)  # type: ignore[arg-type]


def test_arrays_whose_named_dimensions_differ_are_refused() -> None:
    logits, ids = np.zeros(4, np.float32), np.arange(5)
    with pytest.raises(TypeCheckError, match="ids"):
        sample(SamplingParams(max_tokens=1), logits, ids, key="", position=0)


def test_fields_whose_named_dimensions_differ_are_refused() -> None:
    logits, probability = np.zeros((2, 4), np.float32), np.zeros(2, np.float32)
    with pytest.raises(TypeCheckError, match="topk_ids"):
        StepOutput(logits, np.zeros((3, 4), np.int64), probability)
