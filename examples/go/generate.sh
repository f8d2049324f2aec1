#!/usr/bin/env bash
# Generates Go code from the published protos into gen/. Needs go; protoc comes with the repository's virtual environment.
set -euo pipefail
cd "$(dirname "$0")"
root=$(cd ../.. && pwd)
export GOBIN="$PWD/.bin" PATH="$PWD/.bin:$PATH"
go install google.golang.org/protobuf/cmd/protoc-gen-go@v1.36.10
go install google.golang.org/grpc/cmd/protoc-gen-go-grpc@v1.5.1
rules=$(mktemp -d)
trap 'rm -rf "$rules"' EXIT
# The rules are options that a client need not know: an empty file stands for them, and the options are left out.
mkdir -p "$rules/in/buf/validate"
cp -r "$root/protos/creditmesh" "$rules/in/"
printf 'syntax = "proto3"; package buf.validate; option go_package = "creditmesh/example/gen/validate";' > "$rules/in/buf/validate/validate.proto"
"$root/.venv/bin/python" strip_rules.py "$rules/in"
files=(creditmesh/common/v1/billing.proto creditmesh/llm/v1/chat.proto creditmesh/llm/v1/call.proto creditmesh/llm/v1/llm_service.proto)
options=()
for file in "${files[@]}"; do
  package="creditmesh/example/gen/$(dirname "$file")"
  options+=("--go_opt=M$file=$package" "--go-grpc_opt=M$file=$package")
done
mkdir -p gen
"$root/.venv/bin/python" -m grpc_tools.protoc -I "$rules/in" --go_out=. --go_opt=module=creditmesh/example \
  --go-grpc_out=. --go-grpc_opt=module=creditmesh/example "${options[@]}" "${files[@]}"
go mod tidy
