"""The one sentence that a failing command ends with, whatever has failed."""

import re
import sys
import traceback

from beam_gemma.beam_internals import fault_of_worker, sentence_of_worker, without_step
from beam_gemma.cli.held_logs import is_verbose
from beam_gemma.errors import BeamGemmaError

GO_ON = "then go on with --resume"
OF_THE_MACHINE = (
    (
        r"MemoryError|bad_alloc|[Cc]annot allocate memory|[Ff]ailed to allocate|\[Errno 12\]|"
        r"pthread_create failed|can't start new thread",
        f"memory: expected enough for the job, got {{}}; free memory, lower --max_num_seqs or take "
        f"a machine with more, {GO_ON}",
    ),
    (
        r"No space left on device|Disk quota exceeded|File too large",
        f"disk: expected room for what the job writes, got {{}}; make room, {GO_ON}",
    ),
    (
        r"Channel closed|Socket closed|Stream removed|Connection reset|Broken pipe|"
        r"Worker subprocess exited|failed to connect to all addresses",
        f"worker: expected its process to finish, got {{}}, so it has died, for want of memory "
        f"perhaps; free memory, {GO_ON}",
    ),
)
"""Faults of a machine, by what their errors say, and a sentence for each."""
STOPPED_ENGINE = "engine: stopped by "
"""How the sentence begins that names what an engine has met."""


def failure(error: Exception) -> str:
    """Return the sentence for the error that ends a command; with `--verbose`, print its trace.

    An error of this project is its own sentence, also if a worker raised it.
    """
    if isinstance(error, BeamGemmaError):
        sentence: str | None = without_step(str(error))
    else:
        sentence = sentence_of_worker(error)
        if is_verbose():
            traceback.print_exception(error, file=sys.stderr)
    if sentence is not None and not sentence.startswith(STOPPED_ENGINE):
        return sentence
    fault = (sentence or fault_of_worker(error)).removeprefix(STOPPED_ENGINE).rstrip(": ")
    for pattern, words in OF_THE_MACHINE:
        if re.search(pattern, fault):
            return words.format(fault)
    remedy = "" if is_verbose() else "; --verbose shows the traceback"
    return sentence or f"job: expected to finish, got {fault}{remedy}"
