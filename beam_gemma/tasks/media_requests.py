"""Rows with pictures and sounds on their way to the engine.

Their files are decoded in threads of their own, just before the engine gets their rows. A window
bounds the rows that are decoded and not finished, and the memory of what is decoded, so that a call
with thousands of rows holds the pixels of a few. Files that several rows of the window share are
decoded once.
"""

import hashlib
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from itertools import takewhile
from operator import eq
from typing import Generic, TypeVar

import numpy as np
from jaxtyping import Shaped

from beam_gemma.engine.sequence import Completion, Medium, Picture, Request, Sound
from beam_gemma.errors import RecordError
from beam_gemma.inputs.image_processor import ImageProcessor, read_header
from beam_gemma.inputs.media_prompt import MediaSettings
from beam_gemma.inputs.media_values import place_name
from beam_gemma.inputs.row import MediaFile, MediaKind, Prompt
from beam_gemma.inputs.sound_processor import SoundProcessor
from beam_gemma.model.sound_config import SoundConfig
from beam_gemma.model.vision_config import VisionConfig

MAX_THREADS = 8
LARGE_PIXELS = 16_000_000
"""Pixels of a file beyond which it is decoded alone: each takes up to 16 bytes meanwhile."""


MEDIA: dict[MediaKind, type[Medium]] = {"image": Picture, "audio": Sound}
"""What the engine calls a file's kind."""
NAMES: dict[MediaKind, str] = {"image": "picture", "audio": "sound"}
"""What errors call it."""


@dataclass(frozen=True, slots=True)
class Decoded:
    """A picture, a crop of one, or a clip of a sound, as the model takes it."""

    digest: bytes
    values: Shaped[np.ndarray, "..."]


@dataclass(frozen=True, slots=True)
class Shown:
    """A picture or a sound that a row's prompts show."""

    file: MediaFile
    index: int | None
    """Index of the file among those of its kind in the prompt; None if it is the only one."""
    num_views: int
    """Number of its views: the whole picture and its crops, or the clips of a sound."""


@dataclass(eq=False, slots=True, kw_only=True)
class Work:
    """A row that makes requests, from its encoding to its completions."""

    index: int
    """Index of the row among those of the call."""
    asked: Sequence[tuple[Prompt, Request]]
    """The requests, each with its prompt; none of them has its media yet."""
    decoded: Mapping[str, tuple[Decoded, ...]] = field(default_factory=dict)
    """The decoded files by their digests, until the row is finished."""
    futures: list[Future[Completion]] = field(default_factory=list)
    num_left: int = field(init=False)
    """Number of requests that are not finished."""
    fault: Exception | None = None
    """What kept the row from the engine: a `RecordError` if the row is at fault."""

    def __post_init__(self) -> None:
        self.num_left = len(self.asked)

    @property
    def has_media(self) -> bool:
        """True if any of the prompts shows a picture or a sound."""
        return any(prompt.places for prompt, _ in self.asked)

    def shown(self) -> dict[str, Shown]:
        """Return what the prompts show, by the digests of the files."""
        shown: dict[str, Shown] = {}
        for prompt, _ in self.asked:
            for place in prompt.places:
                file = prompt.files[place.file]
                known = shown.get(file.digest, Shown(file, _index(prompt, place.file), 1))
                shown[file.digest] = replace(known, num_views=max(known.num_views, place.view + 1))
        return shown


def _decoded(values: Shaped[np.ndarray, "..."]) -> Decoded:
    """Return values with a digest that tells them from others, also of another type or shape."""
    form = f"{values.dtype} {values.shape}".encode()
    return Decoded(hashlib.blake2b(values.data, digest_size=32, key=form).digest(), values)


def _index(prompt: Prompt, number: int) -> int | None:
    """Return the index of a prompt's file among those of its kind; None if it is the only one."""
    kinds = [file.kind for file in prompt.files]
    kind = kinds[number]
    return kinds[:number].count(kind) if kinds.count(kind) > 1 else None


W = TypeVar("W", bound=Work)
"""A row of a task on its way."""


