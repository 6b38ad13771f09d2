#!/usr/bin/python3
"""A gRPC client that knows only server reflection: no .proto file, no generated code of the services it calls.

    reflection_client.py [--v1alpha] ADDRESS list
    reflection_client.py [--v1alpha] ADDRESS describe SYMBOL
    reflection_client.py [--v1alpha] ADDRESS call SERVICE/METHOD [JSON]

`call` sends one request (as JSON, or none) and prints each response as one line of JSON.
"""
import json
import sys

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, json_format, message_factory

FieldType = descriptor_pb2.FieldDescriptorProto


def message_class(pool, name):
    descriptor = pool.FindMessageTypeByName(name)
    if hasattr(message_factory, "GetMessageClass"):
        return message_factory.GetMessageClass(descriptor)
    return message_factory.MessageFactory(pool).GetPrototype(descriptor)


def reflection_messages(package):
    """The request and response of reflection itself, put together field by field."""
    file = descriptor_pb2.FileDescriptorProto(name=f"{package}.proto", package=package, syntax="proto3")

    def message(name, *fields, oneof=None):
        made = file.message_type.add(name=name)
        if oneof:
            made.oneof_decl.add(name=oneof)
        for field, number, kind, *flags in fields:
            added = made.field.add(name=field, number=number, label=FieldType.LABEL_OPTIONAL)
            if isinstance(kind, str):
                added.type, added.type_name = FieldType.TYPE_MESSAGE, f".{package}.{kind}"
            else:
                added.type = kind
            if "repeated" in flags:
                added.label = FieldType.LABEL_REPEATED
            if "oneof" in flags:
                added.oneof_index = 0

    text, data, number = FieldType.TYPE_STRING, FieldType.TYPE_BYTES, FieldType.TYPE_INT32
    message("Request", ("host", 1, text), ("file_by_filename", 3, text, "oneof"),
            ("file_containing_symbol", 4, text, "oneof"), ("list_services", 7, text, "oneof"), oneof="question")
    message("Files", ("file_descriptor_proto", 1, data, "repeated"))
    message("Service", ("name", 1, text))
    message("Services", ("service", 1, "Service", "repeated"))
    message("Error", ("error_code", 1, number), ("error_message", 2, text))
    message("Response", ("files", 4, "Files", "oneof"), ("services", 6, "Services", "oneof"),
            ("error", 7, "Error", "oneof"), oneof="answer")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_class(pool, f"{package}.Request"), message_class(pool, f"{package}.Response")


class ReflectionError(Exception):
    """The server's error_response."""


class ReflectionClient:
    def __init__(self, channel, version="v1"):
        self.channel, self.pool, self.known = channel, descriptor_pool.DescriptorPool(), set()
        self.Request, response = reflection_messages(f"reflection_{version}")
        self.reflect = channel.stream_stream(f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
                                             request_serializer=self.Request.SerializeToString,
                                             response_deserializer=response.FromString)

    def _ask(self, **question):
        answer, = self.reflect(iter([self.Request(**question)]), timeout=30)
        if answer.WhichOneof("answer") == "error":
            raise ReflectionError(answer.error.error_message)
        return answer

    def services(self):
        return [service.name for service in self._ask(list_services="*").services.service]

    def _learn(self, answer):
        """Adds the files of an answer to the pool, and first what they import."""
        for data in answer.files.file_descriptor_proto:
            file = descriptor_pb2.FileDescriptorProto.FromString(data)
            if file.name in self.known:
                continue
            self.known.add(file.name)
            for needed in file.dependency:
                if needed not in self.known:
                    self._learn(self._ask(file_by_filename=needed))
            self.pool.Add(file)

    def service(self, name):
        self._learn(self._ask(file_containing_symbol=name))
        return self.pool.FindServiceByName(name)

    def describe(self, symbol):
        """The file that a symbol is in, as text."""
        self._learn(self._ask(file_containing_symbol=symbol))
        file = descriptor_pb2.FileDescriptorProto()
        self.pool.FindFileContainingSymbol(symbol).CopyToProto(file)
        return str(file)

    def call(self, path, request=None, timeout=60):
        """Calls SERVICE/METHOD with a request as a dict; yields the responses as messages."""
        service, method = path.split("/")
        descriptor = self.service(service).FindMethodByName(method)
        if descriptor is None:
            raise ReflectionError(f"{service} has no method {method}")
        request_class = message_class(self.pool, descriptor.input_type.full_name)
        response_class = message_class(self.pool, descriptor.output_type.full_name)
        invoke = self.channel.unary_stream(f"/{path}", request_serializer=request_class.SerializeToString,
                                           response_deserializer=response_class.FromString)
        yield from invoke(json_format.ParseDict(request or {}, request_class()), timeout=timeout)


def main(arguments):
    version = "v1"
    if arguments[:1] == ["--v1alpha"]:
        version, arguments = "v1alpha", arguments[1:]
    if len(arguments) < 2 or arguments[1] not in ("list", "describe", "call"):
        print(__doc__, file=sys.stderr)
        return 2
    with grpc.insecure_channel(arguments[0]) as channel:
        client = ReflectionClient(channel, version)
        try:
            if arguments[1] == "list":
                print("\n".join(client.services()))
            elif arguments[1] == "describe":
                print(client.describe(arguments[2]))
            else:
                request = json.loads(arguments[3]) if len(arguments) > 3 else {}
                for response in client.call(arguments[2], request):
                    print(json.dumps(json_format.MessageToDict(response, preserving_proto_field_name=True)), flush=True)
        except (ReflectionError, grpc.RpcError) as error:
            print(f"{arguments[0]}: {error.details() if isinstance(error, grpc.RpcError) else error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
