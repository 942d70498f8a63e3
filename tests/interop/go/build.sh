#!/usr/bin/env bash
# build.sh SOURCES TARGET: generate the stubs with Go's own plugins and build the client in TARGET.
set -euo pipefail
sources=$1 target=$2
cp "$sources"/{go.mod,main.go,bench.go,buf.gen.yaml} "$target"
cd "$target"
export GOBIN="$target/bin"
go install google.golang.org/protobuf/cmd/protoc-gen-go@v1.36.11
go install google.golang.org/grpc/cmd/protoc-gen-go-grpc@v1.6.0
PATH="$GOBIN:$PATH" buf generate "$OSAURUS_REPOSITORY/protos" --template buf.gen.yaml
go mod tidy
go build -o client .
