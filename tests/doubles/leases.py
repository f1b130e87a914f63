"""Leases of outputs, for tests that publish without a command line."""

from beam_gemma.tables.lease import Lease, Standing
from beam_gemma.tables.sink import Sink

JOB = "j"


def hold(sink: Sink, job: str = JOB, *, up_to: Standing = Standing.ENDED) -> None:
    """Take the lease of an output for a job of this process."""
    assert sink.hold(Lease.of_this_process(job, is_remote=False), up_to=up_to) is None
