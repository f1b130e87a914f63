"""Rows with pictures on their way to an engine: decoded a few at a time, each file once.

The engine is a double that answers when a test lets it, so that no test waits for anything.
"""

import gc
import io
import json
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from beam_gemma.engine.sampling import SamplingParams
from beam_gemma.errors import EngineError, OptionsError
from beam_gemma.inputs.image_processor import ImageProcessor
from beam_gemma.inputs.prompt_encoder import PromptEncoder
from beam_gemma.monitoring.progress import Meter
from beam_gemma.tasks import engine_model, media_requests
from beam_gemma.tasks.classify import Classifier
from beam_gemma.tasks.encoded_rows import request_of
from beam_gemma.tasks.generate import GenerateSettings, Generator, check_boxes
from beam_gemma.tasks.mask_decoder import TENSORS, MaskDecoder
from beam_gemma.tasks.questions import ClassifySettings, QuestionEncoder, Shot
from beam_gemma.tasks.row_keys import ENCODED, FILES
from tests.doubles.held_engine import HeldEngine, completion
from tests.doubles.published_processors import VISIONS, our_tokenizer

MAX_LENGTH = 400
A_ID = 274
NUM_TOKENS = VISIONS["gemma3"].num_image_tokens


def picture(number, *, width=40, height=30, orientation=None):
    """Return the file of a picture, another one for each number."""
    values = np.random.default_rng(number).integers(0, 256, (height, width, 3), np.uint8)
    file, exif = io.BytesIO(), Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    Image.fromarray(values).save(file, "PNG", exif=exif)
    return file.getvalue()


def damaged(number):
    """Return a file whose header is whole and whose pixels are not."""
    return picture(number)[:-200]


def settings_of(**fields):
    fields = {"prompt": "{text}", "image_columns": ("photo",)} | fields
    return GenerateSettings(sampling=SamplingParams(max_tokens=4), **fields)


def generator_of(engine, name="gemma3", on_result=lambda _: None, **fields):
    settings = settings_of(**fields)
    encoder = PromptEncoder(
        our_tokenizer(name),
        settings,
        chat_template=None,
        max_tokens=MAX_LENGTH,
        vision=VISIONS[name],
    )
    return Generator(engine, encoder, settings, vision=VISIONS[name], on_result=on_result)


def echo(request):
    """Answer with a token that the request's pictures choose."""
    return completion(A_ID + sum(int(p.values.sum()) for p in request.media) % 26)


@pytest.fixture
def decoded(monkeypatch):
    """The files that were decoded, in order."""
    files, pixels = [], ImageProcessor.pixels

    def watched(self, data, name="picture"):
        files.append(data)
        return pixels(self, data, name)

    monkeypatch.setattr(ImageProcessor, "pixels", watched)
    return files


def test_a_request_has_the_pixels_of_its_row():
    engine = HeldEngine(echo)
    rows = [{"text": f"row {i}", "photo": [picture(i), picture(i + 1)]} for i in range(8)]
    results = generator_of(engine)(rows)
    processor = ImageProcessor(VISIONS["gemma3"])
    by_prompt = {request.prompt_token_ids: request for request in engine.requests}
    tokenizer = our_tokenizer("gemma3")
    for row, result in zip(rows, results, strict=True):
        pixels = [processor.pixels(file)[0] for file in row["photo"]]
        assert result["completion"] == chr(ord("a") + sum(int(p.sum()) for p in pixels) % 26)
        (request,) = (
            r for ids, r in by_prompt.items() if tokenizer.decode(ids).endswith(row["text"])
        )
        assert all((a.values == b).all() for a, b in zip(request.media, pixels, strict=True))
        starts = [p.start for p in request.media]
        assert request.spans == tuple((start, start + NUM_TOKENS) for start in starts)
        soft = {i for start in starts for i in range(start, start + NUM_TOKENS)}
        ids = request.prompt_token_ids
        soft_id = VISIONS["gemma3"].image_token_id
        assert soft == {i for i, token_id in enumerate(ids) if token_id == soft_id}
    assert len({p.digest for r in engine.requests for p in r.media}) == 9


