"""Dense detectors that Detectron2 cannot build from yaml, and how dense heads are decoded."""
