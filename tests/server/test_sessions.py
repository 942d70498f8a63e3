"""Sessions: the store with a clock of the test's, and conversations on a real engine."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from osaurus_grpc.chat.types import Message, Role
from osaurus_grpc.server.sessions import History, SessionKey, Sessions
from osaurus_grpc.v1 import chat_pb2, completion_pb2, inference_service_pb2, sampling_pb2
from tests.conftest import ENDLESS_TOKENS
from tests.server.cores import (
    TINY,
    chat_request,
    eventually,
    failure,
    inference_stub,
    running_core,
    stream_request,
    text_of,
    user,
)

on_a_server = pytest.mark.asyncio(loop_scope="session")


class Clock:
    """Seconds that pass when the test says."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def key(name: str, *, caller: str = "", model: str = "m") -> SessionKey:
    return SessionKey(caller, model, name)


def said(*texts: str) -> History:
    return History(tuple(Message(Role.USER, text) for text in texts))


def store(max_sessions: int = 32, idle_seconds: float = 300.0) -> tuple[Sessions, Clock]:
    clock = Clock()
    return Sessions(max_sessions=max_sessions, idle_seconds=idle_seconds, clock=clock), clock


def keep(sessions: Sessions, name: str, *texts: str) -> None:
    with sessions.turn(key(name)) as turn:
        turn.keep(said(*texts))


def test_a_turn_that_was_kept_is_remembered() -> None:
    sessions, _ = store()
    keep(sessions, "a", "one")

    with sessions.turn(key("a")) as turn:
        assert turn.history == said("one")
        assert turn.is_kept
    assert sessions.peek(key("a")) == said("one")
    others = [key("a", caller="c"), key("a", model="n"), key("b")]
    assert all(sessions.peek(other) == History() for other in others)


def test_a_turn_that_failed_leaves_the_session_as_it_was() -> None:
    sessions, _ = store()
    keep(sessions, "a", "one")

    for name in ("a", "new"):
        with pytest.raises(ValueError, match="broken"), sessions.turn(key(name)):
            raise ValueError("broken")

    assert sessions.peek(key("a")) == said("one")
    assert len(sessions) == 1
    with sessions.turn(key("a")) as turn:
        assert turn.is_kept


def test_a_held_session_is_read_and_not_touched() -> None:
    sessions, _ = store()
    keep(sessions, "a", "one")

    with sessions.turn(key("a")) as holder:
        with sessions.turn(key("a")) as reader:
            assert not reader.is_kept
            assert reader.history == said("one")
            reader.keep(said("reader"))
        with sessions.turn(key("a")) as third:
            assert not third.is_kept
        holder.keep(said("one", "two"))
        # From here on the session is free, though the request has not quite ended.
        with sessions.turn(key("a")) as following:
            assert following.history == said("one", "two")
            following.keep(said("three"))

    assert sessions.peek(key("a")) == said("three")


def test_the_least_recently_used_session_makes_way() -> None:
    sessions, _ = store(max_sessions=2)
    keep(sessions, "a", "1")
    keep(sessions, "b", "2")
    with sessions.turn(key("a")):
        pass

    keep(sessions, "c", "3")

    assert sessions.peek(key("b")) == History()
    assert sessions.peek(key("a")) == said("1")
    assert sessions.peek(key("c")) == said("3")


def test_a_session_in_use_makes_no_way_and_an_empty_one_pushes_none_out() -> None:
    sessions, _ = store(max_sessions=2)
    keep(sessions, "a", "1")
    keep(sessions, "b", "2")
    with sessions.turn(key("new")):
        pass
    assert sessions.peek(key("a")) == said("1")

    with ExitStack() as stack:
        turns = [stack.enter_context(sessions.turn(key(name))) for name in ("a", "b", "c", "d")]
        assert all(turn.is_kept for turn in turns)
        for turn in turns:
            turn.keep(said("kept"))
    assert len(sessions) == 2


def test_idle_sessions_are_forgotten() -> None:
    sessions, clock = store(idle_seconds=300)
    keep(sessions, "a", "1")
    clock.now = 200
    keep(sessions, "b", "2")

    clock.now = 299.9
    assert sessions.peek(key("a")) == said("1")
    clock.now = 300
    assert sessions.peek(key("a")) == History()
    assert sessions.peek(key("b")) == said("2")
    with sessions.turn(key("b")):
        clock.now = 5_000
        assert sessions.peek(key("b")) == said("2")
    clock.now = 5_299
    assert sessions.peek(key("b")) == said("2")


def test_no_sessions_where_they_are_turned_off() -> None:
    sessions, _ = store(max_sessions=0)
    keep(sessions, "a", "1")

    assert sessions.peek(key("a")) == History()