def test_pictures_of_the_same_bytes_and_another_shape_differ():
    plain = np.zeros((3, 48, 96), np.uint8)
    one, other = map(media_requests._decoded, (plain, plain.reshape(3, 96, 48)))
    assert one.digest == media_requests._decoded(plain.copy()).digest
    assert one.digest != other.digest
    assert one.digest != media_requests._decoded(plain.view(np.int8)).digest


def test_all_of_a_paligemma_prompt_is_attended_both_ways():
    engine = HeldEngine(echo)
    rows = [{"text": "a", "photo": picture(1)}, {"text": "abc", "photo": None}]
    generator_of(engine, "paligemma", allow_missing_images=True)(rows)
    assert len(engine.requests) == 2
    for request in engine.requests:
        assert request.spans == ((0, len(request.prompt_token_ids)),)


def test_few_rows_are_decoded_at_a_time():
    engine = HeldEngine(echo, is_held=True, max_num_seqs=3)
    rows = [{"text": f"row {i}", "photo": picture(i)} for i in range(40)]
    stream = generator_of(engine).stream(rows)
    indices = []
    with ThreadPoolExecutor(1) as pool, engine:
        consumer = pool.submit(lambda: indices.extend(index for index, _ in stream))
        for _ in range(6):
            assert engine.arrived.acquire(timeout=60)
        assert not engine.arrived.acquire(timeout=0.05)
        for _ in range(34):
            engine.release(1)
            assert engine.arrived.acquire(timeout=60)
        engine.release()
        consumer.result()
    assert sorted(indices) == list(range(40))
    assert engine.most_held == 6


def test_pixels_are_few_and_forgotten(monkeypatch):
    size = 3 * VISIONS["gemma3"].image_size ** 2
    monkeypatch.setattr(engine_model, "MAX_DECODED_BYTES", 4 * size)
    held, most, guard = [], 0, threading.Lock()
    make = media_requests.Decoded

    def watched(digest, values):
        nonlocal most
        with guard:
            held.append(weakref.ref(values))
            most = max(most, sum(ref() is not None for ref in held))
        return make(digest, values)

    monkeypatch.setattr(media_requests, "Decoded", watched)
    engine = HeldEngine(lambda _: completion(A_ID), max_num_seqs=50)
    engine.requests = type("Forgetful", (), {"__iadd__": lambda self, _: self})()
    rows = [{"text": f"row {i}", "photo": [picture(i), picture(i + 100)]} for i in range(30)]
    assert {r["error"] for r in generator_of(engine)(rows)} == {None}
    gc.collect()
    # A thread may hold the pictures of the row that it has just finished.
    assert most <= 4 + 2 * media_requests.MAX_THREADS
    assert len(held) == 60
    assert all(ref() is None for ref in held)


def test_a_row_larger_than_the_window_runs_alone(monkeypatch):
    monkeypatch.setattr(engine_model, "MAX_DECODED_BYTES", 1)
    engine = HeldEngine(echo, is_held=True)
    rows = [{"text": "a", "photo": [picture(i), picture(9 + i)]} for i in range(3)]
    with ThreadPoolExecutor(1) as pool, engine:
        results = pool.submit(generator_of(engine), rows)
        for _ in rows:
            assert engine.arrived.acquire(timeout=60)
            engine.release(1)
        assert {r["error"] for r in results.result()} == {None}
    assert engine.most_held == 1


def test_rows_that_share_a_picture_decode_it_once(decoded):
    engine = HeldEngine(echo, is_held=True, max_num_seqs=50)
    rows = [{"text": f"row {i}", "photo": [picture(0), picture(1 + i % 2)]} for i in range(20)]
    with ThreadPoolExecutor(1) as pool, engine:
        results = pool.submit(generator_of(engine), rows)
        for _ in rows:
            assert engine.arrived.acquire(timeout=60)
        engine.release()
        results.result()
    assert sorted(decoded) == sorted([picture(0), picture(1), picture(2)])
    first, *others = (r.media[0].values for r in engine.requests)
    assert all(other is first for other in others)


