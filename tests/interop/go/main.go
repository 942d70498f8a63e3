// The interop client in Go: runs the cases of tests/interop/README.md against the core at os.Args[1].
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	pb "osaurus.ai/interop/gen/osaurus/v1"
)

const (
	model    = "tiny-llama"
	patience = 60 * time.Second
	weather  = `{"type":"object","properties":{"city":{"enum":["Paris","Rome"]}},"required":["city"],"additionalProperties":false}`
)

type client struct {
	inference pb.InferenceServiceClient
	models    pb.ModelServiceClient
	health    grpc_health_v1.HealthClient
}

func request(maxTokens int32, temperature float32) *pb.ChatRequest {
	return &pb.ChatRequest{
		Model: model,
		Messages: []*pb.Message{{
			Role:    pb.Role_ROLE_USER,
			Content: []*pb.ContentPart{{Part: &pb.ContentPart_Text{Text: "Hello"}}},
		}},
		Sampling: &pb.SamplingParams{
			Temperature: proto.Float32(temperature),
			MaxTokens:   proto.Int32(maxTokens),
			IgnoreEos:   proto.Bool(true),
		},
	}
}

func text(message *pb.Message) string {
	said := ""
	for _, part := range message.GetContent() {
		said += part.GetText()
	}
	return said
}

func (c *client) listModels(ctx context.Context) error {
	listed, err := c.inference.ListModels(ctx, &pb.ListModelsRequest{})
	if err != nil {
		return err
	}
	for _, each := range listed.GetModels() {
		if each.GetId() == model {
			return nil
		}
	}
	return fmt.Errorf("no %s among %d models", model, len(listed.GetModels()))
}

func (c *client) chat(ctx context.Context) error {
	answer, err := c.inference.Chat(ctx, request(8, 0))
	if err != nil {
		return err
	}
	choice := answer.GetChoices()[0]
	if choice.GetFinishReason() != pb.FinishReason_FINISH_REASON_LENGTH ||
		answer.GetUsage().GetCompletionTokens() != 8 || text(choice.GetMessage()) == "" {
		return fmt.Errorf("unexpected answer %v", answer)
	}
	return nil
}

func (c *client) stream(ctx context.Context) error {
	answer, err := c.inference.Chat(ctx, request(8, 0))
	if err != nil {
		return err
	}
	events, err := c.inference.ChatStream(ctx, &pb.ChatStreamRequest{Chat: request(8, 0)})
	if err != nil {
		return err
	}
	said, count, finished, completed := "", 0, 0, false
	for {
		event, err := events.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
		if (event.GetStarted() != nil) != (count == 0) || completed {
			return fmt.Errorf("event %d out of order", count)
		}
		count++
		said += event.GetContent().GetText()
		if event.GetChoiceFinished() != nil {
			finished++
		}
		completed = event.GetCompleted() != nil
	}
	if want := text(answer.GetChoices()[0].GetMessage()); !completed || finished != 1 || said != want {
		return fmt.Errorf("%d finished, text %q, want %q", finished, said, want)
	}
	return nil
}

func (c *client) cancel(ctx context.Context) error {
	inner, stop := context.WithCancel(ctx)
	defer stop()
	events, err := c.inference.ChatStream(inner, &pb.ChatStreamRequest{Chat: request(100000, 0)})
	if err != nil {
		return err
	}
	for {
		event, err := events.Recv()
		if err != nil {
			return err
		}
		if event.GetContent() != nil {
			break
		}
	}
	stop()
	limited, done := context.WithTimeout(ctx, 30*time.Second)
	defer done()
	unloaded, err := c.models.UnloadModel(limited, &pb.UnloadModelRequest{Model: model})
	if err != nil {
		return err
	}
	if !unloaded.GetWasLoaded() {
		return errors.New("the model was not loaded")
	}
	return nil
}

