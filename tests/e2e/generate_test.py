#!/usr/bin/python3
"""The client API over two workers: what a request can ask for, what it gets back, and how it is refused."""
import math
import threading
import time

import strata_e2e as e2e
from strata_e2e import generate, grpc, pb, refused, request

PROMPT = "The quick brown fox jumps over the lazy dog, and then"
GREEDY = dict(text=PROMPT, temperature=0)


def prompt_ids(server, text=PROMPT):
    return list(server.client.tokenize(text=text, add_special=True).ids)


# --- what comes back ---

def test_an_answer_streams(server):
    answer = generate(server, **GREEDY, max_tokens=20)
    assert len(answer.ids) == 20 and answer.finish == "length", (answer.ids, answer.finish)
    assert answer.responses > 5, "it came in one piece"
    assert answer.usage.completion_tokens == 20
    assert answer.usage.prompt_tokens == len(prompt_ids(server))
    assert answer.timings.total_ms >= answer.timings.ttft_ms > 0
    assert answer.timings.tokens_per_second > 0


def test_text_is_the_text_of_the_ids(server):
    for seed in range(5):
        answer = generate(server, text=PROMPT, seed=seed, max_tokens=40)
        whole = server.client.detokenize(prompt_ids(server) + answer.ids)
        assert whole == PROMPT + answer.text, (whole, answer.text)


def test_ids_instead_of_text(server):
    by_text = generate(server, **GREEDY, max_tokens=8)
    by_ids = generate(server, tokens=prompt_ids(server), temperature=0, max_tokens=8)
    assert by_text.ids == by_ids.ids


def test_greedy_is_the_same_every_time(server):
    first = generate(server, **GREEDY, max_tokens=30).ids
    assert all(generate(server, **GREEDY, max_tokens=30).ids == first for _ in range(3))


def test_seeds_decide(server):
    one, again, other = (generate(server, text=PROMPT, seed=seed, max_tokens=30).ids for seed in (5, 5, 6))
    assert one == again and one != other
    drawn = generate(server, text=PROMPT, max_tokens=30)
    assert drawn.usage.seed
    assert generate(server, text=PROMPT, seed=drawn.usage.seed, max_tokens=30).ids == drawn.ids


def test_choices_differ_and_repeat(server):
    answer = generate(server, text=PROMPT, seed=11, n=4, max_tokens=15)
    ids = [choice.ids for choice in answer.choices]
    assert all(len(i) == 15 for i in ids) and len({tuple(i) for i in ids}) == 4, ids
    assert [c.ids for c in generate(server, text=PROMPT, seed=11, n=4, max_tokens=15).choices] == ids
    assert generate(server, text=PROMPT, seed=11, max_tokens=15).ids == ids[0], "choice 0 is the only choice"
    greedy = generate(server, **GREEDY, n=3, max_tokens=10)
    assert len({tuple(c.ids) for c in greedy.choices}) == 1


def test_max_tokens_and_what_is_left_of_the_context(server):
    context = server.client.model().context
    assert generate(server, **GREEDY, max_tokens=1).finish == "length"
    nothing = generate(server, **GREEDY, max_tokens=0)
    assert nothing.ids == [] and nothing.finish == "length" and nothing.usage.completion_tokens == 0
    prompt = [1 + i % 1000 for i in range(context - 5)]
    rest = generate(server, tokens=prompt, temperature=0, ignore_eos=True)
    assert len(rest.ids) == 5 and rest.finish == "length", rest.ids
    assert len(generate(server, tokens=prompt, temperature=0, ignore_eos=True, max_tokens=50).ids) == 5


# --- when it stops ---

def test_stop_strings_are_cut(server):
    plain = generate(server, **GREEDY, max_tokens=30)
    middle = len(plain.text) // 2
    stop = plain.text[middle:middle + 5]
    answer = generate(server, **GREEDY, max_tokens=30, stop=["never this", stop])
    assert answer.finish == "stop" and answer.stop == stop, (answer.finish, answer.stop)
    assert answer.text == plain.text[:plain.text.index(stop)]
    assert answer.ids == plain.ids[:len(answer.ids)] and len(answer.ids) < 30
    assert answer.usage.completion_tokens == len(answer.ids)


def test_stop_ids_end_a_choice(server):
    plain = generate(server, **GREEDY, max_tokens=30)
    stop = plain.ids[7]
    first = plain.ids.index(stop)
    answer = generate(server, **GREEDY, max_tokens=30, stop_ids=[stop])
    assert answer.ids == plain.ids[:first] and answer.finish == "stop" and answer.stop_id == stop


