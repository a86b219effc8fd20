"""The head on CUDA: matrix products by cuBLAS, the passes over the logits by two Triton kernels.

Importable without triton and without a GPU; `AVAILABLE` says whether triton is installed. Its arithmetic is verified on
a CPU by triton's interpreter; it has not been run on a GPU.
"""

from __future__ import annotations

import math
from importlib.util import find_spec

import torch
from torch import Tensor

from distill_ray.losses.passes import HeadInputs, RowSums

AVAILABLE = find_spec("triton") is not None

_CHUNK_BYTES = 176 * 2**20
"""Logits of one chunk in float32; the weight's float32 gradient is read and written once a chunk, so few are wanted."""
_EMPTY = -1e29
"""A maximum below this is of no logits at all."""


class TritonPass:
    """`HeadPass` by Triton kernels over a whole [rows, V] chunk. Float64 is not supported.

    Args:
        inputs: of the call.
        rows: of a chunk; None takes about 176 MiB of float32 logits.
        block: logits of a row that a program holds at once.
    """

    def __init__(self, inputs: HeadInputs, rows: int | None = None, block: int | None = None) -> None:
        from distill_ray.losses import triton_kernels

        self._kernels, self._block = triton_kernels, block or triton_kernels.BLOCK
        self._in, V = inputs, inputs.vocab_size
        n = rows or max(16, _CHUNK_BYTES // (4 * V) // 16 * 16)
        total, device = len(inputs.hidden_ND), inputs.hidden_ND.device
        self.chunks = [slice(a, min(a + n, total)) for a in range(0, total, n)]
        self._raw_nV = torch.empty(min(n, total), V, dtype=torch.float32, device=device)
        self._other = next((t for t in inputs.temperatures if t != 1.0), None)
        self._rest: dict[float, Tensor] = {}
        self._slope_nE: Tensor | None = None
        self._dhidden_ND = torch.zeros_like(inputs.hidden_ND) if inputs.needs[0] else None
        self._dweight_VD = None
        if inputs.needs[1]:
            self._dweight_VD = torch.empty_like(inputs.weight_VD, dtype=torch.float32)
            # The first chunk overwrites: only what no chunk writes is filled here.
            self._dweight_VD[V if self.chunks else 0 :] = 0
        self._dbias_V = None
        if inputs.needs[2] and inputs.bias_V is not None:
            self._dbias_V = torch.zeros_like(inputs.bias_V, dtype=torch.float32)

    def score(self, chunk: int) -> RowSums:
        """See `HeadPass`."""
        rows, V = self.chunks[chunk], self._in.vocab_size
        ids_nE = self._in.ids.ids_NE[rows]
        raw_nV = self._raw_nV[: len(ids_nE)]
        _product(self._in.hidden_ND[rows], self._in.weight_VD[:V].T, raw_nV, beta=0)
        if self._in.bias_V is not None:
            raw_nV += self._in.bias_V[:V]
        logits_nE = raw_nV.gather(1, ids_nE).double() * self._in.logit_scale
        slope_nE = torch.full_like(logits_nE, self._in.logit_scale)
        if self._in.softcap is not None:
            t_nE = torch.tanh(logits_nE / self._in.softcap)
            logits_nE, slope_nE = t_nE * self._in.softcap, slope_nE * (1 - t_nE**2)
        self._slope_nE = slope_nE
        raw_nV.scatter_(1, ids_nE, -math.inf)
        top_n, sum_1_n, sum_T_n = torch.zeros(3, len(raw_nV), dtype=torch.float32, device=raw_nV.device)
        arguments = (raw_nV, V, top_n, sum_1_n, sum_T_n, V, *self._transform())
        self._launch(self._kernels.rest_sums, len(raw_nV), arguments)
        top_n = top_n.double()
        self._rest = {1.0: sum_1_n.double().log() + top_n}
        if self._other is not None:
            self._rest[self._other] = sum_T_n.double().log() + top_n / self._other
        return RowSums(logits_nE, self._rest, torch.where(top_n < _EMPTY, -math.inf, top_n))

    def _transform(self) -> tuple[float, float, float]:
        return self._in.logit_scale, self._in.softcap or 0.0, 1 / (self._other or 1.0)

    def _launch(self, kernel: object, rows: int, arguments: tuple[object, ...]) -> None:
        two, has_cap = self._other is not None, self._in.softcap is not None
        self._kernels.launch(kernel, rows, *arguments, has_cap=has_cap, two=two, block=self._block)

    def differentiate(self, chunk: int, dlogits_NE: Tensor, drest: dict[float, Tensor]) -> None:
        """See `HeadPass`."""
        assert self._slope_nE is not None  # score went before
        rows, V = self.chunks[chunk], self._in.vocab_size
        hidden_nD = self._in.hidden_ND[rows]
        raw_nV = self._raw_nV[: len(hidden_nD)]
        # In place: a bf16 gradient takes the first half of its row's float32 logits.
        d_nV = raw_nV.view(hidden_nD.dtype)[:, :V]
        zero_n = torch.zeros(len(hidden_nD), dtype=torch.float32, device=raw_nV.device)
        rest, gain = [], []
        for t in (1.0, self._other or 1.0):
            none_n = self._rest[t] == -math.inf
            rest.append(torch.where(none_n, 0, self._rest[t]).float())
            gain.append(torch.where(none_n, 0, drest[t] / t).float() if t in drest else zero_n)
        arguments = (raw_nV, V, d_nV, d_nV.stride(0), *rest, *gain, V, *self._transform())
        self._launch(self._kernels.write_gradient, len(d_nV), arguments)
        named_nE = (dlogits_NE * self._slope_nE).to(d_nV.dtype)
        d_nV.scatter_add_(1, self._in.ids.ids_NE[rows], named_nE)
        if self._dhidden_ND is not None:
            self._dhidden_ND[rows] = d_nV @ self._in.weight_VD[:V].to(d_nV.dtype)
        if self._dweight_VD is not None:
            _product(d_nV.T, hidden_nD, self._dweight_VD[:V], beta=0 if chunk == 0 else 1)
        if self._dbias_V is not None:
            self._dbias_V[:V] += d_nV.sum(0, dtype=torch.float32)

    def gradients(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """See `HeadPass`."""
        return self._in.as_given(self._dhidden_ND, self._dweight_VD, self._dbias_V)


def _product(a: Tensor, b: Tensor, total: Tensor, *, beta: int) -> None:
    """total = beta·total + a @ b, with float32 sums of products in the type of `a`."""
    b = b.to(a.dtype)
    if a.dtype == torch.float32:
        total.addmm_(a, b, beta=beta)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=torch.float32, beta=beta, out=total)
    else:
        total.addmm_(a.float(), b.float(), beta=beta)
