"""scikit-build-core as the build backend, asking for torch only where there is none.

Compiling against torch needs its headers. Named in `build-system.requires`, torch would be downloaded into every
isolated build, several gigabytes that an environment with torch already has.
"""

import subprocess
import sys

from scikit_build_core import build as _build
from scikit_build_core.build import *  # noqa: F403  the hooks of PEP 517


def _torch_if_missing() -> list[str]:
    # -I leaves out the variables by which pip hides the environment's own packages from a build.
    command = [sys.executable, "-I", "-c", "import importlib.metadata as m; print(m.version('torch'))"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    version = found.stdout.strip().split(".")
    enough = found.returncode == 0 and (int(version[0]), int(version[1])) >= (2, 11)
    return [] if enough else ["torch>=2.11"]


def get_requires_for_build_wheel(config_settings=None):
    return _build.get_requires_for_build_wheel(config_settings) + _torch_if_missing()


def get_requires_for_build_editable(config_settings=None):
    return _build.get_requires_for_build_editable(config_settings) + _torch_if_missing()
