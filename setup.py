"""Compiles csrc/cpu while qcore is installed or a wheel is built. Without a C compiler qcore is installed all the same:
slower code serves, and `qcore build-kernels` can compile later. All else stands in pyproject.toml.
"""

import importlib.util
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

spec = importlib.util.spec_from_file_location("recipe", Path(__file__).parent / "csrc/build.py")
recipe = importlib.util.module_from_spec(spec)
spec.loader.exec_module(recipe)


class BuildWithNative(build_py):
    """Puts the library beside its sources: in the wheel, or in this folder when the installation is editable."""

    def run(self):
        super().run()
        target = Path(
            self.get_package_dir("qcore_plugins.csrc") if self.editable_mode else f"{self.build_lib}/qcore_plugins/csrc"
        )
        target = target / "cpu" / recipe.LIBRARY
        target.unlink(missing_ok=True)  # one of older sources
        problem = recipe.compile_cpu(target)
        if problem:
            print(f"qcore: without its compiled CPU code: {problem}")


class WithNative(Distribution):
    """Tells setuptools that what is installed depends on the platform."""

    def has_ext_modules(self):
        return recipe.compiler() is not None


class PlatformWheel(bdist_wheel):
    """A wheel for this platform and every Python when there is a library in it, else for every platform."""

    def get_tag(self):
        _, _, platform = super().get_tag()
        return ("py3", "none", platform)


setup(distclass=WithNative, cmdclass={"build_py": BuildWithNative, "bdist_wheel": PlatformWheel})
