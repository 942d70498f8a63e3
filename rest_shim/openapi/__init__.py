"""The description of the HTTP API, made from the schemas that requests are checked with."""
