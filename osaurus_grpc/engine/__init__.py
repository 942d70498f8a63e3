"""From prompt tokens to generated tokens: scheduling, batching and sampling on one MLX thread."""
