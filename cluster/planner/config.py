"""Settings of the planner: targets, bounds, times."""

from __future__ import annotations

from pydantic import Field, model_validator

from ...core.config import Section


class PlannerConfig(Section):
    """Whether and how the numbers of prefill and decode workers follow the load. docs/planner.md has the formulas."""

    enabled: bool = Field(False, description="change roles and the number of workers by the load; off: as configured")
    interval_s: float = Field(1.0, ge=0.1, le=60, description="between two decisions")
    stale_after_s: float = Field(5.0, gt=0, description="an observation older than this leads to no action")
    ttft_target_ms: float = Field(2000.0, gt=0, description="time to the first token that prefill is sized for")
    ttft_attainment_fraction: float = Field(
        0.99, gt=0.5, lt=1, description="share of requests that shall meet ttft_target_ms"
    )
    itl_target_ms: float = Field(50.0, gt=0, description="time between tokens that decode is sized for")
    target_margin_fraction: float = Field(
        0.8, gt=0, le=1, description="share of both targets that is planned for; the rest is for what no rate shows"
    )
    kv_target_fraction: float = Field(0.8, gt=0, lt=1, description="share of decode's KV pools that may be in use")
    seats_target_fraction: float = Field(0.9, gt=0, le=1, description="share of decode's sequences per step in use")
    prefill_busy_fraction: float = Field(0.9, gt=0, lt=1, description="share of its time that prefill may compute")
    min_prefill_workers: int = Field(1, ge=1, le=1024, description="never fewer prefill workers")
    max_prefill_workers: int = Field(64, ge=1, le=1024, description="never more prefill workers")
    min_decode_workers: int = Field(1, ge=1, le=1024, description="never fewer decode workers")
    max_decode_workers: int = Field(64, ge=1, le=1024, description="never more decode workers")
    min_workers: int = Field(2, ge=2, le=1024, description="of both roles together")
    max_workers: int | None = Field(
        None, ge=2, le=1024, description="of both roles together; none: as many as are configured: only roles change"
    )
    new_nodes: bool = Field(
        False,
        description="on a Ray that is joined: workers beyond the devices of its present nodes wait for further nodes, "
        "which Ray's autoscaler is asked for; off: all workers share the present nodes",
    )
    start_up_s: float = Field(
        60.0, gt=0, description="from the start of a worker until it serves; loads are forecast so far"
    )
    start_timeout_s: float = Field(600.0, gt=0, description="a worker that does not serve by then counts as failed")
    role_cooldown_s: float = Field(5.0, ge=0, description="between two changes of roles")
    shrink_cooldown_s: float = Field(
        150.0, gt=0, description="the need must have been lower for so long before workers go; longer than start_up_s"
    )
    hysteresis_fraction: float = Field(
        0.1, ge=0, lt=1, description="a worker leaves its role only if the others can carry this much more load"
    )
    rate_window_s: float = Field(20.0, gt=0, description="memory of measured rates")
    trend_window_s: float = Field(120.0, gt=0, description="memory of their trend; longer than rate_window_s")
    drain_timeout_s: float = Field(
        900.0, gt=0, description="how long the streams of a worker that goes may run on before it counts as stuck"
    )
    log_decisions: int = Field(256, ge=1, le=65536, description="decisions kept in the log")

    @model_validator(mode="after")
    def _fits_together(self) -> PlannerConfig:
        """Refuse bounds that exclude each other, and cool-downs that a start-up outlasts."""
        for name in ("prefill", "decode"):
            least, most = getattr(self, f"min_{name}_workers"), getattr(self, f"max_{name}_workers")
            if least > most:
                raise ValueError(f"min_{name}_workers is {least} and max_{name}_workers {most}; give a range")
        least = max(self.min_workers, self.min_prefill_workers + self.min_decode_workers)
        if self.max_workers is not None and self.max_workers < least:
            raise ValueError(f"max_workers is {self.max_workers}; the other bounds want {least} workers at least")
        if self.shrink_cooldown_s <= self.start_up_s:
            raise ValueError(
                f"shrink_cooldown_s is {self.shrink_cooldown_s:g} and start_up_s {self.start_up_s:g}; a worker must "
                "not go sooner than another could come: give a longer cool-down"
            )
        if self.trend_window_s <= self.rate_window_s:
            raise ValueError(
                f"trend_window_s is {self.trend_window_s:g} and rate_window_s {self.rate_window_s:g}; the trend is "
                "the difference of the two: give it the longer memory"
            )
        return self
