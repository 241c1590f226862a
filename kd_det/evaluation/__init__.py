"""Metrics: COCO, CrowdHuman, and the paired bootstrap of AP differences."""
