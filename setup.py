"""
For `pip install -e .` with old tools, and for what a wheel has beside the packages.

Everything else is declared in pyproject.toml.
"""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

# From the root of the repository into kd_det/shipped/, where `kd-det configs` finds them.
SHIPPED = ("configs", "train_net.py")


class BuildWithConfigs(build_py):
    """Adds the configs and train_net.py, which in a checkout stand beside the packages."""

    def run(self) -> None:
        """Copy the packages, then these; an editable installation finds them where they are."""
        super().run()
        if self.editable_mode:
            return
        folder = Path(self.build_lib, "kd_det", "shipped")
        shutil.rmtree(folder, ignore_errors=True)  # of an earlier build
        folder.mkdir(parents=True)
        for name in SHIPPED:
            if Path(name).is_dir():
                shutil.copytree(name, folder / name)
            else:
                shutil.copy(name, folder / name)


setup(cmdclass={"build_py": BuildWithConfigs})
