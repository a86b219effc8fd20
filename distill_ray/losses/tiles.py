"""The head in tiles of rows × vocabulary, with torch operations: runs on any device, tuned for CPUs."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from distill_ray.losses.passes import HeadInputs, RowSums

_CHUNK_LOGITS = 2**25
"""Logits of one chunk: 128 MiB in float32. Fewer rows would read and write the weight's gradient more often."""
_TILE_LOGITS = 2**20
"""Logits of one tile: 4 MiB in float32, so that element-wise passes find it in the cache."""
_MOST_ROWS = 256
_LOWEST = -1e30


@dataclass(frozen=True)
class Tiling:
    """Rows of a chunk and vocabulary entries of a tile."""

    rows: int
    columns: int


def default_tiling(vocab_size: int, buffers: int = 1) -> Tiling:
    """Chunks of about 128 MiB over all their buffers, in tiles of about 4 MiB.

    Args:
        vocab_size: V.
        buffers: [rows, V] numbers kept at once: one for each temperature with a gradient, one more for a soft-cap.
    """
    rows = min(_MOST_ROWS, max(16, _CHUNK_LOGITS // (vocab_size * buffers)))
    rows = rows if rows < 32 else rows // 32 * 32
    return Tiling(rows, max(256, _TILE_LOGITS // rows))


class _Named:
    """Where the named entries of every (chunk, tile) lie: sorted by tile once, so that no tile searches for them."""

    def __init__(self, ids_NE: Tensor, vocab_size: int, tiling: Tiling) -> None:
        entries = ids_NE.shape[1]
        row_N1 = torch.arange(len(ids_NE), device=ids_NE.device)[:, None]
        tile_NE = ids_NE // tiling.columns
        width_NE = (vocab_size - tile_NE * tiling.columns).clamp_max(tiling.columns)
        in_chunk_N1 = row_N1 % tiling.rows
        tiles = -(-vocab_size // tiling.columns)
        key = (row_N1 // tiling.rows * tiles + tile_NE).flatten()
        order = key.argsort()
        self._in_tile = (in_chunk_N1 * width_NE + ids_NE - tile_NE * tiling.columns).flatten()[order]
        self._in_row = (in_chunk_N1 * entries + torch.arange(entries, device=ids_NE.device)).flatten()[order]
        chunks = -(-len(ids_NE) // tiling.rows)
        ends = torch.bincount(key, minlength=chunks * tiles).cumsum(0)
        self._ends = [0, *ends.tolist()]
        self._tiles = tiles

    def at(self, chunk: int, tile: int) -> tuple[Tensor, Tensor]:
        """(places in the flattened tile, places in the flattened [n, K + 1] of the chunk)."""
        i = chunk * self._tiles + tile
        span = slice(self._ends[i], self._ends[i + 1])
        return self._in_tile[span], self._in_row[span]


class TorchTiles:
    """`HeadPass` by torch operations.

    A tile's logits are replaced at once by exp((z − top)/T), top the largest logit of the row in that tile, while they
    are in the cache. Exponentials are taken once: the gradient is a multiple of them, row by row.

    Args:
        inputs: of the call.
        tiling: rows and columns; None takes `default_tiling`.
    """

    def __init__(self, inputs: HeadInputs, tiling: Tiling | None = None) -> None:
        self._in, kind = inputs, inputs.kind
        wanted = any(inputs.needs)
        buffers = len(inputs.kept) + (inputs.softcap is not None) if wanted else 1
        self._tiling = tiling or default_tiling(inputs.vocab_size, max(1, buffers))
        n, v, V = self._tiling.rows, self._tiling.columns, inputs.vocab_size
        rows, device = min(n, len(inputs.hidden_ND)), inputs.hidden_ND.device
        self.chunks = [slice(a, min(a + n, len(inputs.hidden_ND))) for a in range(0, len(inputs.hidden_ND), n)]
        self._tiles = [slice(a, min(a + v, V)) for a in range(0, V, v)]
        self._named = _Named(inputs.ids.ids_NE, V, self._tiling)
        # Temperatures with a gradient first: the logits become the exponentials of the first in place.
        self._temperatures = sorted(inputs.temperatures, key=lambda t: t not in inputs.kept)
        width = V if wanted else min(v, V)
        stored = inputs.kept or self._temperatures[:1]
        self._exp = {t: torch.empty(rows * width, dtype=kind, device=device) for t in stored}
        self._slope = torch.empty(rows * width, dtype=kind, device=device) if inputs.softcap and wanted else None
        spare = rows * min(v, V) if len(self._temperatures) > len(self._exp) else 0
        self._spare = torch.empty(spare, dtype=kind, device=device)
        self._hidden_nD = torch.empty(0)
        self._top_nt = torch.empty(0)
        self._rest: dict[float, Tensor] = {}
        self._dhidden_ND = torch.zeros_like(inputs.hidden_ND) if inputs.needs[0] else None
        self._dweight_VD = self._accumulator(inputs.weight_VD) if inputs.needs[1] else None
        self._dbias_V = None
        if inputs.needs[2] and inputs.bias_V is not None:
            self._dbias_V = torch.zeros_like(inputs.bias_V, dtype=kind)

    def _accumulator(self, weight_VD: Tensor) -> Tensor:
        # The first chunk overwrites: only what no chunk writes is filled here.
        total = torch.empty_like(weight_VD, dtype=self._in.kind, memory_format=torch.contiguous_format)
        total[self._in.vocab_size if self.chunks else 0 :] = 0
        return total

    def _view(self, flat: Tensor, rows: int, tile: slice) -> Tensor:
        """The [rows, columns] of a tile: contiguous, one tile after another; always the first where only one fits."""
        begin = tile.start * rows if len(flat) >= rows * self._in.vocab_size else 0
        return flat[begin : begin + rows * (tile.stop - tile.start)].view(rows, -1)

    def _weight(self, tile: slice) -> Tensor:
        # Products of a bf16 head on a CPU are taken in float32: it has no product that keeps float32 sums.
        return self._in.weight_VD[tile].to(self._in.kind)

    def _logits(self, tile: slice, out: Tensor) -> None:
        weight_vD = self._weight(tile)
        if self._in.bias_V is None:
            torch.mm(self._hidden_nD, weight_vD.T, out=out)
        else:
            bias_v = self._in.bias_V[tile].to(out.dtype) * self._in.logit_scale
            torch.addmm(bias_v, self._hidden_nD, weight_vD.T, out=out)
        if self._in.softcap is None:
            return
        out.div_(self._in.softcap).tanh_()
        if self._slope is not None:
            slope = self._view(self._slope, len(out), tile)
            torch.mul(out, out, out=slope).neg_().add_(1)
        out.mul_(self._in.softcap)

    def score(self, chunk: int) -> RowSums:
        """See `HeadPass`."""
        rows, kind = self.chunks[chunk], self._in.kind
        self._hidden_nD = self._in.hidden_ND[rows].to(kind)
        if self._in.logit_scale != 1.0:
            self._hidden_nD = self._hidden_nD * self._in.logit_scale
        n = len(self._hidden_nD)
        named_nE = torch.empty(n, self._in.ids.ids_NE.shape[1], dtype=kind, device=self._hidden_nD.device)
        top_nt = torch.empty(n, len(self._tiles), dtype=kind, device=self._hidden_nD.device)
        sums = {t: torch.empty_like(top_nt) for t in self._temperatures}
        first = self._temperatures[0]
        for i, tile in enumerate(self._tiles):
            z_nv = self._view(self._exp[first], n, tile)
            self._logits(tile, z_nv)
            places, slots = self._named.at(chunk, i)
            named_nE.view(-1)[slots] = z_nv.view(-1)[places]
            z_nv.view(-1)[places] = -math.inf
            top_n1 = z_nv.amax(1, keepdim=True).clamp_min_(_LOWEST)
            z_nv.sub_(top_n1)
            top_nt[:, i] = top_n1[:, 0]
            for t in reversed(self._temperatures):
                e_nv = z_nv
                if t != first:
                    e_nv = self._view(self._exp.get(t, self._spare), n, tile)
                    torch.mul(z_nv, 1 / t, out=e_nv).exp_()
                elif t == 1.0:
                    e_nv.exp_()
                else:
                    e_nv.mul_(1 / t).exp_()
                sums[t][:, i] = e_nv.sum(1)
        self._top_nt = top_nt.double()
        self._rest = {t: (s.double().log() + self._top_nt / t).logsumexp(1) for t, s in sums.items()}
        return RowSums(named_nE.double(), self._rest, self._top_nt.amax(1))

    def differentiate(self, chunk: int, dlogits_NE: Tensor, drest: dict[float, Tensor]) -> None:
        """See `HeadPass`."""
        n, kind, first = len(dlogits_NE), self._in.kind, self._temperatures[0]
        factor = {t: self._factors(t, g).to(kind) for t, g in drest.items()}
        dlogits = dlogits_NE.to(kind).flatten()
        dhidden_nD = torch.zeros_like(self._hidden_nD)
        for i, tile in enumerate(self._tiles):
            d_nv = self._view(self._exp[first], n, tile)
            d_nv.mul_(factor[first][:, i, None])
            for t in factor:
                if t != first:
                    d_nv.addcmul_(self._view(self._exp[t], n, tile), factor[t][:, i, None])
            places, slots = self._named.at(chunk, i)
            # These places are 0 so far; an id that stands twice in a row adds up.
            d_nv.view(-1).index_add_(0, places, dlogits[slots])
            if self._slope is not None:
                d_nv.mul_(self._view(self._slope, n, tile))
            self._add(chunk, tile, d_nv, dhidden_nD)
        if self._dhidden_ND is not None:
            self._dhidden_ND[self.chunks[chunk]] = dhidden_nD.mul_(self._in.logit_scale).to(self._dhidden_ND.dtype)

    def _factors(self, temperature: float, drest_n: Tensor) -> Tensor:
        """[n, tiles] what the stored exponentials are multiplied by: drest·exp(top/T − rest)/T."""
        rest_n1 = self._rest[temperature][:, None]
        share_nt = (self._top_nt / temperature - rest_n1).exp()
        # No token at all beside the named ones: rest is −inf, and there is nothing to multiply.
        return torch.where(rest_n1 == -math.inf, 0, share_nt * drest_n[:, None] / temperature)

    def _add(self, chunk: int, tile: slice, d_nv: Tensor, dhidden_nD: Tensor) -> None:
        if self._dhidden_ND is not None:
            dhidden_nD.addmm_(d_nv, self._weight(tile))
        if self._dweight_VD is not None:
            self._dweight_VD[tile].addmm_(d_nv.T, self._hidden_nD, beta=0 if chunk == 0 else 1)
        if self._dbias_V is not None:
            self._dbias_V[tile] += d_nv.sum(0) * self._in.logit_scale

    def gradients(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """See `HeadPass`."""
        return self._in.as_given(self._dhidden_ND, self._dweight_VD, self._dbias_V)
