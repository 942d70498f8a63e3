#!/usr/bin/env bash
# build.sh SOURCES TARGET: generate the stubs with protoc and build the client in TARGET.
set -euo pipefail
sources=$1 target=$2
cp "$sources"/{CMakeLists.txt,main.cpp} "$target"
cd "$target"
# The error details are Google's own protos, as the Python package of them ships them.
common=$(python3 -c 'import google.rpc, pathlib; print(pathlib.Path(google.rpc.__path__[0]).parents[1])')
rm -rf protos && mkdir -p protos/google/rpc gen
cp -r "$OSAURUS_REPOSITORY/protos/osaurus" "$sources/../protos/grpc" protos
cp "$common"/google/rpc/{error_details,status}.proto protos/google/rpc
(
  cd protos
  find . -name '*.proto' -exec protoc -I. --cpp_out=../gen --grpc_out=../gen \
    --plugin=protoc-gen-grpc="$(command -v grpc_cpp_plugin)" {} +
)
cmake -S . -B build
cmake --build build --parallel 2
cp build/client client