def spans_of(
    vision: VisionConfig | None, prompt: Prompt, request: Request
) -> tuple[tuple[int, int], ...]:
    """Return the ranges of a request's tokens with attention in both directions.

    The tokens of a label, after the prompt of the request, are in none. A decoder whose source an
    encoder reads has none.
    """
    if request.source_token_ids or vision is None or vision.bidirectional == "none":
        return ()
    if vision.bidirectional != "prefix":
        places = (p for p in prompt.places if prompt.files[p.file].kind == "image")
        return tuple((p.start, p.start + p.num_tokens) for p in places)
    shared = takewhile(bool, map(eq, prompt.token_ids, request.prompt_token_ids))
    return ((0, sum(shared)),)


class MediaDecoder:
    """Decodes the pictures and sounds of rows in threads; many windows can share one decoder."""

    def __init__(
        self, vision: VisionConfig | None, sound: SoundConfig | None, settings: MediaSettings
    ) -> None:
        """Initialize the decoder; its threads start with the first file.

        Args:
            vision: The model's picture half; None if it has none.
            sound: The model's sound half; None if it has none.
            settings: The settings of the task.
        """
        self.num_bytes: dict[MediaKind, int] = {}
        """Largest size of a view, once it is decoded, by its kind."""
        self._vision = vision
        self._columns: dict[MediaKind, tuple[str, ...]] = {
            "image": settings.image_columns,
            "audio": settings.audio_columns,
        }
        if vision is not None:
            self.num_bytes["image"] = 3 * vision.max_pixels
            self._images = ImageProcessor(
                vision, settings.pan_and_scan, image_tokens=settings.image_tokens
            )
        if sound is not None:
            num_frames = sound.num_frames_of(sound.max_samples)
            self.num_bytes["audio"] = 4 * num_frames * sound.num_features
            self._sounds = SoundProcessor(sound, split=settings.split_audio)
        self._large = threading.Lock()
        self.pool = ThreadPoolExecutor(
            min(MAX_THREADS, os.cpu_count() or 1), thread_name_prefix="beam-gemma-media"
        )

    def decode(self, file: MediaFile) -> tuple[Decoded, ...]:
        """Return the views of a file.

        Raises:
            RecordError: the file cannot be decoded.
        """
        if file.kind not in self.num_bytes:
            raise RecordError(
                f"{NAMES[file.kind]}: expected none, since the model takes none, got one"
            )
        if file.kind == "audio":
            return tuple(map(_decoded, self._sounds.frames(file.data)))
        header = read_header(file.data)
        is_large = header.width * header.height > LARGE_PIXELS
        with self._large if is_large else nullcontext():
            return tuple(map(_decoded, self._images.pixels(file.data)))

    def error(self, shown: Shown, error: RecordError) -> RecordError:
        """Return the error of `decode`, for the row that shows the file: it names the column."""
        columns, name = self._columns[shown.file.kind], NAMES[shown.file.kind]
        place = place_name(columns, name, shown.index)
        return RecordError(f"{place}: {str(error).removeprefix(f'{name}: ')}")

    def completed(
        self, prompt: Prompt, request: Request, decoded: Mapping[str, tuple[Decoded, ...]]
    ) -> Request:
        """Return a request with the pictures and sounds of its prompt, and with its spans.

        Args:
            prompt: The prompt.
            request: The request of its tokens.
            decoded: The decoded files by their digests.
        """
        is_prefix = self._vision is not None and self._vision.bidirectional == "prefix"
        if not prompt.places and not is_prefix:
            return request
        media = []
        for place in prompt.places:
            file = prompt.files[place.file]
            view = decoded[file.digest][place.view]
            kind = MEDIA[file.kind]
            media.append(kind(place.start, view.digest, view.values, place.num_tokens))
        return replace(request, media=tuple(media), spans=spans_of(self._vision, prompt, request))


@dataclass(eq=False, slots=True)
class _Shared:
    """A file that rows of the window need: how many, and its views once it is decoded."""

    num_bytes: int
    num_rows: int = 0
    is_taken: bool = False
    """True if a thread decodes the file, or has done so."""
    views: Future[tuple[Decoded, ...]] = field(default_factory=Future)


