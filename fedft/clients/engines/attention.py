"""Attention over packed tokens, for rows of uneven length.

Rows are sorted into groups of similar length and each group is padded to a multiple of sixteen,
so that softmax works on whole vectors: on an AVX-512 machine a row of 14 costs fourteen times as
much a number as a row of 16. In bfloat16 the products stay in bfloat16 and softmax is in float32.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_VECTOR = 16
"""Lengths are rounded up to this many tokens: the float32 numbers of a 512-bit register."""

_SPLIT = 16_384
"""Scores (per head and row) that a further group must save: about 0.1 ms of its calls."""


@dataclass(frozen=True, eq=False)
class Group:
    """Rows that are padded to the same length.

    Attributes:
        rows: their indices, [n_g] int64.
        length: t_g, tokens they are padded to.
        offset: where they begin in the padded buffer.
        mask: what is added to their scores, [n_g, 1 or heads, t_g, t_g].
    """

    rows: Tensor
    length: int
    offset: int
    mask: Tensor


@dataclass(frozen=True, eq=False)
class Grouping:
    """Where every (token, head) lies in a buffer of padded rows, [P, d_head].

    Attributes:
        groups: the parts of the buffer, one after another; each is [n_g, heads, t_g, d_head].
        place: position of each (token, head) in the buffer, [T·heads] int64.
        query: for each position the (token, head) that it holds; padding repeats the first. [P]
        key: likewise the (token, key head): several query heads may share one. [P]
        repeats: query heads to a key head.
    """

    groups: Sequence[Group]
    place: Tensor
    query: Tensor
    key: Tensor
    repeats: int


def group_rows(
    real: Tensor, length: int, mask: Tensor, heads: int, key_heads: int, dtype: torch.dtype
) -> Grouping:
    """Sort rows into groups of similar length.

    Args:
        real: positions of the real tokens within n rows of ``length``, [T] int64, ascending.
        length: t, tokens of a padded row.
        mask: the model's, [n, 1 or heads, t, t]: True or 0 where attention is allowed.
        heads: query heads.
        key_heads: key and value heads.
        dtype: of the scores.
    """
    row, token = real // length, real % length
    extents = torch.zeros(mask.shape[0], dtype=torch.int64, device=real.device)
    extents.scatter_reduce_(0, row, token + 1, "amax")
    padded = _padded_lengths((extents + _VECTOR - 1) // _VECTOR * _VECTOR, heads)
    groups: list[Group] = []
    first = torch.zeros_like(padded)  # position of each row in the buffer
    size = 0
    for t in padded.unique().tolist():
        rows = (padded == t).nonzero().squeeze(1)
        groups.append(Group(rows, t, size, _group_mask(mask, rows, t, dtype)))
        first[rows] = size + torch.arange(len(rows), device=real.device) * (heads * t)
        size += len(rows) * heads * t
    head = torch.arange(heads, device=real.device)
    place = ((first[row] + token)[:, None] + head * padded[row, None]).flatten()
    query = torch.zeros(size, dtype=torch.int64, device=real.device)
    query[place] = torch.arange(len(place), device=real.device)
    repeats = heads // key_heads
    key = query // heads * key_heads + query % heads // repeats if repeats > 1 else query
    return Grouping(groups, place, query, key, repeats)


def _padded_lengths(lengths: Tensor, heads: int) -> Tensor:
    """Raise short lengths to the next longer one where a group of their own would not pay."""
    lengths = lengths.clone()
    distinct = lengths.unique().tolist()
    for t, following in pairwise(distinct):
        own = lengths == t
        if int(own.sum()) * heads * (following**2 - t**2) < _SPLIT:
            lengths[own] = following
    return lengths


def _group_mask(mask: Tensor, rows: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """The model's mask of some rows as numbers to add, cut or extended to ``length``."""
    own = mask[rows][..., :length, :length]
    never = torch.finfo(dtype).min
    if own.dtype == torch.bool:
        own = torch.zeros_like(own, dtype=dtype).masked_fill_(~own, never)
    extra = (0, length - own.shape[-1], 0, length - own.shape[-2])
    return F.pad(own.to(dtype), extra, value=never)