def test_min_tokens_forbids_the_end(server):
    plain = generate(server, **GREEDY, max_tokens=30)
    stop = plain.ids[2]
    assert len(generate(server, **GREEDY, max_tokens=30, stop_ids=[stop]).ids) <= 2
    answer = generate(server, **GREEDY, max_tokens=30, stop_ids=[stop], min_tokens=6)
    assert len(answer.ids) >= 6 and stop not in answer.ids[:6]


def test_the_models_own_end(server):
    end = server.client.model().end_ids[0]
    answer = generate(server, **GREEDY, max_tokens=5, logit_bias={end: 1000})
    assert answer.ids == [] and answer.text == "" and answer.finish == "stop" and answer.stop_id == end
    ignored = generate(server, **GREEDY, max_tokens=5, logit_bias={end: 1000}, ignore_eos=True)
    assert ignored.ids == [end] * 5 and ignored.finish == "length" and ignored.text == ""
    shown = generate(server, **GREEDY, max_tokens=2, logit_bias={end: 1000}, ignore_eos=True, echo_special=True)
    assert shown.text == "<|endoftext|>" * 2, shown.text


# --- what it is drawn from ---

def test_logit_bias(server):
    plain = generate(server, **GREEDY, max_tokens=4)
    banned = generate(server, **GREEDY, max_tokens=4, logit_bias={plain.ids[0]: -math.inf})
    assert banned.ids[0] != plain.ids[0]
    forced = generate(server, **GREEDY, max_tokens=4, logit_bias={1234: 1000})
    assert forced.ids == [1234] * 4


def test_narrow_sampling_is_greedy(server):
    greedy = generate(server, **GREEDY, max_tokens=10).ids
    assert generate(server, text=PROMPT, seed=1, top_k=1, max_tokens=10).ids == greedy
    assert generate(server, text=PROMPT, seed=1, top_p=1e-6, max_tokens=10).ids == greedy
    assert generate(server, text=PROMPT, seed=1, min_p=1.0, max_tokens=10).ids == greedy


def test_penalties_change_the_answer(server):
    forced = dict(**GREEDY, max_tokens=6, logit_bias={1234: 1000, 4321: 600})
    assert generate(server, **forced).ids == [1234] * 6
    for penalty in (dict(repetition_penalty=2.0), dict(presence_penalty=500.0), dict(frequency_penalty=500.0)):
        assert 4321 in generate(server, **forced, **penalty).ids, penalty


# --- what is reported ---

def test_logprobs(server):
    answer = generate(server, **GREEDY, max_tokens=10, logprobs=True, top_logprobs=3)
    assert [l.token for l in answer.logprobs] == answer.ids
    for entry in answer.logprobs:
        assert len(entry.top) == 3 and entry.top[0].token == entry.token
        assert entry.logprob == entry.top[0].logprob <= 0
        assert entry.top[0].logprob >= entry.top[1].logprob >= entry.top[2].logprob
    assert b"".join(l.text for l in answer.logprobs).decode() == answer.text
    none = generate(server, **GREEDY, max_tokens=3)
    assert not none.logprobs


def test_logprobs_are_the_models_own(server):
    plain = generate(server, **GREEDY, max_tokens=1, logprobs=True).logprobs[0]
    biased = generate(server, text=PROMPT, temperature=2.0, top_k=1, max_tokens=1, logprobs=True).logprobs[0]
    assert plain.token == biased.token and plain.logprob == biased.logprob


def test_prompt_logprobs_are_what_generation_reports(server):
    ids = prompt_ids(server)
    answer = generate(server, **GREEDY, max_tokens=10, logprobs=True)
    scored = generate(server, tokens=ids + answer.ids, max_tokens=0, prompt_logprobs=True, top_logprobs=2)
    assert scored.prompt_ids == ids + answer.ids
    scores = scored.prompt_logprobs
    assert len(scores) == len(ids) + 10 and scores[0].unscored and not scores[1].unscored
    assert [s.token for s in scores] == ids + answer.ids
    assert [s.logprob for s in scores[len(ids):]] == [l.logprob for l in answer.logprobs], "the same bits"
    assert all(len(s.top) == 2 for s in scores[1:])
    one = generate(server, tokens=ids[:1], max_tokens=0, prompt_logprobs=True)
    assert len(one.prompt_logprobs) == 1 and one.prompt_logprobs[0].unscored


