"""Chooses the next token on the device, as `beam_gemma.engine.sampling.sample` does on the host.

Whole rows of logits are read as rarely as possible: a step of 256 rows has 134 MB of two-byte
logits. The columns are cut into 32 parts, and the maximum over the parts is taken in place. The
columns with the greatest maxima hold the most likely tokens; only these columns are read again.

ONNX Runtime's kernels return equal values in an unspecified order, so the sort keys are unique:
each is a float64 whose high digits are the logit and whose low digits, below the precision of a
float32, are the token id.

Dimensions: R rows of logits, Q rows that need a probability, F rows that need the whole
distribution, V vocabulary, C candidates, U columns, L parts, S slots.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from beam_gemma.model.signature import Signature
from export.modules.heads import Named, top_probability
from export.ops.reference import column_maxima, even_parts

SPARE = 2
"""Columns read again per candidate. One would be enough if no logits were equal."""
ID_UNIT = 2.0**-43
"""Relative step between ids in a sort key; 262,144 ids fit below the 24 bits of a float32."""
LEAST_KEY = 1e-300
"""Step between ids in the sort key of a logit of zero."""


def choosing_head(
    logits: Tensor,
    poison: Tensor,
    finish: Callable[[Tensor], Tensor],
    step: Named,
    next_ids: Tensor,
    signature: Signature,
) -> tuple[Named, Tensor]:
    """Return the `generate` outputs of a graph that chooses tokens, and the new `next_ids`.

    Args:
        logits: [R, V], output of the last product.
        poison: [R], NaN where a row is invalid, else 0.
        finish: Converts logits to float32 and caps them if the model has a cap; keeps their order.
        step: `Signature.step_inputs` by name.
        next_ids: [S], the last token chosen in each slot.
        signature: The graph's signature.
    """
    values, ids = most_likely(logits, finish, signature.candidates)
    values = values + poison[:, None]
    place = choose(values, step)[:, None]
    chosen = ids.gather(1, place)[:, 0]
    rows = finish(logits.index_select(0, step["probability_rows"]))
    outputs = {
        "topk_logits": values,
        "topk_ids": ids,
        "top_probability": top_probability(rows, signature.device),
        "logits": finish(logits.index_select(0, step["full_rows"])),
        "chosen_ids": chosen,
        "chosen_logits": values.gather(1, place)[:, 0],
        "top_logits": values[:, 0],
    }
    return outputs, next_ids.scatter(0, step["logit_slots"].long(), chosen)


def most_likely(
    logits: Tensor, finish: Callable[[Tensor], Tensor], count: int
) -> tuple[Tensor, Tensor]:
    """Return the `count` highest of logits [R, V], finished, and their ids, both [R, C].

    They are sorted by descending logit, then by id. If many tokens tie with the last candidate,
    the ones returned need not have the lowest ids.
    """
    vocab = logits.shape[1]
    parts = even_parts(vocab)
    width = vocab // parts
    num_columns = SPARE * count
    if num_columns >= width:
        values = finish(logits)
        places = _places(values, torch.arange(vocab), count)
        return values.gather(1, places), places
    maxima = column_maxima(logits, parts)
    columns = _places(maxima, torch.arange(width), num_columns)[:, None, :]
    values = logits.view(-1, parts, width).gather(2, columns.expand(-1, parts, -1))
    values = finish(values.reshape(-1, parts * num_columns))
    ids = (columns + width * torch.arange(parts)[:, None]).view(-1, parts * num_columns)
    places = _places(values, ids, count)
    return values.gather(1, places), ids.gather(1, places)


def choose(values: Tensor, step: Named) -> Tensor:
    """Return [R], the index of the candidate that each row takes.

    Args:
        values: [R, C], logits in descending order.
        step: The sampling inputs `temperatures`, `uniforms`, `top_ks` and `top_ps`, all [R].
    """
    wide = values.double()
    ranks = torch.arange(values.shape[1])
    temperature = step["temperatures"].double()[:, None]
    is_drawn = temperature > 0
    mass = torch.exp((wide - wide[:, :1]) / torch.where(is_drawn, temperature, 1.0))
    mass = torch.where(ranks < step["top_ks"][:, None], mass, 0.0)
    sums = torch.cumsum(mass, dim=1)
    nucleus = step["top_ps"].double()[:, None] * sums[:, -1:]
    last = _count(sums < nucleus).clamp(max=values.shape[1] - 1)
    whole = sums.gather(1, last)
    # If rounding lifts the target to the whole sum, take the last candidate that has mass.
    target = step["uniforms"].double()[:, None] * whole
    drawn = torch.minimum(_count(sums <= target), _count(sums < whole))
    return torch.where(is_drawn, drawn, 0)[:, 0]


def _places(values: Tensor, ids: Tensor, count: int) -> Tensor:
    """Return the indices [R, C] of the highest values [R, U]; of equal values, the lowest ids."""
    wide = values.double()
    keys = wide - (wide.abs() * ID_UNIT + LEAST_KEY) * ids
    return torch.topk(keys, count).indices


def _count(marks: Tensor) -> Tensor:
    """Return the number of true marks in each row of [R, C], as [R, 1]."""
    return marks.sum(dim=1, keepdim=True)