func (c *client) deadline(ctx context.Context) error {
	limited, done := context.WithTimeout(ctx, time.Second)
	defer done()
	events, err := c.inference.ChatStream(limited, &pb.ChatStreamRequest{Chat: request(100000, 0)})
	for err == nil {
		_, err = events.Recv()
	}
	if status.Code(err) != codes.DeadlineExceeded {
		return err
	}
	return nil
}

func (c *client) toolCall(ctx context.Context) error {
	asked := request(512, 0)
	asked.Sampling.IgnoreEos = nil
	asked.Tools = []*pb.Tool{{Function: &pb.FunctionTool{Name: "get_weather", ParametersJson: weather}}}
	asked.ToolChoice = &pb.ToolChoice{
		Mode:         pb.ToolChoiceMode_TOOL_CHOICE_MODE_FUNCTION,
		FunctionName: "get_weather",
	}
	answer, err := c.inference.Chat(ctx, asked)
	if err != nil {
		return err
	}
	choice := answer.GetChoices()[0]
	calls := choice.GetMessage().GetToolCalls()
	if choice.GetFinishReason() != pb.FinishReason_FINISH_REASON_TOOL_CALLS || len(calls) == 0 ||
		calls[0].GetFunction().GetName() != "get_weather" {
		return fmt.Errorf("unexpected answer %v", answer)
	}
	var arguments struct{ City string }
	if err := json.Unmarshal([]byte(calls[0].GetFunction().GetArgumentsJson()), &arguments); err != nil {
		return err
	}
	if arguments.City != "Paris" && arguments.City != "Rome" {
		return fmt.Errorf("city %q", arguments.City)
	}
	return nil
}

func (c *client) richError(ctx context.Context) error {
	_, err := c.inference.Chat(ctx, request(8, 9))
	failure := status.Convert(err)
	if failure.Code() != codes.InvalidArgument {
		return fmt.Errorf("code %v", failure.Code())
	}
	reason, field := "", ""
	for _, detail := range failure.Details() {
		switch detail := detail.(type) {
		case *errdetails.ErrorInfo:
			reason = detail.GetDomain() + "/" + detail.GetReason()
		case *errdetails.BadRequest:
			field = detail.GetFieldViolations()[0].GetField()
		}
	}
	if reason != "osaurus.ai/INVALID_FIELD" || field != "sampling.temperature" {
		return fmt.Errorf("reason %q, field %q", reason, field)
	}
	return nil
}

func (c *client) watchHealth(ctx context.Context) error {
	inner, stop := context.WithCancel(ctx)
	defer stop()
	changes, err := c.health.Watch(inner, &grpc_health_v1.HealthCheckRequest{Service: "osaurus.v1.InferenceService"})
	if err != nil {
		return err
	}
	first, err := changes.Recv()
	if err != nil {
		return err
	}
	if first.GetStatus() != grpc_health_v1.HealthCheckResponse_SERVING {
		return fmt.Errorf("status %v", first.GetStatus())
	}
	return nil
}

func main() {
	if len(os.Args) == 5 && os.Args[2] == "bench" {
		if err := bench(os.Args[1], os.Args[3], os.Args[4]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	connection, err := grpc.NewClient(os.Args[1], grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(2)
	}
	defer connection.Close()
	c := &client{
		inference: pb.NewInferenceServiceClient(connection),
		models:    pb.NewModelServiceClient(connection),
		health:    grpc_health_v1.NewHealthClient(connection),
	}
	cases := []struct {
		name string
		run  func(context.Context) error
	}{
		{"list_models", c.listModels}, {"chat", c.chat}, {"stream", c.stream}, {"cancel", c.cancel},
		{"deadline", c.deadline}, {"tool_call", c.toolCall}, {"rich_error", c.richError},
		{"health", c.watchHealth},
	}
	failed := 0
	for _, each := range cases {
		ctx, done := context.WithTimeout(context.Background(), patience)
		if err := each.run(ctx); err != nil {
			failed = 1
			fmt.Printf("failed %s: %v\n", each.name, err)
		} else {
			fmt.Printf("ok %s\n", each.name)
		}
		done()
	}
	os.Exit(failed)
}
