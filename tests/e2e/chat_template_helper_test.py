#!/usr/bin/python3
"""The chat template helper, spoken to directly: real templates against Jinja2 itself, the extras that templates
use, tool calls, and what a template must not be able to do."""
import datetime
import gzip
import json
import os
import struct
import subprocess
import sys
import unittest

try:
    import jinja2
    import jinja2.ext
except ImportError:
    print("skipped: no python3-jinja2 here")
    sys.exit(77)

SOURCE = os.environ.get("STRATA_TEST_SOURCE", os.path.join(os.path.dirname(__file__), "..", ".."))
HELPER = os.path.join(SOURCE, "coordinator", "chat_template.py")
FIXTURES = os.path.join(SOURCE, "tests", "fixtures")


class Helper:
    """One helper process with one template."""

    def __init__(self, template, bos="<s>", eos="</s>", timeout=5):
        self.process = subprocess.Popen(["/usr/bin/python3", "-I", "-B", HELPER], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE)
        self.setup = self.ask({"template": template, "bos_token": bos, "eos_token": eos, "timeout": timeout})

    def ask(self, request):
        body = json.dumps(request).encode()
        self.process.stdin.write(struct.pack(">I", len(body)) + body)
        self.process.stdin.flush()
        length, = struct.unpack(">I", self.process.stdout.read(4))
        return json.loads(self.process.stdout.read(length))

    def render(self, messages, **request):
        return self.ask({"messages": messages, **request})

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.stdin.close()
        self.process.wait(timeout=30)
        self.process.stdout.close()


def once(template, messages=(), **request):
    with Helper(template) as helper:
        return helper.render(list(messages), **request)


def metadata_string(path, key):
    """A string value of a GGUF file, found by its key's bytes."""
    with (gzip.open if path.endswith(".gz") else open)(path, "rb") as file:
        data = file.read()
    name = key.encode()
    at = data.index(struct.pack("<Q", len(name)) + name + struct.pack("<I", 8)) + 8 + len(name) + 4
    length, = struct.unpack_from("<Q", data, at)
    return data[at + 8:at + 8 + length].decode()


def templates():
    with open(os.path.join(FIXTURES, "smollm2_chat_template.jinja"), encoding="utf-8") as file:
        yield "smollm2", file.read()
    yield "qwen2", metadata_string(os.path.join(FIXTURES, "qwen2.gguf.gz"), "tokenizer.chat_template")
    llama3 = os.path.join(SOURCE, "..", "shared", "vocab", "llama3.gguf")
    if os.path.exists(llama3):
        yield "llama3", metadata_string(llama3, "tokenizer.chat_template")


def direct(template, **variables):
    """The same in plain Jinja2, set up as the models' authors' tools set it up."""
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols])
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    return environment.from_string(template).render(**variables)


WEATHER = {"type": "function", "function": {
    "name": "weather", "description": "What's it like in <place>?",
    "parameters": {"type": "object", "properties": {"città": {"type": "string"}}}}}
CONVERSATIONS = {
    "one question": [{"role": "user", "content": "Hello <there> & 'you' \"too\""}],
    "a system prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " Why? \n"}],
    "several turns": [{"role": "user", "content": "1"}, {"role": "assistant", "content": "<think>\nhm\n</think>\n\n2"},
                      {"role": "user", "content": "日本語 é 😀"}],
}


class RealTemplates(unittest.TestCase):
    def test_like_jinja2(self):
        names = []
        for name, template in templates():
            names.append(name)
            with Helper(template) as helper:
                self.assertEqual(helper.setup, {"text": ""})
                for title, messages in CONVERSATIONS.items():
                    for prompt in (True, False):
                        with self.subTest(template=name, conversation=title, prompt=prompt):
                            expected = direct(template, messages=messages, tools=None, add_generation_prompt=prompt,
                                              bos_token="<s>", eos_token="</s>")
                            answer = helper.render(messages, add_generation_prompt=prompt, tools=None)
                            self.assertEqual(answer, {"text": expected})
        self.assertGreaterEqual(len(names), 2)
        print("templates:", ", ".join(names))

    def test_written_out(self):
        by_name = dict(templates())
        hello = [{"role": "user", "content": "Hi"}]
        self.assertEqual(
            once(by_name["smollm2"], hello, add_generation_prompt=True)["text"],
            "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
            "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
        with Helper(by_name["qwen2"]) as helper:
            self.assertEqual(helper.render(hello, arguments={"enable_thinking": False})["text"],
                             "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n")

    def test_tools(self):
        by_name = dict(templates())
        call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": "{\"città\": \"Köln\"}"}}
        messages = [{"role": "user", "content": "Rain?"},
                    {"role": "assistant", "content": None, "tool_calls": [call]},
                    {"role": "tool", "content": "12 °C"}]
        answer = once(by_name["qwen2"], messages, tools=[WEATHER])
        self.assertIn(json.dumps(WEATHER, ensure_ascii=False), answer["text"])
        self.assertIn('<tool_call>\n{"name": "weather", "arguments": {"città": "Köln"}}\n</tool_call>', answer["text"])
        self.assertIn("<tool_response>\n12 °C\n</tool_response>", answer["text"])

    def test_arguments_that_are_no_object_stay_text(self):
        template = "{{ messages[0].tool_calls[0].function.arguments is string }}"
        for text, is_string in (("{\"a\": 1}", "False"), ("[1]", "True"), ("{oops", "True"), ("", "True")):
            calls = [{"type": "function", "function": {"name": "f", "arguments": text}}]
            answer = once(template, [{"role": "assistant", "tool_calls": calls}])
            self.assertEqual(answer, {"text": is_string}, text)


