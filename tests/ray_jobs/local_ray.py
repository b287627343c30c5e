"""The local cluster that tests of a module share, as `ray_jobs.session` starts one, with room for more workers than CPUs."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import ray

from ray_jobs.session import LOCAL_ENVIRONMENT


@contextmanager
def local_ray(*, num_cpus: int = 4, store_bytes: int = 150 * 2**20) -> Iterator[None]:
    """Start it, and end it with the block."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")  # as every job sets it
        ray.init(
            "local",
            num_cpus=num_cpus,
            include_dashboard=False,
            log_to_driver=False,
            object_store_memory=store_bytes,
            runtime_env={"env_vars": LOCAL_ENVIRONMENT},
        )
        try:
            yield
        finally:
            ray.shutdown()
