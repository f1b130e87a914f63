"""What was said of steps and memory, and what the device decides."""

from dataclasses import replace

import pytest

from beam_gemma.errors import OptionsError
from beam_gemma.inference.handlers import GemmaGenerateModelHandler
from beam_gemma.model.vision_config import VisionConfig
from beam_gemma.runtime.limits import Limits


def test_defaults_are_those_of_the_device():
    for device, seqs, tokens, embed in (("cpu", 64, 1024, 1024), ("cuda", 256, 2048, 8192)):
        config = Limits().engine_config(device)
        assert (config.max_num_seqs, config.max_num_batched_tokens) == (seqs, tokens)
        assert Limits().embed_tokens(device) == embed
    said = Limits(max_num_seqs=7, max_num_batched_tokens=90)
    assert said.engine_config("cuda").max_num_seqs == 7
    assert said.embed_tokens("cpu") == said.embed_tokens("cuda") == 90
    assert said.capture_sizes == (7,)
    assert Limits().capture_sizes == (256,)
    assert Limits().memory_utilization == 0.9


@pytest.mark.parametrize(
    ("bidirectional", "num_image_tokens", "cpu", "cuda"),
    [
        ("picture", 256, 1024, 2048),
        ("prefix", 256, 1280, 2048),
        ("prefix", 1024, 2048, 2048),
        ("prefix", 4096, 5120, 5120),
    ],
)
def test_a_step_has_room_for_a_two_sided_prompt(bidirectional, num_image_tokens, cpu, cuda):
    vision = replace(VISION, bidirectional=bidirectional, num_image_tokens=num_image_tokens)
    for device, expected in (("cpu", cpu), ("cuda", cuda)):
        config = Limits().for_pictures(vision, device).engine_config(device)
        assert config.max_num_batched_tokens == expected
        said = Limits(max_num_batched_tokens=300)
        assert said.for_pictures(vision, device) == said
        assert Limits().for_pictures(None, device) == Limits()


VISION = VisionConfig(
    hidden_size=36,
    intermediate_size=52,
    num_hidden_layers=2,
    num_attention_heads=2,
    image_size=28,
    patch_size=7,
    layer_norm_eps=1e-3,
    projector="linear",
    num_image_tokens=16,
    bidirectional="prefix",
    first_position=1,
    image_token_id=9,
    begin_token=None,
    end_token=None,
    resample="bicubic",
    image_mean=(0.5,) * 3,
    image_std=(0.5,) * 3,
)
WRONG = {
    "capture sizes on the CPU": ("cpu", {"cudagraph_capture_sizes": (64,)}, "expected none on the"),
    "memory on the CPU": ("cpu", {"gpu_memory_utilization": 0.5}, "expected none on the CPU"),
    "sizes that fall": ("cuda", {"cudagraph_capture_sizes": (64, 16)}, "expected rising numbers"),
    "no sizes": ("cuda", {"cudagraph_capture_sizes": ()}, "expected rising numbers"),
    "sizes below the rows": (
        "cuda",
        {"cudagraph_capture_sizes": (64,)},
        "max_num_seqs as the last",
    ),
    "more memory than there is": ("cuda", {"gpu_memory_utilization": 1.5}, "expected above 0"),
    "no rows": ("cuda", {"max_num_seqs": 0}, "max_num_seqs: expected at least 1"),
}


@pytest.mark.parametrize(("device", "said", "words"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_is_refused(device, said, words):
    with pytest.raises(OptionsError, match=words):
        Limits(**said).check(device)
    with pytest.raises(OptionsError, match=words):
        GemmaGenerateModelHandler("model", device=device, limits=Limits(**said))


def test_what_is_for_gpus_waits_for_the_machine_where_the_device_does():
    handler = GemmaGenerateModelHandler("model", limits=Limits(gpu_memory_utilization=0.5))
    assert "gpu_memory_utilization=0.5" in repr(handler)
