"""Temporal events: the frames of a video that are alike become one unit, whose tokens are merged once more."""

from __future__ import annotations

import torch

from vtc.adapters.multimodal.question import Question, decide_all, regroup
from vtc.methods.base import Tokens
from vtc.methods.dpc_knn import DPCKNN
from vtc.token_map import TokenMap


def in_events(question: Question, token_map: TokenMap, method: DPCKNN) -> tuple[Question, TokenMap, str]:
    """The frames of every video clustered into events by their means, and the tokens of an event, already merged frame
    by frame, merged again. Returns the question with events for units, the map from its first tokens, and a note."""
    videos = question.videos()
    if not videos:
        return question, token_map, ""
    weight = token_map.size / token_map.size.sum(1, keepdim=True).clamp(min=1)
    tokens = token_map.merge(question.packed(question.rows.detach()).float())
    means = (tokens * weight[..., None]).sum(1)  # of all tokens of a frame
    events = [[frames[i] for i in event] for frames in videos for event in method.events_of(means[frames])]
    of_video = {unit for event in events for unit in event}
    groups = sorted(events + [[unit] for unit in range(len(question.units)) if unit not in of_video])
    whole = question.joined(groups)

    # What happened inside the frames, told of the events.
    unit = torch.arange(len(question.units), device=question.index.device)[:, None]
    real = question.index >= 0
    slot, rank = torch.empty_like(question.columns), torch.empty_like(question.columns)
    slot[question.index[real]] = (unit * token_map.anchor.shape[1] + token_map.group)[real]
    rank[question.index[real]] = token_map.rank[real]
    first = regroup(whole.packed(slot).masked_fill(whole.index < 0, -1), whole.packed(rank))

    left = first.mask().sum(1).tolist()
    keep = [method.keep if group[0] in of_video else 1.0 for group in groups]
    gone = [n - max(1, round(n * k)) for n, k in zip(left, keep, strict=True)]  # type: ignore[operator]
    merged = Tokens(first.merge(whole.packed(whole.rows.detach())), size=first.size, mask=first.mask())
    step = decide_all(method, merged, torch.tensor(gone, device=unit.device))
    return whole, first.compose(step), f"{len(events)} events of {len(of_video)} frames"
