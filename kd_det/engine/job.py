"""What the command line asks of a training job, and its config."""

import argparse
import functools
from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser

from kd_det.config import load_config
from kd_det.config.lazy import is_lazy, load_lazy
from kd_det.engine.lazy_settings import settings_of

_EPILOG = """
Train (the teacher first, if it is absent), continue, evaluate the student alone:
  train_net.py --config-file configs/shapes2/ssim.yaml
  train_net.py --config-file configs/shapes2/ssim.yaml --resume
  train_net.py --config-file configs/shapes2/ssim.yaml --eval-only

Override any key:
  train_net.py --config-file F SOLVER.BASE_LR 0.001 KD.SSIM.WEIGHT 2.0
"""


class Job:
    """
    The arguments of a command line, and the config that they name.

    Args:
        args: of Detectron2's parser.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args

    @classmethod
    def from_command_line(cls, argv: Sequence[str] | None = None) -> "Job":
        """Parse Detectron2's arguments; `argv` None: of this process."""
        parser = default_argument_parser(epilog=_EPILOG)
        args = parser.parse_args(argv)
        if not args.config_file:
            parser.error("--config-file is required, e.g. configs/shapes2/ssim.yaml")
        return cls(args)

    @functools.cached_property
    def lazy(self) -> Any:
        """The LazyConfig, run once in a process; None for a yaml file."""
        if not is_lazy(self.args.config_file):
            return None
        return load_lazy(self.args.config_file, self.args.opts)

    @functools.cached_property
    def cfg(self) -> CfgNode:
        """The full config, read once in a process; of a LazyConfig, what the engine reads of it."""
        if self.lazy is not None:
            return settings_of(self.lazy, self.args.config_file)
        return load_config(self.args.config_file, self.args.opts)

    @property
    def gives_weights(self) -> bool:
        """Whether the command line names the weights to start from, or to evaluate."""
        keys = [str(word).partition("=")[0] for word in self.args.opts]
        return "MODEL.WEIGHTS" in keys or "train.init_checkpoint" in keys

    def __getstate__(self) -> dict[str, Any]:
        # A process that is started reads the config itself, and so does all that reading entails.
        return {"args": self.args}
