"""What an answer may be and how it is read: tools, reasoning, and the constraint that both make."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Final

from osaurus_grpc.chat.calls.answer import AnswerReader
from osaurus_grpc.chat.calls.lark import CallGrammar, call_grammar
from osaurus_grpc.chat.calls.rules import CheckedTool, checked_tool
from osaurus_grpc.chat.channels import ChannelGate
from osaurus_grpc.chat.constraint import EitherConstraint
from osaurus_grpc.chat.detokenize import token_bytes
from osaurus_grpc.chat.gate import ReasoningGate
from osaurus_grpc.chat.grammar import Grammar, Grammars, Trigger
from osaurus_grpc.chat.reasoning import HARMONY, begins_open, reasoning_of
from osaurus_grpc.chat.style import ChatStyle
from osaurus_grpc.chat.template import chat_style
from osaurus_grpc.engine.types import Constraint
from osaurus_grpc.errors import CapabilityError, InvalidRequestError
from osaurus_grpc.models.residency import LoadedModel
from osaurus_grpc.server.convert import visible_tools
from osaurus_grpc.server.prompts import Prompt
from osaurus_grpc.server.response_format import response_grammar
from osaurus_grpc.v1 import chat_pb2, completion_pb2

# Where Harmony's final channel opens (https://cookbook.openai.com/articles/openai-harmony).
_HARMONY_ANSWER: Final = "<|channel|>final<|message|>"
_FORCED: Final = frozenset({chat_pb2.TOOL_CHOICE_MODE_REQUIRED, chat_pb2.TOOL_CHOICE_MODE_FUNCTION})


@dataclass(frozen=True, slots=True)
class Answering:
    """How the answers of one request are held to form and read.

    Attributes:
        make_reader: Makes the reader of one answer; None where it is content and nothing else.
        shown: Special tokens that the reader has to see.
        constraint: Holds an answer to its form; each answer takes a fork of it.
    """

    make_reader: Callable[[], AnswerReader | None] = lambda: None
    shown: frozenset[int] = frozenset()
    constraint: Constraint | None = None


async def answering(
    request: chat_pb2.ChatRequest, model: LoadedModel, prompt: Prompt, grammars: Grammars
) -> Answering:
    """Readies a validated request's answers.

    Raises:
        InvalidRequestError: The response format or a tool's schema cannot be enforced, where it has to be.
        CapabilityError: Nothing can be enforced on this model's tokens, where something has to be.
    """
    tools = visible_tools(request)
    style = chat_style(model.tokenizer, with_tools=bool(tools))
    is_open = begins_open(model.tokenizer, style.marks, prompt.token_ids)
    grammar = await response_grammar(request.response_format, model, grammars)
    has_form = grammar is not None
    calls = await _calls(request, model, style, grammars, has_form=has_form) if tools else None
    inner: Constraint | None = calls
    if grammar is not None and request.tool_choice.mode not in _FORCED:
        form = grammar.constraint(_before_answer(model, style))
        # An answer is calls or has the form: its beginning tells.
        inner = form if calls is None else EitherConstraint([form, calls])
    make_reader = partial(
        style.reader,
        is_reasoning=is_open,
        tools=tools,
        streams_calls=calls is not None,
        is_forced=request.tool_choice.mode in _FORCED,
    )
    return Answering(
        make_reader=make_reader,
        shown=style.shown,
        constraint=_gated(request, model, style, inner, is_open=is_open, has_form=has_form),
    )


async def completion_answering(
    request: completion_pb2.CompleteRequest, model: LoadedModel, grammars: Grammars
) -> Answering:
    """Readies a validated completion's answers. Raises as answering()."""
    grammar = await response_grammar(request.response_format, model, grammars)
    return Answering(constraint=None if grammar is None else grammar.constraint())


def _before_answer(model: LoadedModel, style: ChatStyle) -> Trigger | None:
    """What a model writes before its answer proper."""
    if style.marks is not HARMONY:
        return None
    return Trigger(token_ids=tuple(model.tokenizer.encode(_HARMONY_ANSWER, add_special_tokens=False)))


async def _calls(
    request: chat_pb2.ChatRequest, model: LoadedModel, style: ChatStyle, grammars: Grammars, *, has_form: bool
) -> Constraint | None:
    """Holds calls to the tools' schemas: forced ones at once, others from what opens one.

    Where an answer that is no call has a form of its own, calls are all there is, too.
    """
    mode = request.tool_choice.mode
    is_forced = mode in _FORCED or has_form
    is_named = mode == chat_pb2.TOOL_CHOICE_MODE_FUNCTION
    is_parallel = not is_named and (
        not request.HasField("parallel_tool_calls") or request.parallel_tool_calls
    )
    must_hold = is_forced or any(tool.function.strict for tool in request.tools)
    try:
        tools: list[CheckedTool] = [
            checked_tool(tool, index, is_strict=is_forced or tool.strict)
            for index, tool in enumerate(visible_tools(request))
            if not is_named or tool.name == request.tool_choice.function_name
        ]
        grammar = call_grammar(
            style.syntax, model.tokenizer, tools, is_forced=is_forced, is_parallel=is_parallel
        )
        compiled = await _compiled(grammar, tools, model, grammars)
    except (CapabilityError, InvalidRequestError):
        if must_hold:
            raise
        # The model is free to call or not; what it writes is read without being held to a form.
        return None
    if is_forced or not (grammar.trigger or grammar.trigger_ids):
        return compiled.constraint()
    begin = Trigger(token_ids=grammar.trigger_ids, text=grammar.trigger, is_required=False)
    return compiled.constraint(begin, repeats=grammar.repeats)


async def _compiled(
    grammar: CallGrammar, tools: list[CheckedTool], model: LoadedModel, grammars: Grammars
) -> Grammar:
    try:
        return await grammars.lark(model, grammar.text, field="tools")
    except InvalidRequestError:
        # Compiled one by one, the schema that is at fault names itself.
        for tool in tools:
            await grammars.json_schema(model, tool.tool.schema_json, field=tool.field)
        raise


def _gated(
    request: chat_pb2.ChatRequest,
    model: LoadedModel,
    style: ChatStyle,
    inner: Constraint | None,
    *,
    is_open: bool,
    has_form: bool,
) -> Constraint | None:
    """The constraint, held back until the reasoning is over."""
    limit = request.max_reasoning_tokens if request.HasField("max_reasoning_tokens") else None
    is_forced = request.tool_choice.mode in _FORCED or has_form
    if inner is None and limit is None:
        return None
    if style.marks is HARMONY:
        # Its grammar has a place for reasoning of its own, and its answers begin behind theirs.
        return ChannelGate(
            model.tokenizer, inner, vocab_size=model.vocab_size, max_tokens=limit, waits=not is_forced
        )
    reasoning = reasoning_of(model.tokenizer, style.marks, is_open=is_open, max_tokens=limit)
    if reasoning is None:
        return inner
    return ReasoningGate(
        reasoning,
        inner,
        end_ids=sorted(model.eos_token_ids),
        vocab_size=model.vocab_size,
        token_bytes=partial(token_bytes, model.tokenizer),
        may_end=not is_forced,
    )
