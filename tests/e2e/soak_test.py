#!/usr/bin/python3
"""A busy server, disorderly clients, workers that die: every call ends, with an answer that is right or a status that
fits, and afterwards everything is given back."""
import random
import threading
import time

import strata_e2e as e2e
from strata_e2e import Server, generate, grpc, pb, request

SECONDS = 6
CLIENTS = 8
PROMPTS = ["The quick brown fox", "Once upon a time " * 20, "def f(x):", "1 2 3"]
FITTING = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED}


def disorderly(server, seed, expected, stop, complaints, counts):
    draw = random.Random(seed)
    while not stop.is_set():
        index = draw.randrange(len(PROMPTS))
        kind = draw.choice(["whole", "whole", "cancel", "deadline", "choices", "scores", "stop"])
        try:
            if kind == "cancel":
                call = server.client.stream(request(text=PROMPTS[index], max_tokens=400, ignore_eos=True))
                for _ in range(draw.randrange(4)):
                    next(call)
                call.cancel()
            elif kind == "deadline":
                generate(server, timeout=draw.random() * 0.2, text=PROMPTS[index], max_tokens=400, ignore_eos=True)
            elif kind == "choices":
                assert len(generate(server, text=PROMPTS[index], n=3, max_tokens=8, ignore_eos=True).choices) == 3
            elif kind == "scores":
                scores = generate(server, text=PROMPTS[index], max_tokens=2, prompt_logprobs=True).prompt_logprobs
                assert scores[0].unscored and not any(s.unscored for s in scores[1:])
            elif kind == "stop":
                assert "e" not in generate(server, text=PROMPTS[index], max_tokens=30, stop=["e"]).text
            else:
                ids = generate(server, text=PROMPTS[index], temperature=0, max_tokens=20, ignore_eos=True).ids
                assert ids == expected[index], f"{index}: {ids}"
            counts["well"] += 1
        except grpc.RpcError as error:
            if error.code() not in FITTING:
                complaints.append(f"{kind}: {error.code()}: {error.details()}")
            counts["ended"] += 1
            time.sleep(0.02)  # the pool may be gone
        except Exception as error:  # noqa: whatever it is, it is reported
            complaints.append(f"{kind}: {type(error).__name__}: {error}")


def test_disorder():
    with Server(e2e.small_model(), workers=3, coordinator=["--max-sequences", 8, "--kv-pages", 80]) as server:
        expected = [generate(server, text=text, temperature=0, max_tokens=20, ignore_eos=True).ids for text in PROMPTS]
        stop, complaints, counts = threading.Event(), [], {"well": 0, "ended": 0}
        clients = [threading.Thread(target=disorderly, args=(server, seed, expected, stop, complaints, counts))
                   for seed in range(CLIENTS)]
        for client in clients:
            client.start()
        draw = random.Random(99)
        for _ in range(3):
            time.sleep(SECONDS / 3)
            victim = draw.randrange(3)
            server.workers[victim].kill()
            server.workers[victim].wait()
            server.start_worker(victim)
        server.wait_ready()
        time.sleep(SECONDS / 3)
        stop.set()
        for client in clients:
            client.join(120 * e2e.SLOW)
            assert not client.is_alive(), "a call never ended"
        assert not complaints, complaints[:5]
        assert counts["well"] > 20, counts
        server.idle()
        for text, ids in zip(PROMPTS, expected):
            assert generate(server, text=text, temperature=0, max_tokens=20, ignore_eos=True).ids == ids


if __name__ == "__main__":
    e2e.main(globals())
