#!/usr/bin/python3
"""Messages: the model's own template, rendered by the helper, and what happens without it."""
import strata_e2e as e2e
from strata_e2e import Server, generate, grpc, pb, refused

MESSAGES = [("system", "You are terse."), ("user", "Say hi.")]
RENDERED = ("<|im_start|>system\nYou are terse.<|im_end|>\n<|im_start|>user\nSay hi.<|im_end|>\n"
            "<|im_start|>assistant\n")


def chat_model():
    return e2e.small_model(arch="qwen2", vocab=e2e.vocabulary("qwen2"), layers=2, tied=True)


def as_messages(pairs, **fields):
    made = pb.Messages(**fields)
    for role, content in pairs:
        made.messages.add(role=role, content=content)
    return made


def test_messages_are_rendered_with_the_models_template(server):
    reply = server.client.tokenize(messages=as_messages(MESSAGES))
    assert reply.rendered == RENDERED, reply.rendered
    assert list(reply.ids) == list(server.client.tokenize(text=RENDERED, parse_special=True).ids)
    bare = server.client.tokenize(messages=as_messages(MESSAGES, no_generation_prompt=True))
    assert bare.rendered == RENDERED[:-len("<|im_start|>assistant\n")]
    assert server.client.model().has_chat_template


def test_messages_generate_as_their_text_does(server):
    by_messages = generate(server, messages=MESSAGES, temperature=0, max_tokens=12)
    by_text = generate(server, text=RENDERED, parse_special=True, temperature=0, max_tokens=12)
    assert by_messages.ids == by_text.ids
    assert by_messages.usage.prompt_tokens == by_text.usage.prompt_tokens


def test_every_end_token_ends_the_answer(server):
    end_ids = server.client.model().end_ids
    assert len(end_ids) >= 2, end_ids
    for end in end_ids:
        answer = generate(server, messages=MESSAGES, temperature=0, max_tokens=5, logit_bias={end: 1000})
        assert answer.ids == [] and answer.stop_id == end and answer.finish == "stop"


def test_bad_messages(server):
    bad = grpc.StatusCode.INVALID_ARGUMENT
    with refused(bad, "role"):
        generate(server, messages=[("", "hi")])
    with refused(bad, "template_arguments_json"):
        server.client.tokenize(messages=as_messages(MESSAGES, template_arguments_json="{oops"))
    request = pb.GenerateRequest()
    request.messages.messages.add(role="assistant").tool_calls.add(name="f", arguments_json="[")
    with refused(bad, "arguments_json"):
        list(server.client.stream(request))
    assert generate(server, messages=MESSAGES, max_tokens=1).usage.prompt_tokens


def test_without_the_helper_plain_prompts_still_work():
    with Server(chat_model(), coordinator=["--python", "/nowhere/python3"]) as server:
        try:
            generate(server, messages=MESSAGES, max_tokens=2)
        except grpc.RpcError as error:
            assert "/nowhere/python3" in error.details(), error.details()
        else:
            raise AssertionError("messages were rendered without an interpreter")
        assert generate(server, text="hi", temperature=0, max_tokens=2, ignore_eos=True).ids


if __name__ == "__main__":
    e2e.main(globals(), model=chat_model())
