"""Runs our engine alone: token ids in, token ids out."""

from beam_gemma.engine.engine import Engine
from beam_gemma.engine.sampling import SamplingParams
from beam_gemma.engine.sequence import Request
from beam_gemma.model.artifact import Artifact
from beam_gemma.monitoring.startup_log import process_age
from beam_gemma.runtime.cpu_session import Session
from beam_gemma.runtime.limits import EngineConfig
from benchmarks.runs import Job, Run, Timeline, peak_bytes, serve

WARM_UP = Request(
    request_id="warm-up",
    prompt_token_ids=(2, 5, 6, 7),
    params=SamplingParams(max_tokens=2, ignore_eos=True),
)


def run(job: Job) -> Run:
    """Complete all rows, submitted at once."""
    config = EngineConfig(max_num_seqs=job.batch_size)
    session = Session.of(
        Artifact.open(job.model),
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
    )
    timeline = Timeline()
    engine = Engine(session, config, on_step=timeline.add)
    engine.generate([WARM_UP])
    startup_secs = process_age()
    timeline.restart()
    completions = engine.generate(
        Request(
            request_id=str(i),
            prompt_token_ids=row.prompt_token_ids,
            params=SamplingParams(max_tokens=row.max_tokens, ignore_eos=True),
        )
        for i, row in enumerate(job.rows)
    )
    stats = engine.stats
    return Run(
        batch_size=job.batch_size,
        token_ids=[list(completion.token_ids) for completion in completions],
        steps=timeline.steps,
        startup_secs=startup_secs,
        work_secs=timeline.work_secs,
        tail_secs=0.0,
        peak_bytes=peak_bytes(),
        backlog_occupancy=stats.backlog_occupancy if stats.num_backlog_decode_steps else None,
    )


if __name__ == "__main__":
    serve(run)
