"""Runs one system on one case of the GPU benchmark, in its own process.

python -m benchmarks.gpu.systems SYSTEM JOB.json ANSWER.json

An answer holds the seconds of the work, from first prompt to last token, after a few warm-up rows;
separately, the seconds until the model was loaded and warm; and further figures of some systems.
Padding and tokens beyond a row's request count toward a system's time.
"""

import importlib.util
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from beam_gemma.monitoring.startup_log import process_age
from benchmarks.gpu.work import Job

Answer = dict[str, Any]
WARM_ROWS = 2
POLL_SECS = 1.0


def timed(job: Job, work: Callable[[list[list[int]], list[int]], Any]) -> Answer:
    """Run the rows with the longest prompts to warm up, then time all rows."""
    few = sorted(range(len(job.prompts)), key=lambda i: -len(job.prompts[i]))[:WARM_ROWS]
    work([job.prompts[i] for i in few], [2] * len(few))
    startup_secs = process_age()
    start = time.perf_counter()
    work(job.prompts, job.new_tokens)
    return {"startup_secs": startup_secs, "seconds": time.perf_counter() - start}


def our_completions(job: Job) -> Answer:
    """Run our engine on completions."""
    from benchmarks.gpu.ours import engine_of, requests_of

    engine, timeline = engine_of(job, "generate")

    def work(prompts: list[list[int]], new_tokens: list[int]) -> None:
        timeline.restart()
        failed = [c for c in engine.generate(requests_of(prompts, new_tokens)) if c.error]
        assert not failed, failed[0].error

    answer = timed(job, work)
    decode = [step.seconds for step in timeline.steps if not step.prompt_tokens]
    told = {"decode_secs": sum(decode), "decode_steps": len(decode), **engine.pulse.counts()}
    return answer | told | {"occupancy": engine.stats.occupancy}


def our_classifications(job: Job) -> Answer:
    """Run our engine's `score` head."""
    from benchmarks.gpu.ours import engine_of, scores_of

    engine, _ = engine_of(job, "score")

    def work(prompts: list[list[int]], _: list[int]) -> None:
        failed = [c for c in engine.generate(scores_of(prompts, job.label_ids)) if c.error]
        assert not failed, failed[0].error

    return timed(job, work) | engine.pulse.counts()


def our_embeddings(job: Job) -> Answer:
    """Run our embedding steps."""
    from benchmarks.gpu.ours import steps_of

    steps = steps_of(job)
    return timed(job, lambda texts, _: [vector for _, vector in steps(texts)])


def their_completions(job: Job) -> Answer:
    """Run transformers' `generate` batch by batch; rows of similar completion length share one."""
    from benchmarks.run_transformers import complete
    from benchmarks.runs import Job as Rows
    from benchmarks.workload import Row

    model = _causal_model(job)

    def work(prompts: list[list[int]], new_tokens: list[int]) -> None:
        rows = [
            Row(text="", prompt_token_ids=tuple(ids), max_tokens=n)
            for ids, n in zip(prompts, new_tokens, strict=True)
        ]
        size = job.scale.their_batch
        asked = Rows(model="", weights="", rows=rows, batch_size=size, sort_by="max_tokens")
        complete(model, rows, asked)

    return timed(job, work)