@pytest.mark.parametrize("role", [Role.SYSTEM, Role.DEVELOPER, Role.ASSISTANT])
def test_what_restarts_a_conversation(role: Role) -> None:
    new = [Message(role, "x"), Message(Role.USER, "y")]

    assert said("one").continued_by(new) == tuple(new)


@pytest.mark.parametrize("role", [Role.USER, Role.TOOL])
def test_what_continues_a_conversation(role: Role) -> None:
    new = Message(role, "x")

    assert said("one").continued_by([new]) == (*said("one").messages, new)


def assistant(text: str) -> chat_pb2.Message:
    return chat_pb2.Message(role=chat_pb2.ROLE_ASSISTANT, content=[chat_pb2.ContentPart(text=text)])


def system(text: str) -> chat_pb2.Message:
    return chat_pb2.Message(role=chat_pb2.ROLE_SYSTEM, content=[chat_pb2.ContentPart(text=text)])


def in_session(name: str, *messages: chat_pb2.Message, **sampling: Any) -> chat_pb2.ChatRequest:
    chat = chat_request(**{"max_tokens": 6, **sampling})
    chat.include_token_ids = True
    chat.session_id = name
    del chat.messages[:]
    chat.messages.extend(messages)
    return chat


async def prompt_of(inference: Any, *messages: chat_pb2.Message) -> list[int]:
    """The prompt of these messages without a session."""
    chat = in_session("", *messages, max_tokens=1)
    return list((await inference.Chat(chat)).prompt_token_ids)


def spoken(response: chat_pb2.ChatResponse) -> list[int]:
    """What the model read and wrote."""
    return [*response.prompt_token_ids, *response.choices[0].token_ids]


@on_a_server
async def test_a_client_that_sends_its_new_turns_only(inference: Any) -> None:
    first = await inference.Chat(in_session("new-turns", system("Be brief."), user("One, two, three. " * 9)))
    second = await inference.Chat(in_session("new-turns", user("And what then?")))
    third = await inference.Chat(in_session("new-turns", user("Go on.")))

    # Token by token; only a character that an answer ends in the middle of is not kept.
    assert "\ufffd" not in text_of(first) + text_of(second)
    assert list(second.prompt_token_ids)[: len(spoken(first))] == spoken(first)
    assert list(third.prompt_token_ids)[: len(spoken(second))] == spoken(second)
    # The KV cache of a turn serves the next one.
    cached = [response.usage.cached_prompt_tokens for response in (second, third)]
    assert 0 < cached[0] < cached[1]
    stateless = await prompt_of(
        inference,
        system("Be brief."),
        user("One, two, three. " * 9),
        assistant(text_of(first)),
        user("And what then?"),
        assistant(text_of(second)),
        user("Go on."),
    )
    texts = await _texts(inference, third.prompt_token_ids, stateless)
    assert texts[0] == texts[1]


@on_a_server
async def test_a_client_that_sends_everything_each_time(inference: Any) -> None:
    messages = [system("Be brief."), user("Count to ten.")]
    first = await inference.Chat(in_session("everything", *messages))
    messages += [assistant(text_of(first)), user("Go on.")]
    second = await inference.Chat(in_session("everything", *messages))
    messages += [assistant(text_of(second)), user("Stop.")]
    third = await inference.Chat(in_session("everything", *messages))

    # Without a session the answers' own tokens would be lost in tokenizing them again.
    assert list(second.prompt_token_ids)[: len(spoken(first))] == spoken(first)
    assert list(third.prompt_token_ids)[: len(spoken(second))] == spoken(second)


@on_a_server
async def test_the_styles_may_be_mixed(inference: Any) -> None:
    first = await inference.Chat(in_session("mixed", user("Hello")))
    second = await inference.Chat(
        in_session("mixed", user("Hello"), assistant(text_of(first)), user("Well?"))
    )
    third = await inference.Chat(in_session("mixed", user("Bye")))

    assert list(third.prompt_token_ids)[: len(spoken(second))] == spoken(second)


@on_a_server
async def test_an_edited_history_restarts_the_session(inference: Any) -> None:
    await inference.Chat(in_session("edited", user("Hello")))
    edited = (user("Good morning"), assistant("Yes?"), user("Go on"))
    second = await inference.Chat(in_session("edited", *edited))
    third = await inference.Chat(in_session("edited", user("And then?")))

    assert list(second.prompt_token_ids) == await prompt_of(inference, *edited)
    assert list(third.prompt_token_ids)[: len(spoken(second))] == spoken(second)


@on_a_server
async def test_a_system_message_restarts_the_session(inference: Any) -> None:
    await inference.Chat(in_session("system", user("Hello")))
    second = await inference.Chat(in_session("system", system("Be kind."), user("Hi")))

    assert list(second.prompt_token_ids) == await prompt_of(inference, system("Be kind."), user("Hi"))


