"""The soft prompts extension of text-generation-webui; what it does lives in the package ``kobold_sp_plugin``."""

try:
    from kobold_sp_plugin.hosts.text_generation_webui import extension
except ModuleNotFoundError as error:  # which the host takes for a reason not to start at all
    raise ImportError(f"{error}. `kobold-sp install` puts what is missing into the host's environment.") from error

params = {"display_name": "Soft prompts", "is_tab": False}

setup = extension.setup
ui = extension.ui
custom_css = extension.custom_css
custom_js = extension.custom_js
state_modifier = extension.state_modifier
