"""One thread per process, no telemetry, no network: set before any library is imported."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import pytest
import torch

torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    """On several processes (`pytest -n 2 --dist loadgroup`) the tests of a file stay together, as
    do all files that start a Ray.
    """
    starts_ray = {item.path for item in items if item.get_closest_marker("ray")}
    for item in items:
        group = "ray" if item.path in starts_ray else str(item.path)
        item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture(scope="session")
def ray_head():
    """One Ray for the whole session, with room for every cluster of the tests."""
    import ray

    from rlhf.cluster.ray import connect

    connect(None, 8)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory):
    """A complete pipeline of tiny random parts on disk, its latent statistics not trivial."""
    from rlhf.models.tiny import random_pipeline

    folder = tmp_path_factory.mktemp("models") / "tiny"
    pipeline = random_pipeline()
    draw = torch.Generator().manual_seed(7)
    pipeline.vae.register_to_config(
        latents_mean=torch.randn(64, generator=draw).tolist(),
        latents_std=(0.5 + torch.rand(64, generator=draw)).tolist(),
    )
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_sd3(tmp_path_factory):
    """The same of Stable Diffusion 3."""
    from rlhf.models.tiny_sd3 import random_sd3_pipeline

    folder = tmp_path_factory.mktemp("models") / "tiny-sd3"
    random_sd3_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session", params=["tiny_base", "tiny_sd3"], ids=["qwen21", "sd3"])
def any_base(request):
    """Each model family in turn: what every policy promises is tested on all of them."""
    return request.getfixturevalue(request.param)
