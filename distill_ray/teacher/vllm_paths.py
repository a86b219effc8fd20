"""Which of the two paths by which rows leave vLLM can give what a capture asks for."""

from __future__ import annotations

import sys

from distill_ray.config.sections import CaptureSection, TeacherSection
from distill_ray.errors import CannotCaptureError
from distill_ray.teacher.engine import CapturePath

KNOWN_VERSIONS = ("0.32",)
"""Versions of vLLM whose source the hook was written from."""


def unknown_version() -> str | None:
    """Why the installed vLLM is not one that the hook knows, or None."""
    import vllm

    if ".".join(vllm.__version__.split(".")[:2]) in KNOWN_VERSIONS:
        return None
    return f"vLLM {vllm.__version__} is not one of {', '.join(KNOWN_VERSIONS)}"


def may_fall_back(
    path: CapturePath, unknown: str | None, section: TeacherSection, capture: CaptureSection
) -> tuple[str, ...]:
    """What to tell the user when the public path is taken.

    Raises:
        CannotCaptureError: it was excluded, is slower than GPUs are paid for, or cannot give the temperatures or draws.
    """
    why = f" ({unknown})" if unknown else ""
    if path == "worker":
        raise CannotCaptureError(f"capture inside vLLM's workers cannot be had{why}; use the project's lock file")
    if path == "auto" and section.use_gpu and not section.public_path:
        raise CannotCaptureError(
            f"capture inside vLLM's workers cannot be had{why}, and vLLM's public path is several times slower and "
            "gives no entropy; use the vLLM version of the project's lock file, or set teacher.public_path = true"
        )
    if capture.extra_temperatures:
        raise CannotCaptureError(
            f"capture.temperatures={list(capture.temperatures)}: no tail mass at T ≠ 1 by vLLM's public path{why}; "
            'use the vLLM version of the project\'s lock file, teacher.engine = "transformers" or temperatures = [1.0]'
        )
    if capture.draws:
        raise CannotCaptureError(
            f"capture.draws={capture.draws}: vLLM's public path{why} shows the top {capture.top_k} alone, and drawing "
            "from these would be biased; use the vLLM version of the project's lock file, teacher.engine = "
            '"transformers", or draws = 0 with another objective'
        )
    if path != "auto":
        return ()
    note = f"vLLM's public path is used{why}: several times slower, no entropy"
    print(f"teacher: {note}", file=sys.stderr, flush=True)
    return (note,)
