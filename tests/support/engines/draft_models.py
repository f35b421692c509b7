"""Speculation by a draft model over real runners, for rooms whose steps are taken by hand."""

from twostroke.engine.speculation.draft_model.catch_up import CatchUp
from twostroke.engine.speculation.draft_model.holdings import DraftHoldings
from twostroke.engine.speculation.draft_model.planner import DraftBounds, DraftPlanner
from twostroke.engine.speculation.speculation import Speculation

CONTEXT, VOCABULARY = 1024, 160


def planner_of(num_blocks=64, *, block_tokens=16, chunk=64, context=CONTEXT, vocabulary=VOCABULARY, caches=True):
    """A planner whose chunks have at most `chunk` tokens."""
    catch_up = CatchUp(1.0)
    catch_up.tokens = chunk
    holdings = DraftHoldings(num_blocks, block_tokens, finds_prefixes=caches)
    return DraftPlanner(DraftBounds(context, vocabulary), holdings, catch_up)


def drafted(most=4, **sizes):
    """Speculation by a draft model; the room gives its planner a drafter."""
    return Speculation(planner_of(**sizes), most, "draft_model")
