#!/usr/bin/python3
"""Clients in another language, unmodified: one with stubs generated from the proto, one that knows only reflection."""
import json
import subprocess
import sys
import tempfile

import strata_e2e as e2e
import grpc

try:
    from reflection_client import ReflectionClient, ReflectionError
except ImportError as missing:
    print(f"skipped: {missing}")
    sys.exit(77)

TOOLS = e2e.SOURCE / "tests" / "tools"
SERVICES = ["strata.v1.Inference", "grpc.health.v1.Health", "grpc.reflection.v1.ServerReflection",
            "grpc.reflection.v1alpha.ServerReflection"]


# What such a client looks like. The stubs' folder and the server are its arguments.
STUB_CLIENT = """
import sys
sys.path.insert(0, sys.argv[1])
import grpc, json
from strata.v1 import inference_pb2 as pb, inference_pb2_grpc
import health_pb2, health_pb2_grpc
channel = grpc.insecure_channel(sys.argv[2])
inference = inference_pb2_grpc.InferenceStub(channel)
health = health_pb2_grpc.HealthStub(channel)
ids, text, finish = [], "", 0
for response in inference.Generate(pb.GenerateRequest(text="Hello", max_tokens=6, temperature=0, ignore_eos=True),
                                   timeout=60):
    ids += response.token_ids
    text += response.text
    finish = response.finish_reason or finish
watch = health.Watch(health_pb2.HealthCheckRequest(service="strata.v1.Inference"), timeout=60)
print(json.dumps({
    "model": inference.GetModel(pb.GetModelRequest()).architecture,
    "tokens": list(inference.Tokenize(pb.TokenizeRequest(text="Hello")).ids),
    "ids": ids, "text": text, "finish": finish,
    "check": health.Check(health_pb2.HealthCheckRequest()).status,
    "watch": next(watch).status,
}))
watch.cancel()
"""


def test_generated_stubs(server):
    with tempfile.TemporaryDirectory(prefix="strata-stubs") as folder:
        subprocess.run([TOOLS / "make_stubs", folder], check=True)
        done = subprocess.run([sys.executable, "-c", STUB_CLIENT, folder, server.address], stdout=subprocess.PIPE,
                              check=True)
    said = json.loads(done.stdout)
    expected = e2e.generate(server, text="Hello", max_tokens=6, temperature=0, ignore_eos=True)
    assert said["ids"] == expected.ids and said["text"] == expected.text, said
    assert said["finish"] == e2e.pb.FINISH_REASON_LENGTH, said
    assert said["model"] == "llama", said
    assert said["tokens"] == list(server.client.tokenize(text="Hello").ids), said
    assert said["check"] == 1 and said["watch"] == 1, said


def only_reflection(server, version):
    client = ReflectionClient(server.client.channel, version)
    assert client.services() == SERVICES, client.services()
    model, = client.call("strata.v1.Inference/GetModel")
    assert model.architecture == "llama" and model.layers == 4, model
    request = {"text": "Hello", "max_tokens": 6, "temperature": 0, "ignore_eos": True, "logit_bias": [
        {"token": 11, "bias": -100}]}
    responses = list(client.call("strata.v1.Inference/Generate", request))
    expected = e2e.generate(server, text="Hello", max_tokens=6, temperature=0, ignore_eos=True, logit_bias={11: -100})
    assert [i for r in responses for i in r.token_ids] == expected.ids
    assert "".join(r.text for r in responses) == expected.text
    assert responses[-1].usage.completion_tokens == 6, responses[-1]
    health, = client.call("grpc.health.v1.Health/Check", {"service": "liveness"})
    assert health.status == 1, health
    try:
        client.service("strata.v1.Pool")
    except ReflectionError as error:
        assert "strata.v1.Pool" in str(error)
    else:
        raise AssertionError("the pool's protocol is nobody's business on this port")


def test_reflection_v1(server):
    only_reflection(server, "v1")


def test_reflection_v1alpha(server):
    only_reflection(server, "v1alpha")


def test_errors_reach_a_client_of_reflection(server):
    client = ReflectionClient(server.client.channel)
    with e2e.refused(grpc.StatusCode.INVALID_ARGUMENT):
        list(client.call("strata.v1.Inference/Generate", {"max_tokens": 1}))


def test_the_command_line_client(server):
    tool = TOOLS / "reflection_client.py"

    def run(*arguments):
        return subprocess.run([tool, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    listed = run(server.address, "list")
    assert listed.returncode == 0 and listed.stdout.split() == SERVICES, listed
    called = run("--v1alpha", server.address, "call", "strata.v1.Inference/Tokenize", '{"text": "Hello"}')
    assert json.loads(called.stdout)["ids"] == list(server.client.tokenize(text="Hello").ids), called
    described = run(server.address, "describe", "strata.v1.GenerateRequest")
    assert 'name: "strata/v1/inference.proto"' in described.stdout, described
    absent = run(server.address, "describe", "strata.v1.Absent")
    assert absent.returncode == 1 and "strata.v1.Absent" in absent.stderr, absent


if __name__ == "__main__":
    e2e.main(globals(), workers=2)
