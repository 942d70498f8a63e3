// The interop client in TypeScript: runs the cases of tests/interop/README.md against the core at argv[2].
import { create } from "@bufbuild/protobuf";
import { Code, ConnectError, createClient } from "@connectrpc/connect";
import { createGrpcTransport } from "@connectrpc/connect-node";
import { BadRequestSchema, ErrorInfoSchema } from "./gen/google/rpc/error_details_pb.js";
import { Health, HealthCheckResponse_ServingStatus } from "./gen/grpc/health/v1/health_pb.js";
import { ChatRequestSchema, type Message, Role, ToolChoiceMode } from "./gen/osaurus/v1/chat_pb.js";
import { InferenceService } from "./gen/osaurus/v1/inference_service_pb.js";
import { ModelService } from "./gen/osaurus/v1/model_service_pb.js";
import { FinishReason } from "./gen/osaurus/v1/sampling_pb.js";

const MODEL = "tiny-llama";
const PATIENCE_MS = 60_000;
const WEATHER =
  '{"type":"object","properties":{"city":{"enum":["Paris","Rome"]}},"required":["city"],"additionalProperties":false}';

const transport = createGrpcTransport({ baseUrl: `http://${process.argv[2]}` });
const inference = createClient(InferenceService, transport);
const models = createClient(ModelService, transport);
const health = createClient(Health, transport);

function request(maxTokens: number, temperature: number) {
  return create(ChatRequestSchema, {
    model: MODEL,
    messages: [{ role: Role.USER, content: [{ part: { case: "text", value: "Hello" } }] }],
    sampling: { temperature, maxTokens, ignoreEos: true },
  });
}

function text(message: Message | undefined): string {
  return (message?.content ?? []).map((each) => (each.part.case === "text" ? each.part.value : "")).join("");
}

function check(condition: boolean, seen: unknown): void {
  if (!condition) {
    throw new Error(
      JSON.stringify(seen, (_, value) => (typeof value === "bigint" ? value.toString() : value)),
    );
  }
}

async function listModels(): Promise<void> {
  const { models: listed } = await inference.listModels({}, { timeoutMs: PATIENCE_MS });
  check(listed.some((each) => each.id === MODEL), listed);
}

async function chat(): Promise<string> {
  const answer = await inference.chat(request(8, 0), { timeoutMs: PATIENCE_MS });
  const [choice] = answer.choices;
  check(choice.finishReason === FinishReason.LENGTH, answer);
  check(answer.usage?.completionTokens === 8 && text(choice.message) !== "", answer);
  return text(choice.message);
}

async function stream(): Promise<void> {
  const whole = await chat();
  const kinds: (string | undefined)[] = [];
  let said = "";
  for await (const { event } of inference.chatStream({ chat: request(8, 0) }, { timeoutMs: PATIENCE_MS })) {
    kinds.push(event.case);
    if (event.case === "content") said += event.value.text;
  }
  check(kinds[0] === "started" && kinds.at(-1) === "completed", kinds);
  check(kinds.filter((kind) => kind === "choiceFinished").length === 1 && said === whole, [kinds, said, whole]);
}

async function cancel(): Promise<void> {
  const controller = new AbortController();
  const options = { signal: controller.signal, timeoutMs: PATIENCE_MS };
  try {
    for await (const { event } of inference.chatStream({ chat: request(100_000, 0) }, options)) {
      if (event.case === "content") controller.abort();
    }
    throw new Error("the stream ended by itself");
  } catch (error) {
    check(ConnectError.from(error).code === Code.Canceled, String(error));
  }
  const { wasLoaded } = await models.unloadModel({ model: MODEL }, { timeoutMs: 30_000 });
  check(wasLoaded, { wasLoaded });
}

async function failure(call: () => Promise<unknown>): Promise<ConnectError> {
  try {
    await call();
  } catch (error) {
    return ConnectError.from(error);
  }
  throw new Error("it did not fail");
}

async function deadline(): Promise<void> {
  const error = await failure(async () => {
    for await (const _ of inference.chatStream({ chat: request(100_000, 0) }, { timeoutMs: 1000 }));
  });
  check(error.code === Code.DeadlineExceeded, String(error));
}

async function toolCall(): Promise<void> {
  const asked = create(ChatRequestSchema, {
    model: MODEL,
    messages: [{ role: Role.USER, content: [{ part: { case: "text", value: "Hello" } }] }],
    sampling: { temperature: 0, maxTokens: 512 },
    tools: [{ function: { name: "get_weather", parametersJson: WEATHER } }],
    toolChoice: { mode: ToolChoiceMode.FUNCTION, functionName: "get_weather" },
  });
  const { choices } = await inference.chat(asked, { timeoutMs: PATIENCE_MS });
  const call = choices[0].message?.toolCalls[0]?.function;
  check(choices[0].finishReason === FinishReason.TOOL_CALLS && call?.name === "get_weather", choices);
  check(["Paris", "Rome"].includes(JSON.parse(call?.argumentsJson ?? "{}").city), call);
}

async function richError(): Promise<void> {
  const error = await failure(() => inference.chat(request(8, 9), { timeoutMs: PATIENCE_MS }));
  check(error.code === Code.InvalidArgument, String(error));
  const [info] = error.findDetails(ErrorInfoSchema);
  check(info?.domain === "osaurus.ai" && info.reason === "INVALID_FIELD", info);
  const [wrong] = error.findDetails(BadRequestSchema);
  check(wrong?.fieldViolations[0]?.field === "sampling.temperature", wrong);
}

async function watchHealth(): Promise<void> {
  const controller = new AbortController();
  const options = { signal: controller.signal, timeoutMs: PATIENCE_MS };
  try {
    for await (const { status } of health.watch({ service: "osaurus.v1.InferenceService" }, options)) {
      check(status === HealthCheckResponse_ServingStatus.SERVING, status);
      return;
    }
  } finally {
    controller.abort();
  }
}

const cases: [string, () => Promise<unknown>][] = [
  ["list_models", listModels],
  ["chat", chat],
  ["stream", stream],
  ["cancel", cancel],
  ["deadline", deadline],
  ["tool_call", toolCall],
  ["rich_error", richError],
  ["health", watchHealth],
];
let failed = 0;
for (const [name, run] of cases) {
  try {
    await run();
    console.log(`ok ${name}`);
  } catch (error) {
    failed = 1;
    console.log(`failed ${name}: ${error}`);
  }
}
process.exit(failed);
