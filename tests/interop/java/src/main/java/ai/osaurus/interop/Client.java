package ai.osaurus.interop;

import com.google.gson.JsonParser;
import com.google.protobuf.Any;
import com.google.protobuf.InvalidProtocolBufferException;
import com.google.rpc.BadRequest;
import com.google.rpc.ErrorInfo;
import io.grpc.Context;
import io.grpc.Grpc;
import io.grpc.InsecureChannelCredentials;
import io.grpc.ManagedChannel;
import io.grpc.Status;
import io.grpc.StatusRuntimeException;
import io.grpc.health.v1.HealthCheckRequest;
import io.grpc.health.v1.HealthCheckResponse;
import io.grpc.health.v1.HealthGrpc;
import io.grpc.protobuf.StatusProto;
import java.util.Iterator;
import java.util.LinkedHashMap;
import java.util.Map;
import java.util.concurrent.Callable;
import java.util.concurrent.TimeUnit;
import osaurus.v1.Chat.ChatChoice;
import osaurus.v1.Chat.ChatRequest;
import osaurus.v1.Chat.ChatResponse;
import osaurus.v1.Chat.ChatStreamRequest;
import osaurus.v1.Chat.ChatStreamResponse;
import osaurus.v1.Chat.ContentPart;
import osaurus.v1.Chat.FunctionTool;
import osaurus.v1.Chat.Message;
import osaurus.v1.Chat.Role;
import osaurus.v1.Chat.Tool;
import osaurus.v1.Chat.ToolChoice;
import osaurus.v1.Chat.ToolChoiceMode;
import osaurus.v1.InferenceServiceGrpc;
import osaurus.v1.InferenceServiceGrpc.InferenceServiceBlockingStub;
import osaurus.v1.InferenceServiceOuterClass.ListModelsRequest;
import osaurus.v1.ModelServiceGrpc;
import osaurus.v1.ModelServiceOuterClass.UnloadModelRequest;
import osaurus.v1.Sampling.FinishReason;
import osaurus.v1.Sampling.SamplingParams;

/** The interop client in Java: runs the cases of tests/interop/README.md against the core at args[0]. */
public final class Client {
  private static final String MODEL = "tiny-llama";
  private static final long PATIENCE_SECONDS = 60;
  private static final String WEATHER =
      "{\"type\":\"object\",\"properties\":{\"city\":{\"enum\":[\"Paris\",\"Rome\"]}},"
          + "\"required\":[\"city\"],\"additionalProperties\":false}";

  /** A case; what it throws is what went wrong. */
  private interface Case {
    void run() throws Exception;
  }

  private final ManagedChannel channel;

  private Client(ManagedChannel channel) {
    this.channel = channel;
  }

  private InferenceServiceBlockingStub inference(long seconds) {
    return InferenceServiceGrpc.newBlockingStub(channel).withDeadlineAfter(seconds, TimeUnit.SECONDS);
  }

  private static void check(boolean condition, Object seen) {
    if (!condition) {
      throw new IllegalStateException(String.valueOf(seen).replace('\n', ' '));
    }
  }

  private static ChatRequest request(int maxTokens, float temperature) {
    return ChatRequest.newBuilder()
        .setModel(MODEL)
        .addMessages(
            Message.newBuilder()
                .setRole(Role.ROLE_USER)
                .addContent(ContentPart.newBuilder().setText("Hello")))
        .setSampling(
            SamplingParams.newBuilder()
                .setTemperature(temperature)
                .setMaxTokens(maxTokens)
                .setIgnoreEos(true))
        .build();
  }

  private static ChatStreamRequest streamed(int maxTokens) {
    return ChatStreamRequest.newBuilder().setChat(request(maxTokens, 0)).build();
  }

  private static String text(Message message) {
    StringBuilder text = new StringBuilder();
    message.getContentList().forEach(part -> text.append(part.getText()));
    return text.toString();
  }

  private static StatusRuntimeException failure(Callable<?> call) throws Exception {
    try {
      call.call();
    } catch (StatusRuntimeException failure) {
      return failure;
    }
    throw new IllegalStateException("it did not fail");
  }

  private void listModels() {
    var listed = inference(PATIENCE_SECONDS).listModels(ListModelsRequest.getDefaultInstance());
    check(listed.getModelsList().stream().anyMatch(model -> model.getId().equals(MODEL)), listed);
  }

  private String chat() {
    ChatResponse answer = inference(PATIENCE_SECONDS).chat(request(8, 0));
    ChatChoice choice = answer.getChoices(0);
    String said = text(choice.getMessage());
    check(choice.getFinishReason() == FinishReason.FINISH_REASON_LENGTH, answer);
    check(answer.getUsage().getCompletionTokens() == 8 && !said.isEmpty(), answer);
    return said;
  }

  private void stream() {
    String whole = chat();
    StringBuilder said = new StringBuilder();
    int count = 0;
    int finished = 0;
    boolean isComplete = false;
    Iterator<ChatStreamResponse> events = inference(PATIENCE_SECONDS).chatStream(streamed(8));
    while (events.hasNext()) {
      ChatStreamResponse event = events.next();
      check(event.hasStarted() == (count == 0) && !isComplete, "event " + count + " out of order");
      count++;
      said.append(event.getContent().getText());
      finished += event.hasChoiceFinished() ? 1 : 0;
      isComplete = event.hasCompleted();
    }
    check(isComplete && finished == 1 && whole.contentEquals(said), finished + " " + said);
  }

