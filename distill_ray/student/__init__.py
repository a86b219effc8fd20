"""The student: its first weights, its loss inside one module, and DeepSpeed around it (imported inside functions).

Layout: `build` makes the Hugging Face model, `lora` adds and merges adapters, `module` joins body and head loss,
`schedule` is the learning rate, `engine` wraps DeepSpeed ZeRO 1/2/3, `folder` writes the result. Names are imported
from their modules: most need torch, which takes seconds, and a driver needs `published` and `weights` alone.
"""
