#!/usr/bin/env bash
# build.sh SOURCES TARGET: generate the stubs with protoc-gen-es and compile the client in TARGET.
set -euo pipefail
sources=$1 target=$2
cp "$sources"/{package.json,tsconfig.json,client.ts,buf.gen.yaml} "$target"
cd "$target"
npm install --no-audit --no-fund --loglevel=error
export PATH="$target/node_modules/.bin:$PATH"
# The error details are Google's own protos, as the Python package of them ships them.
common=$(python3 -c 'import google.rpc, pathlib; print(pathlib.Path(google.rpc.__path__[0]).parents[1])')
mkdir -p protos/google
cp -r "$OSAURUS_REPOSITORY/protos/osaurus" "$sources/../protos/grpc" protos
cp -r "$common/google/rpc" protos/google
find protos/google -name '*.py*' -delete
buf generate protos --template buf.gen.yaml --path protos/osaurus --path protos/grpc \
  --path protos/google/rpc/error_details.proto
tsc
