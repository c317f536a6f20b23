"""Adds the .pth file to the wheel: setuptools has no declarative way to place a file beside the packages."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

PTH_NAME = "_torchvision_cpu.pth"


class BuildWithPth(build_py):
    """Copy the .pth file into the root of the build, so that it lands in site-packages."""

    def run(self):
        super().run()
        self.copy_file(str(Path(__file__).parent / PTH_NAME), str(Path(self.build_lib) / PTH_NAME))


setup(cmdclass={"build_py": BuildWithPth})
