"""All mutants: changes that somebody could make by accident in files that decide, and in their drivers."""

from __future__ import annotations

import planted_adapters
import planted_adoption
import planted_api
import planted_certificates
import planted_dialects
import planted_codecs
import planted_discovery
import planted_doors
import planted_draft_model
import planted_engine
import planted_fetching
import planted_gpu
import planted_handover
import planted_int4
import planted_kv
import planted_models
import planted_pairs
import planted_responses
import planted_router
import planted_scaling
import planted_sizes
import planted_speculation
import planted_states
import planted_windows
import planted_workers

_MACHINES = (
    "tests/kv/test_handover_scenarios.py",
    "tests/decode_worker/test_pull.py",
    "tests/prefill_worker/test_prefill_task.py",
)
_ENGINE = ("tests/engine/test_engine_core.py", "tests/engine/test_scheduler_scenarios.py")
_SESSION = (
    "tests/decode_worker/test_ledger.py",
    "tests/worker/test_worker_session.py",
    "tests/worker/test_resume.py",
)
_PURE = (
    "tests/router/requests/test_lifecycle.py",
    "tests/router/requests/test_resume.py",
    "tests/router/requests/test_full_workers.py",
    "tests/router/requests/test_lost_workers.py",
    "tests/router/routing/test_scenarios.py",
    "tests/router/routing/test_pure.py",
)
_FLOW = (
    "tests/router/requests/test_flow.py",
    "tests/router/workers/test_links.py",
    "tests/router/workers/test_strangers.py",
)

