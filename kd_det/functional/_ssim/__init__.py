"""The fast parts of `kd_det.functional.ssim`."""
