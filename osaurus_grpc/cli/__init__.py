"""The osaurus command."""
