"""Dense detectors that Detectron2 cannot build from yaml; each brings its keys and its decoder."""
