"""Tokens drawn from the teacher, with replacement, by inverse distribution function. Torch on any device.

Two uniforms a draw. The first falls on a kept token or on the tail. The second finds the token in the tail: first a
shard, by the shards' masses, then a column inside that shard's own tile. Both go by ascending ids. So a draw depends on
the row's logits and its seed alone, not on how the vocabulary is split, and two likely tokens that low bits put in
another order change no more than the bits did. Across ranks go the drawn ids and their logits, never the vocabulary.
Nothing here has been run on a GPU yet.

Legend: R rows, W columns of a shard, K kept, C = P·K candidates, P shards, N draws, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec

import torch
from torch.nn.functional import pad

from distill_ray.config.sections import CaptureSection
from distill_ray.schema import COUNT_SHIFT
from distill_ray.teacher.reduction import Candidates, ShardRows, candidates, reduce_tile
from distill_ray.teacher.seeds import uniforms

_CPU_TYPES = (torch.float32, torch.bfloat16)
_BLOCK_BYTES = {"cpu": 2**24, "cuda": 2**27}
"""Bytes of float32 that exist at once while torch searches a tile: with fewer on a GPU, launches would dominate."""
_RUN = 256
"""Columns whose masses are summed before any of them is looked at."""
_NO_MASS = 2.0**-100
"""Mass, relative to the tail's likeliest token, below which a shard counts as empty: its float32 masses may all be."""


@dataclass(frozen=True)
class DrawSpec:
    """What is drawn at every position."""

    count: int
    """Draws a row, N."""
    tail_only: bool
    """From everything outside the kept tokens, instead of the whole distribution."""
    temperature: float

    @classmethod
    def of(cls, capture: CaptureSection) -> DrawSpec | None:
        """None where the capture keeps no draws."""
        if not capture.draws:
            return None
        return cls(capture.draws, capture.draws_from == "tail", capture.draws_temperature)


@dataclass(frozen=True)
class OwnShard:
    """One shard whose logits lie in this process."""

    index: int
    """Its place among all shards."""
    logits_RW: torch.Tensor
    """After `reduce_tile`, which overwrites the shard's K best in it."""
    first_id: int
    rows: ShardRows


Combine = Callable[[torch.Tensor], torch.Tensor]
"""int32 words of this rank → their sum over all ranks."""


def draw_words(
    spec: DrawSpec,
    keys_R: torch.Tensor,
    shards: list[ShardRows],
    found: Candidates,
    own: list[OwnShard],
    top_logprob_R: torch.Tensor,
    temperatures: tuple[float, ...],
    combine: Combine,
) -> torch.Tensor:
    """Draw N tokens a row.

    Args:
        spec: how many, of what, at which temperature.
        keys_R: int64 seeds, of `seeds.row_keys`.
        shards: of all ranks, in ascending order of their ids.
        found: `candidates(shards)`.
        own: those of them that lie here; their tiles are written to.
        top_logprob_R: float32 log-probability of the likeliest kept token at T = 1.
        temperatures: the T ≠ 1 that the shards hold sums at.
        combine: sums over ranks; every rank must call this function.

    Returns:
        [R, 2 N] int32 words as `wire` has them, the same on every rank.
    """
    choice = _choose(spec, keys_R, shards, found, (1.0, *temperatures).index(spec.temperature))
    drawn = torch.zeros(len(keys_R), 2 * spec.count, dtype=torch.int32, device=keys_R.device)
    for shard in own:
        if shard.logits_RW.shape[1]:
            drawn += _find(spec, choice, found, shard)
    drawn = combine(drawn)
    kept_RN, at_RN = choice.kept_RN >= 0, choice.kept_RN.clamp_min(0)
    ids_RN = torch.where(kept_RN, found.ids_RC.gather(1, at_RN), drawn[:, : spec.count])
    logits_RN = drawn[:, spec.count :].contiguous().view(torch.float32)
    logits_RN = torch.where(kept_RN, found.values_RC.gather(1, at_RN), logits_RN)
    return _counted(ids_RN, (logits_RN - found.values_RC[:, :1]) + top_logprob_R[:, None], choice.none_R)


def draw_from_logits(
    spec: DrawSpec,
    logits_RV: torch.Tensor,
    top_k: int,
    keys_R: torch.Tensor,
    top_logprob_R: torch.Tensor,
    token_ids: int | None = None,
) -> torch.Tensor:
    """`draw_words` of whole rows of logits, which are overwritten.

    Args:
        spec: what is drawn.
        logits_RV: [R, V].
        top_k: K.
        keys_R: int64 seeds.
        top_logprob_R: float32 log-probability of the likeliest kept token at T = 1.
        token_ids: only ids below it are kept; None: any.
    """
    temperatures = () if spec.temperature == 1 else (spec.temperature,)
    own = list[OwnShard]()
    for tile_RW, k in ((logits_RV[:, :token_ids], top_k), (logits_RV[:, token_ids or logits_RV.shape[1] :], 0)):
        if tile_RW.shape[1]:
            first_id = logits_RV.shape[1] - tile_RW.shape[1] if own else 0
            rows = reduce_tile(tile_RW, first_id, torch.zeros_like(top_logprob_R), k, temperatures)
            own.append(OwnShard(len(own), tile_RW, first_id, rows))
    shards = [shard.rows for shard in own]
    found = candidates(shards)
    return draw_words(spec, keys_R, shards, found, own, top_logprob_R, temperatures, lambda words: words)


