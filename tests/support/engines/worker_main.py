"""A worker with the tiny model in a process of its own."""

import textwrap

from twostroke.checkpoint.config import ModelConfig
from twostroke.core.request import Role
from twostroke.worker.settings import WorkerSettings

MAIN = textwrap.dedent("""
    import gc, logging, sys
    logging.basicConfig(level=logging.INFO, stream=sys.stdout)
    from twostroke.worker.settings import WorkerSettings
    from twostroke.worker.main import run_worker
    run_worker(WorkerSettings.model_validate_json(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else None)
    print("threads switch after", sys.getswitchinterval())
    print("never scanned again:", gc.get_freeze_count())
""")


def settings_for(checkpoint, **changes):
    return WorkerSettings(
        worker_id="w",
        role=changes.pop("role", Role.COMBINED),
        model_directory=str(checkpoint),
        model_name="tiny",
        model=ModelConfig(path=str(checkpoint), **changes.pop("model", {})),
        cluster_key="a key of the tests",
        drain_timeout_s=changes.pop("drain_timeout_s", 5.0),
        **changes,
    )