def test_rows_of_text_go_first_and_as_one():
    engine = HeldEngine(echo)
    rows = [{"text": f"row {i}", "photo": picture(i) if i % 2 else None} for i in range(10)]
    results = generator_of(engine, allow_missing_images=True)(rows)
    assert engine.batches == [5, 1, 1, 1, 1, 1]
    texts = [our_tokenizer("gemma3").decode(r.prompt_token_ids) for r in engine.requests[:5]]
    assert texts == [f"row {i}" for i in range(0, 10, 2)]
    assert [r["completion"] for r in results[::2]] == ["a"] * 5


def test_what_cannot_be_decoded_is_the_error_of_its_row_alone():
    meter = Meter()
    engine = HeldEngine(echo)
    rows = [{"text": f"row {i}", "photo": picture(i)} for i in range(12)]
    whole = generator_of(engine)(rows)
    rows[3]["photo"] = damaged(3)
    rows[4]["photo"] = [picture(4), damaged(3)]
    rows[5]["photo"] = b"none"
    results = generator_of(engine, on_result=meter.add)(rows)
    assert [i for i, r in enumerate(results) if r["error"]] == [3, 4, 5]
    assert results[3]["error"].startswith("column 'photo': expected a picture that can be decoded")
    assert results[4]["error"].startswith("column 'photo', picture 2: expected")
    assert all(results[i] == whole[i] for i in (0, 1, 2, 6, 7, 11))
    assert (meter.read().rows, meter.read().failed) == (12, 3)


def test_a_row_is_worth_the_same_alone_and_after_its_request_was_carried():
    engine = HeldEngine(echo)
    generate = generator_of(engine)
    rows = [
        {"text": f"row {i % 3}", "photo": [picture(i % 4), picture(0), damaged(7)][: 1 + i % 3]}
        for i in range(9)
    ]
    together = generate(rows)
    assert [generate([row])[0] for row in rows] == together
    carried = [
        {
            ENCODED: request_of(row, lambda row: generate._encoder(row).identity),
            FILES: row["photo"],
        }
        for row in rows
    ]
    assert generate(carried) == together
    del carried[1][FILES]
    assert "expected the files of 2" in generate(carried)[1]["error"]


def test_what_waits_is_given_up_when_the_model_is_drained(decoded):
    engine = HeldEngine(echo, is_held=True, max_num_seqs=2)
    generate = generator_of(engine)
    rows = [{"text": f"row {i}", "photo": picture(i)} for i in range(200)]
    stream = generate.stream(rows)
    with ThreadPoolExecutor(1) as pool, engine:
        results = pool.submit(lambda: list(stream))
        for _ in range(4):
            assert engine.arrived.acquire(timeout=60)
        generate.drain()
        come = results.result(timeout=60)
    assert len(come) == 2
    assert all(result["completion"] for _, result in come)
    assert len(decoded) < 4 + 2 * media_requests.MAX_THREADS
    with pytest.raises(EngineError, match="closed"):
        generate(rows)


def test_an_engine_that_stops_is_nobodys_row_error():
    engine = HeldEngine(echo, is_held=True, max_num_seqs=2)
    rows = [{"text": f"row {i}", "photo": picture(i)} for i in range(50)]
    with ThreadPoolExecutor(1) as pool, engine:
        results = pool.submit(generator_of(engine), rows)
        assert engine.arrived.acquire(timeout=60)
        engine.fail("engine: stopped by a fault")
        with pytest.raises(EngineError, match="stopped by a fault"):
            results.result(timeout=60)


def test_a_stream_that_is_left_starts_no_more():
    engine = HeldEngine(echo, is_held=True, max_num_seqs=1)
    rows = [{"text": f"row {i}", "photo": picture(i)} for i in range(50)]
    stream = generator_of(engine).stream(rows)
    with ThreadPoolExecutor(1) as pool, engine:
        first = pool.submit(next, stream)
        assert engine.arrived.acquire(timeout=60)
        engine.release(1)
        first.result(timeout=60)
        stream.close()
    while engine.arrived.acquire(timeout=0.1):
        assert len(engine.requests) <= 4


