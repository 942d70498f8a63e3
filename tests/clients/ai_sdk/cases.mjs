// Vercel's AI SDK through each provider that a server like this is reached by.
import assert from "node:assert/strict";
import test from "node:test";

import { createAnthropic } from "@ai-sdk/anthropic";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { embedMany, generateObject, generateText, stepCountIs, streamObject, streamText, tool } from "ai";
import { createOllama } from "ai-sdk-ollama";
import { z } from "zod";

const { SERVER_URL, CHAT_MODEL: CHAT, TINY_MODEL: TINY, EMBEDDING_MODEL: EMBEDDING } = process.env;
const baseURL = `${SERVER_URL}/v1`;
const compatible = createOpenAICompatible({
  name: "osaurus",
  baseURL,
  apiKey: "none",
  includeUsage: true,
  supportsStructuredOutputs: true,
});
const openai = createOpenAI({ baseURL, apiKey: "none" });
const anthropic = createAnthropic({ baseURL, apiKey: "none" });
const ollama = createOllama({ baseURL: SERVER_URL });

const providers = {
  "openai-compatible": compatible(CHAT),
  "openai chat": openai.chat(CHAT),
  "openai responses": openai.responses(CHAT),
  anthropic: anthropic(CHAT),
  ollama: ollama(CHAT),
};
const asked = { prompt: "What is the capital of France?", temperature: 0, maxRetries: 0 };
const schema = z.object({ city: z.enum(["Paris", "Oslo"]), warm: z.boolean() });
const weather = (seen) =>
  tool({
    description: "The weather of a city.",
    inputSchema: z.object({ city: z.enum(["Paris", "Oslo"]) }),
    execute: async ({ city }) => {
      seen.push(city);
      return "11 degrees";
    },
  });

for (const [name, model] of Object.entries(providers)) {
  test(`${name}: generateText`, async () => {
    const { text, finishReason, usage } = await generateText({ model, ...asked, maxOutputTokens: 24 });
    assert.match(text, /Paris/);
    assert.equal(finishReason, "stop");
    assert.ok(usage.inputTokens > 0 && usage.outputTokens > 0);
  });

  test(`${name}: streamText`, async () => {
    const result = streamText({
      model,
      ...asked,
      maxOutputTokens: 24,
      onError: ({ error }) => {
        throw error;
      },
    });
    let text = "";
    for await (const delta of result.textStream) text += delta;
    assert.match(text, /Paris/);
    assert.equal(await result.finishReason, "stop");
    assert.ok((await result.usage).outputTokens > 0);
  });

  test(`${name}: the limit of tokens`, async () => {
    const { finishReason } = await generateText({ model, ...asked, maxOutputTokens: 2 });
    assert.equal(finishReason, "length");
  });

  test(`${name}: generateObject`, async () => {
    const { object } = await generateObject({ model, ...asked, schema, maxOutputTokens: 64 });
    assert.equal(typeof object.warm, "boolean");
  });

  // Ollama has no way to make a model call a tool.
  const calls = name === "ollama" ? test.skip : test;
  for (const streamed of [false, true]) {
    calls(`${name}: a tool is called${streamed ? " in a stream" : ""}`, async () => {
      const seen = [];
      const given = {
        model,
        ...asked,
        maxOutputTokens: 64,
        tools: { weather: weather(seen) },
        toolChoice: { type: "tool", toolName: "weather" },
        stopWhen: stepCountIs(2),
        prepareStep: ({ stepNumber }) => (stepNumber ? { toolChoice: "none" } : {}),
      };
      const result = streamed ? streamText(given) : await generateText(given);
      const steps = await result.steps;
      assert.equal(steps.length, 2);
      assert.equal(steps[0].finishReason, "tool-calls");
      assert.ok(seen.length >= 1);
      assert.ok(steps[1].text);
    });
  }

  test(`${name}: errors`, async () => {
    const unknown = {
      "openai-compatible": compatible("gpt-9"),
      "openai chat": openai.chat("gpt-9"),
      "openai responses": openai.responses("gpt-9"),
      anthropic: anthropic("gpt-9"),
      ollama: ollama("gpt-9"),
    }[name];
    await assert.rejects(generateText({ ...asked, model: unknown }), /not found/i);
  });
}

test("openai: streamObject", async () => {
  const result = streamObject({ model: openai.chat(CHAT), ...asked, schema, maxOutputTokens: 64 });
  for await (const _ of result.partialObjectStream);
  assert.equal(typeof (await result.object).warm, "boolean");
});

test("openai responses: a conversation that the server keeps", async () => {
  const model = openai.responses(TINY);
  const first = await generateText({ model, ...asked, maxOutputTokens: 4 });
  const id = first.providerMetadata.openai.responseId;
  const second = await generateText({
    model,
    ...asked,
    maxOutputTokens: 4,
    providerOptions: { openai: { previousResponseId: id } },
  });
  assert.ok(second.usage.inputTokens > first.usage.inputTokens);
});

test("openai responses: earlier answers by their ids", async () => {
  const model = openai.responses(TINY);
  const first = await generateText({ model, ...asked, maxOutputTokens: 4 });
  const said = { role: "user", content: asked.prompt };
  const { text, usage } = await generateText({
    model,
    messages: [said, ...first.response.messages, said],
    temperature: 0,
    maxRetries: 0,
    maxOutputTokens: 4,
  });
  assert.ok(text);
  assert.ok(usage.inputTokens > first.usage.inputTokens);
});

for (const [name, model] of Object.entries({
  "openai-compatible": compatible.textEmbeddingModel(EMBEDDING),
  openai: openai.textEmbeddingModel(EMBEDDING),
  ollama: ollama.textEmbeddingModel(EMBEDDING),
})) {
  test(`${name}: embedMany`, async () => {
    const { embeddings } = await embedMany({ model, values: ["a cat", "a dog"] });
    assert.deepEqual(embeddings.map((vector) => vector.length), [384, 384]);
  });
}
