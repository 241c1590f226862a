"""The wrapper around teacher and student: captures, pairing, views, schedules."""

from kd_det.distillation.detector import DistillationDetector

__all__ = ["DistillationDetector"]