def test_crops_are_pictures_of_their_own():
    engine = HeldEngine(echo)
    row = {"text": "a", "photo": [picture(1), picture(2, width=900, height=300)]}
    assert generator_of(engine, pan_and_scan=True)([row])[0]["error"] is None
    processor = ImageProcessor(VISIONS["gemma3"], pan_and_scan=True)
    wanted = [pixels for file in row["photo"] for pixels in processor.pixels(file)]
    shown = engine.requests[0].media
    assert len(wanted) == 1 + 4
    assert all((a.values == b).all() for a, b in zip(shown, wanted, strict=True))
    assert len({p.digest for p in shown}) == 5


def test_large_pictures_are_decoded_one_at_a_time(monkeypatch):
    monkeypatch.setattr(media_requests, "LARGE_PIXELS", 1000)
    running, most, guard = 0, 0, threading.Lock()
    pixels = ImageProcessor.pixels

    def watched(self, data, name="picture"):
        nonlocal running, most
        with guard:
            running += 1
            most = max(most, running)
        try:
            return pixels(self, data, name)
        finally:
            with guard:
                running -= 1

    monkeypatch.setattr(ImageProcessor, "pixels", watched)
    rows = [{"text": "a", "photo": picture(i, width=300, height=300)} for i in range(16)]
    generator_of(HeldEngine(echo, max_num_seqs=50))(rows)
    assert most == 1


def test_a_model_without_pictures_refuses_them():
    with pytest.raises(OptionsError, match="column 'photo': expected no pictures"):
        PromptEncoder(our_tokenizer("gemma3"), settings_of(), chat_template=None, max_tokens=9)


def question_encoder(settings, name="gemma3"):
    return QuestionEncoder(
        our_tokenizer(name),
        settings,
        chat_template=None,
        max_model_len=MAX_LENGTH,
        vision=VISIONS[name],
    )


@pytest.mark.parametrize("name", ["gemma3", "paligemma"])
def test_labels_are_scored_beside_pictures(name, decoded):
    settings = ClassifySettings(
        prompt="{text} is ", image_columns=("photo",), labels=("a cat", "a dog", "nothing")
    )
    encoder = question_encoder(settings, name)
    engine = HeldEngine(lambda r: completion(scores=tuple(-float(i) for _, i in r.targets)))
    classify = Classifier(engine, [encoder], settings, vision=VISIONS[name], on_result=print)
    (result,) = classify([{"text": "it", "photo": picture(1)}])
    assert result["error"] is None
    assert len(engine.requests) == 3
    assert len(decoded) == 1
    question = encoder({"text": "it", "photo": picture(1)})
    for request in engine.requests:
        (shown,) = request.media
        assert shown.start == question.prompt.places[0].start
        num_prompt = len(question.prompt.token_ids)
        assert request.prompt_token_ids[:num_prompt] == question.prompt.token_ids
        span = (0, num_prompt) if name == "paligemma" else (shown.start, shown.start + NUM_TOKENS)
        assert request.spans == (span,)
        assert len(request.prompt_token_ids) > num_prompt


def test_a_label_that_joins_the_prompt_is_in_no_span():
    settings = ClassifySettings(
        prompt="{text}", image_columns=("photo",), labels=("\n\na", "\nb"), prompt_format="raw"
    )
    encoder = question_encoder(settings, "paligemma")
    engine = HeldEngine(lambda r: completion(scores=(0.0,) * len(r.targets)))
    classify = Classifier(engine, [encoder], settings, vision=VISIONS["paligemma"], on_result=print)
    row = {"text": "it", "photo": picture(1)}
    assert classify([row])[0]["error"] is None
    num_prompt = len(encoder(row).prompt.token_ids)
    # The line feed at the end of the prompt is part of the label's first token.
    assert {request.spans for request in engine.requests} == {((0, num_prompt - 1),)}