@dataclass(frozen=True)
class _Choice:
    """Which token each draw falls on, as far as the shards' numbers tell."""

    kept_RN: torch.Tensor
    """int64 place among the candidates; −1 where the draw falls on the tail."""
    shard_RN: torch.Tensor
    """int64 shard of a draw that falls on the tail."""
    wanted_RN: torch.Tensor
    """float64 mass of that shard's tail before the token drawn, in units of `greatest_R`'s."""
    greatest_R: torch.Tensor
    """float32 greatest logit of the tail, over all shards."""
    none_R: torch.Tensor
    """Rows that have nothing to draw from: a tail of mass zero."""


def _choose(spec: DrawSpec, keys_R: torch.Tensor, shards: list[ShardRows], found: Candidates, sums: int) -> _Choice:
    T, top_k = spec.temperature, shards[0].values_RK.shape[1]
    dropped_RD, owner_RD = found.values_RC[:, top_k:], found.shard_RC[:, top_k:]
    rest_max_RP = torch.stack([s.rest_max_R for s in shards], 1)
    greatest_R1 = torch.cat([rest_max_RP, dropped_RD], 1).amax(1, keepdim=True)
    greatest_R1 = torch.where(torch.isneginf(greatest_R1), 0.0, greatest_R1)  # of nothing: a difference would be NaN
    log_sum_RP = torch.stack([s.rest_sum_RS[:, sums] for s in shards], 1)
    mass_RP = ((rest_max_RP - greatest_R1).double() / T + log_sum_RP.double()).exp()
    mass_RP = mass_RP.scatter_add(1, owner_RD, ((dropped_RD - greatest_R1).double() / T).exp())
    mass_RP = torch.where(mass_RP < _NO_MASS, 0.0, mass_RP)
    upto_RP = mass_RP.cumsum(1)
    wanted_RN = uniforms(keys_R, spec.count, lane=1) * upto_RP[:, -1:]
    # The first whose sum exceeds what is wanted: never one without mass.
    shard_RN = torch.searchsorted(upto_RP, wanted_RN, right=True).clamp_(max=len(shards) - 1)
    wanted_RN = (wanted_RN - (upto_RP - mass_RP).gather(1, shard_RN)).clamp_(min=0)
    kept_RN = torch.full_like(shard_RN, -1)
    if not spec.tail_only:
        top_R1 = found.values_RC[:, :1]
        order_RK = found.ids_RC[:, :top_k].argsort(1)
        head_RK = ((found.values_RC.gather(1, order_RK) - top_R1).double() / T).exp().cumsum(1)
        tail_R1 = upto_RP[:, -1:] * ((greatest_R1 - top_R1).double() / T).exp()
        sought_RN = uniforms(keys_R, spec.count, lane=0) * (head_RK[:, -1:] + tail_R1)
        place_RN = torch.searchsorted(head_RK, sought_RN, right=True)
        kept_RN = torch.where(place_RN < top_k, order_RK.gather(1, place_RN.clamp(max=top_k - 1)), kept_RN)
    return _Choice(kept_RN, shard_RN, wanted_RN, greatest_R1[:, 0], (upto_RP[:, -1] == 0) & spec.tail_only)


def _find(spec: DrawSpec, choice: _Choice, found: Candidates, shard: OwnShard) -> torch.Tensor:
    """[R, 2 N] int32: ids and bits of the logits of the draws that fall on this shard's tail, 0 elsewhere."""
    tile_RW = shard.logits_RW
    _put_back(shard, found)
    here_RN = (choice.kept_RN < 0) & (choice.shard_RN == shard.index) & ~choice.none_R[:, None]
    wanted_RN = torch.where(here_RN, choice.wanted_RN, -1.0)
    search = _search(tile_RW.device.type, tile_RW.dtype)
    column_RN = search(tile_RW, choice.greatest_R, spec.temperature, wanted_RN)
    at_RN = column_RN.clamp_min(0)
    # Not found only in a row with NaN; NaN has the row refused.
    logits_RN = torch.where(column_RN < 0, torch.nan, tile_RW.gather(1, at_RN).float())
    ids_RN = torch.where(here_RN, at_RN + shard.first_id, 0).int()
    return torch.cat([ids_RN, torch.where(here_RN, logits_RN, 0.0).view(torch.int32)], 1)


