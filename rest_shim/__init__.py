"""HTTP front of the Osaurus core: OpenAI's and Ollama's APIs, mapped onto gRPC."""