@on_a_server
async def test_a_busy_session_answers_from_what_it_remembers(endless_dir: Path) -> None:
    async with running_core(endless_dir) as core, inference_stub(core.address) as inference:
        first = await inference.Chat(in_session("busy", user("Hello")))
        running = inference.ChatStream(
            stream_request(
                in_session("busy", user("Tell me all"), max_tokens=ENDLESS_TOKENS, ignore_eos=True)
            )
        )
        await running.read()

        second = await inference.Chat(in_session("busy", user("And me?")))
        running.cancel()
        await eventually(lambda: len(core.calls) == 0)
        third = await inference.Chat(in_session("busy", user("Still there?")))

        for response in (second, third):
            assert list(response.prompt_token_ids)[: len(spoken(first))] == spoken(first)
        # Neither the second nor the cancelled one left a trace.
        expected = await prompt_of(inference, user("Hello"), assistant(text_of(first)), user("Still there?"))
        texts = await _texts(inference, third.prompt_token_ids, expected)
        assert texts[0] == texts[1]


@on_a_server
async def test_a_refused_request_leaves_the_session_as_it_was(inference: Any) -> None:
    first = await inference.Chat(in_session("refused", user("Hello")))
    refused = in_session("refused", user("word " * 3_000))
    assert (await failure(inference.Chat(refused))).info.reason == "CONTEXT_LENGTH_EXCEEDED"

    second = await inference.Chat(in_session("refused", user("Again")))

    assert list(second.prompt_token_ids)[: len(spoken(first))] == spoken(first)
    assert second.usage.prompt_tokens < 100


@on_a_server
async def test_of_several_answers_the_first_is_remembered(inference: Any) -> None:
    chat = in_session("several", user("Hello"), temperature=1.0, seed=3)
    chat.choice_count = 3
    first = await inference.Chat(chat)
    assert len({tuple(choice.token_ids) for choice in first.choices}) == 3

    second = await inference.Chat(in_session("several", user("Go on")))

    assert list(second.prompt_token_ids)[: len(spoken(first))] == spoken(first)


@on_a_server
async def test_an_answer_that_was_begun_is_one_message(inference: Any) -> None:
    first = await inference.Chat(in_session("begun", user("Hello"), assistant("Well, ")))
    second = await inference.Chat(in_session("begun", user("Go on")))

    tokens = list(second.prompt_token_ids)
    assert tokens[: len(spoken(first))] == spoken(first)
    turns = await prompt_of(inference, user("Hello"), assistant("Well, x"), user("Go on"))
    mark = turns[0]
    assert tokens.count(mark) == turns.count(mark)


