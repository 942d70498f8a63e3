"""Clients as people use them, each in an environment of its own, against the running server."""
