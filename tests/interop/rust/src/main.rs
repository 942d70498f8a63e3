//! The interop client in Rust: runs the cases of tests/interop/README.md against the core at argv[1].
use std::error::Error;
use std::time::Duration;

use health::health_client::HealthClient;
use osaurus::chat_stream_response::Event;
use osaurus::inference_service_client::InferenceServiceClient;
use osaurus::model_service_client::ModelServiceClient;
use osaurus::{content_part::Part, FinishReason, Role, ToolChoiceMode};
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request};
use tonic_types::StatusExt;

mod osaurus {
    tonic::include_proto!("osaurus.v1");
}
mod health {
    tonic::include_proto!("grpc.health.v1");
}

const MODEL: &str = "tiny-llama";
const PATIENCE: Duration = Duration::from_secs(60);
const WEATHER: &str = r#"{"type":"object","properties":{"city":{"enum":["Paris","Rome"]}},"required":["city"],"additionalProperties":false}"#;

type Outcome<T = ()> = Result<T, Box<dyn Error>>;

fn check(condition: bool, seen: impl std::fmt::Debug) -> Outcome {
    if condition {
        Ok(())
    } else {
        Err(format!("{seen:?}").into())
    }
}

fn within<T>(message: T, limit: Duration) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(limit);
    request
}

fn request(max_tokens: i32, temperature: f32) -> osaurus::ChatRequest {
    osaurus::ChatRequest {
        model: MODEL.into(),
        messages: vec![osaurus::Message {
            role: Role::User.into(),
            content: vec![osaurus::ContentPart { part: Some(Part::Text("Hello".into())) }],
            ..Default::default()
        }],
        sampling: Some(osaurus::SamplingParams {
            temperature: Some(temperature),
            max_tokens: Some(max_tokens),
            ignore_eos: Some(true),
            ..Default::default()
        }),
        ..Default::default()
    }
}

fn streamed(max_tokens: i32) -> osaurus::ChatStreamRequest {
    osaurus::ChatStreamRequest { chat: Some(request(max_tokens, 0.0)), ..Default::default() }
}

fn text(message: &osaurus::Message) -> String {
    let said = message.content.iter().filter_map(|part| match &part.part {
        Some(Part::Text(text)) => Some(text.as_str()),
        _ => None,
    });
    said.collect()
}

struct Client {
    inference: InferenceServiceClient<Channel>,
    models: ModelServiceClient<Channel>,
    health: HealthClient<Channel>,
}

impl Client {
    async fn run(&mut self, case: &str) -> Outcome {
        match case {
            "list_models" => self.list_models().await,
            "chat" => self.chat().await.map(drop),
            "stream" => self.stream().await,
            "cancel" => self.cancel().await,
            "deadline" => self.deadline().await,
            "tool_call" => self.tool_call().await,
            "rich_error" => self.rich_error().await,
            "health" => self.watch_health().await,
            _ => Err("no such case".into()),
        }
    }

    async fn list_models(&mut self) -> Outcome {
        let asked = within(osaurus::ListModelsRequest::default(), PATIENCE);
        let listed = self.inference.list_models(asked).await?.into_inner();
        check(listed.models.iter().any(|model| model.id == MODEL), listed)
    }

    async fn chat(&mut self) -> Outcome<String> {
        let answer = self.inference.chat(within(request(8, 0.0), PATIENCE)).await?.into_inner();
        let choice = answer.choices.first().ok_or("no choice")?;
        check(choice.finish_reason() == FinishReason::Length, &answer)?;
        check(answer.usage.as_ref().is_some_and(|usage| usage.completion_tokens == 8), &answer)?;
        let said = text(choice.message.as_ref().ok_or("no message")?);
        check(!said.is_empty(), &answer)?;
        Ok(said)
    }

    async fn stream(&mut self) -> Outcome {
        let whole = self.chat().await?;
        let mut events = self.inference.chat_stream(within(streamed(8), PATIENCE)).await?.into_inner();
        let (mut said, mut count, mut finished, mut is_complete) = (String::new(), 0, 0, false);
        while let Some(response) = events.message().await? {
            let event = response.event.ok_or("an event of no kind")?;
            let is_in_order = matches!(event, Event::Started(_)) == (count == 0) && !is_complete;
            check(is_in_order, format!("event {count} out of order"))?;
            count += 1;
            match event {
                Event::Content(delta) => said += &delta.text,
                Event::ChoiceFinished(_) => finished += 1,
                Event::Completed(_) => is_complete = true,
                _ => {}
            }
        }
        check(is_complete && finished == 1 && said == whole, (is_complete, finished, said, whole))
    }

