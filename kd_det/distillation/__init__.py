"""The wrapper around teacher and student: captures, pairing, views, schedules."""

from kd_det.distillation.api import Weighted, distill, load_teacher
from kd_det.distillation.detector import DistillationDetector
from kd_det.distillation.teacher import Teacher

__all__ = ["DistillationDetector", "Teacher", "Weighted", "distill", "load_teacher"]