class Extras(unittest.TestCase):
    def check(self, template, text, **request):
        self.assertEqual(once(template, **request), {"text": text})

    def test_blocks_are_trimmed(self):
        self.check("{% if true %}\n  a\n  {% endif %}\nb", "  a\nb")

    def test_loop_controls(self):
        self.check("{% for i in range(9) %}{% if i == 1 %}{% continue %}{% endif %}{% if i == 3 %}{% break %}"
                   "{% endif %}{{ i }}{% endfor %}", "02")

    def test_tojson_is_not_escaped(self):
        value = {"b": "<é'&\">", "a": [1, None, True]}
        self.check("{{ x | tojson }}", json.dumps(value, ensure_ascii=False), arguments={"x": value})
        self.check("{{ x | tojson(indent=2) }}", json.dumps(value, ensure_ascii=False, indent=2),
                   arguments={"x": value})

    def test_date(self):
        today = datetime.datetime.now().strftime("%d %b %Y")
        answer = once("{{ strftime_now('%d %b %Y') }}")
        self.assertIn(answer["text"], (today, datetime.datetime.now().strftime("%d %b %Y")))

    def test_variables(self):
        self.check("{{ bos_token }}|{{ eos_token }}|{{ tools is none }}|{{ documents is none }}|"
                   "{{ add_generation_prompt }}|{{ nothing is defined }}", "<s>|</s>|True|True|True|False")
        # The request's own fields cannot be replaced through arguments.
        self.check("{{ messages | length }}", "0", arguments={"messages": [1, 2]})

    def test_generation_blocks_are_their_body(self):
        self.check("{% generation %}{{ 1 + 1 }}{% endgeneration %}!", "2!")

    def test_any_text_comes_through(self):
        text = "line\nend\r\n\u2028 \u0000 \U0001F600 \\ \""
        self.assertEqual(once("{{ messages[0].content }}", [{"content": text}]), {"text": text})

    def test_one_after_another(self):
        with Helper("{{ messages[0] }}") as helper:
            for i in range(50):
                self.assertEqual(helper.render([i]) if i < 0 else helper.render([{"i": i}]), {"text": str({"i": i})})


class Refusals(unittest.TestCase):
    def test_the_templates_own(self):
        answer = once("{{ raise_exception('Only user and assistant, please') }}")
        self.assertEqual(answer["kind"], "refused")
        self.assertIn("Only user and assistant, please", answer["error"])

    def test_a_broken_template(self):
        with Helper("ok\n{% if %}") as helper:
            self.assertEqual(helper.setup["kind"], "broken")
            self.assertIn("line 2", helper.setup["error"])

    def test_failures_are_sentences(self):
        for template in ("{{ messages[0].content + 1 }}", "{{ nothing.at.all }}", "{{ 1 / 0 }}",
                         "{% for i in 5 %}{% endfor %}", "{{ messages | nosuch }}"):
            with Helper(template) as helper:
                answer = helper.setup
                if "error" not in answer:
                    answer = helper.render([{"role": "user", "content": "x"}])
                self.assertIn("chat template", answer["error"], template)

    def test_the_sandbox_holds(self):
        for template in ("{{ ''.__class__.__mro__[1].__subclasses__() }}",
                         "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
                         "{{ raise_exception.__globals__ }}{{ raise_exception.__globals__['sys'].exit() }}",
                         "{{ '{0.__class__.__init__}'.format(1).x.y }}",
                         "{{ messages.append(1) }}", "{{ messages[0].update({'a': 1}) }}",
                         "{% for i in range(10**9) %}{% endfor %}",
                         "{% include '/etc/passwd' %}", "{% import 'os' as os %}"):
            with self.subTest(template=template), Helper(template) as helper:
                answer = helper.render([{"role": "user", "content": "x"}])
                self.assertIn("error", answer)
                self.assertIsNone(helper.process.poll())

    def test_memory_is_limited(self):
        with Helper("{% if messages %}{{ ('a' * 2000000000) | length }}{% else %}fine{% endif %}") as helper:
            self.assertIn("more than", helper.render([{}])["error"])
            self.assertEqual(helper.render([]), {"text": "fine"})

    def test_it_ends_by_itself_when_nobody_is_left(self):
        spin = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
        helper = Helper(spin, timeout=-4)  # the alarm comes 5 s after the time limit
        body = b'{"messages": []}'
        helper.process.stdin.write(struct.pack(">I", len(body)) + body)
        helper.process.stdin.close()
        self.assertLess(helper.process.wait(timeout=60), 0)
        helper.process.stdout.close()

    def test_requests_must_be_whole(self):
        with Helper("x") as helper:
            self.assertIn("error", helper.ask({"nothing": 1}))
            self.assertIn("error", helper.ask({"messages": 5}))
            self.assertEqual(helper.render([]), {"text": "x"})


if __name__ == "__main__":
    unittest.main(verbosity=1)