def test_shots_show_their_pictures(decoded):
    shots = tuple(
        Shot(row={"text": f"shot {i}", "photo": picture(50 + i)}, label=i) for i in (0, 1)
    )
    settings = ClassifySettings(
        prompt="{text}: ", image_columns=("photo",), labels=("no", "yes"), shots=shots
    )
    encoder = question_encoder(settings)
    engine = HeldEngine(lambda r: completion(scores=(0.0,) * len(r.targets)))
    classify = Classifier(engine, [encoder], settings, vision=VISIONS["gemma3"], on_result=print)
    rows = [{"text": f"row {i}", "photo": picture(i)} for i in range(4)]
    results = classify(rows)
    assert {r["error"] for r in results} == {None}
    assert {len(request.media) for request in engine.requests} == {3}
    assert set(decoded) == {picture(i) for i in (50, 51, 0, 1, 2, 3)}
    carried = [
        {
            ENCODED: request_of(row, lambda row: [encoder(row).identity]),
            FILES: [row["photo"]],
        }
        for row in rows
    ]
    assert json.loads(carried[0][ENCODED])
    assert classify(carried) == results


def loc(text):
    """Return the tokens of a completion of PaliGemma."""
    tokenizer = our_tokenizer("paligemma")
    return tokenizer.encode(tokenizer.split(text), add_bos=False)


CAT = "<loc0256><loc0000><loc0512><loc1023>"
MASK = "".join(f"<seg{i:03}>" for i in range(16))


def test_boxes_are_in_pixels_of_the_picture_as_it_is_seen(tmp_path):
    text = f"{CAT}{MASK} cat ; {CAT} ; <loc0001> ; {CAT} hat"
    engine = HeldEngine(lambda _: completion(*loc(text)))
    rng = np.random.default_rng(0)
    weights = {name: rng.normal(size=shape) for name, shape in TENSORS.items()}
    np.savez(tmp_path / "decoder.npz", **weights)
    masks = {"mask_decoder": str(tmp_path / "decoder.npz")}
    for fields in ({}, masks):
        settings = settings_of(boxes=True, **fields)
        generate = generator_of(engine, "paligemma", boxes=True, **fields)
        # An orientation of 6 turns a picture, so that its height is the width of the file.
        row = {"text": "segment cat", "photo": picture(1, width=80, height=40, orientation=6)}
        (result,) = generate([row])
        assert result["completion"] == text
        assert list(result) == settings.result_schema.names
        assert result["num_unreadable_boxes"] == 1
        assert [box["label"] for box in result["boxes"]] == ["cat", "", "hat"]
        box = result["boxes"][0]
        assert (box["y_min"], box["x_min"], box["y_max"]) == (20.0, 0.0, 40.0)
        assert box["x_max"] == pytest.approx(40 * 1023 / 1024, abs=1e-12)
        assert box["segment"] == list(range(16))
        if fields:
            assert box["mask"] == MaskDecoder(weights).png(range(16))
            assert result["boxes"][2]["mask"] is None


def test_boxes_take_one_picture():
    engine = HeldEngine(lambda _: completion(*loc(f"{CAT} cat")))
    generate = generator_of(engine, "paligemma", boxes=True, allow_missing_images=True)
    photos = [picture(1), [picture(1), picture(2)], None, picture(3)]
    results = generate([{"text": "detect cat", "photo": photo} for photo in photos])
    errors = [r["error"] for r in results]
    assert errors[0] is errors[3] is None
    assert errors[1].startswith("boxes: expected one picture in the row")
    assert errors[2].endswith("got 0")


def test_boxes_are_refused_where_there_are_none():
    with pytest.raises(OptionsError, match="boxes: expected a model such as PaliGemma"):
        check_boxes(settings_of(boxes=True), our_tokenizer("gemma3"))
    check_boxes(settings_of(boxes=True), our_tokenizer("paligemma"))
    with pytest.raises(OptionsError, match="mask_decoder: expected boxes"):
        settings_of(mask_decoder="x.npz")
    with pytest.raises(OptionsError, match=r"mask decoder missing\.npz: expected"):
        generator_of(HeldEngine(echo), "paligemma", boxes=True, mask_decoder="missing.npz")
