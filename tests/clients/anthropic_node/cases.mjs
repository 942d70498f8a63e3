// Anthropic's client for Node with its helpers: streams, tools and the tool runner, parsing, aborts.
import assert from "node:assert/strict";
import test from "node:test";

import Anthropic from "@anthropic-ai/sdk";
import { betaZodTool } from "@anthropic-ai/sdk/helpers/beta/zod";
import { zodOutputFormat } from "@anthropic-ai/sdk/helpers/zod";
import { z } from "zod";

const { SERVER_URL, ENDLESS_URL, CHAT_MODEL: CHAT, TINY_MODEL: TINY } = process.env;
const client = new Anthropic({ baseURL: SERVER_URL, apiKey: "none", maxRetries: 0 });
const messages = [{ role: "user", content: "What is the capital of France?" }];
const greedy = { model: CHAT, messages, temperature: 0 };
const once = { type: "any", disable_parallel_tool_use: true };

test("messages", async () => {
  const message = await client.messages.create({ ...greedy, max_tokens: 24 });
  assert.match(message.content[0].text, /Paris/);
  assert.equal(message.stop_reason, "end_turn");
  assert.ok(message._request_id);
});

test("stream", async () => {
  const stream = client.messages.stream({ ...greedy, max_tokens: 24 });
  let text = "";
  stream.on("text", (delta) => (text += delta));
  const message = await stream.finalMessage();
  assert.match(text, /Paris/);
  assert.equal(message.content[0].text, text);
  assert.ok(message.usage.output_tokens > 0);
});

test("tools and their results", async () => {
  const tools = [
    {
      name: "get_weather",
      input_schema: {
        type: "object",
        properties: { city: { enum: ["Paris", "Oslo"] } },
        required: ["city"],
        additionalProperties: false,
      },
    },
  ];
  const stream = client.messages.stream({ ...greedy, max_tokens: 128, tools, tool_choice: once });
  let json = "";
  stream.on("inputJson", (delta) => (json += delta));
  const message = await stream.finalMessage();
  const call = message.content.at(-1);
  assert.equal(message.stop_reason, "tool_use");
  assert.deepEqual(JSON.parse(json), call.input);
  const after = await client.messages.create({
    ...greedy,
    max_tokens: 8,
    tools,
    tool_choice: { type: "none" },
    messages: [
      ...messages,
      { role: "assistant", content: message.content },
      { role: "user", content: [{ type: "tool_result", tool_use_id: call.id, content: "11 degrees" }] },
    ],
  });
  assert.ok(after.content[0].text);
});

test("tool runner", async () => {
  const seen = [];
  const tool = betaZodTool({
    name: "note",
    description: "Say whether it is warm.",
    inputSchema: z.object({ warm: z.boolean() }),
    run: (given) => {
      seen.push(given);
      return "noted";
    },
  });
  const runner = client.beta.messages.toolRunner({
    ...greedy,
    max_tokens: 128,
    max_iterations: 2,
    tools: [tool],
    tool_choice: once,
  });
  for await (const _ of runner);
  assert.equal(typeof seen[0].warm, "boolean");
});

test("parse", async () => {
  const message = await client.messages.parse({
    ...greedy,
    max_tokens: 64,
    output_config: { format: zodOutputFormat(z.object({ warm: z.boolean() })) },
  });
  assert.equal(typeof message.parsed_output.warm, "boolean");
});

test("counting and models", async () => {
  const counted = await client.messages.countTokens({ model: CHAT, messages });
  assert.ok(counted.input_tokens > 5);
  const names = [];
  for await (const entry of client.models.list()) names.push(entry.id);
  assert.ok(names.includes(CHAT));
  assert.equal((await client.models.retrieve(CHAT)).type, "model");
});

test("errors", async () => {
  await assert.rejects(client.messages.create({ ...greedy, model: "claude-omega", max_tokens: 1 }), (error) => {
    assert.ok(error instanceof Anthropic.NotFoundError);
    assert.equal(error.error.error.type, "not_found_error");
    assert.ok(error.requestID);
    return true;
  });
  await assert.rejects(
    client.messages.create({ ...greedy, max_tokens: 1, messages: [] }),
    Anthropic.BadRequestError,
  );
});

test("an abort ends a stream", async () => {
  const own = new Anthropic({ baseURL: ENDLESS_URL, apiKey: "none", maxRetries: 0 });
  const stream = own.messages.stream({ model: TINY, messages, max_tokens: 20_000 });
  let seen = 0;
  stream.on("text", () => {
    seen += 1;
    if (seen === 3) stream.abort();
  });
  await assert.rejects(stream.finalMessage(), Anthropic.APIUserAbortError);
  // What one read of the socket brought is handed on all the same.
  assert.ok(seen < 10_000);
  assert.ok(await own.messages.create({ model: TINY, messages, max_tokens: 1 }));
});