def _put_back(shard: OwnShard, found: Candidates) -> None:
    """Leave the tail in the tile: the shard's own best stand in it again unless they are among the kept."""
    top_k = shard.rows.values_RK.shape[1]
    n = min(top_k, shard.logits_RW.shape[1])
    values_RK, ids_RK = shard.rows.values_RK[:, :n], shard.rows.ids_RK[:, :n]
    last_R1, last_id_R1 = found.values_RC[:, top_k - 1 : top_k], found.ids_RC[:, top_k - 1 : top_k]
    kept_RK = (values_RK > last_R1) | ((values_RK == last_R1) & (ids_RK <= last_id_R1))
    left_RK = torch.where(kept_RK, -torch.inf, values_RK).to(shard.logits_RW.dtype)
    shard.logits_RW.scatter_(1, (ids_RK - shard.first_id).long(), left_RK)


@cache
def _search(device: str, dtype: torch.dtype) -> Callable[..., torch.Tensor]:
    """The compiled search for such a tile, or torch's."""
    if device == "cpu" and dtype in _CPU_TYPES and find_spec("numba"):
        return import_module("distill_ray.teacher.search_cpu").search
    return search_by_torch


def search_by_torch(
    logits_RW: torch.Tensor, greatest_R: torch.Tensor, temperature: float, wanted_RN: torch.Tensor
) -> torch.Tensor:
    """[R, N] int64: the first column at which the running sum of e^{(z − greatest) / T} exceeds what is wanted.

    Beyond the whole sum it is the last column that has a mass at all.

    Args:
        logits_RW: [R, W], −inf where nothing is to be found.
        greatest_R: float32, none of the logits greater.
        temperature: T.
        wanted_RN: float64; negative where nothing is wanted, which gives −1.
    """
    width, n_draws = logits_RW.shape[1], wanted_RN.shape[1]
    most = _BLOCK_BYTES.get(logits_RW.device.type, _BLOCK_BYTES["cpu"])
    step = max(1, most // (4 * max(width, 3 * _RUN * n_draws)))
    parts = zip(logits_RW.split(step), greatest_R.split(step), wanted_RN.split(step), strict=True)
    return torch.cat([_search_block(z.float(), top[:, None], temperature, w) for z, top, w in parts])


def _search_block(
    z_RW: torch.Tensor, greatest_R1: torch.Tensor, temperature: float, wanted_RN: torch.Tensor
) -> torch.Tensor:
    mass_RW = pad(((z_RW - greatest_R1) / temperature).exp(), (0, -z_RW.shape[1] % _RUN))
    mass_RGL = mass_RW.view(len(z_RW), -1, _RUN)
    sums_RG = mass_RGL.sum(2, dtype=torch.float64)
    upto_RG = sums_RG.cumsum(1)
    last_R1 = _last_with_mass(sums_RG)
    run_RN = torch.searchsorted(upto_RG, wanted_RN, right=True).minimum(last_R1).clamp_(min=0)
    left_RN = wanted_RN - (upto_RG - sums_RG).gather(1, run_RN)
    run_RNL = mass_RGL.gather(1, run_RN[:, :, None].expand(-1, -1, _RUN))
    place_RN = (run_RNL.cumsum(2, dtype=torch.float64) <= left_RN[:, :, None]).sum(2)
    column_RN = run_RN * _RUN + place_RN.minimum(_last_with_mass(run_RNL)[:, :, 0])
    return torch.where((wanted_RN >= 0) & (last_R1 >= 0), column_RN, -1)


def _last_with_mass(mass: torch.Tensor) -> torch.Tensor:
    """Last index of the last dimension that holds a mass, −1 if none does; the dimension stays, of size 1."""
    index = torch.arange(mass.shape[-1], device=mass.device)
    return torch.where(mass > 0, index, -1).amax(-1, keepdim=True)


def _counted(ids_RN: torch.Tensor, logprobs_RN: torch.Tensor, none_R: torch.Tensor) -> torch.Tensor:
    """[R, 2 N] int32 words: distinct ids in ascending order with their counts, then float32 bits; zeros after them."""
    ids_RN, order_RN = ids_RN.long().sort(1)
    logprobs_RN = logprobs_RN.gather(1, order_RN)
    first_RN = torch.ones_like(ids_RN)
    first_RN[:, 1:] = (ids_RN[:, 1:] != ids_RN[:, :-1]).long()
    slot_RN = first_RN.cumsum(1) - 1
    counts_RN = torch.zeros_like(ids_RN).scatter_add_(1, slot_RN, torch.ones_like(ids_RN))
    words_RN = torch.zeros_like(ids_RN).scatter_(1, slot_RN, ids_RN) | counts_RN << COUNT_SHIFT
    words_RN = (words_RN - ((words_RN >> 31) << 32)).int()  # the same 32 bits
    numbers_RN = torch.zeros_like(logprobs_RN).scatter_(1, slot_RN, logprobs_RN).view(torch.int32)
    return torch.where(none_R[:, None], 0, torch.cat([words_RN, numbers_RN], 1))
