"""The embedded host: a server of its own, for anyone who has no host yet."""
