"""Rows with pictures on their way to the engine.

Pictures are decoded in threads of their own, just before the engine gets their rows. A window
bounds the rows that are decoded and not finished, and the memory of their pixels, so that a call
with thousands of rows holds the pixels of a few. Pictures that several rows of the window share are
decoded once.

Dimensions: I height and J width of a picture in pixels.
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
from jaxtyping import UInt8

from beam_gemma.engine.sequence import Completion, Picture, Request
from beam_gemma.errors import RecordError
from beam_gemma.inputs.image_processor import ImageProcessor, read_header
from beam_gemma.inputs.images import ImageSettings, picture_name
from beam_gemma.inputs.row import ImageFile, Prompt
from beam_gemma.model.vision_config import VisionConfig

MAX_THREADS = 8
LARGE_PIXELS = 16_000_000
"""Pixels of a file beyond which it is decoded alone: each takes up to 16 bytes meanwhile."""


@dataclass(frozen=True, slots=True)
class Pixels:
    """A picture, or a crop of one, in the model's size."""

    digest: bytes
    values: UInt8[np.ndarray, "3 I J"]


@dataclass(frozen=True, slots=True)
class View:
    """A picture that a row's prompts show."""

    file: ImageFile
    index: int | None
    """Index of the picture among those of the prompt; None if it is the only one."""
    num_crops: int
    """Number of crops that are shown beside the whole picture."""


@dataclass(eq=False, slots=True, kw_only=True)
class Work:
    """A row that makes requests, from its encoding to its completions."""

    index: int
    """Index of the row among those of the call."""
    asked: Sequence[tuple[Prompt, Request]]
    """The requests, each with its prompt; none of them has its pictures yet."""
    pixels: Mapping[str, tuple[Pixels, ...]] = field(default_factory=dict)
    """The decoded pictures by the digests of their files, until the row is finished."""
    futures: list[Future[Completion]] = field(default_factory=list)
    num_left: int = field(init=False)
    """Number of requests that are not finished."""
    fault: Exception | None = None
    """What kept the row from the engine: a `RecordError` if the row is at fault."""

    def __post_init__(self) -> None:
        self.num_left = len(self.asked)

    @property
    def has_pictures(self) -> bool:
        """True if any of the prompts shows a picture."""
        return any(prompt.places for prompt, _ in self.asked)

    def views(self) -> dict[str, View]:
        """Return the pictures that the prompts show, by the digests of their files."""
        views: dict[str, View] = {}
        for prompt, _ in self.asked:
            for place in prompt.places:
                file = prompt.images[place.image]
                index = place.image if len(prompt.images) > 1 else None
                known = views.get(file.digest, View(file, index, 0))
                views[file.digest] = replace(known, num_crops=max(known.num_crops, place.crop))
        return views


W = TypeVar("W", bound=Work)
"""A row of a task on its way."""


def spans_of(vision: VisionConfig, prompt: Prompt, request: Request) -> tuple[tuple[int, int], ...]:
    """Return the ranges of a request's tokens with attention in both directions.

    The tokens of a label, after the prompt of the request, are in none. A decoder whose source an
    encoder reads has none.
    """
    if request.source_token_ids or vision.bidirectional == "none":
        return ()
    if vision.bidirectional != "prefix":
        return tuple((p.start, p.start + p.num_tokens) for p in prompt.places)
    shared = takewhile(bool, map(eq, prompt.token_ids, request.prompt_token_ids))
    return ((0, sum(shared)),)


class PictureDecoder:
    """Decodes the pictures of rows in threads; many windows can share one decoder."""

    def __init__(self, vision: VisionConfig, settings: ImageSettings) -> None:
        """Initialize the decoder; its threads start with the first picture.

        Args:
            vision: The model's picture half.
            settings: The settings of the task.
        """
        self.vision = vision
        self.num_bytes = 3 * vision.max_pixels
        """Largest size of a picture's pixels."""
        self._columns = settings.image_columns
        self._processor = ImageProcessor(
            vision, settings.pan_and_scan, image_tokens=settings.image_tokens
        )
        self._large = threading.Lock()
        self.pool = ThreadPoolExecutor(
            min(MAX_THREADS, os.cpu_count() or 1), thread_name_prefix="beam-gemma-pictures"
        )

    def decode(self, view: View) -> tuple[Pixels, ...]:
        """Return the pixels of a picture and of its crops.

        Raises:
            RecordError: the file cannot be decoded.
        """
        header = read_header(view.file.data)
        is_large = header.width * header.height > LARGE_PIXELS
        with self._large if is_large else nullcontext():
            values = self._processor.pixels(view.file.data)
        return tuple(Pixels(hashlib.blake2b(v.data, digest_size=32).digest(), v) for v in values)

    def error(self, view: View, error: RecordError) -> RecordError:
        """Return the error of `decode`, for the row of a view: it names the row's column."""
        name = picture_name(self._columns, view.index)
        return RecordError(f"{name}: {str(error).removeprefix('picture: ')}")

    def completed(
        self, prompt: Prompt, request: Request, pixels: Mapping[str, tuple[Pixels, ...]]
    ) -> Request:
        """Return a request with the pictures of its prompt, and with its spans.

        Args:
            prompt: The prompt.
            request: The request of its tokens.
            pixels: The decoded pictures by the digests of their files.
        """
        if not prompt.places and self.vision.bidirectional != "prefix":
            return request
        pictures = []
        for place in prompt.places:
            shown = pixels[prompt.images[place.image].digest][place.crop]
            picture = Picture(place.start, shown.digest, shown.values, place.num_tokens)
            pictures.append(picture)
        spans = spans_of(self.vision, prompt, request)
        return replace(request, pictures=tuple(pictures), spans=spans)