  /** Calls belong to the context they are made in and end when it is cancelled. */
  private void cancel() throws Exception {
    try (Context.CancellableContext context = Context.current().withCancellation()) {
      context.call(
          () -> {
            Iterator<ChatStreamResponse> events = inference(PATIENCE_SECONDS).chatStream(streamed(100_000));
            while (!events.next().hasContent()) {}
            context.cancel(null);
            StatusRuntimeException failure = failure(() -> drained(events));
            check(failure.getStatus().getCode() == Status.Code.CANCELLED, failure);
            return null;
          });
    }
    var unloaded =
        ModelServiceGrpc.newBlockingStub(channel)
            .withDeadlineAfter(30, TimeUnit.SECONDS)
            .unloadModel(UnloadModelRequest.newBuilder().setModel(MODEL).build());
    check(unloaded.getWasLoaded(), "the model was not loaded");
  }

  private static <T> T drained(Iterator<T> events) {
    T last = null;
    while (events.hasNext()) {
      last = events.next();
    }
    return last;
  }

  private void deadline() throws Exception {
    StatusRuntimeException failure = failure(() -> drained(inference(1).chatStream(streamed(100_000))));
    check(failure.getStatus().getCode() == Status.Code.DEADLINE_EXCEEDED, failure);
  }

  private void toolCall() {
    ChatRequest.Builder asked = request(512, 0).toBuilder();
    asked.getSamplingBuilder().clearIgnoreEos();
    asked.addTools(
        Tool.newBuilder()
            .setFunction(FunctionTool.newBuilder().setName("get_weather").setParametersJson(WEATHER)));
    asked.setToolChoice(
        ToolChoice.newBuilder()
            .setMode(ToolChoiceMode.TOOL_CHOICE_MODE_FUNCTION)
            .setFunctionName("get_weather"));
    ChatResponse answer = inference(PATIENCE_SECONDS).chat(asked.build());
    ChatChoice choice = answer.getChoices(0);
    check(choice.getFinishReason() == FinishReason.FINISH_REASON_TOOL_CALLS, answer);
    check(choice.getMessage().getToolCallsCount() == 1, answer);
    var call = choice.getMessage().getToolCalls(0).getFunction();
    String city = JsonParser.parseString(call.getArgumentsJson()).getAsJsonObject().get("city").getAsString();
    check(call.getName().equals("get_weather") && (city.equals("Paris") || city.equals("Rome")), call);
  }

  private void richError() throws Exception {
    StatusRuntimeException failure = failure(() -> inference(PATIENCE_SECONDS).chat(request(8, 9)));
    check(failure.getStatus().getCode() == Status.Code.INVALID_ARGUMENT, failure);
    var status = StatusProto.fromThrowable(failure);
    check(status != null, "no details");
    ErrorInfo info = detail(status, ErrorInfo.class);
    check(info.getDomain().equals("osaurus.ai") && info.getReason().equals("INVALID_FIELD"), info);
    BadRequest wrong = detail(status, BadRequest.class);
    check(wrong.getFieldViolations(0).getField().equals("sampling.temperature"), wrong);
  }

  private static <T extends com.google.protobuf.Message> T detail(com.google.rpc.Status status, Class<T> kind)
      throws InvalidProtocolBufferException {
    for (Any detail : status.getDetailsList()) {
      if (detail.is(kind)) {
        return detail.unpack(kind);
      }
    }
    throw new IllegalStateException("no " + kind.getSimpleName());
  }

  private void watchHealth() throws Exception {
    try (Context.CancellableContext context = Context.current().withCancellation()) {
      HealthCheckResponse first =
          context.call(
              () ->
                  HealthGrpc.newBlockingStub(channel)
                      .withDeadlineAfter(PATIENCE_SECONDS, TimeUnit.SECONDS)
                      .watch(HealthCheckRequest.newBuilder().setService("osaurus.v1.InferenceService").build())
                      .next());
      check(first.getStatus() == HealthCheckResponse.ServingStatus.SERVING, first);
    }
  }

  public static void main(String[] args) {
    ManagedChannel channel = Grpc.newChannelBuilder(args[0], InsecureChannelCredentials.create()).build();
    Client client = new Client(channel);
    Map<String, Case> cases = new LinkedHashMap<>();
    cases.put("list_models", client::listModels);
    cases.put("chat", client::chat);
    cases.put("stream", client::stream);
    cases.put("cancel", client::cancel);
    cases.put("deadline", client::deadline);
    cases.put("tool_call", client::toolCall);
    cases.put("rich_error", client::richError);
    cases.put("health", client::watchHealth);
    int status = 0;
    for (var each : cases.entrySet()) {
      try {
        each.getValue().run();
        System.out.println("ok " + each.getKey());
      } catch (Exception failure) {
        status = 1;
        System.out.println("failed " + each.getKey() + ": " + failure);
      }
    }
    channel.shutdownNow();
    System.exit(status);
  }
}
