"""`python -m kd_det.engine`: the same as train_net.py, from anywhere."""

from kd_det.engine.main import main

if __name__ == "__main__":
    main()
