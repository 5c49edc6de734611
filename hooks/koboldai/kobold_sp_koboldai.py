"""Lies in KoboldAI's Python environment, beside the ``.pth`` file that imports it at every start."""

from kobold_sp_plugin.hosts.koboldai import arm

hook = arm()
