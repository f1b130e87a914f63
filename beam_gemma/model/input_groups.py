"""Inputs and outputs that graphs have together; `signature` says what each one is."""

from beam_gemma.model.graph_tensors import tensors_of

ROW_INPUTS = (
    *tensors_of(("B", "L"), token_rows="int64"),
    *tensors_of(("T",), token_places="int64"),
)
TEXT_INPUTS = (*tensors_of(("T",), position_ids="int64"), *ROW_INPUTS)
SHARED_CACHE_INPUTS = (
    *tensors_of(("R",), row_sequences="int64"),
    *tensors_of(("R1",), row_cu_seqlens="int32"),
    *tensors_of(("R",), row_past_seqlens="int32"),
)
SOURCE_INPUTS = (
    *tensors_of(("TC",), token_rows="int64", source_rows="int64"),
    *tensors_of(("T",), token_places="int64"),
    *tensors_of(("T2",), token_cu_seqlens="int32"),
)
SPAN_INPUTS = (
    *tensors_of(("X",), span_rows="int64"),
    *tensors_of(("T",), span_places="int64"),
    *tensors_of(("Z1",), span_cu_seqlens="int32"),
    *tensors_of(("Z",), span_past_seqlens="int32"),
)
CHOICE_INPUTS = (
    *tensors_of(("T",), token_slots="int32"),
    *tensors_of(("R",), logit_slots="int32", temperatures="float32", uniforms="float32"),
    *tensors_of(("R",), top_ks="int32", top_ps="float32"),
    *tensors_of(("F",), full_rows="int64"),
)
CHOICE_OUTPUTS = tensors_of(
    ("R",), chosen_ids="int64", chosen_logits="float32", top_logits="float32"
)
