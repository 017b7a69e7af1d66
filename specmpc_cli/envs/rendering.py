"""How MuJoCo draws without a screen. To be settled before a simulator is imported, because they read the choice when they are."""

from __future__ import annotations

import ctypes.util
import os
import sys

_LIBRARIES = {"egl": "EGL", "osmesa": "OSMesa"}
INSTALL = "on Debian: apt-get install libegl1 libgl1-mesa-dri (EGL), or libosmesa6 (OSMesa)"


def choose_backend() -> str:
    """Sets MUJOCO_GL where the user has not: glfw with a screen, else the first of egl and osmesa that is installed; → its name.

    With neither, the variable stays as it is, and "nothing" is returned: tasks that draw by other means still can.
    """
    given = os.environ.get("MUJOCO_GL")
    if given:
        return given
    if sys.platform != "linux" or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"):
        return "glfw"
    for backend, library in _LIBRARIES.items():
        if ctypes.util.find_library(library):
            os.environ["MUJOCO_GL"] = backend
            return backend
    return "nothing"
