"""The gRPC transport around the engine."""
