"""
Checkpoints of which the part called `model` is exactly the student's Detectron2 state dict.

Everything else sits beside it: `trainer` (optimizer, schedule, iteration, random state) and `kd`
(adapters, the teacher's identity, the loss normaliser).
"""

from kd_det.checkpoint.checkpointer import KDCheckpointer
from kd_det.checkpoint.state import KDState, student_of

__all__ = ["KDCheckpointer", "KDState", "student_of"]