class PackedAttention(torch.autograd.Function):
    """``softmax(s q k^T + mask) v`` within each row.

    q: [T, heads, d_head], k and v: [T, key_heads, d_head]; the answer is [T, heads, d_head].
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, scaling: float, grouping: Grouping
    ) -> Tensor:
        Q = q.flatten(0, 1).index_select(0, grouping.query)  # [P, d_head]
        K = k.flatten(0, 1).index_select(0, grouping.key)
        V = v.flatten(0, 1).index_select(0, grouping.key)
        out = torch.empty_like(V)
        weights: list[Tensor] = []
        for group in grouping.groups:
            q_g, k_g, v_g, out_g = (_part(x, group, q.shape[1]) for x in (Q, K, V, out))
            scores = torch.bmm(q_g, k_g.mT).mul_(scaling)  # [n_g·heads, t_g, t_g]
            scores.unflatten(0, (len(group.rows), -1)).add_(group.mask)
            weights.append(_softmax(scores))
            torch.bmm(weights[-1], v_g, out=out_g)
        ctx.save_for_backward(Q, K, V, *weights)
        ctx.scaling, ctx.grouping, ctx.heads = scaling, grouping, q.shape[1]
        return out.index_select(0, grouping.place).view(*q.shape[:2], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        Q, K, V, *weights = ctx.saved_tensors
        grouping: Grouping = ctx.grouping
        g_out = torch.zeros_like(V).index_copy_(0, grouping.place, grads[0].flatten(0, 1))
        gQ, gK, gV = torch.empty_like(Q), torch.empty_like(K), torch.empty_like(V)
        for group, p in zip(grouping.groups, weights, strict=True):
            q_g, k_g, v_g, g_g = (_part(x, group, ctx.heads) for x in (Q, K, V, g_out))
            gq_g, gk_g, gv_g = (_part(x, group, ctx.heads) for x in (gQ, gK, gV))
            torch.bmm(p.mT, g_g, out=gv_g)
            gs = _softmax_gradient(torch.bmm(g_g, v_g.mT), p).mul_(ctx.scaling)
            torch.bmm(gs, k_g, out=gq_g)
            torch.bmm(gs.mT, q_g, out=gk_g)
        gq = gQ.index_select(0, grouping.place).view(-1, ctx.heads, Q.shape[1])
        return gq, _by_key_head(gK, ctx), _by_key_head(gV, ctx), None, None


def _part(buffer: Tensor, group: Group, heads: int) -> Tensor:
    """One group's rows of a buffer, [n_g·heads, t_g, d_head]."""
    count = len(group.rows) * heads
    part = buffer.narrow(0, group.offset, count * group.length)
    return part.view(count, group.length, -1)


def _softmax(scores: Tensor) -> Tensor:
    narrow = scores.dtype == torch.bfloat16
    if not narrow:
        return torch.softmax(scores, -1)
    return torch.softmax(scores.float(), -1).to(scores.dtype)


def _softmax_gradient(gradient: Tensor, p: Tensor) -> Tensor:
    """Gradient with respect to the scores, given that of ``p = softmax(scores)``."""
    if p.dtype != torch.bfloat16:
        return torch.ops.aten._softmax_backward_data(gradient, p, -1, p.dtype)
    wide = torch.ops.aten._softmax_backward_data(gradient.float(), p.float(), -1, torch.float32)
    return wide.to(p.dtype)


def _by_key_head(gradient: Tensor, ctx: Any) -> Tensor:
    """Back to [T, key_heads, d_head]: query heads that share a key head are summed."""
    own = gradient.index_select(0, ctx.grouping.place)
    each = own.view(-1, ctx.heads // ctx.grouping.repeats, ctx.grouping.repeats, own.shape[1])
    return each.squeeze(2) if ctx.grouping.repeats == 1 else each.sum(2)
