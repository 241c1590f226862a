"""The fast parts of `kd_det.functional.gaussian_importance`."""
