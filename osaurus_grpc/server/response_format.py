"""The form that a request wants its answers in, as a grammar."""

from __future__ import annotations

from osaurus_grpc.chat.grammar import Grammar, Grammars, TokenizedModel
from osaurus_grpc.v1 import chat_pb2


async def response_grammar(
    wanted: chat_pb2.ResponseFormat, model: TokenizedModel, grammars: Grammars
) -> Grammar | None:
    """What an answer has to follow; None for free text.

    Raises:
        InvalidRequestError: The schema, expression or grammar is none, or cannot be enforced.
        CapabilityError: Nothing can be enforced on this model's tokens.
        OverloadedError: Too many grammars are being compiled.
    """
    match wanted.WhichOneof("format"):
        case None:
            return None
        case "json_object":
            return await grammars.json_object(model, field="response_format.json_object")
        case "json_schema":
            return await grammars.json_schema(
                model,
                wanted.json_schema.schema_json,
                strict=wanted.json_schema.strict,
                field="response_format.json_schema.schema_json",
            )
        case "regex":
            return await grammars.regex(model, wanted.regex, field="response_format.regex")
        case "grammar":
            return await grammars.lark(model, wanted.grammar, field="response_format.grammar")
