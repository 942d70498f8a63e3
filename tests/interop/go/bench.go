package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"sync"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	pb "osaurus.ai/interop/gen/osaurus/v1"
)

const benchPatience = 10 * time.Minute

// What one stream saw: when its content deltas came, since the streams were started.
type arrivals struct {
	times []time.Duration
	err   error
}

// Figures as tests/benchmarks/clients.py reads them, one line of JSON.
type figures struct {
	Seconds      float64   `json:"seconds"`
	FirstSeconds []float64 `json:"first_seconds"`
	GapSeconds   []float64 `json:"gap_seconds"`
	CPUSeconds   float64   `json:"cpu_seconds"`
}

func cpuTime() time.Duration {
	var usage syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &usage); err != nil {
		panic(err)
	}
	return time.Duration(usage.Utime.Nano() + usage.Stime.Nano())
}

func follow(ctx context.Context, inference pb.InferenceServiceClient, asked *pb.ChatRequest, started time.Time) arrivals {
	seen := arrivals{}
	events, err := inference.ChatStream(ctx, &pb.ChatStreamRequest{Chat: asked})
	for err == nil {
		var event *pb.ChatStreamResponse
		if event, err = events.Recv(); err == nil && event.GetContent() != nil {
			seen.times = append(seen.times, time.Since(started))
		}
	}
	if !errors.Is(err, io.EOF) {
		seen.err = err
	}
	return seen
}

// round runs one stream for each prompt, all at once.
func round(ctx context.Context, inference pb.InferenceServiceClient, prompts []string, tokens int32) (*figures, error) {
	all := make([]arrivals, len(prompts))
	before, started := cpuTime(), time.Now()
	var running sync.WaitGroup
	for i, prompt := range prompts {
		asked := request(tokens, 0)
		asked.Messages[0].Content[0].Part = &pb.ContentPart_Text{Text: prompt}
		running.Add(1)
		go func() {
			defer running.Done()
			all[i] = follow(ctx, inference, asked, started)
		}()
	}
	running.Wait()
	result := &figures{
		Seconds:      time.Since(started).Seconds(),
		FirstSeconds: []float64{},
		GapSeconds:   []float64{},
		CPUSeconds:   (cpuTime() - before).Seconds(),
	}
	for _, seen := range all {
		if seen.err != nil {
			return nil, seen.err
		}
		for n, at := range seen.times {
			if n == 0 {
				result.FirstSeconds = append(result.FirstSeconds, at.Seconds())
			} else {
				result.GapSeconds = append(result.GapSeconds, (at - seen.times[n-1]).Seconds())
			}
		}
	}
	return result, nil
}

// bench runs a round of streams for each line of stdin, a JSON array of STREAMS prompts, each answered
// with TOKENS tokens, and prints a line of figures for it.
func bench(address, streams, tokens string) error {
	wanted, err := strconv.Atoi(streams)
	if err != nil {
		return err
	}
	limit, err := strconv.ParseInt(tokens, 10, 32)
	if err != nil {
		return err
	}
	connection, err := grpc.NewClient(address, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer connection.Close()
	inference := pb.NewInferenceServiceClient(connection)
	ctx, done := context.WithTimeout(context.Background(), benchPatience)
	defer done()
	lines := json.NewDecoder(os.Stdin)
	for {
		var prompts []string
		if err := lines.Decode(&prompts); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
		if len(prompts) != wanted {
			return fmt.Errorf("%d prompts for %d streams", len(prompts), wanted)
		}
		result, err := round(ctx, inference, prompts, int32(limit))
		if err != nil {
			return err
		}
		if err := json.NewEncoder(os.Stdout).Encode(result); err != nil {
			return err
		}
	}
}
