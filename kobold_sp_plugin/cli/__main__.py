"""``python -m kobold_sp_plugin.cli``."""

from . import main

main()
