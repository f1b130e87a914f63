"""Choosing the next token on the device, as `beam_gemma.engine.sampling.sample` does on the host.

Whole rows of logits are read as seldom as possible: a step of 256 rows has 134 MB of them in two
bytes each. Their columns are cut into 32 parts, and the maximum over the parts is taken where they
lie. The columns with the greatest maxima hold the most likely tokens; only these columns are looked
at again.

ONNX Runtime's kernels return equal values in an order of their own. So what is sorted are keys
without equals: a float64 that has the logit in front and the token id behind, where a float32 has
no digits.

Dimensions: R rows of logits, Q of these that need a probability, F of these that need the whole
distribution, V vocabulary, C candidates, U columns, L parts, S slots.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from beam_gemma.model.signature import Signature
from export.modules.heads import Named, top_probability
from export.ops.reference import column_maxima, even_parts

SPARE = 2
"""Columns that are looked at again, for each candidate. One would do if no logits were equal."""
ID_UNIT = 2.0**-43
"""Behind the 24 digits of a float32, and room for 262,144 ids before them."""
LEAST_KEY = 1e-300
"""Tells ids of a logit of zero apart."""


def choosing_head(
    logits: Tensor,
    poison: Tensor,
    finish: Callable[[Tensor], Tensor],
    step: Named,
    next_ids: Tensor,
    signature: Signature,
) -> tuple[Named, Tensor]:
    """Return the outputs of the `generate` head of a graph that chooses, and the new `next_ids`.

    Args:
        logits: [R, V] as the last product gives them.
        poison: [R], NaN where a row means nothing, else 0.
        finish: Makes logits float32, and caps them where the model does so; keeps their order.
        step: `Signature.step_inputs` by name.
        next_ids: [S].
        signature: Of the graph.
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

    The highest first; equal ones by their ids. Of many tokens that are all as likely as the last
    candidate, others than those of the lowest ids may be left out.
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
    """Return [R], which of the candidates each row takes.

    Args:
        values: [R, C] logits, the highest first.
        step: How to choose: `temperatures`, `uniforms`, `top_ks` and `top_ps`, all [R].
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
    # Rounding may lift the target to the whole sum: the last candidate that has mass then.
    target = step["uniforms"].double()[:, None] * whole
    drawn = torch.minimum(_count(sums <= target), _count(sums < whole))
    return torch.where(is_drawn, drawn, 0)[:, 0]


def _places(values: Tensor, ids: Tensor, count: int) -> Tensor:
    """Return where the highest of values [R, U] lie, [R, C]: of equal ones those of lowest ids."""
    wide = values.double()
    keys = wide - (wide.abs() * ID_UNIT + LEAST_KEY) * ids
    return torch.topk(keys, count).indices


def _count(marks: Tensor) -> Tensor:
    """Return how many of the marks [R, C] each row has, as [R, 1]."""
    return marks.sum(dim=1, keepdim=True)