class MediaWindow(Generic[W]):
    """Decodes rows and hands them to the engine, a bounded number at a time."""

    def __init__(
        self,
        works: Iterable[W],
        decoder: MediaDecoder,
        *,
        send: Callable[[W, Callable[[W], None]], None],
        on_end: Callable[[W], None],
        max_rows: int,
        max_bytes: int,
    ) -> None:
        """Start the first rows.

        Args:
            works: The rows, in the order in which they are started.
            decoder: The decoder of their files.
            send: Hands a row to the engine, which calls the function beside it once all requests
                of the row are finished. What it raises is the fault of the row, and of all later
                rows unless it is a `RecordError`.
            on_end: Called with each row that is finished or has a fault, from any thread.
            max_rows: Most rows that are started and not finished.
            max_bytes: Most bytes of what is decoded; a row with more runs alone.
        """
        self._decoder = decoder
        self._send = send
        self._on_end = on_end
        self._max_rows = max_rows
        self._max_bytes = max_bytes
        self._waiting = deque(works)
        self._shared: dict[str, _Shared] = {}
        self._num_rows = self._num_bytes = 0
        self._lock = threading.Lock()  # guards the four above
        self._stopped: Exception | None = None
        """What keeps any further row from the engine."""
        self._start_more()

    @property
    def num_rows(self) -> int:
        """Number of rows that are started and not finished."""
        with self._lock:
            return self._num_rows

    def close(self) -> None:
        """Start no further rows."""
        with self._lock:
            self._waiting.clear()

    def _start_more(self) -> None:
        while (started := self._next()) is not None:
            self._decoder.pool.submit(self._begin, *started)

    def _next(self) -> tuple[W, dict[str, Shown]] | None:
        """Return the next row with its files, or None if the window is full or all have come."""
        with self._lock:
            if not self._waiting:
                return None
            shown = self._waiting[0].shown()
            sizes = self._decoder.num_bytes
            new = {
                digest: _Shared(each.num_views * sizes.get(each.file.kind, 0))
                for digest, each in shown.items()
                if digest not in self._shared
            }
            num_bytes = sum(shared.num_bytes for shared in new.values())
            is_full = self._num_rows >= self._max_rows
            if self._num_rows and (is_full or self._num_bytes + num_bytes > self._max_bytes):
                return None
            self._shared |= new
            for digest in shown:
                self._shared[digest].num_rows += 1
            self._num_rows += 1
            self._num_bytes += num_bytes
            return self._waiting.popleft(), shown

    def _begin(self, work: W, shown: Mapping[str, Shown]) -> None:
        """Decode a row's files and send its requests."""

        def end(finished: W) -> None:
            self._end(finished, shown)

        if self._stopped is not None:
            work.fault = self._stopped
            end(work)
            return
        try:
            work.decoded = {digest: self._views(each) for digest, each in shown.items()}
            self._send(work, end)
        except Exception as error:  # whoever waits for the row must learn of any error
            if not isinstance(error, RecordError):
                self._stopped = error
            work.fault = error
            end(work)

    def _views(self, shown: Shown) -> tuple[Decoded, ...]:
        with self._lock:
            shared = self._shared[shown.file.digest]
            is_mine, shared.is_taken = not shared.is_taken, True
        if is_mine:
            try:
                shared.views.set_result(self._decoder.decode(shown.file))
            except Exception as error:  # of all rows with this file
                shared.views.set_exception(error)
        try:
            return shared.views.result()
        except RecordError as error:
            raise self._decoder.error(shown, error) from error

    def _end(self, work: W, shown: Iterable[str]) -> None:
        work.decoded = {}
        with self._lock:
            self._num_rows -= 1
            for digest in shown:
                shared = self._shared[digest]
                shared.num_rows -= 1
                if not shared.num_rows:
                    self._num_bytes -= shared.num_bytes
                    del self._shared[digest]
        self._on_end(work)
        self._start_more()