@dataclass(eq=False, slots=True)
class _Shared:
    """A picture that rows of the window need: how many, and its pixels once they are decoded."""

    num_bytes: int
    num_rows: int = 0
    is_taken: bool = False
    """True if a thread decodes the picture, or has done so."""
    pixels: Future[tuple[Pixels, ...]] = field(default_factory=Future)


class PictureWindow(Generic[W]):
    """Decodes rows and hands them to the engine, a bounded number at a time."""

    def __init__(
        self,
        works: Iterable[W],
        decoder: PictureDecoder,
        *,
        send: Callable[[W, Callable[[W], None]], None],
        on_end: Callable[[W], None],
        max_rows: int,
        max_bytes: int,
    ) -> None:
        """Start the first rows.

        Args:
            works: The rows, in the order in which they are started.
            decoder: The decoder of their pictures.
            send: Hands a row to the engine, which calls the function beside it once all requests
                of the row are finished. What it raises is the fault of the row, and of all later
                rows unless it is a `RecordError`.
            on_end: Called with each row that is finished or has a fault, from any thread.
            max_rows: Most rows that are started and not finished.
            max_bytes: Most bytes of their pixels; a row with more runs alone.
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

    def close(self) -> None:
        """Start no further rows."""
        with self._lock:
            self._waiting.clear()

    def _start_more(self) -> None:
        while (started := self._next()) is not None:
            self._decoder.pool.submit(self._begin, *started)

    def _next(self) -> tuple[W, dict[str, View]] | None:
        """Return the next row with its pictures, or None if the window is full or all have come."""
        with self._lock:
            if not self._waiting:
                return None
            views = self._waiting[0].views()
            new = {
                digest: _Shared((1 + view.num_crops) * self._decoder.num_bytes)
                for digest, view in views.items()
                if digest not in self._shared
            }
            num_bytes = sum(shared.num_bytes for shared in new.values())
            is_full = self._num_rows >= self._max_rows
            if self._num_rows and (is_full or self._num_bytes + num_bytes > self._max_bytes):
                return None
            self._shared |= new
            for digest in views:
                self._shared[digest].num_rows += 1
            self._num_rows += 1
            self._num_bytes += num_bytes
            return self._waiting.popleft(), views

    def _begin(self, work: W, views: Mapping[str, View]) -> None:
        """Decode a row's pictures and send its requests."""

        def end(finished: W) -> None:
            self._end(finished, views)

        if self._stopped is not None:
            work.fault = self._stopped
            end(work)
            return
        try:
            work.pixels = {digest: self._pixels(view) for digest, view in views.items()}
            self._send(work, end)
        except Exception as error:  # whoever waits for the row must learn of any error
            if not isinstance(error, RecordError):
                self._stopped = error
            work.fault = error
            end(work)

    def _pixels(self, view: View) -> tuple[Pixels, ...]:
        with self._lock:
            shared = self._shared[view.file.digest]
            is_mine, shared.is_taken = not shared.is_taken, True
        if is_mine:
            try:
                shared.pixels.set_result(self._decoder.decode(view))
            except Exception as error:  # of all rows with this picture
                shared.pixels.set_exception(error)
        try:
            return shared.pixels.result()
        except RecordError as error:
            raise self._decoder.error(view, error) from error

    def _end(self, work: W, views: Iterable[str]) -> None:
        work.pixels = {}
        with self._lock:
            self._num_rows -= 1
            for digest in views:
                shared = self._shared[digest]
                shared.num_rows -= 1
                if not shared.num_rows:
                    self._num_bytes -= shared.num_bytes
                    del self._shared[digest]
        self._on_end(work)
        self._start_more()
