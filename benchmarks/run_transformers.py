"""Runs transformers' own `generate`: float32, PyTorch's fused attention, its default cache.

Rows are sorted by prompt length, to reduce padding, or by the number of requested tokens, so that
rows of a batch end together. All rows of a batch run until its longest is done; tokens beyond a
row's `max_tokens` are not counted as work.
"""

import time

import torch
import transformers

from benchmarks.padding import padded
from benchmarks.runs import Job, Run, Step, serve, timed_run
from benchmarks.workload import Row


class Clock(transformers.StoppingCriteria):
    """Stopping criterion that records the end time of each step and never stops."""

    def __init__(self) -> None:
        self.times = [time.perf_counter()]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: object) -> torch.Tensor:
        """Record the time."""
        del scores
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def run(job: Job) -> Run:
    """Complete all rows, one batch after another."""
    model = transformers.AutoModelForCausalLM.from_pretrained(job.weights, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return timed_run(job, lambda rows: complete(model, rows, job))


def complete(
    model: transformers.PreTrainedModel, rows: list[Row], job: Job
) -> tuple[list[list[int]], list[Step]]:
    """Return the new tokens of each row, and the steps of all batches."""
    order = sorted(range(len(rows)), key=lambda i: _length(rows[i], job.sort_by))[::-1]
    token_ids: list[list[int]] = [[] for _ in rows]
    steps = []
    for first in range(0, len(order), job.batch_size):
        batch = order[first : first + job.batch_size]
        completions, batch_steps = _generate(model, [rows[i] for i in batch])
        steps += batch_steps
        for i, completion in zip(batch, completions, strict=True):
            token_ids[i] = completion
    return token_ids, steps


def _length(row: Row, sort_by: str) -> tuple[int, int]:
    lengths = len(row.prompt_token_ids), row.max_tokens
    return lengths if sort_by == "prompt_tokens" else lengths[::-1]


@torch.inference_mode()
def _generate(
    model: transformers.PreTrainedModel, rows: list[Row]
) -> tuple[list[list[int]], list[Step]]:
    """Return the new tokens of each row of a batch, and its steps."""
    ids, mask = padded([row.prompt_token_ids for row in rows], model.device)
    width = ids.shape[1]
    clock = Clock()
    output = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=max(row.max_tokens for row in rows),
        do_sample=False,
        stopping_criteria=transformers.StoppingCriteriaList([clock]),
    )
    steps = []
    for step, (before, now) in enumerate(zip(clock.times, clock.times[1:], strict=False)):
        prompt_tokens = sum(len(row.prompt_token_ids) for row in rows) if step == 0 else 0
        new_tokens = sum(row.max_tokens > step for row in rows)
        steps.append(Step(now - before, prompt_tokens, new_tokens))
    completions = [
        line[width : width + row.max_tokens]
        for row, line in zip(rows, output.tolist(), strict=True)
    ]
    return completions, steps


if __name__ == "__main__":
    serve(run)
