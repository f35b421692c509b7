"""Settings under which guesses must change no token, and what a room says and counts."""

from dataclasses import replace

from twostroke.core.request import SamplingParams

GREEDY = SamplingParams(max_tokens=30, temperature=0.0, ignore_eos=True)
SAMPLED = replace(GREEDY, temperature=0.9, seed=11)
SETTINGS = {
    "greedy": GREEDY,
    "greedy that ends by itself": replace(GREEDY, ignore_eos=False, logit_bias=((1, 4.0),)),
    "sampled": SAMPLED,
    "filtered": replace(SAMPLED, top_p=0.9, top_k=20, min_p=0.01),
    "penalised": replace(SAMPLED, repetition_penalty=1.3, frequency_penalty=0.5, presence_penalty=0.7),
    "biased": replace(SAMPLED, logit_bias=((40, 6.0), (41, -100.0), (1, 4.0)), ignore_eos=False),
    "bad words": replace(GREEDY, bad_words=((40, 40), (77,), (12, 13, 14))),
    "no end before": replace(SAMPLED, min_tokens=9, ignore_eos=False, logit_bias=((1, 5.0),)),
    "stop ids": replace(SAMPLED, stop_token_ids=(20, 21, 22, 23, 24, 25), min_tokens=3),
    "logprobs": replace(GREEDY, logprobs=4, prompt_logprobs=2),
    "short": replace(GREEDY, max_tokens=3),
}


def told(room, name):
    """What a room said of a request: tokens, logprobs, logprobs of its prompt, and why it ended."""
    return room.tokens.get(name), room.logprobs.get(name), room.prompt_logprobs.get(name), room.ended[name].reason


def counted(room, what):
    """A counter of speculation: "draft_tokens" or "accepted_tokens"."""
    return room.core.counters[f"spec_decode_num_{what}"]
