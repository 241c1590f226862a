#!/usr/bin/env python
"""
Train, resume or evaluate a detector, with or without distillation.

    train_net.py --config-file configs/quickstart/feature_lp.yaml [--resume | --eval-only]
                 [KEY VALUE ...]
"""

from kd_det.engine.main import main

if __name__ == "__main__":
    main()
