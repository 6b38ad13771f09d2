#!/usr/bin/env python3
"""The smallest Python client: sends a prompt to a Strata server and prints the answer as it comes.

    generate.py 127.0.0.1:50051 "Once upon a time"

Needs grpcio and the stubs, made once from the .proto file:
    python3 -m grpc_tools.protoc -Iproto --python_out=. --grpc_python_out=. proto/strata/v1/inference.proto
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
