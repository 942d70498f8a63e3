"""Model families: where their templates and tokenizers lie, and what is to be found out about them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from osaurus_grpc.chat.calls import families
from osaurus_grpc.chat.calls.syntax import CallSyntax
from osaurus_grpc.chat.reasoning import think_marks
from osaurus_grpc.chat.template import template_text

_MARK = re.compile(r"<[^<>\s=]{2,}>|\[/?[A-Z_]+\]")
# How a family's template can be told to reason: by default, told to, told not to; "o" where the prompt
# opens the reasoning, "c" where it closes it at once, "-" where it says nothing.
Switch = str


@dataclass(frozen=True, slots=True)
class Family:
    """A family of models.

    Attributes:
        name: Of one model of it.
        syntax: How it writes calls.
        template: The file of its template; "" where it comes with the tokenizer.
        tokenizer: The folder of its tokenizer; "" where none is to be had, and SmolLM2's stands in with
            the family's marks as special tokens.
        close: What ends its reasoning, "" if it does not reason.
        switch: How its reasoning can be switched.
        efforts: Whether it can be told how hard to reason.
        rewrites: Why its template shows calls otherwise than as it tells the model to write them; "" if
            it does not.
        sorts: Its template sorts arguments by their names.
        drops_nulls: Its template leaves out what is null.
    """

    name: str
    syntax: CallSyntax
    template: str = ""
    tokenizer: str = ""
    close: str = ""
    switch: Switch = "---"
    efforts: bool = False
    rewrites: str = ""
    sorts: bool = False
    drops_nulls: bool = False

    def load(self, folder: Path, stand_in: Path) -> PreTrainedTokenizerBase:
        """Its tokenizer, with its template."""
        path = folder / "tokenizers" / self.tokenizer if self.tokenizer else stand_in
        tokenizer, own_template = _tokenizer(path) if self.tokenizer else (_fresh(path), "")
        tokenizer.chat_template = own_template
        if self.template:
            tokenizer.chat_template = (folder / "templates" / f"{self.template}.jinja").read_text()
        if not self.tokenizer:
            _add_marks(tokenizer, self.syntax)
        return tokenizer


@lru_cache(maxsize=2)
def _tokenizer(path: Path) -> tuple[PreTrainedTokenizerBase, object]:
    tokenizer = _fresh(path)
    return tokenizer, tokenizer.chat_template


def _fresh(path: Path) -> PreTrainedTokenizerBase:
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(path))
    return tokenizer


def _add_marks(tokenizer: PreTrainedTokenizerBase, syntax: CallSyntax) -> None:
    marks = think_marks(tokenizer, template_text(tokenizer, with_tools=True))
    texts = [*syntax.texts, *((marks.open, marks.close) if marks else ())]
    names = sorted({name for text in texts for name in _MARK.findall(text)})
    tokenizer.add_special_tokens({"additional_special_tokens": names}, replace_extra_special_tokens=False)


FAMILIES = (
    Family("Qwen 2.5", families.HERMES, tokenizer="qwen-2.5"),
    Family("Qwen 3", families.HERMES, tokenizer="qwen-3", close="</think>", switch="--c"),
    Family("Qwen 3.5", families.QWEN3_CODER, tokenizer="qwen-3.5", close="</think>", switch="ooc"),
    Family("QwQ", families.HERMES, tokenizer="qwq-32b", close="</think>", switch="ooo"),
    Family("Qwen3-Coder", families.QWEN3_CODER, "Qwen3-Coder", "qwen-3", close="</think>"),
    Family("Hermes 3", families.HERMES, "NousResearch-Hermes-3-Llama-3.1-8B-tool_use", "llama"),
    Family("Hermes 2 Pro", families.HERMES, "NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use", "llama"),
    Family("Llama 3.1", families.LLAMA, "meta-llama-Llama-3.1-8B-Instruct", "llama"),
    Family("Llama 3.2", families.LLAMA, "meta-llama-Llama-3.2-3B-Instruct", "llama"),
    Family("Llama 3.3", families.LLAMA, "meta-llama-Llama-3.3-70B-Instruct", "llama"),
    Family("Functionary 3.1", families.FUNCTIONARY_31, "meetkai-functionary-medium-v3.1", "llama"),
    Family("Functionary 3.2", families.FUNCTIONARY_32, "meetkai-functionary-medium-v3.2", "llama"),
    Family(
        "DeepSeek R1 distill Llama",
        families.DEEPSEEK_R1,
        tokenizer="deepseek-r1-distill-llama-8b",
        close="</think>",
        switch="ooo",
    ),
    Family(
        "DeepSeek R1 distill Qwen",
        families.DEEPSEEK_R1,
        "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B",
        "deepseek-r1-distill-qwen-7b",
        close="</think>",
        switch="coc",
    ),
    Family("DeepSeek V3.1", families.DEEPSEEK_V31, tokenizer="deepseek-v3.1", close="</think>", switch="coc"),
    Family(
        "DeepSeek V3.2",
        families.DEEPSEEK_V32,
        "deepseek-ai-DeepSeek-V3.2",
        "deepseek-v3.2",
        close="</think>",
        switch="coc",
    ),
    Family(
        "DeepSeek V4",
        families.DEEPSEEK_V4,
        "deepseek-ai-DeepSeek-V4",
        "deepseek-v4",
        close="</think>",
        switch="coc",
        rewrites="its template puts an empty line where there are no arguments",
    ),
    Family(
        "ERNIE 4.5",
        families.HERMES,
        tokenizer="ernie",
        close="</think>",
        switch="ooo",
        rewrites="its template puts empty lines between calls",
    ),
    Family("Gemma 3", families.FALLBACK, tokenizer="gemma"),
    Family(
        "Gemma 4",
        families.GEMMA_4,
        "google-gemma-4-31B-it",
        "gemma-4",
        close="<channel|>",
        switch="c-c",
        rewrites="its template shows names in nested objects without quotes",
        sorts=True,
    ),
    Family("GLM 4.5", families.GLM, tokenizer="glm-4.5v", close="</think>", switch="--c"),
    Family("GLM 4.6", families.GLM, "GLM-4.6", "glm-4.5v", close="</think>", switch="--c"),
    Family("GLM 4.7", families.GLM_47, tokenizer="glm-4.7-flash", close="</think>", switch="ooc"),
    Family("MiniMax M2", families.MINIMAX_M2, tokenizer="minimax", close="</think>", switch="ooo"),
    Family(
        "MiniMax M3",
        families.MINIMAX_M3,
        tokenizer="minimax-m3",
        close="</mm:think>",
        switch="-oc",
        rewrites="its template leaves out what is null",
        drops_nulls=True,
    ),
    Family("Mistral 7B", families.MISTRAL_SPACED, tokenizer="mistral"),
    Family("Mistral Nemo", families.MISTRAL_LIST, "mistralai-Mistral-Nemo-Instruct-2407", "mistral-nemo"),
    Family("Mistral Small 3.2", families.MISTRAL_ID, "Mistral-Small-3.2-24B-Instruct-2506"),
    Family("Devstral", families.MISTRAL, "unsloth-mistral-Devstral-Small-2507"),
    Family("Ministral 3", families.MISTRAL, "mistralai-Ministral-3-14B-Reasoning-2512", close="[/THINK]"),
    Family("Nemotron Nano 2", families.TOOLCALL_LIST, tokenizer="nemotron", close="</think>", switch="ooc"),
    Family(
        "Nemotron 3",
        families.QWEN3_CODER,
        "NVIDIA-Nemotron-3-Nano-30B-A3B-BF16",
        "nemotron",
        close="</think>",
        switch="ooc",
    ),
    Family("Phi 4", families.FALLBACK, tokenizer="phi"),
    Family("Phi 3.5", families.FALLBACK, "microsoft-Phi-3.5-mini-instruct"),
    Family("gpt-oss", families.HARMONY, "openai-gpt-oss-120b", "gpt-oss", close="<|end|>", efforts=True),
    Family("Kimi K2", families.KIMI_K2, "moonshotai-Kimi-K2"),
    Family("Kimi K2 Thinking", families.KIMI_K2, "Kimi-K2-Thinking", close="</think>"),
    Family("Granite 3.3", families.GRANITE, "ibm-granite-granite-3.3-2B-Instruct", close="</think>"),
    Family("Granite 4", families.HERMES, "ibm-granite-granite-4.0"),
    Family("LFM2", families.LFM2, "LFM2-8B-A1B"),
    Family(
        "LFM2.5",
        families.LFM2,
        "LFM2.5-8B-A1B",
        close="</think>",
        rewrites="its template quotes strings as Python does, without escapes",
    ),
    Family(
        "Command R7B",
        families.COMMAND,
        "CohereForAI-c4ai-command-r7b-12-2024-tool_use",
        "command-r-plus",
        close="<|END_THINKING|>",
        switch="c-c",
    ),
    Family(
        "Seed-OSS",
        families.SEED,
        "ByteDance-Seed-OSS",
        close="</seed:think>",
        switch="--c",
        rewrites="its template shows objects as Python does",
    ),
    Family(
        "Apriel",
        families.TOOL_CALLS_LIST,
        "Apriel-1.6-15b-Thinker-fixed",
        close="[BEGIN FINAL RESPONSE]",
        switch="ooo",
        rewrites="its template shows ids, which it does not ask for",
    ),
    Family("MiniMax M1", families.TOOL_CALLS_LINES, "MiniMax-M1"),
    Family("GigaChat 3.1", families.GIGACHAT, "GigaChat3.1-10B-A1.8B"),
    Family("Solar Open", families.SOLAR, "upstage-Solar-Open-100B", efforts=True),
    Family(
        "MiniCPM 5",
        families.MINICPM,
        "openbmb-MiniCPM5-1B",
        close="</think>",
        switch="-oc",
        rewrites="its template shows objects as Python does",
    ),
    Family(
        "Ling 3",
        families.GLM,
        "inclusionai-ling-3.0-flash",
        close="</think>",
        switch="ooc",
        rewrites="its template puts no line end between arguments, unlike its instructions",
    ),
    Family("Laguna XS", families.GLM, "poolside-Laguna-XS.2", close="</think>", switch="coc"),
    Family(
        "StepFun 3.5",
        families.QWEN3_CODER,
        "StepFun3.5-Flash",
        close="</think>",
        switch="ooo",
        rewrites="its template puts nothing between calls",
    ),
    Family("MiMo", families.HERMES, "MiMo-VL"),
    Family("Bielik", families.HERMES, "Bielik-11B-v3.0-Instruct", close="</think>", switch="-o-"),
    Family("Apertus", families.APERTUS, "Apertus-8B-Instruct", close="<|inner_suffix|>"),
    Family(
        "Hunyuan 3",
        families.HUNYUAN_3,
        "tencent-Hy3",
        close="</think:opensource>",
        switch="coc",
        efforts=True,
    ),
    # Its template for tools takes them in a form of its own, so that the other one is used.
    Family("Command R+", families.FALLBACK, tokenizer="command-r-plus"),
    Family(
        "Command R+ of llama.cpp",
        families.COMMAND_R,
        "CohereForAI-c4ai-command-r-plus-tool_use",
        "command-r-plus",
        rewrites="its template indents objects",
    ),
    Family("LFM2.5 Instruct", families.LFM2, "LFM2.5-Instruct", close="</think>"),
    Family("SmolLM3", families.FALLBACK, "HuggingFaceTB-SmolLM3-3B", close="</think>", switch="--c"),
    Family(
        "Reka Edge",
        families.HERMES,
        "Reka-Edge",
        close="</think>",
        switch="-o-",
        rewrites="its template escapes letters beyond ASCII",
    ),
    Family("Spark 2.5", families.GLM_47, "Spark2.5", close="</think>", switch="ooc"),
    # These have syntaxes that are not known: the model is told of another one, and shown calls in that.
    Family("Kimi K3", families.KIMI_K3, "Kimi-K3", close="<|close|>think<|sep|>", switch="oo-", efforts=True),
    Family("GigaChat 3", families.FALLBACK, "GigaChat3-10B-A1.8B"),
    Family("Muse Glimmer", families.FALLBACK, "muse-glimmer", efforts=True),
)
