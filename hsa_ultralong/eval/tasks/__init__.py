"""Tasks that measure what a model remembers, at any exact length, for any tokenizer (README.md beside this file)."""

from hsa_ultralong.eval.tasks.catalogue import SUITES, TASKS, check_tasks, make_samples, reads_text
from hsa_ultralong.eval.tasks.material import Material
from hsa_ultralong.eval.tasks.sample import Sample, Task
from hsa_ultralong.eval.tasks.scoring import score

__all__ = ["SUITES", "TASKS", "Material", "Sample", "Task", "check_tasks", "make_samples", "reads_text", "score"]
