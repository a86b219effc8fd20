"""The model card: lineage, licence, recipe and figures of a published student."""

from __future__ import annotations

import json
from typing import Any

from distill_ray.report.gate import failures, unjudged
from distill_ray.report.table import METRICS, MODELS


def model_card(report: dict[str, Any], *, teacher: str, base: str | None, licence: str, dtype: str) -> str:
    """README.md of the exported folder.

    Args:
        report: as `build_report` gives it.
        teacher: name of the teacher, without its location.
        base: name of the model whose weights the student began with; None where they were random.
        licence: `export.licence`.
        dtype: of the published weights.
    """
    identity, loss = report["identity"], report["recipe"]["loss"]
    front = {
        "license": licence,
        **({} if base is None else {"base_model": base}),
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["distillation", "distill-ray"],
        "model-index": [_results(report)],
    }
    gate = report["gate"]
    verdict = "none stated" if not gate else "; ".join(failures(gate)) or "passed"
    if open_ := unjudged(gate):
        verdict += f"; not judged: {'; '.join(open_)}"
    return "\n".join(
        [
            "---",
            # JSON is YAML, and its quoting needs no second thought.
            *(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in front.items()),
            "---",
            "",
            f"# {identity['name']} {identity['version']}",
            "",
            f"A student distilled from **{teacher}** with distill_ray, on the teacher's stored soft targets: objective "
            f"`{loss['objective']}`, temperature {loss['temperature']:g}, weight of the hard labels "
            f"{loss['hard_label_weight']:g}.",
            "",
            "## Figures on held-out text",
            "",
            "| | teacher | student before | student after |",
            "|---|---:|---:|---:|",
            *(
                f"| {label} | " + " | ".join(f"{report[m][key]:{spec}}" for m, _ in MODELS) + " |"
                for key, label, spec in METRICS
            ),
            "",
            f"Bounds of the recipe: {verdict}.",
            "",
            "## How to load",
            "",
            "```python",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            'model = AutoModelForCausalLM.from_pretrained("path/to/this/folder", dtype="auto")',
            'tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")',
            "```",
            "",
            "With vLLM: `vllm serve path/to/this/folder`.",
            "",
            "## Lineage",
            "",
            "| | |",
            "|---|---|",
            f"| teacher | {teacher} |",
            f"| teacher weights | `{identity['teacher']}` |",
            *_start(identity),
            f"| licence | {licence} |",
            f"| type of these weights | {dtype} |",
            f"| tokenizer | `{identity['tokenizer']}` |",
            f"| corpus fingerprint | `{identity['corpus']}` ({identity['units']:,} units) |",
            f"| capture fingerprint | `{identity['capture']}` |",
            f"| trained weights | `{identity['student']}` |",
            f"| recipe fingerprint | `{identity['recipe']}` |",
            "",
            "## Recipe",
            "",
            "The identity fields that the recipe fingerprint covers, without where things lie and how they were run.",
            "",
            "```json",
            json.dumps(report["recipe"], indent=2, ensure_ascii=False, sort_keys=True),
            "```",
            "",
        ]
    )


def _start(identity: dict[str, Any]) -> list[str]:
    """Of reports before December 2026, nothing."""
    found = [f"| student before training | {identity['start']} |"] if identity.get("start") else []
    return found + ([f"| its weights | `{identity['start_weights']}` |"] if identity.get("start_weights") else [])


def _results(report: dict[str, Any]) -> dict[str, Any]:
    """The student's figures as a hub reads them (Hugging Face, model card metadata, `model-index`)."""
    identity = report["identity"]
    metrics = [{"type": key, "name": label, "value": report["after"][key]} for key, label, _ in METRICS]
    result = {
        "task": {"type": "text-generation"},
        "dataset": {"name": f"held-out text of {identity['name']} {identity['version']}", "type": "held-out"},
        "metrics": metrics,
    }
    return {"name": f"{identity['name']} {identity['version']}", "results": [result]}
