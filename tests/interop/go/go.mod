module osaurus.ai/interop

go 1.24

require (
	google.golang.org/genproto/googleapis/rpc v0.0.0-20251022142026-3a174f9686a8
	google.golang.org/grpc v1.78.0
	google.golang.org/protobuf v1.36.11
)
