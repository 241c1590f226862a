"""MSAD's resolution-aligned teacher (CVPR 2021)."""
