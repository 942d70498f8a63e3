// Ollama's client for Node: every call that a model's own server answers.
import assert from "node:assert/strict";
import test from "node:test";

import { Ollama } from "ollama";

const { SERVER_URL, ENDLESS_URL, CHAT_MODEL: CHAT, TINY_MODEL: TINY, EMBEDDING_MODEL: EMBEDDING } = process.env;
const client = new Ollama({ host: SERVER_URL });
const messages = [{ role: "user", content: "What is the capital of France?" }];
const greedy = { temperature: 0, num_predict: 24 };
const schema = {
  type: "object",
  properties: { city: { type: "string", enum: ["Paris", "Oslo"] }, warm: { type: "boolean" } },
  required: ["city", "warm"],
};
const names = (models) => models.map((entry) => entry.name.replace(/:latest$/, ""));

test("chat", async () => {
  const answer = await client.chat({ model: CHAT, messages, options: greedy });
  assert.match(answer.message.content, /Paris/);
  assert.equal(answer.done_reason, "stop");
  assert.ok(answer.eval_count > 0 && answer.eval_duration > 0 && answer.total_duration > 0);
});

test("chat stream", async () => {
  let text = "";
  let last;
  for await (const part of await client.chat({ model: CHAT, messages, options: greedy, stream: true })) {
    text += part.message.content;
    last = part;
  }
  assert.match(text, /Paris/);
  assert.equal(last.done, true);
});

test("an abort ends a stream", async () => {
  const own = new Ollama({ host: ENDLESS_URL });
  const stream = await own.chat({ model: TINY, messages, options: { num_predict: 20_000 }, stream: true });
  let parts = 0;
  await assert.rejects(
    async () => {
      for await (const _ of stream) {
        parts += 1;
        if (parts === 3) own.abort();
      }
    },
    { name: "AbortError" },
  );
  // What one read of the socket brought is handed on all the same.
  assert.ok(parts < 10_000);
  assert.ok((await own.chat({ model: TINY, messages, options: { num_predict: 1 } })).done);
});

test("generate", async () => {
  const answer = await client.generate({ model: CHAT, prompt: messages[0].content, options: greedy });
  assert.match(answer.response, /Paris/);
  assert.ok(answer.context.length > 0);
  let last;
  const asked = { model: TINY, prompt: "one", raw: true, stream: true, options: { num_predict: 3 } };
  for await (const part of await client.generate(asked)) last = part;
  assert.equal(last.done_reason, "length");
});

test("format", async () => {
  const options = { temperature: 0, num_predict: 64 };
  const answer = await client.chat({ model: CHAT, messages, format: schema, options });
  assert.equal(typeof JSON.parse(answer.message.content).warm, "boolean");
});

test("tools and their results", async () => {
  const tool = {
    type: "function",
    function: {
      name: "get_weather",
      description: "The weather of a city.",
      parameters: { type: "object", required: ["city"], properties: { city: { type: "string" } } },
    },
  };
  const call = { function: { name: "get_weather", arguments: { city: "Paris" } } };
  const history = [
    ...messages,
    { role: "assistant", content: "", tool_calls: [call] },
    { role: "tool", tool_name: "get_weather", content: "11 degrees" },
  ];
  const answer = await client.chat({ model: CHAT, messages: history, tools: [tool], options: greedy });
  assert.ok(answer.message.content || answer.message.tool_calls.length);
});

test("think", async () => {
  const options = { num_predict: 2 };
  assert.ok((await client.chat({ model: TINY, messages, think: false, options })).done);
  await assert.rejects(client.chat({ model: TINY, messages, think: true, options }), (error) => {
    assert.equal(error.name, "ResponseError");
    assert.equal(error.status_code, 400);
    assert.match(error.message, /does not support thinking/);
    return true;
  });
});

test("embed", async () => {
  const found = await client.embed({ model: EMBEDDING, input: ["a cat", "a dog"] });
  assert.deepEqual(found.embeddings.map((vector) => vector.length), [384, 384]);
  assert.equal((await client.embeddings({ model: EMBEDDING, prompt: "a cat" })).embedding.length, 384);
});

test("names", async () => {
  assert.ok(names((await client.list()).models).includes(CHAT));
  const shown = await client.show({ model: CHAT });
  assert.ok(shown.capabilities.includes("completion"));
  assert.equal(shown.model_info["general.architecture"], "llama");
  assert.match((await client.version()).version, /^\d+\.\d+\.\d+/);
  await assert.rejects(client.show({ model: "nope" }), { status_code: 404 });
});

test("copy and delete", async () => {
  await client.copy({ source: TINY, destination: "copied-node" });
  assert.ok(names((await client.list()).models).includes("copied-node"));
  await client.delete({ model: "copied-node" });
  assert.ok(!names((await client.list()).models).includes("copied-node"));
});

test("keep_alive and ps", async () => {
  const loaded = await client.chat({ model: TINY, messages: [], keep_alive: "10m" });
  assert.equal(loaded.done_reason, "load");
  assert.ok(names((await client.ps()).models).includes(TINY));
  assert.equal((await client.generate({ model: TINY, prompt: "", keep_alive: 0 })).done_reason, "unload");
  assert.ok(!names((await client.ps()).models).includes(TINY));
});

test("what is not served is said clearly", async () => {
  for (const call of [client.pull({ model: "smollm2" }), client.create({ model: "new", from: TINY })]) {
    await assert.rejects(call, (error) => {
      assert.equal(error.status_code, 501);
      assert.ok(!error.message.includes("[object"));
      return true;
    });
  }
});