def their_continuous_completions(job: Job) -> Answer:
    """Run transformers' continuous batching, as its `generate_batch` does."""
    import transformers

    model = _causal_model(job)
    settings = transformers.GenerationConfig(
        max_new_tokens=max(job.new_tokens), do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    small = {}
    if job.device == "cpu":
        small["continuous_batching_config"] = transformers.ContinuousBatchingConfig(
            num_blocks=64, max_batch_tokens=job.scale.prefill_tokens
        )
    with model.continuous_batching_context_manager(generation_config=settings, **small) as manager:

        def work(prompts: list[list[int]], new_tokens: list[int]) -> None:
            for i, (ids, n) in enumerate(zip(prompts, new_tokens, strict=True)):
                manager.add_request(ids, request_id=f"{len(prompts)}-{i}", max_new_tokens=n)
            left = len(prompts)
            while left:
                result = manager.get_result(timeout=POLL_SECS)
                if result is not None and result.is_finished():
                    assert result.error is None, result.error
                    left -= 1
                assert manager.is_running(), "the manager has stopped"

        return timed(job, work)


def vllm_completions(job: Job) -> Answer:
    """Run vLLM with random weights of its own."""
    from vllm import LLM, SamplingParams

    longest = max(len(ids) + n for ids, n in zip(job.prompts, job.new_tokens, strict=True))
    llm = LLM(
        model=job.shapes,
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype=job.dtype,
        max_model_len=longest,
        max_num_seqs=job.scale.slots,
        enable_prefix_caching=False,
    )

    def work(prompts: list[list[int]], new_tokens: list[int]) -> None:
        params = [
            SamplingParams(temperature=0, max_tokens=n, ignore_eos=True, detokenize=False)
            for n in new_tokens
        ]
        llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)

    return timed(job, work)


def their_classifications(job: Job) -> Answer:
    """Run forward passes of transformers over batches of whole prompts, padded on the left."""
    import torch

    from benchmarks.padding import padded

    model = _causal_model(job)

    @torch.inference_mode()
    def work(prompts: list[list[int]], _: list[int]) -> None:
        for batch in _batches(prompts, job.scale.their_tokens):
            ids, mask = padded(batch, job.device)
            logits = model(ids, attention_mask=mask, logits_to_keep=1, use_cache=False).logits
            logits[:, -1, job.label_ids].argmax(dim=1).tolist()

    return timed(job, work)


def their_embeddings(job: Job) -> Answer:
    """Run transformers over padded batches of texts of similar length, with mean pooling."""
    import torch
    import transformers

    from benchmarks.padding import padded

    config = transformers.AutoConfig.from_pretrained(job.shapes)
    with torch.device(job.device):
        model = transformers.AutoModel.from_config(config, dtype=getattr(torch, job.dtype)).eval()

    @torch.inference_mode()
    def work(texts: list[list[int]], _: list[int]) -> None:
        for batch in _batches(texts, job.scale.their_tokens):
            ids, mask = padded(batch, job.device, left=False)
            states = model(ids, attention_mask=mask, use_cache=False).last_hidden_state
            means = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
            torch.nn.functional.normalize(means.float()).cpu()

    return timed(job, work)


def _causal_model(job: Job) -> Any:
    """Return a transformers model of the job's shapes with random weights of its own."""
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(job.shapes)
    with torch.device(job.device):
        dtype = getattr(torch, job.dtype)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def _batches(rows: list[list[int]], limit: int) -> Iterator[list[list[int]]]:
    """Yield batches of rows of similar length, with at most `limit` tokens after padding."""
    batch: list[list[int]] = []
    for row in sorted(rows, key=len, reverse=True):
        if batch and len(batch[0]) * (len(batch) + 1) > limit:
            yield batch
            batch = []
        batch.append(row)
    yield batch


SYSTEMS: dict[str, Callable[[Job], Answer]] = {
    "engine": our_completions,
    "engine, scores": our_classifications,
    "embedder": our_embeddings,
    "transformers generate": their_completions,
    "transformers generate_batch": their_continuous_completions,
    "transformers forward": their_classifications,
    "transformers embed": their_embeddings,
    "vLLM": vllm_completions,
}
NEEDS = {"vLLM": "vllm"}
"""Package that a peer needs to run; `torch` for peers not listed."""


def is_installed(system: str) -> bool:
    """Return whether a system can run here."""
    packages = [NEEDS.get(system, "torch")] if not system.startswith(("engine", "embed")) else []
    return all(importlib.util.find_spec(package) for package in packages)


def main() -> None:
    """Run one job and write its answer."""
    system, asked, answered = sys.argv[1], *map(Path, sys.argv[2:])
    answer = SYSTEMS[system](Job.from_json(json.loads(asked.read_text())))
    answered.write_text(json.dumps(answer))


if __name__ == "__main__":
    main()
