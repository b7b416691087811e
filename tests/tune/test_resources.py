"""What a trial takes, and how many fit."""

import pytest

from rcnn.config import PipelineConfig
from rcnn.data.manifest import Manifest, require_manifest
from rcnn.results import IngestResult
from rcnn.storage import Storage
from rcnn.train.checkpoint import build_classifier
from rcnn.tune.resources import PROCESS_BYTES, largest_points, memory_of_trial, room_for_trials, saved_bytes_per_image


@pytest.fixture
def manifest(tiny_config: PipelineConfig, digits: IngestResult) -> Manifest:
    return require_manifest(Storage(tiny_config.storage), digits.folder)


def test_the_scarcest_resource_limits_the_number_of_trials(tiny_config: PipelineConfig, manifest: Manifest) -> None:
    small, large = {"CPU": 2.0, "memory": 3e9}, {"CPU": 64.0, "memory": 11e9, "GPU": 4.0}
    room = room_for_trials(tiny_config, manifest, [small, large])
    assert room.num_trials == 2 + 11
    assert room.reason.startswith("13 at a time, limited by memory; a trial takes up to 1.0 GB")
    assert room_for_trials(tiny_config, manifest, [small]).reason.startswith("2 at a time, limited by CPU cores")
    on_gpus = tiny_config.with_settings({"tune.gpus_per_trial": 0.5})
    assert room_for_trials(on_gpus, manifest, [small, large]).num_trials == 8
    two_workers = on_gpus.with_settings({"tune.workers_per_trial": 2})
    assert room_for_trials(two_workers, manifest, [small, large]).num_trials == 4
    capped = tiny_config.with_settings({"tune.max_concurrent_trials": 1})
    assert "1 at a time, limited by tune.max_concurrent_trials" in room_for_trials(capped, manifest, [large]).reason


def test_one_trial_starts_where_no_node_has_its_memory(tiny_config: PipelineConfig, manifest: Manifest) -> None:
    room = room_for_trials(tiny_config, manifest, [{"CPU": 2.0, "memory": 0.5e9}])
    assert (room.num_trials, room.memory_bytes) == (1, 500_000_000)
    assert "no node has that much: 0.5 GB" in room.reason


@pytest.mark.long
def test_memory_grows_with_the_largest_point_and_the_batch(tiny_config: PipelineConfig, manifest: Manifest) -> None:
    needed = memory_of_trial(tiny_config, manifest)
    wider = tiny_config.with_settings({"tune.space": {"model.k": [8, 256], "model.t": [0, 1]}})
    large_batch = tiny_config.with_settings({"train.batch_size": 160})
    assert PROCESS_BYTES < needed < memory_of_trial(large_batch, manifest) < memory_of_trial(wider, manifest)


@pytest.mark.long
def test_memory_is_that_of_the_largest_network_whatever_the_order(
    tiny_config: PipelineConfig, manifest: Manifest
) -> None:
    def needed(*networks: str) -> int:
        space = {"model.network": networks, "model.k": [8, 64], "train.learning_rate": [0.01, 0.02]}
        return memory_of_trial(tiny_config.with_settings({"model.t": 3, "tune.space": space}), manifest)

    assert needed("wide") < needed("rcnn")
    assert needed("rcnn", "wide") == needed("wide", "rcnn") == needed("rcnn")


def test_a_fine_range_gives_its_largest_value(tiny_config: PipelineConfig) -> None:
    space = {"model.dropout": {"min": 0, "max": 0.5, "step": 1e-9}, "model.k": {"min": 4, "max": 9, "step": 2}}
    [point] = largest_points(tiny_config.with_settings({"tune.space": space}))
    assert point.root == {"model.dropout": 0.5, "model.k": 8}


def test_what_a_pass_keeps_is_counted_once_per_image(tiny_config: PipelineConfig, manifest: Manifest) -> None:
    network = build_classifier(tiny_config.with_settings({"model.network": "rcnn", "model.dropout": 0}), manifest)
    two, six = (saved_bytes_per_image(network, (28, 28, 1), num_images=number) for number in (2, 6))
    first_maps = 4 * 8 * 28 * 28  # bytes of the first layer's output
    assert two > first_maps
    assert six == pytest.approx(two, rel=0.05)
