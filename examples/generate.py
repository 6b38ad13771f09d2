#!/usr/bin/env python3
"""The smallest Python client: sends a prompt to a Strata server and prints the answer as it comes.

Needs grpcio (Debian: python3-grpcio) and stubs made once from the .proto file, with Debian's own tools:
    mkdir -p build/stubs
    protoc -Iproto --python_out=build/stubs --grpc_out=build/stubs \\
        --plugin=protoc-gen-grpc=$(command -v grpc_python_plugin) proto/strata/v1/inference.proto
or with pip's grpcio-tools:
    python3 -m grpc_tools.protoc -Iproto --python_out=build/stubs --grpc_python_out=build/stubs \\
        proto/strata/v1/inference.proto
Then:
    PYTHONPATH=build/stubs /usr/bin/python3 examples/generate.py 127.0.0.1:50051 "Once upon a time"
"""
import sys

import grpc
from strata.v1 import inference_pb2, inference_pb2_grpc


def main():
    address, prompt = sys.argv[1:]
    with grpc.insecure_channel(address) as channel:
        server = inference_pb2_grpc.InferenceStub(channel)
        request = inference_pb2.GenerateRequest(text=prompt, max_tokens=64, temperature=0)
        for response in server.Generate(request):
            print(response.text, end="", flush=True)
    print()


if __name__ == "__main__":
    main()
