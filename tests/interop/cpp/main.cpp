// The interop client in C++: runs the cases of tests/interop/README.md against the core at argv[1].
#include <chrono>
#include <functional>
#include <iostream>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <grpcpp/grpcpp.h>

#include "google/rpc/error_details.pb.h"
#include "google/rpc/status.pb.h"
#include "grpc/health/v1/health.grpc.pb.h"
#include "osaurus/v1/inference_service.grpc.pb.h"
#include "osaurus/v1/model_service.grpc.pb.h"

namespace v1 = osaurus::v1;
namespace health = grpc::health::v1;

namespace {

constexpr char kModel[] = "tiny-llama";
constexpr char kWeather[] =
    R"({"type":"object","properties":{"city":{"enum":["Paris","Rome"]}},"required":["city"],"additionalProperties":false})";
constexpr std::chrono::seconds kPatience{60};

struct Stubs {
  std::unique_ptr<v1::InferenceService::Stub> inference;
  std::unique_ptr<v1::ModelService::Stub> models;
  std::unique_ptr<health::Health::Stub> health;
};

void Check(bool condition, const std::string& seen) {
  if (!condition) throw std::runtime_error(seen);
}

void CheckOk(const grpc::Status& status) {
  Check(status.ok(), std::to_string(status.error_code()) + " " + status.error_message());
}

void SetDeadline(grpc::ClientContext& context, std::chrono::seconds limit = kPatience) {
  context.set_deadline(std::chrono::system_clock::now() + limit);
}

v1::ChatRequest Request(int max_tokens, float temperature) {
  v1::ChatRequest request;
  request.set_model(kModel);
  auto* message = request.add_messages();
  message->set_role(v1::ROLE_USER);
  message->add_content()->set_text("Hello");
  request.mutable_sampling()->set_temperature(temperature);
  request.mutable_sampling()->set_max_tokens(max_tokens);
  request.mutable_sampling()->set_ignore_eos(true);
  return request;
}

std::string Text(const v1::Message& message) {
  std::string text;
  for (const auto& part : message.content()) text += part.text();
  return text;
}

v1::ChatResponse Answer(Stubs& stubs, const v1::ChatRequest& request) {
  grpc::ClientContext context;
  SetDeadline(context);
  v1::ChatResponse response;
  CheckOk(stubs.inference->Chat(&context, request, &response));
  return response;
}

void ListModels(Stubs& stubs) {
  grpc::ClientContext context;
  SetDeadline(context);
  v1::ListModelsResponse response;
  CheckOk(stubs.inference->ListModels(&context, {}, &response));
  for (const auto& model : response.models()) {
    if (model.id() == kModel) return;
  }
  throw std::runtime_error(response.ShortDebugString());
}

void Chat(Stubs& stubs) {
  const auto response = Answer(stubs, Request(8, 0));
  const auto& choice = response.choices(0);
  Check(choice.finish_reason() == v1::FINISH_REASON_LENGTH && response.usage().completion_tokens() == 8 &&
            !Text(choice.message()).empty(),
        response.ShortDebugString());
}

void Stream(Stubs& stubs) {
  const auto whole = Text(Answer(stubs, Request(8, 0)).choices(0).message());
  grpc::ClientContext context;
  SetDeadline(context);
  v1::ChatStreamRequest request;
  *request.mutable_chat() = Request(8, 0);
  auto reader = stubs.inference->ChatStream(&context, request);
  v1::ChatStreamResponse event;
  std::string text;
  int count = 0, finished = 0;
  bool completed = false;
  while (reader->Read(&event)) {
    Check(event.has_started() == (count == 0) && !completed, "event " + std::to_string(count) + " out of order");
    ++count;
    text += event.content().text();
    finished += event.has_choice_finished();
    completed = event.has_completed();
  }
  CheckOk(reader->Finish());
  Check(completed && finished == 1 && text == whole, text);
}

void Cancel(Stubs& stubs) {
  {
    grpc::ClientContext context;
    SetDeadline(context);
    v1::ChatStreamRequest request;
    *request.mutable_chat() = Request(100000, 0);
    auto reader = stubs.inference->ChatStream(&context, request);
    v1::ChatStreamResponse event;
    while (reader->Read(&event) && !event.has_content()) {
    }
    context.TryCancel();
    while (reader->Read(&event)) {
    }
    Check(reader->Finish().error_code() == grpc::StatusCode::CANCELLED, "not cancelled");
  }
  grpc::ClientContext context;
  SetDeadline(context, std::chrono::seconds{30});
  v1::UnloadModelRequest request;
  request.set_model(kModel);
  v1::UnloadModelResponse response;
  CheckOk(stubs.models->UnloadModel(&context, request, &response));
  Check(response.was_loaded(), "the model was not loaded");
}

void Deadline(Stubs& stubs) {
  grpc::ClientContext context;
  SetDeadline(context, std::chrono::seconds{1});
  v1::ChatStreamRequest request;
  *request.mutable_chat() = Request(100000, 0);
  auto reader = stubs.inference->ChatStream(&context, request);
  v1::ChatStreamResponse event;
  while (reader->Read(&event)) {
  }
  const auto status = reader->Finish();
  Check(status.error_code() == grpc::StatusCode::DEADLINE_EXCEEDED, status.error_message());
}

void ToolCall(Stubs& stubs) {
  auto request = Request(512, 0);
  request.mutable_sampling()->clear_ignore_eos();
  auto* function = request.add_tools()->mutable_function();
  function->set_name("get_weather");
  function->set_parameters_json(kWeather);
  request.mutable_tool_choice()->set_mode(v1::TOOL_CHOICE_MODE_FUNCTION);
  request.mutable_tool_choice()->set_function_name("get_weather");
  const auto response = Answer(stubs, request);
  const auto& choice = response.choices(0);
  Check(choice.finish_reason() == v1::FINISH_REASON_TOOL_CALLS && choice.message().tool_calls_size() > 0,
        response.ShortDebugString());
  const auto& call = choice.message().tool_calls(0).function();
  std::string arguments;
  for (char c : call.arguments_json()) {
    if (c != ' ') arguments += c;
  }
  Check(call.name() == "get_weather" && (arguments == R"({"city":"Paris"})" || arguments == R"({"city":"Rome"})"),
        call.ShortDebugString());
}

void RichError(Stubs& stubs) {
  grpc::ClientContext context;
  SetDeadline(context);
  v1::ChatResponse response;
  const auto failed = stubs.inference->Chat(&context, Request(8, 9), &response);
  Check(failed.error_code() == grpc::StatusCode::INVALID_ARGUMENT, failed.error_message());
  google::rpc::Status status;
  Check(status.ParseFromString(failed.error_details()), "no details");
  std::string reason, field;
  for (const auto& detail : status.details()) {
    google::rpc::ErrorInfo info;
    google::rpc::BadRequest wrong;
    if (detail.UnpackTo(&info)) reason = info.domain() + "/" + info.reason();
    if (detail.UnpackTo(&wrong)) field = wrong.field_violations(0).field();
  }
  Check(reason == "osaurus.ai/INVALID_FIELD" && field == "sampling.temperature", reason + " " + field);
}

void Health(Stubs& stubs) {
  grpc::ClientContext context;
  SetDeadline(context);
  health::HealthCheckRequest request;
  request.set_service("osaurus.v1.InferenceService");
  auto reader = stubs.health->Watch(&context, request);
  health::HealthCheckResponse response;
  Check(reader->Read(&response) && response.status() == health::HealthCheckResponse::SERVING,
        response.ShortDebugString());
  context.TryCancel();
  reader->Finish();
}

}  // namespace

int main(int, char** argv) {
  auto channel = grpc::CreateChannel(argv[1], grpc::InsecureChannelCredentials());
  Stubs stubs{v1::InferenceService::NewStub(channel), v1::ModelService::NewStub(channel),
              health::Health::NewStub(channel)};
  const std::vector<std::pair<std::string, std::function<void(Stubs&)>>> cases = {
      {"list_models", ListModels}, {"chat", Chat},           {"stream", Stream},        {"cancel", Cancel},
      {"deadline", Deadline},      {"tool_call", ToolCall}, {"rich_error", RichError}, {"health", Health},
  };
  int failed = 0;
  for (const auto& [name, run] : cases) {
    try {
      run(stubs);
      std::cout << "ok " << name << std::endl;
    } catch (const std::exception& error) {
      failed = 1;
      std::cout << "failed " << name << ": " << error.what() << std::endl;
    }
  }
  return failed;
}
