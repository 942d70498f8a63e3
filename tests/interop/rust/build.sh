#!/usr/bin/env bash
# build.sh SOURCES TARGET: generate the stubs with tonic-build and build the client in TARGET.
set -euo pipefail
sources=$1 target=$2
cp -r "$sources"/{Cargo.toml,build.rs,src} "$target"
cd "$target"
rm -rf protos && mkdir protos
cp -r "$OSAURUS_REPOSITORY/protos/osaurus" "$sources/../protos/grpc" protos
cargo build --quiet --target-dir build
cp build/debug/client client
# Hundreds of megabytes that nothing needs again.
rm -rf build
