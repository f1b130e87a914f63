"""Make room for a job's outputs: what is there, what lies too near, and whose lease it is."""

import argparse
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from apache_beam.io.filesystem import FileSystem

from beam_gemma.errors import BeamGemmaError, OptionsError, one_line
from beam_gemma.jobs.publish import Output
from beam_gemma.jobs.run_record import difference
from beam_gemma.tables.file_sink import SHARD, FileSink, check_writable
from beam_gemma.tables.hive_partitions import is_data
from beam_gemma.tables.lease import Lease, Standing
from beam_gemma.tables.open_table import WILDCARD
from beam_gemma.tables.sink import FORMATS, Sink
from beam_gemma.tables.source import Source


def make_room(
    output: Output, source: Source, flags: argparse.Namespace, *, is_remote: bool
) -> None:
    """Check the places of a job's outputs, write to each on trial, and take their leases.

    Args:
        output: The outputs.
        source: The table that the job reads.
        flags: The flags, which say whether an earlier output or job may be replaced.
        is_remote: Whether the job outlives this process.

    Raises:
        OptionsError: an output or a job is there that the flags do not allow for, or a place cannot
            be written. The leases are given back.
    """
    places = {"--output": output.sink}
    if output.errors is not None:
        places["--errors"] = output.errors
        _check_apart(output.sink, output.errors)
    for flag, sink in places.items():
        _check_free(flag, sink, source, flags)
        _check_unread(flag, sink, source)
    claim = Lease.of_this_process(output.job, is_remote=is_remote)
    try:
        for flag, sink in places.items():
            check_writable(flag, sink.trial_path)
            _hold(flag, sink, claim, flags)
            # Another job may have published until the lease was taken.
            _check_free(flag, sink, source, flags)
    except BaseException:  # also Ctrl-C
        output.release()
        raise
    if flags.overwrite and not flags.resume:
        for sink in places.values():
            sink.begin_anew()


def is_done(sink: Sink, facts: Mapping[str, Any], num_rows: int | None) -> bool:
    """Return whether an output that is to be resumed is whole, and of the same job.

    Args:
        sink: The output.
        facts: The part of the job's record that is known before the run.
        num_rows: The number of rows of the job's table, if that is known.

    Raises:
        OptionsError: the output is whole, but another job wrote it.
    """
    if not sink.earlier() or sink.is_unfinished():
        return False
    record = sink.record()
    if record is None and sink.can_append:
        return True  # a table may have a description of its owner's in place of a record
    other = "files without a record" if record is None else difference(record, facts, num_rows)
    if other is not None:
        raise OptionsError(
            f"--resume: expected the job that wrote {sink.uri}, got {other}; choose another "
            "--output or begin anew by --overwrite"
        )
    return True


def _check_free(flag: str, sink: Sink, source: Source, flags: argparse.Namespace) -> None:
    earlier = sink.earlier()
    if both := [name for name in earlier if name in (*source.files, source.uri)]:
        raise OptionsError(
            f"{flag}: expected another table than that of --input, got {both[0]} in both"
        )
    if flags.resume:
        return
    if sink.is_unfinished() and not flags.overwrite:
        raise OptionsError(
            f"{flag}: expected no unfinished job, got {sink.work}; go on with it by --resume or "
            "begin anew by --overwrite"
        )
    if earlier and not (flags.overwrite or flags.append):
        remedy = "--append or --overwrite" if sink.can_append else "--overwrite"
        raise OptionsError(
            f"{flag}: expected no earlier output, got {earlier[0]}; choose another name or pass "
            f"{remedy}"
        )


def _hold(flag: str, sink: Sink, claim: Lease, flags: argparse.Namespace) -> None:
    """Take the lease of an output; docs/reliability.md says whose place a job may take."""
    up_to = Standing.ENDED
    if flags.resume or flags.overwrite:
        up_to = Standing.RUNNING if flags.overwrite else Standing.UNSEEN
    try:
        other = sink.hold(claim, up_to=up_to)
    except BeamGemmaError:
        raise
    except Exception as error:  # each file system raises its own errors
        raise OptionsError(
            f"{flag}: expected a folder that can be written, got {one_line(error)} at {sink.work}"
        ) from error
    if other is None:
        return
    remedy = "wait for its end, or take its place by --overwrite"
    if other.standing is Standing.UNSEEN:
        remedy = "once it has ended, go on with it by --resume or begin anew by --overwrite"
    raise OptionsError(f"{flag}: expected no other job that writes it, got {other}; {remedy}")


def _check_apart(output: Sink, errors: Sink) -> None:
    """Refuse outputs of which one would be files of the other."""
    one, other = _real(output.uri), _real(errors.uri)
    inside = (one.startswith(f"{other}/"), other.startswith(f"{one}/"))
    if any(inside) or _place(output) == _place(errors):
        raise OptionsError(
            f"--errors: expected another place than that of --output, got {errors.uri} beside "
            f"{output.uri}; choose another name"
        )


def _place(sink: Sink) -> str:
    """Return the same path for outputs that share a record, or are named as the other's files."""
    return re.sub(SHARD.pattern + r"(?=\.run\.json$)", "", _real(sink.trial_path))


def _check_unread(flag: str, sink: Sink, source: Source) -> None:
    """Refuse an output whose files the next job over the input would read as rows."""
    if isinstance(sink, FileSink) and _is_read(sink, source):
        raise OptionsError(
            f"{flag}: expected a place that is not read, got {sink.uri}, whose files would be "
            f"rows of {source.uri}; choose another folder"
        )


def _is_read(sink: FileSink, source: Source) -> bool:
    if not source.files or not source.files[0].endswith(f".{sink.format}"):
        return False
    name = _real(f"{sink.prefix}-00000-of-00001.{sink.format}")
    table = _real(source.uri.rstrip("/"))
    if WILDCARD.search(table) and not Path(table).exists():
        pattern = table if table.endswith(FORMATS) else f"{table}/*.{sink.format}"
        return re.fullmatch(FileSystem.translate_pattern(pattern), name) is not None
    return name.startswith(f"{table}/") and is_data(name, table)


def _real(uri: str) -> str:
    """Return a local path without links; what is not local stays as it is."""
    return uri if "://" in uri else os.path.realpath(uri)
