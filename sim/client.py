"""A simulated client: sends a request, cancels it, sends it again, and checks every token that it gets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from ..core.errors import TwostrokeError
from ..core.request import FinishReason, Request
from ..decode_worker.choice import ChoiceText
from ..router.requests.pieces import OutputDelta
from .invariants import Samples, Violation
from .network import End, Network
from .router import RouterNode
from .setting import Order, Setting
from .workers.cells import cells_after, domain_cell
from .workers.facts import MODEL
from .workers.store import undisturbed
from .world import Process, World

EXPECTED_ENDS = ("finished", "cancelled", "overloaded", "invalid_value")  # the last: its id is still in use
KILLERS_ENDS = ("poison_request", "cancelled", "overloaded")
SLACK_S = 2.0  # for messages under way, steps under way, and ticks


class Stream:
    """Tokens of one choice received so far."""

    def __init__(self, cell: int, text: ChoiceText) -> None:
        self.tokens: list[int] = []
        self.cell = cell  # cell of the last token so far (of the prompt, at first)
        self.finish: FinishReason | None = None
        self.text = text  # of the same tokens, if no worker had failed


class Attempt:
    """One sending of a request. Ends once: finished, failed, broken or cancelled."""

    def __init__(self, client: Client, request: Request, end: End, router: RouterNode) -> None:
        cell = cells_after(domain_cell(request.isolation_domain), request.prompt_ids)[-1]
        self.request = request
        texts = [undisturbed(request.sampling, request.prompt_ids) for _ in range(request.num_choices)]
        self.streams = [Stream(cell, text) for text in texts]
        self.outcome: str | None = None
        self._client = client
        self._end = end
        self._router = router
        self._router_life = router.process.life if router.process.is_alive else None
        self._deadline = client.world.after(request.timeout_s + SLACK_S, client.process, self._overdue)
        end.on_message, end.on_end = self._hear, self._heard_end

    def is_of(self, router: RouterNode) -> bool:
        """Return whether this life of the router serves the attempt."""
        return router is self._router and router.process.is_alive

    def cancel(self) -> None:
        """Break the stream, as a user who closes the window does."""
        if self.outcome is None:
            self._end.abort()
            self._over("cancelled")

    def _hear(self, message: OutputDelta | TwostrokeError) -> None:
        if isinstance(message, TwostrokeError):
            self._over(message.code)
            return
        if self.outcome is not None:
            raise Violation("R1", f"{self._name}: a piece after the end ({self.outcome})")
        stream = self.streams[message.choice]
        if message.first_index != len(stream.tokens) or stream.finish is not None:
            raise Violation("R2", f"{self._name}: token {message.first_index} came, {len(stream.tokens)} were there")
        text = "".join([self._take(stream, message.choice, token_id) for token_id in message.token_ids])
        if message.finish_reason is not None:
            text += stream.text.flush()
            self._finish(stream, message.finish_reason)
        if message.text != text:
            raise Violation("R4", f"{self._name}: {message.text!r} came where {text!r} was next")
        if message.usage is not None:
            delivered = sum(len(s.tokens) for s in self.streams)
            if message.usage.completion_tokens != delivered:
                raise Violation("R5", f"{self._name}: usage {message.usage}, {delivered} tokens came")
        if all(s.finish is not None for s in self.streams):
            self._over("finished")

    def _take(self, stream: Stream, choice: int, token_id: int) -> str:
        """Check a token; returns its text."""
        if not self._client.samples.may_follow(token_id, stream.cell, self.request.sampling.seed, choice):
            place = len(stream.tokens)
            raise Violation("R3", f"{self._name}: nobody computed token {place} ({token_id}) from what came before it")
        stream.tokens.append(token_id)
        stream.cell = cells_after(stream.cell, (token_id,))[0]
        return stream.text.push(len(stream.tokens) - 1, (token_id,)).text

    def _finish(self, stream: Stream, reason: FinishReason) -> None:
        if reason is not stream.text.ended:
            raise Violation("R1", f"{self._name}: ended by {reason} after {len(stream.tokens)} tokens")
        stream.finish = reason

    def _heard_end(self) -> None:
        if self.outcome is None:
            if self._router.process.life == self._router_life:
                raise Violation("R1", f"{self._name}: the stream ended without an end")
            self._over("router lost")

    def _overdue(self) -> None:
        """Handle a missing end: only a router that died or stood still may be late."""
        if self.outcome is not None:
            return
        process = self._router.process
        if process.life == self._router_life and process.frozen_s == 0:
            raise Violation("R7", f"{self._name}: no end {SLACK_S} s after its deadline")
        self._end.abort()
        self._over("given up")

    def _over(self, outcome: str) -> None:
        if self.outcome is not None:
            raise Violation("R1", f"{self._name}: ended as {outcome}, had ended as {self.outcome}")
        self.outcome = outcome
        self._deadline.cancel()
        self._client.ended(self)

    @property
    def _name(self) -> str:
        return self.request.request_id


class Client:
    """One request and its attempts, under one id."""

    def __init__(self, world: World, network: Network, order: Order, setting: Setting, samples: Samples) -> None:
        self.world, self.network, self.samples = world, network, samples
        self.router_name = order.router
        self.process = Process(f"client-{order.router}-{order.domain}-{order.request_id}")
        self.router: Callable[[], RouterNode]
        self.outcomes: list[str] = []
        self.num_tokens = 0
        self.is_done = False
        self._order = order
        self._setting = setting
        self._current: Attempt | None = None
        world.after(order.at_s, self.process, self._ask)

    def _ask(self) -> None:
        order, router = self._order, self.router()
        sampling = order.sampling
        if sampling.seed and self.outcomes:
            # A request without a fixed seed gets another one at each attempt: a token of an earlier attempt is wrong.
            sampling = replace(sampling, seed=self.world.random.getrandbits(40))
        request = Request(
            order.request_id, MODEL, order.prompt_ids, sampling, order.num_choices, order.domain, order.timeout_s
        )
        self.world.note(self.process, f"asks for {sampling.max_tokens} after {len(order.prompt_ids)} tokens")
        near, far = self.network.connect(self.process, router.process, order.request_id, is_calm=True)
        far.on_message = lambda asked: router.generate(far, asked)
        attempt = self._current = Attempt(self, request, near, router)
        if order.cancel_after_s is not None and not self.outcomes:
            self.world.after(order.cancel_after_s, self.process, attempt.cancel)
        near.send(request)

    def ended(self, attempt: Attempt) -> None:
        """Ask again under the same id, or be done."""
        outcome = attempt.outcome or ""
        self.world.note(self.process, f"{outcome} after {[len(s.tokens) for s in attempt.streams]} tokens")
        self.outcomes.append(outcome)
        expected = EXPECTED_ENDS if not self._order.kills else KILLERS_ENDS
        if self._setting.is_bearable and outcome not in expected:
            raise Violation("L1", f"{self._order.request_id} ended as {outcome}, and nothing was in its way")
        self._check_known(attempt)
        self.num_tokens += sum(len(s.tokens) for s in attempt.streams)
        if outcome == "finished" or len(self.outcomes) >= self._order.attempts:
            self.is_done = True
            return
        self.world.after(self.world.random.random() * 0.1, self.process, self._ask)

    def _check_known(self, attempt: Attempt) -> None:
        """Check S1: request ids are separate per tenant, while requests run and afterwards."""
        request, router = attempt.request, self.router()
        if attempt.outcome == "invalid_value" and len(self.outcomes) == 1:
            raise Violation("S1", f"{request.request_id} of {request.owner} is in use by another tenant")
        if not attempt.is_of(router):
            return
        known = router.explain(request.owner, request.request_id)
        if known is None:
            if attempt.outcome == "finished":
                raise Violation("S1", f"nothing is known of {request.request_id} of {request.owner}")
        elif (known["tenant"], known["tokens"]["prompt"]) != (request.owner, len(request.prompt_ids)):
            raise Violation("S1", f"{request.owner} asked about {request.request_id} and heard of another's")
