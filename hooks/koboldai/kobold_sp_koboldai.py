"""Lies in KoboldAI's Python environment, beside the ``.pth`` file that imports it at every start of that Python.

So it costs next to nothing, and does no harm where the package is gone: it waits until ``flask_session`` is imported.
"""

import sys


class Waiting:
    hook = None

    def find_spec(self, name, path=None, target=None):
        if name != "flask_session":
            return None
        sys.meta_path.remove(self)
        from importlib.util import find_spec

        try:
            from kobold_sp_plugin.hosts.koboldai import arm

            self.hook = arm()
        except Exception as error:  # whatever fails, the host starts
            import logging

            logging.getLogger("kobold_sp_plugin").warning("kobold_sp_plugin stays out of this host: %r", error)
        return find_spec(name)


waiting = Waiting()
sys.meta_path.insert(0, waiting)
