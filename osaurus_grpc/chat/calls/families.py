"""The call syntaxes of model families, and which one a model writes.

Each is as the family's own chat template writes calls into a conversation, which is what the models
were trained on. Detection reads the template first and the vocabulary second, as mlx-lm's does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from osaurus_grpc.chat.calls.syntax import (
    CallSyntax,
    InlineParameters,
    JsonObject,
    NamedJson,
    NestedElements,
    TaggedParameters,
    XtmlElements,
)

if TYPE_CHECKING:  # transformers takes a second to import, and callers bring the object
    from transformers import PreTrainedTokenizerBase

HERMES: Final = CallSyntax(  # Qwen 2.5 and 3, Hermes, Granite 4, MiMo, Reka, Bielik and many others
    "hermes",
    JsonObject(),
    section_open="<tool_call>\n",
    section_close="\n</tool_call>",
    repeats_section=True,
    separator="\n",
)
FALLBACK: Final = CallSyntax(
    "fallback",
    JsonObject(),
    section_open="<tool_call>\n",
    section_close="\n</tool_call>",
    repeats_section=True,
    separator="\n",
    is_native=False,
)
LLAMA: Final = CallSyntax(
    "llama",
    JsonObject(arguments_key="parameters"),
    separator="; ",
    also_opens=("<|python_tag|>", "<|python_start|>"),
    opens_bare=True,
)
MISTRAL_LIST: Final = CallSyntax(
    "mistral-list", JsonObject(id_key="id"), section_open="[TOOL_CALLS]", is_list=True, separator=", "
)
MISTRAL_SPACED: Final = CallSyntax(  # Mistral 7B 0.3, Mixtral 8x22B
    "mistral-spaced", JsonObject(id_key="id"), section_open="[TOOL_CALLS] ", is_list=True, separator=", "
)
MISTRAL: Final = CallSyntax(
    "mistral",
    NamedJson("", "[ARGS]", ("[CALL_ID]",)),
    section_open="[TOOL_CALLS]",
    repeats_section=True,
)
MISTRAL_ID: Final = CallSyntax(  # Mistral Small 3.2
    "mistral-id",
    NamedJson("", "[ARGS]", ("[CALL_ID]",), id_open="[CALL_ID]"),
    section_open="[TOOL_CALLS]",
    repeats_section=True,
)
DEEPSEEK_R1: Final = CallSyntax(
    "deepseek-r1",
    NamedJson("function<｜tool▁sep｜>", "\n```json\n"),
    section_open="<｜tool▁calls▁begin｜>",
    section_close="<｜tool▁calls▁end｜>",
    call_open="<｜tool▁call▁begin｜>",
    call_close="\n```<｜tool▁call▁end｜>",
    separator="\n",
)
DEEPSEEK_V31: Final = CallSyntax(
    "deepseek-v3.1",
    NamedJson("", "<｜tool▁sep｜>"),
    section_open="<｜tool▁calls▁begin｜>",
    section_close="<｜tool▁calls▁end｜>",
    call_open="<｜tool▁call▁begin｜>",
    call_close="<｜tool▁call▁end｜>",
)
KIMI_K2: Final = CallSyntax(
    "kimi-k2",
    NamedJson("functions.", "<|tool_call_argument_begin|>", counts=True),
    section_open="<|tool_calls_section_begin|>",
    section_close="<|tool_calls_section_end|>",
    call_open="<|tool_call_begin|>",
    call_close="<|tool_call_end|>",
)
KIMI_K3: Final = CallSyntax(
    "kimi-k3",
    XtmlElements(),
    section_open="<|open|>tools<|sep|>",
    section_close="<|close|>tools<|sep|>",
    leads=("<|open|>response<|sep|>", "<|close|>response<|sep|>"),
    tail="<|close|>message<|sep|>",
)
HARMONY: Final = CallSyntax(
    "harmony",
    NamedJson("", "<|channel|>commentary json<|message|>"),
    section_open="<|start|>assistant to=functions.",
    repeats_section=True,
    also_opens=("<|end|>", "<|constrain|>"),
)
GRANITE: Final = CallSyntax(  # Granite 3
    "granite", JsonObject(), section_open="<|tool_call|>", is_list=True, separator=", "
)
PHI_4: Final = CallSyntax(
    "phi-4",
    JsonObject(),
    section_open="<|tool_call|>",
    section_close="<|/tool_call|>",
    is_list=True,
    separator=", ",
)
TOOLCALL_LIST: Final = CallSyntax(  # Nemotron Nano 2
    "nemotron",
    JsonObject(),
    section_open="<TOOLCALL>",
    section_close="</TOOLCALL>",
    is_list=True,
    separator=", ",
)
TOOL_CALLS_LIST: Final = CallSyntax(  # Apriel
    "apriel",
    JsonObject(),
    section_open="<tool_calls>",
    section_close="</tool_calls>",
    is_list=True,
    separator=", ",
)
TOOL_CALLS_LINES: Final = CallSyntax(
    "minimax-m1",
    JsonObject(),
    section_open="<tool_calls>\n",
    section_close="\n</tool_calls>",
    separator="\n",
)
COMMAND: Final = CallSyntax(  # Command R7B, Command A
    "command",
    JsonObject("tool_name", "parameters", index_key="tool_call_id"),
    section_open="<|START_ACTION|>",
    section_close="<|END_ACTION|>",
    is_list=True,
    list_marks=("[\n    ", "\n]"),
    separator=",\n    ",
)
COMMAND_R: Final = CallSyntax(  # Command R and R+
    "command-r",
    JsonObject("tool_name", "parameters"),
    section_open="Action: ```json\n",
    section_close="```",
    is_list=True,
    list_marks=("[\n    ", "\n]"),
    separator=",\n    ",
    also_opens=("Action:```json", "Action:\n```json"),
)
APERTUS: Final = CallSyntax(
    "apertus",
    NamedJson('{"', '": '),
    section_open="<|tools_prefix|>",
    section_close="<|tools_suffix|>",
    is_list=True,
    call_close="}",
    separator=", ",
)
GIGACHAT: Final = CallSyntax("gigachat", JsonObject(), section_open="<|function_call|>", repeats_section=True)
FUNCTIONARY_31: Final = CallSyntax(
    "functionary-v3.1", NamedJson("", ">"), call_open="<function=", call_close="</function>"
)
FUNCTIONARY_32: Final = CallSyntax("functionary-v3.2", NamedJson("", "\n"), call_open=">>>", recipient="all")
SOLAR: Final = CallSyntax(
    "solar",
    NamedJson("", "<|tool_call:args|>", id_close="<|tool_call:name|>"),
    section_open="<|tool_calls|>",
    call_open="<|tool_call:begin|>",
    call_close="<|tool_call:end|>",
)
QWEN3_CODER: Final = CallSyntax(  # also Qwen 3.5, Nemotron 3, StepFun
    "qwen3-coder",
    TaggedParameters(
        "<function=", ">\n", "<parameter=", ">\n", "\n</parameter>", "</function>", separator="\n"
    ),
    section_open="<tool_call>\n",
    section_close="\n</tool_call>",
    repeats_section=True,
    separator="\n",
    also_opens=("<function=",),
)
SEED: Final = CallSyntax(
    "seed-oss",
    TaggedParameters("<function=", ">\n", "<parameter=", ">", "</parameter>", "</function>", separator="\n"),
    section_open="<seed:tool_call>\n",
    section_close="\n</seed:tool_call>",
    repeats_section=True,
    separator="\n",
)
GLM: Final = CallSyntax(  # 4.5 and 4.6, Ling, Laguna XS
    "glm",
    TaggedParameters("", "\n", "<arg_key>", "</arg_key>\n<arg_value>", "</arg_value>", "", separator="\n"),
    section_open="<tool_call>",
    section_close="</tool_call>",
    repeats_section=True,
    separator="\n",
)
GLM_47: Final = CallSyntax(  # also Spark, Laguna S
    "glm-4.7",
    TaggedParameters("", "", "<arg_key>", "</arg_key><arg_value>", "</arg_value>", ""),
    section_open="<tool_call>",
    section_close="</tool_call>",
    repeats_section=True,
)
LONGCAT: Final = CallSyntax(
    "longcat",
    TaggedParameters(
        "",
        "\n",
        "<longcat_arg_key>",
        "</longcat_arg_key>\n<longcat_arg_value>",
        "</longcat_arg_value>",
        "",
        separator="\n",
    ),
    section_open="<longcat_tool_call>",
    section_close="</longcat_tool_call>",
    repeats_section=True,
    separator="\n",
)
HUNYUAN_3: Final = CallSyntax(
    "hunyuan-3",
    TaggedParameters(
        "",
        "<tool_sep:opensource>\n",
        "<arg_key:opensource>",
        "</arg_key:opensource>\n<arg_value:opensource>",
        "</arg_value:opensource>",
        "</tool_call:opensource>",
        separator="\n",
    ),
    section_open="<tool_calls:opensource>\n",
    section_close="\n</tool_calls:opensource>",
    call_open="<tool_call:opensource>",
    separator="\n",
)
MINIMAX_M2: Final = CallSyntax(
    "minimax-m2",
    TaggedParameters(
        '<invoke name="', '">\n', '<parameter name="', '">', "</parameter>", "</invoke>", separator="\n"
    ),
    section_open="<minimax:tool_call>\n",
    section_close="\n</minimax:tool_call>",
    separator="\n",
)
MINIMAX_M3: Final = CallSyntax(
    "minimax-m3",
    NestedElements(),
    section_open="]<]minimax[>[<tool_call>\n",
    section_close="\n]<]minimax[>[</tool_call>",
    separator="\n",
)
_DSML = TaggedParameters(
    '<｜DSML｜invoke name="',
    '">\n',
    '<｜DSML｜parameter name="',
    '" string="false">',
    "</｜DSML｜parameter>",
    "</｜DSML｜invoke>",
    string_key_close='" string="true">',
    separator="\n",
)
DEEPSEEK_V32: Final = CallSyntax(
    "deepseek-v3.2",
    _DSML,
    section_open="<｜DSML｜function_calls>\n",
    section_close="\n</｜DSML｜function_calls>",
    separator="\n",
)
DEEPSEEK_V4: Final = CallSyntax(
    "deepseek-v4",
    _DSML,
    section_open="<｜DSML｜tool_calls>\n",
    section_close="\n</｜DSML｜tool_calls>",
    separator="\n",
)
MINICPM: Final = CallSyntax(
    "minicpm",
    TaggedParameters(
        '<function name="',
        '">',
        '<param name="',
        '">',
        "</param>",
        "</function>",
        quotes=("<![CDATA[", "]]>"),
    ),
    separator="\n",
)
LFM2: Final = CallSyntax(
    "lfm2",
    InlineParameters("", "(", "=", ")", ", "),
    section_open="<|tool_call_start|>",
    section_close="<|tool_call_end|>",
    is_list=True,
    separator=", ",
)
PYTHONIC: Final = CallSyntax(  # Llama 4, Llama 3.2, ToolACE, where the template asks for it
    "pythonic",
    InlineParameters("", "(", "=", ")", ", "),
    is_list=True,
    separator=", ",
    opens_bare=True,
    wraps=("<|python_start|>", "<|python_end|>"),
    is_shown_as_text=True,
)
OLMO_3: Final = CallSyntax(
    "olmo-3",
    InlineParameters("", "(", "=", ")", ", "),
    section_open="<function_calls>",
    section_close="</function_calls>",
    separator="\n",
)
GEMMA_4: Final = CallSyntax(
    "gemma-4",
    InlineParameters("call:", "{", ":", "}", ",", quote='<|"|>'),
    section_open="<|tool_call>",
    section_close="<tool_call|>",
    repeats_section=True,
)
FUNCTION_GEMMA: Final = CallSyntax(
    "function-gemma",
    InlineParameters("call:", "{", ":", "}", ",", quote="<escape>"),
    section_open="<start_function_call>",
    section_close="<end_function_call>",
    repeats_section=True,
)

# What a template that writes a family's calls holds, the more telling ones first.
_TEMPLATE_SIGNS: Final[tuple[tuple[tuple[str, ...], CallSyntax], ...]] = (
    (("<|tool_call>", "<tool_call|>"), GEMMA_4),
    (("<start_function_call>",), FUNCTION_GEMMA),
    (("<minimax:tool_call>",), MINIMAX_M2),
    (("DSML", "function_calls"), DEEPSEEK_V32),
    (("DSML", "tool_calls"), DEEPSEEK_V4),
    (("<function_calls>", "<functions>"), OLMO_3),
    (("<seed:tool_call>",), SEED),
    (("<longcat_tool_call>",), LONGCAT),
    (("<tool_calls{}>", "<arg_key{}>"), HUNYUAN_3),
    (("<arg_key>", "</arg_key>\\n<arg_value>"), GLM),
    (("<arg_key>", "</arg_key>\n<arg_value>"), GLM),
    (("<arg_key>", "<tool_call>"), GLM_47),
    (("<|tool_list_start|>",), LFM2),
    (("<|tool_call_start|>",), LFM2),
    (("<function=", "<parameter="), QWEN3_CODER),
    (("<|tool_calls_section_begin|>",), KIMI_K2),
    (("<|open|>", "<|sep|>", "open_tag('tools')", "open_tag('call'"), KIMI_K3),
    (('<function name="', '<param name="'), MINICPM),
    (("<｜tool▁calls▁begin｜>", "```json"), DEEPSEEK_R1),
    (("<｜tool▁calls▁begin｜>",), DEEPSEEK_V31),
    (("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"), MISTRAL_ID),
    (("[TOOL_CALLS]", "[ARGS]"), MISTRAL),
    (("[TOOL_CALLS] [",), MISTRAL_SPACED),
    (("[TOOL_CALLS]",), MISTRAL_LIST),
    (("<|START_ACTION|>",), COMMAND),
    (("Action:", "directly-answer"), COMMAND_R),
    (("<|tools_prefix|>",), APERTUS),
    (("<|function_call|>",), GIGACHAT),
    (("<|tool_call:begin|>",), SOLAR),
    (("<TOOLCALL>",), TOOLCALL_LIST),
    (("<tool_calls>[",), TOOL_CALLS_LIST),
    (("<tool_calls>", "[BEGIN FINAL RESPONSE]"), TOOL_CALLS_LIST),
    (("<tool_calls>\\n",), TOOL_CALLS_LINES),
    (("<tool_calls>\n",), TOOL_CALLS_LINES),
    (("<|/tool_call|>",), PHI_4),
    (("<|tool_call|>",), GRANITE),
    ((">>>all", ">>>${recipient}"), FUNCTIONARY_32),
    (("]<]minimax[>[", '<invoke name="'), MINIMAX_M3),
    (("<tool_call>",), HERMES),
    (("<function=",), FUNCTIONARY_31),
    (("[func_name1(", "func_name2("), PYTHONIC),
    (('{"name": function name, "parameters"',), LLAMA),
    (("<|python_tag|>",), LLAMA),
    (("<|python_start|>",), LLAMA),
)
_VOCABULARY_SIGNS: Final[tuple[tuple[tuple[str, ...], CallSyntax], ...]] = (
    (("<|tool_call_start|>", "<|tool_call_end|>"), LFM2),
)


def detect(tokenizer: PreTrainedTokenizerBase, template: str) -> CallSyntax:
    """The syntax of a model's calls; FALLBACK where nothing tells of one.

    Args:
        tokenizer: The model's.
        template: The text of its chat template.
    """
    vocabulary = tokenizer.added_tokens_encoder
    if all(mark in vocabulary for mark in ("<|channel|>", "<|message|>", "<|start|>", "<|call|>")):
        return HARMONY
    for signs, syntax in _TEMPLATE_SIGNS:
        if all(sign in template for sign in signs):
            return syntax
    for signs, syntax in _VOCABULARY_SIGNS:
        if all(sign in vocabulary for sign in signs):
            return syntax
    return FALLBACK