    async fn cancel(&mut self) -> Outcome {
        let mut events = self.inference.chat_stream(within(streamed(100_000), PATIENCE)).await?.into_inner();
        loop {
            let response = events.message().await?.ok_or("the stream ended by itself")?;
            if matches!(response.event, Some(Event::Content(_))) {
                break;
            }
        }
        // What tonic calls cancelling.
        drop(events);
        let asked = osaurus::UnloadModelRequest { model: MODEL.into(), ..Default::default() };
        let unloaded = self.models.unload_model(within(asked, Duration::from_secs(30))).await?.into_inner();
        check(unloaded.was_loaded, unloaded)
    }

    async fn deadline(&mut self) -> Outcome {
        // The case before has unloaded the model; a load may take longer than the deadline.
        self.chat().await?;
        let asked = within(streamed(100_000), Duration::from_secs(3));
        let failure = match self.inference.chat_stream(asked).await {
            Err(failure) => failure,
            Ok(events) => {
                let mut events = events.into_inner();
                loop {
                    match events.message().await {
                        Ok(Some(_)) => {}
                        Ok(None) => return Err("the stream ended by itself".into()),
                        Err(failure) => break failure,
                    }
                }
            }
        };
        check(failure.code() == Code::DeadlineExceeded, failure)
    }

    async fn tool_call(&mut self) -> Outcome {
        let mut asked = request(512, 0.0);
        if let Some(sampling) = asked.sampling.as_mut() {
            sampling.ignore_eos = None;
        }
        asked.tools.push(osaurus::Tool {
            function: Some(osaurus::FunctionTool {
                name: "get_weather".into(),
                parameters_json: WEATHER.into(),
                ..Default::default()
            }),
        });
        asked.tool_choice = Some(osaurus::ToolChoice {
            mode: ToolChoiceMode::Function.into(),
            function_name: "get_weather".into(),
        });
        let answer = self.inference.chat(within(asked, PATIENCE)).await?.into_inner();
        let choice = answer.choices.first().ok_or("no choice")?;
        check(choice.finish_reason() == FinishReason::ToolCalls, &answer)?;
        let calls = choice.message.as_ref().map_or(&[][..], |message| &message.tool_calls);
        check(calls.len() == 1, &answer)?;
        let function = calls[0].function.as_ref().ok_or("not a function")?;
        let arguments: String = function.arguments_json.split_whitespace().collect();
        let is_a_city = [r#"{"city":"Paris"}"#, r#"{"city":"Rome"}"#].contains(&arguments.as_str());
        check(function.name == "get_weather" && is_a_city, function)
    }

    async fn rich_error(&mut self) -> Outcome {
        let failure = match self.inference.chat(within(request(8, 9.0), PATIENCE)).await {
            Ok(answer) => return Err(format!("answered {answer:?}").into()),
            Err(failure) => failure,
        };
        check(failure.code() == Code::InvalidArgument, &failure)?;
        let details = failure.get_error_details();
        let info = details.error_info().ok_or("no ErrorInfo")?;
        check(info.domain == "osaurus.ai" && info.reason == "INVALID_FIELD", info)?;
        let wrong = details.bad_request().ok_or("no BadRequest")?;
        check(wrong.field_violations.iter().any(|each| each.field == "sampling.temperature"), wrong)
    }

    async fn watch_health(&mut self) -> Outcome {
        let asked = health::HealthCheckRequest { service: "osaurus.v1.InferenceService".into() };
        let mut changes = self.health.watch(within(asked, PATIENCE)).await?.into_inner();
        let first = changes.message().await?.ok_or("no message")?;
        check(first.status() == health::health_check_response::ServingStatus::Serving, first)
    }
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Outcome {
    let address = std::env::args().nth(1).ok_or("usage: client HOST:PORT")?;
    let channel = Endpoint::from_shared(format!("http://{address}"))?.connect().await?;
    let mut client = Client {
        inference: InferenceServiceClient::new(channel.clone()),
        models: ModelServiceClient::new(channel.clone()),
        health: HealthClient::new(channel),
    };
    let cases = ["list_models", "chat", "stream", "cancel", "deadline", "tool_call", "rich_error", "health"];
    let mut status = 0;
    for case in cases {
        match client.run(case).await {
            Ok(()) => println!("ok {case}"),
            Err(failure) => {
                status = 1;
                println!("failed {case}: {failure}");
            }
        }
    }
    std::process::exit(status)
}
