"""OpenAI's Responses API, as the Open Responses specification describes it."""
