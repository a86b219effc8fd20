"""The student: its first weights, its loss inside one module, and DeepSpeed around it (imported inside functions).

Layout: `build` makes the Hugging Face model, `lora` adds and merges adapters, `module` joins body and head loss,
`schedule` is the learning rate, `engine` wraps DeepSpeed ZeRO 1/2/3, `folder` writes the result.
"""

from distill_ray.student.build import build_initial
from distill_ray.student.engine import StepResult, StudentEngine, check_resumable
from distill_ray.student.folder import write_folder
from distill_ray.student.lora import add_lora, merge_lora
from distill_ray.student.module import DistillModule, loss_spec, shared_vocabulary
from distill_ray.student.schedule import learning_rate

__all__ = [
    "DistillModule",
    "StepResult",
    "StudentEngine",
    "add_lora",
    "build_initial",
    "check_resumable",
    "learning_rate",
    "loss_spec",
    "merge_lora",
    "shared_vocabulary",
    "write_folder",
]
