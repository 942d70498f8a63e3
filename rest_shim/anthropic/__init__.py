"""Anthropic's Messages API: what a request may hold, its conversion both ways, its routes."""
