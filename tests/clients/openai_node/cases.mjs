// OpenAI's client for Node with its helpers: parsing, stream events, the tool runner, aborts.
import assert from "node:assert/strict";
import test from "node:test";

import OpenAI from "openai";
import { zodFunction, zodResponseFormat, zodTextFormat } from "openai/helpers/zod";
import { z } from "zod";

const { SERVER_URL, CHAT_MODEL: CHAT, TINY_MODEL: TINY, EMBEDDING_MODEL: EMBEDDING } = process.env;
const client = new OpenAI({ baseURL: `${SERVER_URL}/v1`, apiKey: "none", maxRetries: 0, timeout: 120_000 });
const CAPITAL = [{ role: "user", content: "What is the capital of France?" }];
const Forecast = z.object({ city: z.enum(["Paris", "Oslo"]), warm: z.boolean() });
const greedy = { model: CHAT, messages: CAPITAL, temperature: 0 };

test("chat", async () => {
  const { data: answer, response } = await client.chat.completions
    .create({ ...greedy, max_tokens: 24 })
    .withResponse();
  assert.match(answer.choices[0].message.content, /Paris/);
  assert.equal(answer.choices[0].finish_reason, "stop");
  assert.ok(answer._request_id);
  assert.equal(response.headers.get("x-request-id"), answer._request_id);
});

test("stream", async () => {
  const stream = await client.chat.completions.create({
    ...greedy,
    max_tokens: 24,
    stream: true,
    stream_options: { include_usage: true },
  });
  let text = "";
  let usage = null;
  for await (const chunk of stream) {
    text += chunk.choices[0]?.delta?.content ?? "";
    usage = chunk.usage ?? usage;
  }
  assert.match(text, /Paris/);
  assert.ok(usage.completion_tokens > 0);
});

test("stream helper", async () => {
  const stream = client.chat.completions.stream({ ...greedy, max_tokens: 24 });
  let deltas = "";
  stream.on("content", (delta) => (deltas += delta));
  const completion = await stream.finalChatCompletion();
  assert.match(deltas, /Paris/);
  assert.equal(completion.choices[0].message.content, deltas);
});

test("parse", async () => {
  const answer = await client.chat.completions.parse({
    ...greedy,
    max_tokens: 64,
    response_format: zodResponseFormat(Forecast, "forecast"),
  });
  assert.equal(typeof answer.choices[0].message.parsed.warm, "boolean");
});

test("parse of a stream", async () => {
  const stream = client.chat.completions.stream({
    ...greedy,
    max_tokens: 64,
    response_format: zodResponseFormat(Forecast, "forecast"),
  });
  const answer = await stream.finalChatCompletion();
  assert.equal(typeof answer.choices[0].message.parsed.warm, "boolean");
});

for (const streamed of [false, true]) {
  test(`tool runner${streamed ? ", streamed" : ""}`, async () => {
    const seen = [];
    const runner = client.chat.completions.runTools(
      {
        ...greedy,
        max_tokens: 128,
        stream: streamed,
        parallel_tool_calls: false,
        // A named function: the runner stops after one call of it.
        tool_choice: { type: "function", function: { name: "forecast" } },
        tools: [
          zodFunction({
            name: "forecast",
            parameters: Forecast,
            function: (given) => {
              seen.push(given);
              return "11 degrees";
            },
          }),
        ],
      },
      { maxChatCompletions: 2 },
    );
    await runner.done();
    assert.equal(typeof seen[0].warm, "boolean");
    const result = await runner.finalFunctionToolCallResult();
    assert.equal(result, "11 degrees");
  });
}

test("a tool's result is answered", async () => {
  const tools = [zodFunction({ name: "forecast", parameters: Forecast })];
  const first = await client.chat.completions.create({
    ...greedy,
    max_tokens: 128,
    tools,
    tool_choice: "required",
    parallel_tool_calls: false,
  });
  const message = first.choices[0].message;
  assert.equal(first.choices[0].finish_reason, "tool_calls");
  const second = await client.chat.completions.create({
    ...greedy,
    messages: [...CAPITAL, message, { role: "tool", tool_call_id: message.tool_calls[0].id, content: "11" }],
    max_tokens: 8,
    tools,
    tool_choice: "none",
  });
  assert.ok(second.choices[0].message.content);
});

test("completions", async () => {
  const answer = await client.completions.create({ model: TINY, prompt: "one", max_tokens: 3 });
  assert.equal(answer.object, "text_completion");
  assert.equal(answer.usage.completion_tokens, 3);
});

test("embeddings", async () => {
  const asked = { model: EMBEDDING, input: ["a cat", "a dog"] };
  const found = await client.embeddings.create(asked);
  const floats = await client.embeddings.create({ ...asked, encoding_format: "float" });
  assert.equal(found.data[1].embedding.length, 384);
  found.data[1].embedding.forEach((value, i) =>
    assert.ok(Math.abs(value - floats.data[1].embedding[i]) < 1e-6),
  );
});

test("models", async () => {
  const names = [];
  for await (const entry of client.models.list()) names.push(entry.id);
  assert.ok(names.includes(CHAT));
  assert.equal((await client.models.retrieve(CHAT)).object, "model");
});

test("responses", async () => {
  const asked = { model: CHAT, input: CAPITAL, temperature: 0, max_output_tokens: 24 };
  const whole = await client.responses.create(asked);
  assert.match(whole.output_text, /Paris/);
  const stream = client.responses.stream(asked);
  const kinds = [];
  for await (const event of stream) kinds.push(event.type);
  const final = await stream.finalResponse();
  assert.equal(final.output_text, whole.output_text);
  assert.equal(kinds[0], "response.created");
  assert.equal(kinds.at(-1), "response.completed");
});

test("responses parse", async () => {
  const answer = await client.responses.parse({
    model: CHAT,
    input: CAPITAL,
    temperature: 0,
    max_output_tokens: 64,
    text: { format: zodTextFormat(Forecast, "forecast") },
  });
  assert.equal(typeof answer.output_parsed.warm, "boolean");
});

test("errors", async () => {
  await assert.rejects(client.chat.completions.create({ ...greedy, model: "gpt-9" }), (error) => {
    assert.ok(error instanceof OpenAI.NotFoundError);
    assert.equal(error.code, "model_not_found");
    assert.ok(error.requestID);
    return true;
  });
  await assert.rejects(client.chat.completions.create({ ...greedy, temperature: 9 }), (error) => {
    assert.ok(error instanceof OpenAI.BadRequestError);
    assert.equal(error.param, "temperature");
    return true;
  });
  await assert.rejects(
    client.chat.completions.create({ ...greedy, model: "gpt-9", stream: true }),
    OpenAI.NotFoundError,
  );
});

test("an abort ends a stream", async () => {
  const stream = await client.chat.completions.create({ ...greedy, model: TINY, max_tokens: 200, stream: true });
  let chunks = 0;
  for await (const _ of stream) {
    chunks += 1;
    if (chunks === 3) stream.controller.abort();
  }
  assert.ok(chunks < 100);
  const after = await client.chat.completions.create({ ...greedy, model: TINY, max_tokens: 1 });
  assert.equal(after.usage.completion_tokens, 1);
});

test("an abort ends a request", async () => {
  const signal = AbortSignal.timeout(200);
  await assert.rejects(
    client.chat.completions.create(
      { ...greedy, max_tokens: 200, ignore_eos: true },
      { signal },
    ),
    OpenAI.APIUserAbortError,
  );
});
