"""Renders one model's chat template with Jinja2, for the coordinator that started this process.

Frames on standard input and output: a length of four bytes (big endian), then that many bytes of JSON. The first
frame brings {"template", "bos_token", "eos_token", "timeout"}; every later one is a request. Each is answered by
{"text": ...} or {"error": sentence, "kind": ...}, in order. The process ends with its standard input. What it
renders comes from a model file, so templates run in Jinja2's sandbox, under limits on memory and time, and can
write no files.
"""
import json
import math
import resource
import signal
import sys
from datetime import datetime

MEMORY_BYTES = 1 << 30


class Refused(Exception):
    """The template itself called raise_exception."""


def read_frame():
    head = sys.stdin.buffer.read(4)
    if len(head) < 4:
        sys.exit(0)
    body = sys.stdin.buffer.read(int.from_bytes(head, "big"))
    return json.loads(body)


def write_frame(answer):
    body = json.dumps(answer, ensure_ascii=False).encode("utf-8", "replace")
    sys.stdout.buffer.write(len(body).to_bytes(4, "big") + body)
    sys.stdout.buffer.flush()


def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    # Jinja2's own filter escapes for HTML, which is wrong in a prompt.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def strftime_now(pattern):
    return datetime.now().strftime(pattern)


def raise_exception(message):
    raise Refused(message)


def make_environment():
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} marks what a model wrote, for training; in a prompt it is only its body."""

        tags = {"generation"}

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation])
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    return environment


def as_templates_expect(messages):
    """Clients send null for the content beside tool calls, and their arguments as JSON text."""
    for message in messages:
        calls = message.get("tool_calls") or ()
        if calls and message.get("content") is None:
            message["content"] = ""
        for call in calls:
            function = call.get("function", call)
            if isinstance(function.get("arguments"), str):
                try:
                    parsed = json.loads(function["arguments"])
                except ValueError:
                    continue
                if isinstance(parsed, dict):
                    function["arguments"] = parsed
    return messages


def render(template, setup, request):
    variables = {"documents": None, "bos_token": setup["bos_token"], "eos_token": setup["eos_token"]}
    variables.update(request.get("arguments") or {})
    variables["messages"] = as_templates_expect(request["messages"])
    variables["tools"] = request.get("tools") or None
    variables["add_generation_prompt"] = request.get("add_generation_prompt", True)
    return template.render(variables)


def answer_to(template, setup, request):
    try:
        return {"text": render(template, setup, request)}
    except Refused as error:
        return {"kind": "refused", "error": f"the chat template refuses these messages: {error}"}
    except MemoryError:
        return {"kind": "failed", "error": f"the chat template needs more than {MEMORY_BYTES >> 20} MB"}
    except Exception as error:  # whatever a template can raise is a sentence for its user
        sentence = f"{type(error).__name__}: {error}"
        return {"kind": "failed", "error": f"the chat template fails on these messages: {sentence}"}


def limit_resources():
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))


def main():
    setup = read_frame()
    try:
        environment = make_environment()
    except ImportError:
        write_frame({"kind": "missing", "error": "chat templates need python3-jinja2 (apt install python3-jinja2)"})
        return
    limit_resources()
    # The coordinator ends what overruns. This is for the case that it is gone and we would not notice.
    alarm = math.ceil(setup["timeout"]) + 5
    signal.alarm(alarm)
    try:
        template = environment.from_string(setup["template"])
    except Exception as error:
        line = getattr(error, "lineno", None)
        where = f" (line {line})" if line else ""
        write_frame({"kind": "broken", "error": f"the model's chat template does not compile: {error}{where}"})
        return
    write_frame({"text": ""})
    while True:
        signal.alarm(0)
        request = read_frame()
        signal.alarm(alarm)
        write_frame(answer_to(template, setup, request))


if __name__ == "__main__":
    main()
