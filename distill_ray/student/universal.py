"""DeepSpeed's universal format: a ZeRO checkpoint, which fits one number of workers, made into one that fits any."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from distill_ray.errors import DistillError


def convert(folder: Path, out: Path, zero_stage: int, processes: int) -> None:
    """Run DeepSpeed's converter over all ranks' files; needs about as much disk again, twice for a moment.

    Args:
        folder: every rank's files, as DeepSpeed names them.
        out: created; gets one folder a parameter, with weights and moments in float32.
        zero_stage: that the files were saved at.
        processes: work at once.

    Raises:
        DistillError: the converter failed; ends with what it said.
    """
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal"]
    command += ["--input_folder", str(folder), "--output_folder", str(out)]
    command += ["--num_extract_workers", str(processes), "--num_merge_workers", str(processes)]
    if zero_stage < 3:
        # The converter wants a description of tensor-parallel layouts, and takes its absence for "none" only when told.
        command.append("--inject_missing_state")
    env = {**os.environ, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode != 0:
        said = " ".join(done.stdout.strip().splitlines()[-3:])
        raise DistillError(f"DeepSpeed could not convert the checkpoint in {folder} (exit {done.returncode}): {said}")