def test_long_prompt_logprobs_come_in_parts(server):
    tokens = [(i * 37) % 50000 for i in range(server.client.model().context // e2e.SLOW)]
    responses = list(server.client.stream(request(tokens=tokens, max_tokens=0, prompt_logprobs=True, top_logprobs=20)))
    assert max(response.ByteSize() for response in responses) < 2_000_000
    assert len(responses) >= 2
    assert len(e2e.Answer(responses).prompt_logprobs) == len(tokens)


def test_request_ids(server):
    call = server.client.stream(request(**GREEDY, max_tokens=1), metadata=(("x-request-id", "mine-1"),))
    assert dict(call.initial_metadata())["x-request-id"] == "mine-1"
    list(call)
    call = server.client.stream(request(**GREEDY, max_tokens=1, request_id="mine-2"))
    assert dict(call.initial_metadata())["x-request-id"] == "mine-2"
    list(call)
    call = server.client.stream(request(**GREEDY, max_tokens=1))
    drawn = dict(call.initial_metadata())["x-request-id"]
    list(call)
    assert len(drawn) == 16
    log = server.coordinator.text()
    assert all(f"request {name}:" in log for name in ("mine-1", "mine-2", drawn))


# --- refusals ---

def test_bad_requests_are_refused_with_a_sentence(server):
    bad = grpc.StatusCode.INVALID_ARGUMENT
    size = server.client.model().vocabulary
    for fields, parts in (
            (dict(), ["no input"]),
            (dict(text=""), ["empty"]),
            (dict(tokens=[]), ["empty"]),
            (dict(tokens=[size]), ["tokens", str(size)]),
            (dict(tokens=[-1]), ["tokens", "-1"]),
            (dict(**GREEDY, n=0), ["n is 0"]),
            (dict(**GREEDY, n=1000), ["n is 1000"]),
            (dict(text="x", temperature=-1), ["temperature is -1"]),
            (dict(text="x", temperature=math.nan), ["temperature"]),
            (dict(text="x", top_p=0), ["top_p is 0"]),
            (dict(text="x", top_p=1.01), ["top_p"]),
            (dict(text="x", min_p=-0.1), ["min_p"]),
            (dict(text="x", repetition_penalty=0), ["repetition_penalty is 0"]),
            (dict(text="x", frequency_penalty=math.inf), ["frequency_penalty"]),
            (dict(text="x", logprobs=True, top_logprobs=21), ["top_logprobs is 21", "20"]),
            (dict(text="x", top_logprobs=1), ["neither"]),
            (dict(text="x", stop=["y"] * 17), ["17", "16"]),
            (dict(text="x", stop=[""]), ["stop string is empty"]),
            (dict(text="x", stop=["y" * 300]), ["300", "256"]),
            (dict(text="x", stop_ids=[size]), ["stop_ids"]),
            (dict(text="x", stop_ids=[1] * 65), ["65", "64"]),
            (dict(text="x", logit_bias={size: 1.0}), ["logit_bias"]),
            (dict(text="x", logit_bias={1: math.nan}), ["logit_bias of token 1"]),
            (dict(text="x", max_tokens=2, min_tokens=3), ["min_tokens is 3"]),
            (dict(text="x", request_id="not\nprintable"), ["request_id"]),
            (dict(text="x", request_id="x" * 200), ["request_id of 200 bytes"]),
            (dict(messages=[("user", "hi")]), ["no chat template"])):
        with refused(bad, *parts):
            generate(server, **fields)
    with refused(grpc.StatusCode.NOT_FOUND, "gpt-5"):
        generate(server, **GREEDY, model="gpt-5")
    assert generate(server, **GREEDY, max_tokens=1, model=server.client.model().name).ids


def test_too_long_prompts_are_refused_with_both_numbers(server):
    context = server.client.model().context
    with refused(grpc.StatusCode.INVALID_ARGUMENT, str(context + 1), str(context)):
        generate(server, tokens=[1] * (context + 1))
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "leaves no room"):
        generate(server, tokens=[1] * context)


def test_garbage_is_refused(server):
    call = server.client.channel.unary_stream(e2e.INFERENCE + "Generate")
    with refused(grpc.StatusCode.INVALID_ARGUMENT):
        list(call(b"\xff\xff\xff\xff", timeout=20))
    with refused(grpc.StatusCode.INVALID_ARGUMENT):
        list(call(pb.GenerateRequest(request_id="x").SerializeToString() + b"\x1a\x02\xc3\x28", timeout=20))
    with refused(grpc.StatusCode.UNIMPLEMENTED):
        server.client.channel.unary_unary(e2e.INFERENCE + "Nonsense")(b"", timeout=20)
    assert generate(server, **GREEDY, max_tokens=1).ids


# --- text ---

def test_tokenize_and_back(server):
    for text in ("Hello, world", "  spaces\n\nand lines ", "na\u00efve \u20ac \U0001f600 \u4f60\u597d", ""):
        ids = server.client.tokenize(text=text).ids
        assert server.client.detokenize(ids) == text
    special = server.client.tokenize(text="<|endoftext|>", parse_special=True).ids
    assert list(special) == list(server.client.model().end_ids)[:1]
    assert len(server.client.tokenize(text="<|endoftext|>").ids) > 1
    assert server.client.detokenize(special) == ""
    assert server.client.detokenize(special, special=True) == "<|endoftext|>"
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "ids[0]"):
        server.client.detokenize([-5])


