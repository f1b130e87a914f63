"""Our engine and steps for the GPU benchmark; other systems do not import this module."""

from beam_gemma.engine.embedding_engine import EmbeddingSteps
from beam_gemma.engine.engine import Engine
from beam_gemma.engine.sampling import SamplingParams
from beam_gemma.engine.sequence import Request
from beam_gemma.model.artifact import Artifact
from beam_gemma.model.graph_tensors import Head
from beam_gemma.runtime.cpu_session import Session
from beam_gemma.runtime.cuda_session import CudaSession
from beam_gemma.runtime.limits import EngineConfig, Limits
from beam_gemma.runtime.open_session import open_session
from beam_gemma.runtime.step_shapes import num_texts
from benchmarks.gpu.work import Job
from benchmarks.runs import Timeline

LABELS = SamplingParams(max_tokens=1)


def engine_of(job: Job, head: Head) -> tuple[Engine, Timeline]:
    """Return an engine for a job, and the timeline that records its steps."""
    timeline = Timeline()
    config = EngineConfig(
        max_num_seqs=job.scale.slots, max_num_batched_tokens=job.scale.prefill_tokens
    )
    session = session_of(
        job,
        head,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
    )
    engine = Engine(session, config, on_step=timeline.add, device_stats=session.stats)
    return engine, timeline


def session_of(job: Job, head: Head, **limits: int) -> Session | CudaSession:
    """Load a job's model on its device."""
    artifact = Artifact.open(job.model)
    return open_session(artifact, head, job.device, Limits(**limits))


def steps_of(job: Job) -> EmbeddingSteps:
    """Return the embedding steps for a job."""
    budget = job.scale.prefill_tokens
    session = session_of(job, "embed", max_num_batched_tokens=budget)
    return EmbeddingSteps(
        session,
        max_num_batched_tokens=budget,
        max_num_seqs=num_texts(budget) if job.device == "cuda" else None,
        on_step=lambda _: None,
    )


def requests_of(prompts: list[list[int]], new_tokens: list[int]) -> list[Request]:
    """Return requests for completions of the given numbers of tokens."""
    return [
        Request(
            request_id=str(i),
            prompt_token_ids=tuple(ids),
            params=SamplingParams(max_tokens=n, ignore_eos=True),
        )
        for i, (ids, n) in enumerate(zip(prompts, new_tokens, strict=True))
    ]


def scores_of(prompts: list[list[int]], label_ids: list[int]) -> list[Request]:
    """Return requests for raw logits of single-token labels, enough for a softmax over labels."""
    return [
        Request(
            request_id=str(i),
            prompt_token_ids=tuple(ids),
            params=LABELS,
            targets=tuple((len(ids) - 1, label) for label in label_ids),
            normalized=False,
        )
        for i, ids in enumerate(prompts)
    ]
