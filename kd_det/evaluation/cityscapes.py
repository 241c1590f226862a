"""Detectron2's evaluator of Cityscapes' instances, with the package's files in the run's folder."""

import json
import os
from typing import Any

import numpy as np
from detectron2.evaluation import CityscapesInstanceEvaluator


class CityscapesInstances(CityscapesInstanceEvaluator):
    """
    Same metrics as its base.

    The package cityscapesscripts 2.3 writes `matches.json` into the working directory, and cannot
    write it with numpy 2.4, whose counts are no Python numbers.

    Args:
        dataset_name: registered name.
        output_dir: where `matches.json` goes.
    """

    def __init__(self, dataset_name: str, output_dir: str) -> None:
        super().__init__(dataset_name)
        self._output_dir = output_dir

    def evaluate(self) -> Any:
        """Return {"segm": {"AP": ..., "AP50": ...}} from 0 to 100, in the main process."""
        from cityscapesscripts.evaluation import evalInstanceLevelSemanticLabeling as package

        original = package.writeDict2JSON
        package.writeDict2JSON = self._write
        try:
            return super().evaluate()
        finally:
            package.writeDict2JSON = original

    def _write(self, content: Any, file_name: str) -> None:
        os.makedirs(self._output_dir, exist_ok=True)
        # An absolute name stays what it is.
        with open(os.path.join(self._output_dir, file_name), "w", encoding="utf-8") as file:
            json.dump(content, file, default=_plain, sort_keys=True)


def _plain(value: Any) -> Any:
    """Return what JSON can hold of a number of numpy's, or of an object of the package's."""
    return value.item() if isinstance(value, np.generic) else vars(value)
