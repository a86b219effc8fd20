"""Weights of the student that stay as they are."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from distill_ray.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def freeze(model: PreTrainedModel, patterns: tuple[str, ...]) -> None:
    """Take the weights of these names or globs out of training, in place; a tied one under any of its names.

    Raises:
        UserError: a pattern matches no weight, or nothing is left to train.
    """
    named = dict(model.named_parameters(remove_duplicate=False))
    for pattern in patterns:
        found = [parameter for name, parameter in named.items() if fnmatchcase(name, pattern)]
        if not found:
            raise UserError(
                f"student.freeze: no weight of {type(model).__name__} is named {pattern!r}; among its names are "
                f"{', '.join([*named][:2])} and {[*named][-1]}"
            )
        for parameter in found:
            parameter.requires_grad_(False)
    if patterns and not any(parameter.requires_grad for parameter in named.values()):
        raise UserError(f"student.freeze={list(patterns)} leaves no weight to train; name fewer")