# Of the first beginning that fits: the most specific and quickest files first.
TESTS: dict[str, tuple[str, ...]] = {
    "kv/handover/carrier": (
        "tests/kv/test_carrier.py",
        *_MACHINES,
        "tests/prefill_worker/test_service.py",
        "tests/worker/test_worker_handover.py",
    ),
    "kv/handover/driver": (
        "tests/kv/test_carrier.py",
        *_MACHINES,
        "tests/prefill_worker/test_service.py",
        "tests/worker/test_worker_handover.py",
    ),
    "kv/handover/frames": ("tests/kv/test_wire.py", "tests/decode_worker/test_pull.py"),
    "kv/handover/transports/paired_end": ("tests/kv/test_paired_end.py",),
    "kv/handover/fetching": ("tests/kv/test_fetching.py",),
    "kv/handover/damage": (*_MACHINES, "tests/kv/test_handover_pair.py", "tests/kv/test_wire.py"),
    "kv/handover/pairing": ("tests/kv/test_pairing.py",),
    "kv/codec": ("tests/kv/test_codec.py", "tests/kv/test_byte_codecs.py"),
    "kernels/reference_codecs": ("tests/kv/test_byte_codecs.py",),
    "kv/spec": ("tests/kv/test_codec_choice.py",),
    "engine/guard/": ("tests/engine/test_codec_guard.py",),
    "model/codec_guard": ("tests/model/test_codec_guard.py",),
    "kv/handover/": (*_MACHINES, "tests/kv/test_handover_pair.py"),
    "kv/digest": ("tests/kv/test_digest.py", "tests/kv/test_wire.py"),
    "kv/windows": ("tests/kv/test_windows.py",),
    "kv/store/store": (
        "tests/kv/test_store.py",
        "tests/kv/test_seal_in_place.py",
        "tests/kv/test_host_store.py",
        "tests/kv/test_store_windows.py",
    ),
    "kv/store/host_store": ("tests/kv/test_host_store.py",),
    "kv/cache/residency": ("tests/kv/test_residency.py",),
    "kv/cache/states": ("tests/engine/test_states.py", "tests/engine/test_engine_lives.py"),
    "kv/block": ("tests/kv/test_identities.py",),
    "kv/keys": ("tests/kv/test_identities.py", "tests/core/test_proof.py"),
    "kv/sizing": ("tests/cluster/test_placement.py",),
    "kv/slices": ("tests/worker/test_rank_work.py",),
    "kv/": ("tests/kv/test_pool.py", "tests/kv/test_prefix.py"),
    **dict.fromkeys(
        ("checkpoint/int4", "checkpoint/layout", "checkpoint/sizes", "model/weights/quantised/int4", "model/ops/int4"),
        ("tests/model/test_int4_checkpoints.py", "tests/model/test_int4_ops.py"),
    ),
    "checkpoint/adapters/": ("tests/checkpoint/test_adapters.py",),
    "checkpoint/safetensors_files": ("tests/checkpoint/test_adapters.py",),
    "worker/adapters": ("tests/worker/test_adapters.py",),
    "checkpoint/stacked": ("tests/checkpoint/test_family_configs.py", "tests/model/test_quantised_checkpoints.py"),
    "checkpoint/quantised/mxfp4": (
        "tests/checkpoint/test_quantised_plan.py",
        "tests/model/test_quantised_checkpoints.py",
    ),
    "checkpoint/cuts": ("tests/model/test_rank_source.py", "tests/model/test_quantised_checkpoints.py"),
    "checkpoint/gguf/special_ids": ("tests/text/test_gguf_tokenizer.py",),
    "engine/adapters": ("tests/engine/test_adapters.py",),
    "model/ops/native_changes": ("tests/model/test_adapters.py",),
    "model/ops/low_rank": ("tests/model/test_adapters.py",),
    "model/ops/torch_attention": ("tests/model/test_native_ops.py",),
    "model/ops/": ("tests/model/test_quantised_checkpoints.py",),
    "model/quantise/float4": ("tests/model/test_float4.py",),
    "model/weights/": ("tests/model/test_quantised_checkpoints.py",),
    "model/decoder/": ("tests/model/test_quantised_checkpoints.py",),
    "model/adapters/": ("tests/model/test_adapters.py",),
    "router/workers/loaded_adapters": ("tests/router/workers/test_loaded_adapters.py",),
    "router/routing/fleet": (*_PURE, "tests/router/routing/test_adapters.py"),
    "engine/policy": (
        "tests/prefill_worker/test_prefill_policy.py",
        "tests/decode_worker/test_decode_policy.py",
        *_ENGINE,
    ),
    "engine/step_times": ("tests/engine/test_step_times.py",),
    "engine/speculation/draft_model/": ("tests/engine/test_draft_model.py",),
    "engine/speculation/": ("tests/engine/test_speculation.py", "tests/engine/test_draft_model.py"),
    "model/drafter": ("tests/engine/test_draft_model_engine.py",),
    "text/same_tokens": ("tests/text/test_same_tokens.py",),
    "engine/lifecycle": (*_ENGINE, "tests/engine/test_speculation_engine.py", "tests/engine/test_grammar_engine.py"),
    "engine/core": (*_ENGINE, "tests/engine/test_speculation_engine.py", "tests/engine/test_grammar_engine.py"),
    "model/runner": ("tests/engine/test_speculation_engine.py",),
    "model/sampling/masks": ("tests/model/test_grammar_masks.py",),
    "model/sampling/step": (
        "tests/engine/test_grammar_engine.py",
        "tests/engine/test_speculation_engine.py",
        "tests/engine/test_sampling_engine.py",
    ),
    "engine/link/plan_stream": ("tests/engine/test_plan_stream.py",),
    "engine/link/steady": ("tests/engine/test_plan_stream.py",),
    "engine/link/rank_link": ("tests/engine/test_rank_link.py",),
    "worker/rank_work": ("tests/worker/test_rank_work.py",),
    "engine/link/client": ("tests/engine/test_client.py", "tests/engine/test_thread_link.py"),
    "engine/loop": ("tests/engine/test_engine.py", "tests/model/test_codec_guard.py"),
    "engine/turn": ("tests/engine/test_turn.py", *_ENGINE, "tests/engine/test_swap.py"),
    "engine/swap": (*_ENGINE, "tests/engine/test_swap.py"),
    "engine/integrity": (*_ENGINE, "tests/engine/test_engine_lives.py"),
    "engine/cache_manager": (
        *_ENGINE,
        "tests/engine/test_cache_manager.py",
        "tests/engine/test_states.py",
        "tests/engine/test_draft_model.py",
        "tests/engine/test_window_lives.py",
    ),
    "engine/scheduler": (*_ENGINE, "tests/engine/test_fairness.py", "tests/engine/test_states.py"),
    "engine/states": ("tests/engine/test_states.py", "tests/engine/test_engine_lives.py"),
    "engine/report": ("tests/engine/test_report.py",),
    "engine/sequence": ("tests/engine/test_report.py", *_ENGINE),
    "engine/": (*_ENGINE, "tests/engine/test_fairness.py", "tests/engine/test_window_lives.py"),
    "decode_worker/choice": ("tests/decode_worker/test_choice.py",),
    "decode_worker/outbox": ("tests/decode_worker/test_outbox.py",),
    "decode_worker/pairs": ("tests/worker/test_paired_workers.py",),
    "prefill_worker/pairs": ("tests/worker/test_paired_workers.py",),
    "decode_worker/pull": (
        "tests/decode_worker/test_pull.py",
        "tests/decode_worker/test_task.py",
        "tests/worker/test_worker_handover.py",
        "tests/worker/test_paired_workers.py",
    ),
    "decode_worker/router_session": ("tests/decode_worker/test_router_session.py", *_SESSION),
    "decode_worker/messages": ("tests/decode_worker/test_task.py", *_SESSION, "tests/worker/test_fetching.py"),
    "decode_worker/task": ("tests/decode_worker/test_task.py", *_SESSION, "tests/worker/test_fetching.py"),
    "decode_worker/journaling": ("tests/decode_worker/test_journaling.py",),
    "decode_worker/buddy_calls": ("tests/decode_worker/test_journaling.py",),
    "decode_worker/journal": ("tests/decode_worker/test_journal.py",),
    "decode_worker/sources": ("tests/decode_worker/test_sources.py",),
    "decode_worker/fetch": ("tests/decode_worker/test_fetch.py", "tests/worker/test_fetching.py"),
    "decode_worker/": (*_SESSION, "tests/worker/test_worker_handover.py", "tests/worker/test_worker_faults.py"),
    "prefill_worker/": (
        "tests/prefill_worker/test_prefill_task.py",
        "tests/prefill_worker/test_service.py",
        "tests/worker/test_worker_handover.py",
        "tests/worker/test_worker_faults.py",
        "tests/worker/test_paired_workers.py",
    ),
    "router/routing/known_worker": ("tests/router/routing/test_stall.py", *_PURE),
    "router/routing/prefixes": ("tests/router/routing/test_prefixes.py", *_PURE),
    "router/requests/dispatch": (*_FLOW, "tests/router/requests/test_flow_lives.py"),
    "router/workers/registry": (
        *_FLOW,
        "tests/router/routing/test_metrics.py",
        "tests/router/requests/test_flow_lives.py",
    ),
    "router/requests/flow": (*_FLOW, "tests/router/requests/test_flow_lives.py"),
    "router/workers/links": (*_FLOW, "tests/router/requests/test_flow_lives.py"),
    "router/routing/buddies": ("tests/router/routing/test_buddies.py",),
    "router/routing/policy": (*_PURE, "tests/router/routing/test_fetches.py"),
    "router/routing/costs": (*_PURE, "tests/router/routing/test_fetches.py"),
    "router/routing/candidates": _PURE,
    "router/routing/recorded": (
        "tests/router/routing/test_fetches.py",
        "tests/router/routing/test_recorded.py",
    ),
    "router/requests/explain": ("tests/router/requests/test_explained.py",),
    "router/requests/history": ("tests/router/requests/test_history.py", "tests/sim/replay/test_decisions.py"),
    "router/api/grpc/guard": ("tests/router/api/test_guard.py", "tests/router/api/http/test_connections.py"),
    "router/api/grpc/message_bounds": ("tests/router/api/test_message_bounds.py",),
    "router/api/http/structure": ("tests/router/api/http/test_structure.py",),
    "router/api/http/reading": ("tests/router/api/http/test_reading.py", "tests/router/api/http/test_body_room.py"),
    "router/api/http/bodies": (
        "tests/router/api/http/test_bodies.py",
        "tests/router/api/http/test_body_room.py",
        "tests/router/api/http/test_http_doors.py",
    ),
    "router/api/http/connection": (
        "tests/router/api/http/test_connections.py",
        "tests/router/api/http/test_selector.py",
    ),
    "router/api/http/selector": ("tests/router/api/http/test_selector.py",),
    "router/api/http/browser": ("tests/router/api/http/test_browser.py", "tests/router/api/http/test_http_doors.py"),
    "router/api/validate": (
        "tests/router/api/test_validate.py",
        "tests/router/api/test_defaults.py",
        "tests/router/api/test_messages.py",
        "tests/router/api/test_body_fields.py",
        "tests/router/api/test_underload.py",
    ),
    "router/api/http/sse": ("tests/router/api/http/test_sse.py",),
    "router/api/frontend": ("tests/router/api/test_frontend.py", "tests/router/api/test_underload.py"),
    "router/api/grammar_checks": ("tests/router/api/test_grammar_checks.py",),
    "router/api/checks": ("tests/router/api/test_validate.py",),
    "router/journal/redis_store": (
        "tests/router/test_redis_writes.py",
        "tests/router/test_adoption.py",
        "tests/router/test_stored_responses.py",
    ),
    "router/api/batch": ("tests/router/api/test_batch.py",),
    "router/routing/lost_workers": ("tests/router/requests/test_lost_workers.py",),
    "router/api/dialects/responses/": (
        "tests/router/api/dialects/test_response_items.py",
        "tests/router/api/dialects/test_responses.py",
        "tests/router/test_stored_responses.py",
    ),
    "router/api/dialects/": (
        "tests/router/api/dialects/test_translations.py",
        "tests/router/api/dialects/test_dialects.py",
    ),
    "router/api/grpc/call_wire": ("tests/router/api/test_grpc_priority.py",),
    "router/api/kserve/": ("tests/router/api/dialects/test_kserve.py",),
    "router/journal/": ("tests/router/test_journal.py", "tests/router/test_stored_responses.py"),
    "router/": (*_PURE, "tests/router/requests/test_flow.py"),
    "core/call_reaper": ("tests/core/test_call_reaper.py", "tests/router/api/test_guard.py"),
    "core/probes": ("tests/core/test_call_reaper.py", "tests/router/api/test_guard.py"),
    "core/hosted": ("tests/core/test_hosted.py",),
    "worker/main": ("tests/worker/test_worker_process.py",),
    "cluster/launch/last_words": ("tests/cluster/test_last_words.py",),
    "core/proof": ("tests/core/test_proof.py",),
    "core/tls/rotating": ("tests/worker/test_scrape.py",),
    "core/tls/face": ("tests/router/api/http/test_tls.py",),
    "core/tls/": ("tests/core/test_tls.py", "tests/cluster/test_tls_doors.py"),
    "core/": ("tests/cluster/test_inner_doors.py", "tests/router/workers/test_strangers.py"),
    "text/stop": ("tests/text/test_special_stop.py", "tests/text/test_shown.py", "tests/text/test_incremental.py"),
    "text/stream": (
        "tests/text/test_special_stop.py",
        "tests/text/test_shown.py",
        "tests/decode_worker/test_choice.py",
    ),
    "text/tokenizer": ("tests/text/test_tokenizer.py",),
    "text/parsing/call_forms": ("tests/text/parsing/test_call_grammar.py",),
    "text/parsing/": ("tests/text/parsing/test_parser.py", "tests/text/parsing/test_recorded_outputs.py"),
    "text/": ("tests/text/test_incremental.py", "tests/text/test_behind_prompt.py"),
    "cluster/deployment/processes": ("tests/cluster/deployment/test_processes.py",),
    "cluster/deployment/": ("tests/cluster/deployment/test_adoption.py",),
    "cluster/discovery/endpoint_slices": ("tests/cluster/discovery/test_endpoint_slices.py",),
    "cluster/discovery/names": ("tests/cluster/discovery/test_names.py",),
    "cluster/discovery/": ("tests/cluster/discovery/test_slices.py", "tests/cluster/discovery/test_watching.py"),
    "cluster/kubernetes/": (
        "tests/cluster/kubernetes/test_lease.py",
        "tests/cluster/kubernetes/test_owed.py",
        "tests/cluster/kubernetes/test_pods.py",
        "tests/cluster/kubernetes/test_arm.py",
    ),
    "cluster/devices": ("tests/cluster/test_devices.py",),
    "cluster/fit": ("tests/cluster/test_fit.py",),
    "worker/automatic": ("tests/cluster/test_placement.py",),
    "cluster/planner/": ("tests/cluster/planner/test_law.py",),
    "cluster/operations/room": ("tests/cluster/operations/test_room.py", "tests/cluster/test_nodes.py"),
    "cluster/operations/scaler": ("tests/cluster/operations/test_scaler_turns.py",),
    "cluster/placement": ("tests/cluster/test_nodes.py",),
    "cluster/wanted": ("tests/cluster/test_wanted.py",),
    "cluster/operations/rolling": ("tests/cluster/operations/test_rolling.py",),
    "cluster/restarts": ("tests/cluster/test_restarts.py",),
    "cluster/members": ("tests/cluster/test_members.py",),
    "cluster/supervisor": ("tests/cluster/test_supervisor.py", "tests/cluster/test_drained.py"),
    "worker/blocks/keep": (
        "tests/worker/test_why_not_kept.py",
        "tests/worker/test_keeping.py",
        "tests/worker/test_copies.py",
    ),
    "worker/blocks/copies": ("tests/worker/test_copies.py", "tests/worker/test_keeping.py"),
    "worker/blocks/departure": ("tests/worker/test_departure.py",),
    "worker/blocks/departing": ("tests/worker/test_fetch_answers.py", "tests/worker/test_fetching.py"),
    "worker/watch": ("tests/worker/test_watchers.py", "tests/worker/test_worker_watch.py"),
    "worker/announcer": (
        "tests/worker/test_announcer.py",
        "tests/cluster/discovery/test_endpoint_slices.py",
        "tests/worker/test_worker_watch.py",
    ),
    "worker/gpu/nvml": ("tests/worker/gpu/test_nvml.py",),
    "worker/gpu/monitor": ("tests/worker/gpu/test_monitor.py",),
    "worker/gpu/visible": ("tests/worker/gpu/test_visible.py",),
    "worker/gpu/": ("tests/worker/gpu/test_verdict.py",),
    "worker/": ("tests/worker/test_fetch_answers.py", "tests/worker/test_worker_watch.py"),
}

MUTANTS = [
    *planted_kv.MUTANTS,
    *planted_handover.MUTANTS,
    *planted_engine.MUTANTS,
    *planted_workers.MUTANTS,
    *planted_router.MUTANTS,
    *planted_api.MUTANTS,
    *planted_adapters.MUTANTS,
    *planted_discovery.MUTANTS,
    *planted_doors.MUTANTS,
    *planted_responses.MUTANTS,
    *planted_gpu.MUTANTS,
    *planted_sizes.MUTANTS,
    *planted_certificates.MUTANTS,
    *planted_scaling.MUTANTS,
    *planted_adoption.MUTANTS,
    *planted_speculation.MUTANTS,
    *planted_draft_model.MUTANTS,
    *planted_models.MUTANTS,
    *planted_states.MUTANTS,
    *planted_windows.MUTANTS,
    *planted_pairs.MUTANTS,
    *planted_dialects.MUTANTS,
    *planted_fetching.MUTANTS,
    *planted_int4.MUTANTS,
    *planted_codecs.MUTANTS,
]
