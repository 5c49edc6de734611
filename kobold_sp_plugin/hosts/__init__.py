"""The host applications that the plugin is dropped into: one file per host, what is hooked there as data."""
