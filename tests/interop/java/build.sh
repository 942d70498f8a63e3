#!/usr/bin/env bash
# build.sh SOURCES TARGET: generate the stubs with Maven's protobuf plugin and build the client in TARGET.
set -euo pipefail
sources=$1 target=$2
cp -r "$sources"/{pom.xml,src} "$target"
cd "$target"
rm -rf protos && mkdir protos
cp -r "$OSAURUS_REPOSITORY/protos/osaurus" protos
mvn --batch-mode --quiet --no-transfer-progress package