def test_the_model_and_the_pool_describe_themselves(server):
    model, pool = server.client.model(), server.pool()
    assert (model.architecture, model.layers, model.width, model.heads, model.kv_heads) == ("llama", 4, 64, 4, 2)
    assert model.tokenizer.startswith("gpt2/") and model.fingerprint and not model.has_chat_template
    assert pool.state == pb.POOL_STATE_READY and pool.problem == "" and pool.workers_wanted == server.n_workers
    assert [s.first_layer for s in pool.stages] == [sum(s.layers for s in pool.stages[:i])
                                                    for i in range(server.n_workers)]
    assert sum(s.layers for s in pool.stages) == 4
    for index, stage in enumerate(pool.stages):
        assert stage.index == index and stage.state == "ready" and stage.worker in server.names()
        assert stage.weight_bytes > 0 and stage.kv_bytes > 0 and stage.loaded_bytes == stage.load_bytes > 0
        assert e2e.BACKEND != "cpu" or stage.device.startswith("cpu"), stage.device
    assert pool.pages >= pool.pages_free > 0 and pool.page_positions == 64 and pool.max_sequences == 16


# --- clients that leave, are slow, or run out of time ---

def test_cancelling_frees_slots_and_pages(server):
    server.idle()
    calls = [server.client.stream(request(text=PROMPT, max_tokens=100000, ignore_eos=True)) for _ in range(4)]
    for call in calls:
        next(iter(call))
    e2e.until(lambda: server.pool().running == 4 and server.pool().pages_free < server.pool().pages, "they run")
    for call in calls:
        call.cancel()
    server.idle()


def test_a_deadline_ends_the_work(server):
    server.idle()
    with refused(grpc.StatusCode.DEADLINE_EXCEEDED):
        generate(server, timeout=0.5, text=PROMPT, ignore_eos=True, stop_ids=[])
        generate(server, timeout=0.01, text=PROMPT, ignore_eos=True)  # a fast machine reached the context
    server.idle()


def test_a_slow_reader_stalls_nobody_else(server):
    server.idle()
    slow = e2e.Client(server.address, **{"grpc.http2.lookahead_bytes": 1, "grpc.http2.bdp_probe": 0})
    call = slow.stream(request(text=PROMPT, max_tokens=1900, ignore_eos=True, logprobs=True, top_logprobs=20))
    stream = iter(call)
    tokens = len(next(stream).token_ids)

    def stalled():
        before = server.pool()
        time.sleep(0.3)
        after = server.pool()
        return after.running == 1 and after.steps == before.steps
    e2e.until(stalled, "it waits for its reader")
    for _ in range(3):
        assert len(generate(server, **GREEDY, max_tokens=20).ids) == 20
    assert server.pool().running >= 1, "it still waits"
    tokens += sum(len(response.token_ids) for response in stream)
    assert tokens == 1900, "it waited, and lost nothing"
    slow.close()
    server.idle()


# --- many at once ---

def test_sixteen_at_once_are_as_one_alone(server):
    prompts = [PROMPT[:5 + 3 * i] for i in range(16)]
    alone = [generate(server, text=p, temperature=0, max_tokens=24).ids for p in prompts]
    together = [None] * 16

    def ask(i):
        together[i] = generate(server, text=prompts[i], temperature=0, max_tokens=24).ids
    threads = [threading.Thread(target=ask, args=(i,)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone


def test_more_than_fit_wait_their_turn(server):
    answers = []

    def ask(seed):
        answers.append(generate(server, text=PROMPT, seed=seed, max_tokens=12, n=2))
    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(20)]  # 40 sequences in 16 slots
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 20 and all(len(c.ids) == 12 or c.finish == "stop" for a in answers for c in a.choices)
    server.idle()


if __name__ == "__main__":
    e2e.main(globals(), model=e2e.small_model(context=2048), workers=2,
             coordinator=["--max-sequences", 16, "--context", 2048])
