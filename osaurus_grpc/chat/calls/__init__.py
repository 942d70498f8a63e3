"""How models write tool calls: call syntaxes, their grammars, and reading them out of a stream."""
