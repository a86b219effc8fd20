"""What the server imports from which `apart` forks: the slow modules of the command line's own process."""

import ray
import ray.data
import ray.train.torch
import torch
import transformers

import distill_ray.cli
import distill_ray.pipeline
import distill_ray.status
import distill_ray.student.published
import distill_ray.student.weights
import distill_ray.targets.reader
import distill_ray.targets.writer

__all__ = ["distill_ray", "ray", "torch", "transformers"]
