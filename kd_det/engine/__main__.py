"""`python -m kd_det.engine`: the same as train_net.py, from anywhere."""

from kd_det.engine.console import plain_errors
from kd_det.engine.ending import end_with_parent
from kd_det.engine.main import main

if __name__ == "__main__":
    end_with_parent()
    with plain_errors():
        main()