@on_a_server
async def test_an_answer_ended_by_a_stop_text_goes_on_without_it(inference: Any) -> None:
    whole = text_of(await inference.Chat(in_session("", user("Hello"), max_tokens=12)))
    stop = whole[len(whole) // 2 :][:4]
    first = await inference.Chat(in_session("stopped", user("Hello"), max_tokens=12, stop=[stop]))
    second = await inference.Chat(in_session("stopped", user("Go on")))

    expected = await prompt_of(inference, user("Hello"), assistant(text_of(first)), user("Go on"))
    texts = await _texts(inference, second.prompt_token_ids, expected)
    assert texts[0] == texts[1]


async def _texts(inference: Any, *prompts: Any) -> list[str]:
    """What prompts of tokens say."""
    texts = []
    for token_ids in prompts:
        request = completion_pb2.CompleteRequest(
            model=TINY,
            tokens=completion_pb2.TokenPrompt(token_ids=token_ids),
            sampling=sampling_pb2.SamplingParams(max_tokens=1, temperature=0),
            echo=True,
        )
        stream = completion_pb2.CompleteStreamRequest(completion=request)
        events = [event async for event in inference.CompleteStream(stream)]
        texts.append(next(e.content.text for e in events if e.WhichOneof("event") == "content"))
    return texts


@on_a_server
async def test_a_tools_result_continues_the_call_that_is_remembered(inference: Any) -> None:
    tool = chat_pb2.Tool(function=chat_pb2.FunctionTool(name="clock"))
    asked = user("What time is it?")
    chat = in_session("tools", asked, max_tokens=64)
    chat.tools.append(tool)
    chat.tool_choice.mode = chat_pb2.TOOL_CHOICE_MODE_REQUIRED
    first = await inference.Chat(chat)
    (call, *_) = first.choices[0].message.tool_calls
    assert call.function.name == "clock"
    result = chat_pb2.Message(
        role=chat_pb2.ROLE_TOOL, content=[chat_pb2.ContentPart(text="Noon")], tool_call_id=call.id
    )
    following = in_session("tools", result)
    following.tools.append(tool)

    second = await inference.Chat(following)

    whole = in_session("", asked, first.choices[0].message, result)
    whole.tools.append(tool)
    stateless = await inference.Chat(whole)
    texts = await _texts(inference, second.prompt_token_ids, stateless.prompt_token_ids)
    assert texts[0] == texts[1]
    assert "Noon" in texts[0]


@on_a_server
async def test_counting_sees_the_session_and_leaves_it_alone(inference: Any) -> None:
    await inference.Chat(in_session("counted", user("Hello")))
    request = inference_service_pb2.CountTokensRequest(chat=in_session("counted", user("Go on")))
    counted = [(await inference.CountTokens(request)).token_count for _ in range(2)]

    second = await inference.Chat(in_session("counted", user("Go on")))

    assert counted == [second.usage.prompt_tokens] * 2


@on_a_server
async def test_the_settings_reach_the_sessions(tiny_dir: Path) -> None:
    async with running_core(tiny_dir, max_sessions=1) as core, inference_stub(core.address) as inference:
        first = await inference.Chat(in_session("a", user("Hello")))
        assert len((await inference.Chat(in_session("a", user("Hello")))).prompt_token_ids) > len(
            spoken(first)
        )
        await inference.Chat(in_session("b", user("Hello")))
        forgotten = await inference.Chat(in_session("a", user("Hello")))
        assert forgotten.prompt_token_ids == first.prompt_token_ids
    async with running_core(tiny_dir, max_sessions=0) as core, inference_stub(core.address) as inference:
        for _ in range(2):
            response = await inference.Chat(in_session("a", user("Hello")))
            assert response.prompt_token_ids == first.prompt_token_ids


@on_a_server
async def test_callers_do_not_share_a_session(tiny_dir: Path) -> None:
    def bearer(name: str) -> tuple[tuple[str, str], ...]:
        return (("authorization", f"Bearer {name}"),)

    async with (
        running_core(tiny_dir, api_keys=("one", "two")) as core,
        inference_stub(core.address) as inference,
    ):
        chat = in_session("shared", user("Hello"))
        first = await inference.Chat(chat, metadata=bearer("one"))
        other = await inference.Chat(chat, metadata=bearer("two"))
        again = await inference.Chat(chat, metadata=bearer("one"))

    assert other.prompt_token_ids == first.prompt_token_ids
    assert list(again.prompt_token_ids)[: len(spoken(first))] == spoken(first)


@on_a_server
async def test_many_requests_at_once_on_one_session(inference: Any) -> None:
    first = await inference.Chat(in_session("crowd", user("Hello")))
    await asyncio.gather(*(inference.Chat(in_session("crowd", user(f"Number {i}"))) for i in range(8)))

    after = await inference.Chat(in_session("crowd", user("Go on")))

    tokens = list(after.prompt_token_ids)
    assert tokens[: len(spoken(first))] == spoken(first)
    # Those that came while one held the session left no trace; whole turns, one at the least.
    mark = tokens[0]
    further = tokens.count(mark) - list(first.prompt_token_ids).count(mark)
    assert further in range(4, 19, 2)


SAID = ("Count to ten, slowly and aloud.", "And then?", "Why is that so? " * 6, "Go on.")
session_turns = st.lists(
    st.tuples(
        st.sampled_from(("first", "second")),
        st.sampled_from(("new turn", "new turn", "everything", "an edited history")),
        st.sampled_from(SAID),
    ),
    min_size=5,
    max_size=8,
)


# Shrinking would replay turns in sessions that remember them.
@settings(max_examples=3, phases=(Phase.explicit, Phase.generate), derandomize=True,
          suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])  # fmt: skip
@given(history=session_turns)
@on_a_server
async def test_sessions_change_no_token_of_an_answer(
    inference: Any, forgetful: Any, history: list[tuple[str, str, str]]
) -> None:
    """Two conversations in whatever style, edited or not: each answer is that of a core without memory."""
    opening = system("Be brief and kind. " * 8)
    known: dict[str, list[chat_pb2.Message]] = {}
    for name, style, said in history:
        if name not in known:
            style, known[name] = "everything", [opening]
        if style == "an edited history":
            del known[name][-2:]
        known[name] = [*(known[name] or [opening]), user(said)]
        sent = known[name][-1:] if style == "new turn" else known[name]
        answer = await inference.Chat(in_session(name, *sent, ignore_eos=True, max_tokens=9))
        known[name].append(assistant(text_of(answer)))
        plain = completion_pb2.CompleteRequest(
            model=TINY,
            tokens=completion_pb2.TokenPrompt(token_ids=answer.prompt_token_ids),
            sampling=sampling_pb2.SamplingParams(temperature=0.0, max_tokens=9, ignore_eos=True),
            include_token_ids=True,
        )
        expected = await forgetful.Complete(plain)
        assert list(answer.choices[0].token_ids) == list(expected.choices[0].token_ids)
        assert answer.usage.cached_prompt_tokens > 0 or len(known[name]) == 3
