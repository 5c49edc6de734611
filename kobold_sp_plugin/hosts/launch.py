"""Runs KoboldAI's script with the hook armed, where nothing can be installed: ``python launch.py aiserver.py ...``.

``kobold-sp run`` starts this file by its path, in the host's own Python. This package is imported from where it lies,
and nothing else from there, so that the host sees its own libraries only.
"""

import importlib.util
import os
import runpy
import sys
from pathlib import Path


def main() -> None:
    """Replace this process's arguments and search path by the script's, and run it as ``__main__``."""
    script = os.path.abspath(sys.argv[1])
    del sys.argv[0]
    sys.path[0] = os.path.dirname(script)  # instead of this file's folder
    if "kobold_sp_koboldai" not in sys.modules:  # else it is installed, and armed by that
        package = Path(__file__).resolve().parents[1]
        spec = importlib.util.spec_from_file_location(
            package.name, package / "__init__.py", submodule_search_locations=[str(package)]
        )
        assert spec is not None and spec.loader is not None
        module = sys.modules[package.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        from kobold_sp_plugin.hosts.koboldai import arm

        arm()
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
