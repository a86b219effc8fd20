"""The audit: before money goes into training, stored rows are compared with the teacher asked again another way.

sample.py      which sequences
source.py      tokens, mask and document against the corpus tokenised again; rows against their own tokens
rows.py        ids and log-probabilities of a row against the row scored again, within the codec's rounding
columns.py     the row's tails, actual token and entropy
pair.py        one sequence, stored and scored again
tolerance.py   how far two runs of one teacher may lie apart, and what that lets through
unit.py        the audit of one unit
outcome.py     what was compared and found, in words and as a document
witnessed.py   what the capture's own teachers answered a second time
remote.py      the teacher loaded anew, in one Ray actor
verb.py        the run over the sample, and the document that publishes its outcome
"""

from distill_ray.audit.verb import outdated, require_sample, run

__all__ = ["outdated", "require_sample", "run"]
